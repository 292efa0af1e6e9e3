/* pool.c: the threads of one model instance.
 *
 * The caller of `run` is thread 0; the others wait at their own gate. A job is one kernel, cut into contiguous equal
 * parts, one for each thread, which takes it piece by piece. A thread that has done its part takes pieces of the
 * others': a core that is slower, interrupted or asleep holds nobody up for longer than a piece. A piece is a share of
 * what is left, so the last ones, which the others wait for, are small (guided self-scheduling; Polychronopoulos and
 * Kuck, 1987). Who computes a piece does not change its bits. Nothing here allocates after rt_pool_start.
 */

#include <signal.h>
#include <time.h>

/* How long a waiting thread spins at first: longer than the gap between two kernels, shorter than a time slice. */
#define RT_SPIN_NS 100000

/* A piece is this share of what is left of its part, and at least a grain: each costs an atomic exchange and a call. */
#define RT_SHARE 8

/* Kernels keep at most a few KiB on the stack; a thread's static TLS and a signal frame with tiles must fit as well. */
#define RT_STACK_BYTES ((size_t)1 << 20)

static inline void rt_pause(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb" ::: "memory"); /* `yield` does nothing on most cores; this waits a few cycles */
#elif defined(__arm__)
    __asm__ volatile("yield" ::: "memory");
#elif defined(__riscv)
    __asm__ volatile(".4byte 0x0100000f" ::: "memory"); /* pause, a hint on cores without Zihintpause */
#endif
}

static int64_t rt_now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* ---- gates -------------------------------------------------------------------------------------------------- */

static bool rt_gate_init(rt_gate *gate) {
    atomic_init(&gate->value, 0), atomic_init(&gate->asleep, false), gate->vain = 0;
    return !pthread_mutex_init(&gate->mutex, NULL) && !pthread_cond_init(&gate->wake, NULL);
}

static void rt_gate_destroy(rt_gate *gate) {
    pthread_cond_destroy(&gate->wake), pthread_mutex_destroy(&gate->mutex);
}

static void rt_gate_wait(rt_gate *gate, unsigned wanted, bool spin) {
    if (spin) {
        const int64_t end = rt_now_ns() + (RT_SPIN_NS >> gate->vain);
        bool came = false;
        do { /* no sched_yield: it would hand a whole time slice to a background job of any priority */
            for (int i = 0; i < 64 && !came; i++, rt_pause())
                came = atomic_load_explicit(&gate->value, memory_order_acquire) == wanted;
        } while (!came && rt_now_ns() < end);
        /* On a crowded machine the awaited thread may need this very CPU: sleep sooner next time. */
        gate->vain = (uint8_t)(came ? gate->vain - (gate->vain > 0) : gate->vain + 2 * (gate->vain < 6));
        if (came) return;
    }
    /* Sequential consistency does the rest: either the waker sees `asleep`, or we see the new value. */
    pthread_mutex_lock(&gate->mutex);
    atomic_store(&gate->asleep, true);
    while (atomic_load(&gate->value) != wanted) pthread_cond_wait(&gate->wake, &gate->mutex);
    atomic_store(&gate->asleep, false);
    pthread_mutex_unlock(&gate->mutex);
}

/* Call after changing the value. */
static void rt_gate_wake(rt_gate *gate) {
    if (!atomic_load(&gate->asleep)) return;
    pthread_mutex_lock(&gate->mutex);
    pthread_cond_signal(&gate->wake);
    pthread_mutex_unlock(&gate->mutex);
}

/* ---- jobs --------------------------------------------------------------------------------------------------- */

/* The first iteration of a part; that of the part behind the last is the job's end. */
static int32_t rt_pool_bound(const rt_pool *pool, int32_t part) {
    return pool->begin + (int32_t)((int64_t)pool->extent * part / pool->parts);
}

/* A thread's share of a job: the pieces of its own part, then what is left of the parts behind it. */
static void rt_pool_work(rt_pool *pool, int32_t own) {
    for (int32_t i = 0; i < pool->parts; i++) {
        const int32_t part = (own + i) % pool->parts, end = rt_pool_bound(pool, part + 1);
        atomic_int *next = part ? &pool->workers[part - 1].next : &pool->next;
        int32_t begin = atomic_load_explicit(next, memory_order_relaxed);
        while (begin < end) {
            const int32_t left = end - begin, share = left / RT_SHARE > pool->grain ? left / RT_SHARE : pool->grain;
            const int32_t piece = left - share < pool->grain ? left : share; /* nothing smaller than a grain is left */
            if (!atomic_compare_exchange_weak_explicit(next, &begin, begin + piece, memory_order_relaxed,
                                                       memory_order_relaxed))
                continue;
            pool->step(pool->frame, begin, begin + piece);
            begin = atomic_load_explicit(next, memory_order_relaxed);
        }
    }
}

static void *rt_worker_main(void *argument) {
    rt_worker *worker = argument;
    rt_pool *pool = worker->pool;
    for (;;) {
        rt_gate_wait(&worker->go, 1, pool->spin);
        if (!atomic_exchange(&worker->go.value, 0)) continue; /* too late: the job is done */
        if (pool->quit) return NULL;
        rt_pool_work(pool, (int32_t)(worker - pool->workers) + 1);
        if (atomic_fetch_sub(&pool->done.value, 1) == 1) rt_gate_wake(&pool->done);
    }
}

static void rt_pool_open(rt_pool *pool, int32_t workers) {
    for (int32_t i = 0; i < workers; i++) {
        atomic_store(&pool->workers[i].go.value, 1);
        rt_gate_wake(&pool->workers[i].go);
    }
}

static void ingot_parallel(const rt_frame *frame, rt_step *step, int32_t begin, int32_t end, int32_t grain) {
    rt_pool *pool = frame->pool;
    int32_t extent = end - begin, parts = extent / grain;
    if (parts > pool->threads) parts = pool->threads;
    if (parts < 2) {
        step(frame, begin, end);
        return;
    }
    pool->step = step, pool->frame = frame;
    pool->begin = begin, pool->extent = extent, pool->parts = parts, pool->grain = grain;
    atomic_store_explicit(&pool->next, begin, memory_order_relaxed);
    for (int32_t i = 0; i < parts - 1; i++)
        atomic_store_explicit(&pool->workers[i].next, rt_pool_bound(pool, i + 1), memory_order_relaxed);
    atomic_store(&pool->done.value, (unsigned)parts - 1);
    rt_pool_open(pool, parts - 1);
    rt_pool_work(pool, 0);
    for (int32_t i = 0; i < parts - 1; i++) /* workers that have not begun: asleep, or without a CPU */
        if (atomic_exchange(&pool->workers[i].go.value, 0)) atomic_fetch_sub(&pool->done.value, 1);
    rt_gate_wait(&pool->done, 0, pool->spin);
}

/* ---- life --------------------------------------------------------------------------------------------------- */

static void rt_pool_stop(rt_pool *pool) {
    /* Made before a fork, its threads live in the other process. */
    if (pool->pid != getpid() || pool->started == 0) return;
    pool->quit = true;
    rt_pool_open(pool, pool->started);
    for (int32_t i = 0; i < pool->started; i++) {
        pthread_join(pool->workers[i].thread, NULL);
        rt_gate_destroy(&pool->workers[i].go);
    }
    rt_gate_destroy(&pool->done);
    pool->started = 0;
}

/* Starts threads - 1 workers. Also used in the child after a fork: whatever state the parent's threads left in the
 * gates is overwritten, never locked. */
static ingot_status rt_pool_start(rt_pool *pool, int32_t threads, char *error, size_t error_size) {
    pthread_attr_t attributes;
    sigset_t all, before;
    rt_cpus cpus;
    int failure = 0;
    pool->threads = threads, pool->started = 0, pool->pid = getpid(), pool->quit = false;
    if (threads < 2) return INGOT_OK;
    pool->spin = threads <= rt_cpu_count(false);
    const bool narrow = rt_fits_fast(cpus, threads); /* the calling thread is the program's own: it stays where it is */
    if (!rt_gate_init(&pool->done) || pthread_attr_init(&attributes) != 0)
        return rt_fail(error, error_size, INGOT_ERR_THREADS, "the thread pool could not be set up");
    pthread_attr_setstacksize(&attributes, RT_STACK_BYTES);
    /* The program's signal handlers run on the program's own threads. */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    for (int32_t i = 0; i < threads - 1 && !failure; i++) {
        rt_worker *worker = &pool->workers[i];
        worker->pool = pool, failure = ENOMEM;
        if (rt_gate_init(&worker->go))
            failure = pthread_create(&worker->thread, &attributes, rt_worker_main, worker);
        if (!failure && narrow) pthread_setaffinity_np(worker->thread, sizeof cpus, (cpu_set_t *)(void *)cpus);
        pool->started += !failure;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    if (!failure) return INGOT_OK;
    int32_t got = pool->started;
    rt_pool_stop(pool);
    return rt_fail(error, error_size, INGOT_ERR_THREADS, "thread %d of %d could not be started (errno %d)",
                   (int)got + 2, (int)threads, failure);
}
