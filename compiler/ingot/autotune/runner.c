/* runner.c: runs and times the candidates of one batch.
 *
 * batch.h, which is generated, gives the kernels and these tables: rt_info (the CPU features the kernels need),
 * `tasks`, `candidates` (grouped by task, each task's reference first) and the weights' factors in batch.bin.
 *
 *   runner THREADS REPEATS MICROSECONDS LIMIT ID...
 *
 * measures the candidates ID... in REPEATS rounds, each for about MICROSECONDS a round, and writes one line a step:
 *
 *   {"begin": 3}                                                       before candidate 3 is touched
 *   {"candidate": 3, "error": 1e-7, "noise": 0.01, "ns": [1200, ...]}  its median of every round
 *
 * error is max|difference| / max|reference| against its task's reference; above LIMIT there is no "ns". The rounds of
 * a task's candidates are the same moments, so their ratios are free of what else the machine does.
 */

#include "rt.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

/* Fills `bytes` bytes: expands [dims] of a[i, o, n] * b[j, k, m], indices in the order i, j, o, k, n, m; a and b are
 * offsets into batch_data. */
typedef struct fill {
    uint64_t offset, bytes;
    uint32_t dims[6]; /* all 0: stored as it is, at `a` */
    int32_t dtype;
    uint64_t a, b;
} fill;

typedef struct candidate {
    int32_t id, task;
    void (*forward)(const rt_frame *frame);
    uint64_t arena_bytes, weights_bytes;
    const fill *fills;
    int32_t n_fills;
} candidate;

typedef struct tensor {
    uint64_t count;
    int32_t dtype;
} tensor;

typedef struct task {
    const tensor *inputs, *outputs;
    int32_t n_inputs, n_outputs;
} task;

static ingot_status rt_fail(char *text, size_t size, ingot_status status, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, size, format, arguments);
    va_end(arguments);
    return status;
}

#include "batch.h"

#include "cpu.c"
#include "pool.c"

#define MOST_TENSORS 64
#define MOST_ROUNDS 64
#define MOST_RUNS 64
/* A candidate this many times slower than the best of its task is not measured more than once. */
#define HOPELESS 3
/* A round in which the reference is slower than at its best by this much is a bad period, and is repeated. */
#define BAD_PERIOD 1.08
/* Runs of one thread that are longer than this are measured in the thread's own time, which a crowded machine stretches
 * less. */
#define CPU_TIME_NS 50000

typedef struct state {
    const candidate *what;
    uint8_t *arena, *weights;
    int64_t once;
    double error;
    double ns[MOST_ROUNDS];
    int rounds;
    bool alive;
} state;

static rt_pool pool;
static uint8_t *sweep;
/* Executed instructions, where an emulator counts them (counter.c); they then stand for nanoseconds everywhere. */
static const volatile uint64_t *counter;

static int64_t now(void) {
    return counter ? (int64_t)*counter : rt_now_ns();
}

static void find_counter(void) {
    const char *path = getenv("INGOT_COUNTER");
    const int fd = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    void *found = fd < 0 ? MAP_FAILED : mmap(NULL, sizeof *counter, PROT_READ, MAP_SHARED, fd, 0);
    if (found != MAP_FAILED) counter = found;
}

static void die(const char *why) {
    fprintf(stderr, "%s\n", why);
    exit(3);
}

static void *take(uint64_t bytes) {
    void *block = NULL;
    if (bytes > SIZE_MAX / 2 || posix_memalign(&block, INGOT_MEMORY_ALIGNMENT, bytes ? (size_t)bytes : 1) != 0)
        die("not enough memory for a candidate");
    return block;
}

static uint32_t dtype_bytes(int32_t dtype) {
    switch (dtype) {
    case INGOT_BOOL: case INGOT_INT8: case INGOT_UINT8: return 1;
    case INGOT_INT16: case INGOT_UINT16: case INGOT_FLOAT16: case INGOT_BFLOAT16: return 2;
    case INGOT_INT64: case INGOT_UINT64: case INGOT_FLOAT64: return 8;
    default: return 4;
    }
}

static float from_half(uint16_t bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const float value = exponent == 31  ? (fraction ? NAN : INFINITY)
                        : exponent ? ldexpf((float)(1024 + fraction), exponent - 25)
                                   : ldexpf((float)fraction, -24);
    return bits & 0x8000 ? -value : value;
}

static double element(const uint8_t *data, int32_t dtype, uint64_t i) {
    uint32_t wide;
    uint16_t half;
    float single;
    switch (dtype) {
    case INGOT_BOOL: case INGOT_UINT8: return data[i];
    case INGOT_INT8: return ((const int8_t *)data)[i];
    case INGOT_INT16: return ((const int16_t *)(const void *)data)[i];
    case INGOT_UINT16: return ((const uint16_t *)(const void *)data)[i];
    case INGOT_INT32: return ((const int32_t *)(const void *)data)[i];
    case INGOT_UINT32: return ((const uint32_t *)(const void *)data)[i];
    case INGOT_INT64: return (double)((const int64_t *)(const void *)data)[i];
    case INGOT_UINT64: return (double)((const uint64_t *)(const void *)data)[i];
    case INGOT_FLOAT64: return ((const double *)(const void *)data)[i];
    case INGOT_FLOAT16: memcpy(&half, data + 2 * i, 2); return from_half(half);
    case INGOT_BFLOAT16:
        memcpy(&half, data + 2 * i, 2);
        wide = (uint32_t)half << 16;
        memcpy(&single, &wide, 4);
        return single;
    default: return ((const float *)(const void *)data)[i];
    }
}

static void put(uint8_t *data, int32_t dtype, uint64_t i, float value) {
    uint32_t wide;
    const int32_t whole = (int32_t)value;
    memcpy(&wide, &value, 4);
    switch (dtype) {
    case INGOT_BOOL: data[i] = value > 0; return;
    case INGOT_INT8: ((int8_t *)data)[i] = (int8_t)whole; return;
    case INGOT_UINT8: data[i] = (uint8_t)whole; return;
    case INGOT_INT16: ((int16_t *)(void *)data)[i] = (int16_t)whole; return;
    case INGOT_UINT16: ((uint16_t *)(void *)data)[i] = (uint16_t)whole; return;
    case INGOT_INT32: case INGOT_UINT32: ((int32_t *)(void *)data)[i] = whole; return;
    case INGOT_INT64: case INGOT_UINT64: ((int64_t *)(void *)data)[i] = whole; return;
    case INGOT_FLOAT64: ((double *)(void *)data)[i] = value; return;
    case INGOT_BFLOAT16: ((uint16_t *)(void *)data)[i] = (uint16_t)((wide + 0x8000) >> 16); return;
    case INGOT_FLOAT16: /* normal numbers only */
        wide += 0x1000;
        ((uint16_t *)(void *)data)[i] =
            (uint16_t)(fabsf(value) < 1e-4f ? 0 : (wide >> 16 & 0x8000) | (((wide >> 13) - (112u << 10)) & 0x7fff));
        return;
    default: ((float *)(void *)data)[i] = value; return;
    }
}

/* Seeded values: floats in [-1, 1), the whole range of 8 bits, and 0 or 1 where whole numbers may be indices. */
static void randomise(uint8_t *data, tensor what, uint64_t seed) {
    const int32_t d = what.dtype;
    const bool real = d == INGOT_FLOAT32 || d == INGOT_FLOAT64 || d == INGOT_FLOAT16 || d == INGOT_BFLOAT16;
    const bool byte = d == INGOT_INT8 || d == INGOT_UINT8;
    const float low = d == INGOT_INT8 ? -128.0f : 0.0f;
    uint64_t x = seed * 0x9e3779b97f4a7c15u + 1;
    for (uint64_t i = 0; i < what.count; i++) {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        const float unit = (float)(x >> 40) * 0x1p-24f;
        put(data, d, i, real ? 2 * unit - 1 : low + floorf((byte ? 256.0f : 2.0f) * unit));
    }
}

static void expand(const fill *f, uint8_t *weights) {
    uint8_t *out = weights + f->offset;
    if (!f->dims[0]) {
        memcpy(out, batch_data + f->a, (size_t)f->bytes);
        return;
    }
    const float *a = (const float *)(const void *)(batch_data + f->a);
    const float *b = (const float *)(const void *)(batch_data + f->b);
    uint64_t count = 0;
    const uint32_t *d = f->dims;
    for (uint32_t i = 0; i < d[0]; i++)
        for (uint32_t j = 0; j < d[1]; j++)
            for (uint32_t o = 0; o < d[2]; o++)
                for (uint32_t k = 0; k < d[3]; k++)
                    for (uint32_t n = 0; n < d[4]; n++)
                        for (uint32_t m = 0; m < d[5]; m++)
                            put(out, f->dtype, count++, a[(i * d[2] + o) * d[4] + n] * b[(j * d[3] + k) * d[5] + m]);
}

/* Each thread reads a share as large as its caches, so that what they held must come again from further away. */
static void sweep_step(const rt_frame *frame, int32_t begin, int32_t end) {
    (void)frame;
    for (int64_t i = (int64_t)begin * SWEEP_BYTES; i < (int64_t)end * SWEEP_BYTES; i += 64)
        (void)((volatile const uint8_t *)sweep)[i];
}

static double median(double *values, int count) {
    for (int i = 1; i < count; i++)
        for (int j = i; j > 0 && values[j] < values[j - 1]; j--) {
            const double other = values[j];
            values[j] = values[j - 1];
            values[j - 1] = other;
        }
    return count % 2 ? values[count / 2] : 0.5 * (values[count / 2 - 1] + values[count / 2]);
}

/* One task's tensors, while its candidates are measured. */
typedef struct bench {
    ingot_tensor inputs[MOST_TENSORS], outputs[MOST_TENSORS];
    uint8_t *fresh;                  /* the first input once more */
    uint8_t *expected[MOST_TENSORS]; /* the reference's outputs */
} bench;

static rt_frame frame_of(const bench *b, const state *s) {
    return (rt_frame){.weights = s->weights, .arena = s->arena, .inputs = b->inputs, .outputs = b->outputs,
                      .pool = &pool};
}

/* The time of this thread, without what the scheduler gave to others: of use for one thread, and for runs that are
 * much longer than the system call that reads it. */
static int64_t cpu_now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* One run as in a model: weights and old tensors far away, the first input just written. */
static int64_t run_once(const bench *b, const state *s) {
    const rt_frame frame = frame_of(b, s);
    const bool alone = !counter && pool.threads == 1 && s->once > CPU_TIME_NS;
    if (!counter) ingot_parallel(&frame, sweep_step, 0, pool.threads, 1);
    memcpy(b->inputs[0].data, b->fresh, (size_t)b->inputs[0].bytes);
    const int64_t start = alone ? cpu_now_ns() : now();
    s->what->forward(&frame);
    return (alone ? cpu_now_ns() : now()) - start;
}

static double measure(const bench *b, const state *s, int64_t budget) {
    double times[MOST_RUNS];
    int64_t runs = budget / (s->once > 0 ? s->once : 1);
    runs = counter ? 1 : runs < 3 ? 3 : runs > MOST_RUNS ? MOST_RUNS : runs; /* counts repeat exactly */
    for (int64_t i = 0; i < runs; i++) times[i] = (double)run_once(b, s);
    return median(times, (int)runs);
}

static void begin(int32_t id) {
    printf("{\"begin\": %d}\n", (int)id);
    fflush(stdout);
}

static void report(const state *s) {
    double sorted[MOST_ROUNDS], away[MOST_ROUNDS];
    printf("{\"candidate\": %d, \"error\": %.9g", (int)s->what->id, s->error);
    if (s->rounds) {
        memcpy(sorted, s->ns, sizeof(double) * (size_t)s->rounds);
        const double middle = median(sorted, s->rounds);
        for (int r = 0; r < s->rounds; r++) away[r] = fabs(s->ns[r] - middle);
        printf(", \"noise\": %.6g, \"ns\": [", median(away, s->rounds) / middle);
        for (int r = 0; r < s->rounds; r++) printf(r ? ", %.0f" : "%.0f", s->ns[r]);
        printf("]");
    }
    printf("}\n");
    fflush(stdout);
}

/* max|difference| / max|reference|; 1e30 where one is a number and the other is not. */
static double compare(const uint8_t *wanted, const uint8_t *found, tensor what) {
    double largest = 0, worst = 0;
    for (uint64_t i = 0; i < what.count; i++) {
        const double a = element(wanted, what.dtype, i), b = element(found, what.dtype, i);
        if (isfinite(a) != isfinite(b)) return 1e30;
        if (!isfinite(a)) continue;
        largest = fmax(largest, fabs(a));
        worst = fmax(worst, fabs(a - b));
    }
    return worst == 0 ? 0 : largest > 0 ? worst / largest : 1e30;
}

static void load(state *s, const candidate *what) {
    s->what = what;
    s->alive = true;
    s->arena = rt_allocate(what->arena_bytes ? (size_t)what->arena_bytes : 1); /* as a model's */
    if (!s->arena) die("not enough memory for a candidate");
    s->weights = take(what->weights_bytes);
    memset(s->arena, 0, (size_t)what->arena_bytes);
    for (int32_t i = 0; i < what->n_fills; i++) expand(&what->fills[i], s->weights);
}

static bool wanted(int32_t id, int argc, char **argv) {
    for (int i = 5; i < argc; i++)
        if (atoi(argv[i]) == id) return true;
    return false;
}

static void run_task(int32_t index, const candidate *first, int count, int rounds, int64_t budget, double limit,
                     int argc, char **argv) {
    const task *t = &tasks[index];
    bench b;
    memset(&b, 0, sizeof b);
    if (t->n_inputs < 1 || t->n_inputs > MOST_TENSORS || t->n_outputs > MOST_TENSORS) die("a task with too many tensors");
    for (int32_t i = 0; i < t->n_inputs; i++) {
        b.inputs[i].bytes = t->inputs[i].count * dtype_bytes(t->inputs[i].dtype);
        b.inputs[i].data = take(b.inputs[i].bytes);
        randomise(b.inputs[i].data, t->inputs[i], (uint64_t)i + 1);
    }
    b.fresh = take(b.inputs[0].bytes);
    memcpy(b.fresh, b.inputs[0].data, (size_t)b.inputs[0].bytes);
    for (int32_t i = 0; i < t->n_outputs; i++) {
        b.outputs[i].bytes = t->outputs[i].count * dtype_bytes(t->outputs[i].dtype);
        b.outputs[i].data = take(b.outputs[i].bytes);
        b.expected[i] = take(b.outputs[i].bytes);
    }
    state *states = take(sizeof(state) * (uint64_t)count);
    memset(states, 0, sizeof(state) * (size_t)count);
    int64_t best = INT64_MAX;
    for (int i = 0; i < count; i++) {
        state *s = &states[i];
        if (i > 0 && !wanted(first[i].id, argc, argv)) continue;
        begin(first[i].id);
        load(s, &first[i]);
        for (int32_t o = 0; o < t->n_outputs; o++) memset(b.outputs[o].data, 0xff, (size_t)b.outputs[o].bytes);
        run_once(&b, s);
        for (int32_t o = 0; o < t->n_outputs; o++) {
            if (i == 0) memcpy(b.expected[o], b.outputs[o].data, (size_t)b.outputs[o].bytes);
            s->error = fmax(s->error, compare(b.expected[o], b.outputs[o].data, t->outputs[o]));
        }
        if (!(s->error <= limit)) s->alive = false;
        if (s->alive) {
            s->once = run_once(&b, s);
            for (int again = 0; again < 2; again++) {
                const int64_t once = run_once(&b, s);
                s->once = once < s->once ? once : s->once;
            }
            if (s->once < best) best = s->once;
        }
    }
    for (int i = 1; i < count; i++) { /* what is hopeless takes no part in the rounds */
        state *s = &states[i];
        if (s->alive && s->once / HOPELESS > best) {
            s->ns[0] = (double)s->once;
            s->rounds = 1;
            s->alive = false;
        }
    }
    double fastest = INFINITY;
    for (int r = 0, attempts = 0; states[0].alive && r < rounds; attempts++) {
        for (int i = 0; i < count; i++) {
            state *s = &states[i];
            if (!s->alive) continue;
            begin(s->what->id);
            s->ns[r] = measure(&b, s, budget);
            if (i == 0 && s->ns[r] < fastest) fastest = s->ns[r];
            if (i == 0 && s->ns[r] > fastest * BAD_PERIOD && attempts < 2 * rounds) break;
            s->rounds = r + 1;
        }
        if (states[0].rounds == r + 1) r++;
    }
    for (int i = 0; i < count; i++) {
        if (states[i].what) report(&states[i]);
        free(states[i].arena);
        free(states[i].weights);
    }
    for (int32_t i = 0; i < t->n_inputs; i++) free(b.inputs[i].data);
    free(b.fresh);
    for (int32_t i = 0; i < t->n_outputs; i++) {
        free(b.outputs[i].data);
        free(b.expected[i]);
    }
    free(states);
}

int main(int argc, char **argv) {
    char why[512] = "";
    if (argc < 6) die("usage: runner THREADS REPEATS MICROSECONDS LIMIT ID...");
    find_counter();
    const int threads = atoi(argv[1]), rounds = counter ? 1 : atoi(argv[2]);
    if (threads < 1 || threads > INGOT_MAX_THREADS || rounds < 1 || rounds > MOST_ROUNDS) die("a number is out of range");
    if (rt_check_cpu(why, sizeof why) != INGOT_OK || rt_pool_start(&pool, threads, why, sizeof why) != INGOT_OK) die(why);
    sweep = take((uint64_t)threads * SWEEP_BYTES);
    memset(sweep, 1, (size_t)threads * SWEEP_BYTES);
    const int total = (int)(sizeof candidates / sizeof candidates[0]);
    for (int from = 0; from < total;) {
        int to = from;
        bool any = false;
        for (; to < total && candidates[to].task == candidates[from].task; to++) any |= wanted(candidates[to].id, argc, argv);
        if (any)
            run_task(candidates[from].task, &candidates[from], to - from, rounds, atoll(argv[3]) * 1000, atof(argv[4]), argc,
                     argv);
        from = to;
    }
    rt_pool_stop(&pool);
    return 0;
}
