/* rt.h: what the runtime's files and the generated entry.c share.
 *
 * entry.c includes this header, defines the model (below), then includes cpu.c, pool.c, model.c and selftest.c: one
 * translation unit with everything static, so that an artifact exports one symbol and any number of artifacts link
 * into one program. entry.c defines
 *
 *   RT_INSTANCE_BYTES   room for struct ingot_model at the start of an instance's memory
 *   RT_ARENA_BYTES      the intermediate tensors, right behind it
 *   RT_STATE_BYTES      each of the two halves of the state, behind the arena
 *   RT_INITIAL_STATE    if defined: where the first run's state lies in the weights, else it is zeros
 *   RT_INPUTS, RT_OUTPUTS
 *   RT_HAS_SELFTEST     1 if RT_SELFTEST_SEED, RT_SELFTEST_RUNS, rt_expected[RT_OUTPUTS] and rt_expected_data exist
 *   rt_info             names, shapes, target, sizes
 *   rt_counts           the outputs whose size depends on data, ended by output -1
 *   rt_weights          where the weights lie (a pointer, filled in by the dynamic loader)
 *   rt_choose           the rt_bucket of the caller's inputs, null if none fits, of which RT_SIZES tells
 */
#ifndef INGOT_RT_H
#define INGOT_RT_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1 /* sched_getaffinity, syscall */
#endif

#include "ingot.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/types.h>

/* Values that different threads write lie this far apart. */
#define RT_LINE INGOT_MEMORY_ALIGNMENT

/* Memory that is larger is asked to lie in pages of this size. */
#define RT_LARGE_PAGE ((size_t)2 << 20)

/* Memory of an instance, null if there is none. Large pages, where the kernel has them, cost fewer faults in the first
 * run, and time no longer depends on which cache lines small pages happen to share. What fills none stays in small ones. */
static inline void *rt_allocate(size_t bytes) {
    void *memory = NULL;
    const size_t large = bytes - bytes % RT_LARGE_PAGE;
    if (posix_memalign(&memory, large ? RT_LARGE_PAGE : RT_LINE, bytes) != 0) return NULL;
    if (large) madvise(memory, large, MADV_HUGEPAGE); /* a wish, which a kernel without them refuses */
    return memory;
}

struct rt_pool;

/* What a step works on. Kernels find their tensors at fixed offsets from these five. */
typedef struct rt_frame {
    const uint8_t *weights;
    uint8_t *arena;
    uint8_t *state[2]; /* what the run before has left, and what this one leaves */
    const ingot_tensor *inputs;
    const ingot_tensor *outputs;
    struct rt_pool *pool;
} rt_frame;

/* One kernel call: computes the parallel iterations [begin, end). */
typedef void rt_step(const rt_frame *frame, int32_t begin, int32_t end);

/* Runs step over [begin, end), in parallel where each thread gets at least `grain` iterations. (Inlined at every step it
 * would be most of a large model's code.) */
__attribute__((noinline)) static void ingot_parallel(const rt_frame *frame, rt_step *step, int32_t begin,
                                                     int32_t end, int32_t grain);

/* A value one thread waits for: it spins for a moment, then sleeps. */
typedef struct rt_gate {
    atomic_uint value;
    atomic_bool asleep;
    uint8_t vain; /* each spin in vain makes the next one shorter: it is halved so many times */
    pthread_mutex_t mutex;
    pthread_cond_t wake;
} rt_gate;

typedef struct rt_worker {
    _Alignas(RT_LINE) atomic_int next; /* the first iteration of its part that nobody has taken: in the gate's line */
    rt_gate go;                        /* its value is 1 from when a job is posted until one of the two takes it */
    pthread_t thread;
    struct rt_pool *pool;
} rt_worker;

typedef struct rt_pool {
    int32_t threads; /* the calling thread is one of them */
    int32_t started; /* workers that run, at most threads - 1 */
    pid_t pid;       /* the process they run in: a fork leaves none behind */
    bool spin;
    bool quit;
    /* The job: written by the caller before it opens the gates, read by the workers that take part. */
    rt_step *step;
    const rt_frame *frame;
    int32_t begin;
    int32_t extent;
    int32_t parts; /* one for each thread that takes part */
    int32_t grain; /* the fewest iterations worth a call */
    _Alignas(RT_LINE) atomic_int next; /* as of a worker, for the caller's part */
    rt_gate done;                      /* its value counts the workers that are not done */
    rt_worker workers[INGOT_MAX_THREADS - 1];
} rt_pool;

/* What the model expects and gives for one set of input shapes, and one inference then. */
typedef struct rt_bucket { const ingot_tensor_info *inputs, *outputs; void (*forward)(const rt_frame *); } rt_bucket;

/* An output's size along `axis` is the int64_t at `offset` in the half of the state that a run leaves. */
typedef struct rt_count { int32_t output, axis; uint64_t offset; } rt_count;

/* Every stride-th element of one output of the selftest, as stored behind rt_expected_data. */
typedef struct rt_expected_output {
    uint64_t offset; /* bytes */
    uint64_t count;
    uint64_t stride;
    double tolerance;
} rt_expected_output;

/* Writes a message (cut at a whole UTF-8 character) and returns status, so that callers can `return rt_fail(...)`. */
static ingot_status rt_fail(char *text, size_t size, ingot_status status, const char *format, ...)
    __attribute__((format(printf, 4, 5)));

static ingot_status rt_check_cpu(char *error, size_t error_size);
static int32_t rt_cpu_count(bool fast);
static bool rt_fits_fast(unsigned long *cpus, int32_t threads);
static ingot_status rt_pool_start(rt_pool *pool, int32_t threads, char *error, size_t error_size);
static void rt_pool_stop(rt_pool *pool);

#endif /* INGOT_RT_H */
