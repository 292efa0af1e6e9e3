/* Tests of the C ABI, for the model that tests/handmade.py makes. Runs natively, under sanitizers, under
 * qemu, with the model loaded (first argument: its path) or linked in (built with -DLINKED).
 *
 *   driver MODEL.so CASE...      prints "ok CASE" per case; the first failed check ends it with status 1
 */
#define _GNU_SOURCE 1
#include "ingot.h"

#include <dirent.h>
#include <dlfcn.h>
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { ROWS = 97, COLUMNS = 33, COUNT = ROWS * COLUMNS, STATE = 10240 };

#define CHECK(condition)                                                                \
    do {                                                                                \
        if (!(condition)) {                                                             \
            fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition);     \
            _exit(1);                                                                   \
        }                                                                               \
    } while (0)

#define CHECK_TEXT(found, wanted)                                                                  \
    do {                                                                                           \
        const char *text_ = (found);                                                               \
        if (!strstr(text_, wanted)) {                                                              \
            fprintf(stderr, "%s:%d: \"%s\" lacks \"%s\"\n", __FILE__, __LINE__, text_, wanted);    \
            _exit(1);                                                                              \
        }                                                                                          \
    } while (0)

static const ingot_api *api;
static const char *model_path;

/* ---- counted allocation ---- */

#ifdef COUNT_ALLOCATIONS
extern void *__libc_malloc(size_t);
extern void *__libc_calloc(size_t, size_t);
extern void *__libc_realloc(void *, size_t);
extern void *__libc_memalign(size_t, size_t);
static atomic_long allocations;
void *malloc(size_t size) { return atomic_fetch_add(&allocations, 1), __libc_malloc(size); }
void *calloc(size_t n, size_t size) { return atomic_fetch_add(&allocations, 1), __libc_calloc(n, size); }
void *realloc(void *p, size_t size) { return atomic_fetch_add(&allocations, 1), __libc_realloc(p, size); }
void *aligned_alloc(size_t a, size_t size) { return atomic_fetch_add(&allocations, 1), __libc_memalign(a, size); }
int posix_memalign(void **p, size_t a, size_t size) {
    atomic_fetch_add(&allocations, 1);
    *p = __libc_memalign(a, size);
    return *p ? 0 : 12;
}
#endif

/* ---- one set of tensors ---- */

typedef struct set {
    float x[COUNT], y[COUNT], same[COUNT];
    int64_t k[3], index[3];
    int64_t shape[2], shape_k[1];
    ingot_tensor in[2], out[3];
} set;

static void fill(set *s, unsigned seed) {
    memset(s, 0, sizeof *s);
    for (int i = 0; i < COUNT; i++) s->x[i] = (float)((seed + (unsigned)i * 7919u) % 2001u) / 1000.0f - 1.0f;
    for (int i = 0; i < 3; i++) s->k[i] = (int64_t)seed + 10 * i;
    s->shape[0] = ROWS, s->shape[1] = COLUMNS, s->shape_k[0] = 3;
    s->in[0] = (ingot_tensor){s->x, sizeof s->x, INGOT_FLOAT32, 2, s->shape, INGOT_CPU, 0};
    s->in[1] = (ingot_tensor){s->k, sizeof s->k, INGOT_INT64, 1, s->shape_k, INGOT_CPU, 0};
    s->out[0] = (ingot_tensor){s->y, sizeof s->y, INGOT_FLOAT32, 2, s->shape, INGOT_CPU, 0};
    s->out[1] = (ingot_tensor){s->index, sizeof s->index, INGOT_INT64, 1, s->shape_k, INGOT_CPU, 0};
    s->out[2] = (ingot_tensor){s->same, sizeof s->same, INGOT_FLOAT32, 2, s->shape, INGOT_CPU, 0};
}

static set *new_set(unsigned seed) {
    set *s = malloc(sizeof *s);
    CHECK(s);
    fill(s, seed);
    return s;
}

static int right(const set *s) {
    for (int i = 0; i < COUNT; i++) {
        const double w = -2.0 + 4.0 * (i % COLUMNS) / (COLUMNS - 1);
        if (!(fabs(s->y[i] - (tanh(s->x[i] * w) + 1)) < 1e-5) || s->same[i] != s->x[i]) return 0;
    }
    for (int i = 0; i < 3; i++)
        if (s->index[i] != s->k[i] + i) return 0;
    return 1;
}

static ingot_status run(ingot_model *model, set *s) { return api->run(model, s->in, 2, s->out, 3); }

static ingot_model *create(int32_t threads) {
    char error[256] = "";
    ingot_options options = {.struct_size = sizeof options, .threads = threads, .error = error, .error_bytes = sizeof error};
    ingot_model *model = NULL;
    if (api->create(&options, &model) != INGOT_OK) fprintf(stderr, "create: %s\n", error);
    CHECK(model);
    return model;
}

static int thread_count(void) {
    int count = 0;
    DIR *folder = opendir("/proc/self/task");
    CHECK(folder);
    for (struct dirent *entry; (entry = readdir(folder));) count += entry->d_name[0] != '.';
    closedir(folder);
    return count;
}

/* ---- cases ---- */

static void case_describe(void) {
    const ingot_model_info *info = NULL;
    CHECK(api->abi_version == INGOT_ABI_VERSION && api->struct_size == sizeof(ingot_api));
    CHECK(api->describe(NULL) == INGOT_ERR_NULL);
    CHECK(api->describe(&info) == INGOT_OK && info->struct_size == sizeof *info);
    CHECK(info->n_inputs == 2 && info->n_outputs == 3 && info->memory_bytes == STATE + 64 + sizeof(float) * COUNT + 60);
    CHECK(!strcmp(info->inputs[1].name, "k") && info->inputs[1].dtype == INGOT_INT64 && info->inputs[1].bytes == 24);
    CHECK(info->inputs[0].ndim == 2 && info->inputs[0].shape[0] == ROWS && info->inputs[0].shape[1] == COLUMNS);
    CHECK(info->weights_bytes == 4 * COLUMNS && info->inputs[0].quant_count == 0 && !info->inputs[0].scales);
    CHECK(!strcmp(api->version(), info->compiler) && !strncmp(info->compiler, "ingot ", 6));
    CHECK(!strcmp(api->last_error(NULL), "model is null"));
}

static void case_create(void) {
    char error[64];
    ingot_model *model = (ingot_model *)&error;
    ingot_options options = {.struct_size = sizeof options, .threads = 1, .error = error, .error_bytes = sizeof error};
    CHECK(api->create(&options, NULL) == INGOT_ERR_NULL);
    CHECK_TEXT(error, "model is null");
    options.threads = 65;
    CHECK(api->create(&options, &model) == INGOT_ERR_THREADS && !model);
    CHECK_TEXT(error, "threads is 65, expected 0 to 64");
    options.threads = -1;
    CHECK(api->create(&options, &model) == INGOT_ERR_THREADS);
    options.error_bytes = 8; /* a short buffer gets a short text */
    CHECK(api->create(&options, &model) == INGOT_ERR_THREADS && !strcmp(error, "threads"));
    options.error_bytes = 0;
    CHECK(api->create(&options, &model) == INGOT_ERR_THREADS);
    options.error_bytes = sizeof error;
    options.threads = 1;
    options.struct_size = 4;
    CHECK(api->create(&options, &model) == INGOT_ERR_ABI);
    options.struct_size = sizeof options + 8; /* a later version's struct */
    CHECK(api->create(&options, &model) == INGOT_OK && api->destroy(model) == INGOT_OK);
    CHECK(api->create(NULL, &model) == INGOT_OK && model);
    CHECK(!strcmp(api->last_error(model), ""));
    CHECK(api->destroy(model) == INGOT_OK);
    CHECK(api->destroy(NULL) == INGOT_ERR_NULL);
}

static void case_memory(void) {
    char error[128];
    const ingot_model_info *info;
    ingot_model *model;
    CHECK(api->describe(&info) == INGOT_OK);
    const size_t bytes = (size_t)info->memory_bytes;
    unsigned char *block = malloc(bytes + 128);
    CHECK(block);
    unsigned char *memory = block + 64 - (uintptr_t)block % 64;
    memset(memory, 0xa5, bytes + 64);
    ingot_options options = {sizeof options, 3, memory, bytes, error, sizeof error};
    options.memory = memory + 8;
    CHECK(api->create(&options, &model) == INGOT_ERR_ALIGNMENT);
    CHECK_TEXT(error, "expected a multiple of 64");
    options.memory = memory;
    options.memory_bytes = bytes - 1;
    CHECK(api->create(&options, &model) == INGOT_ERR_MEMORY);
    CHECK_TEXT(error, "memory_bytes is ");
    options.memory_bytes = bytes;
    for (int i = 0; i < 2; i++) { /* the same memory can be used again */
        set *s = new_set(3);
        CHECK(api->create(&options, &model) == INGOT_OK && (void *)model == (void *)memory);
        CHECK(run(model, s) == INGOT_OK && right(s));
        CHECK(api->destroy(model) == INGOT_OK);
        for (size_t j = bytes; j < bytes + 64 - (size_t)(memory - block) % 64; j++) CHECK(memory[j] == 0xa5);
        free(s);
    }
    free(block);
}

static void expect(ingot_model *model, set *s, ingot_status status, const char *text) {
    const ingot_status found = run(model, s);
    if (found != status) fprintf(stderr, "status %d, expected %d (%s)\n", (int)found, (int)status, text);
    CHECK(found == status);
    CHECK_TEXT(api->last_error(model), text);
    fill(s, 1);
}

static void case_arguments(void) {
    ingot_model *model = create(1);
    set *s = new_set(1);
    int64_t large[9] = {1, 1, 1, 1, 1, 1, 1, 1, 1};
    int64_t edge[8] = {INT64_MIN, INT64_MIN, INT64_MIN, INT64_MIN, INT64_MIN, INT64_MIN, INT64_MIN, INT64_MIN};
    CHECK(api->run(NULL, s->in, 2, s->out, 3) == INGOT_ERR_NULL);
    CHECK(api->run(model, s->in, 1, s->out, 3) == INGOT_ERR_COUNT);
    CHECK_TEXT(api->last_error(model), "1 inputs given, expected 2");
    CHECK(api->run(model, s->in, 2, s->out, -4) == INGOT_ERR_COUNT);
    CHECK_TEXT(api->last_error(model), "-4 outputs given, expected 3");
    CHECK(api->run(model, NULL, 2, s->out, 3) == INGOT_ERR_NULL);
    CHECK_TEXT(api->last_error(model), "inputs is null");
    CHECK(api->run(model, s->in, 2, NULL, 3) == INGOT_ERR_NULL);
    s->in[0].data = NULL;
    expect(model, s, INGOT_ERR_NULL, "input 'x': data is null");
    s->out[1].shape = NULL;
    expect(model, s, INGOT_ERR_NULL, "output 'index': shape is null");
    s->in[0].device = INGOT_CUDA;
    expect(model, s, INGOT_ERR_DEVICE, "input 'x': device 1, expected 0 (CPU)");
    s->in[0].dtype = INGOT_FLOAT64;
    expect(model, s, INGOT_ERR_DTYPE, "input 'x': dtype float64, expected float32");
    s->in[0].dtype = 13;
    expect(model, s, INGOT_ERR_DTYPE, "input 'x': dtype unknown, expected float32");
    s->in[0].dtype = -1;
    expect(model, s, INGOT_ERR_DTYPE, "dtype unknown");
    s->shape[1] = 34;
    expect(model, s, INGOT_ERR_SHAPE, "input 'x': shape [97,34], expected [97,33]");
    s->in[0].ndim = 0;
    expect(model, s, INGOT_ERR_SHAPE, "input 'x': shape [], expected [97,33]");
    s->in[0].ndim = 1;
    expect(model, s, INGOT_ERR_SHAPE, "input 'x': shape [97], expected [97,33]");
    s->in[1].ndim = 9, s->in[1].shape = large;
    expect(model, s, INGOT_ERR_SHAPE, "input 'k': ndim 9, expected 1");
    s->in[1].ndim = -1, s->in[1].shape = NULL;
    expect(model, s, INGOT_ERR_NULL, "input 'k': shape is null");
    s->in[1].ndim = 8, s->in[1].shape = edge;
    expect(model, s, INGOT_ERR_SHAPE, ",-9223372036854775808], expected [3]");
    s->out[2].bytes--;
    expect(model, s, INGOT_ERR_BYTES, "output 'same': bytes 12803, expected 12804");
    s->in[0].bytes = UINT64_MAX;
    expect(model, s, INGOT_ERR_BYTES, "input 'x': bytes 18446744073709551615, expected 12804");
    s->in[0].data = (char *)s->x + 2;
    expect(model, s, INGOT_ERR_ALIGNMENT, "expected a multiple of 4 (the size of float32)");
    s->in[1].data = (char *)s->k + 4;
    expect(model, s, INGOT_ERR_ALIGNMENT, "input 'k': data at ");
    s->out[0].data = s->x;
    expect(model, s, INGOT_ERR_OVERLAP, "output 'y': memory overlaps that of input 'x'");
    s->out[2].data = s->y + 1;
    expect(model, s, INGOT_ERR_OVERLAP, "output 'same': memory overlaps that of output 'y'");
    CHECK(run(model, s) == INGOT_OK && right(s));
    CHECK(api->destroy(model) == INGOT_OK);
    free(s);
}

static void case_threads(void) {
    static const int32_t counts[] = {1, 2, 3, 7, 64, 0};
    set *s = new_set(0), *first = new_set(0);
    CHECK(api->destroy(create(2)) == INGOT_OK); /* a sanitizer's own thread starts with the first one */
    usleep(20000);
    const int before = thread_count();
    for (unsigned i = 0; i < sizeof counts / sizeof counts[0]; i++) {
        ingot_model *model = create(counts[i]);
        const int started = thread_count() - before;
        if (counts[i]) CHECK(started == counts[i] - 1);
        CHECK(started < (int)sysconf(_SC_NPROCESSORS_CONF) || counts[i]);
        for (unsigned round = 0; round < 50; round++) {
            fill(s, round);
            CHECK(run(model, s) == INGOT_OK && right(s));
            if (round == 0 && i == 0) memcpy(first, s, sizeof *s);
            if (round == 0) CHECK(!memcmp(first->y, s->y, sizeof s->y)); /* the same bits with any number of threads */
        }
        CHECK(api->destroy(model) == INGOT_OK);
        for (int wait = 0; thread_count() != before && wait < 1000; wait++) usleep(1000); /* joined, but still listed */
        CHECK(thread_count() == before);
    }
    free(first);
    free(s);
}

/* Threads that have gone to sleep wake up again. */
static void case_sleep(void) {
    ingot_model *model = create(3);
    set *s = new_set(0);
    for (unsigned round = 0; round < 20; round++) {
        usleep(round % 4 * 1000);
        fill(s, round);
        CHECK(run(model, s) == INGOT_OK && right(s));
    }
    CHECK(api->destroy(model) == INGOT_OK);
    free(s);
}

/* A great number of short jobs: lost wake-ups would hang here. */
static void case_stress(void) {
    ingot_model *model = create(2);
    set *s = new_set(5);
    for (int round = 0; round < 3000; round++) CHECK(run(model, s) == INGOT_OK);
    CHECK(right(s) && api->destroy(model) == INGOT_OK);
    for (int round = 0; round < 50; round++) CHECK(api->destroy(create(4)) == INGOT_OK);
    free(s);
}

typedef struct job { ingot_model *model; set *set; } job;

static void *run_in_thread(void *argument) {
    job *j = argument;
    ingot_status status;
    do status = run(j->model, j->set);
    while (status == INGOT_ERR_BUSY); /* the other thread's probe was faster */
    return (void *)(intptr_t)status;
}

static void release(set *s) { __atomic_store_n(&s->k[0], 5, __ATOMIC_RELEASE); }

/* Starts a run that stays inside its last kernel until release(). */
static pthread_t start_blocked(job *j) {
    pthread_t thread;
    set *probe = new_set(0);
    j->set->k[0] = -77;
    CHECK(pthread_create(&thread, NULL, run_in_thread, j) == 0);
    while (run(j->model, probe) != INGOT_ERR_BUSY) usleep(100);
    free(probe);
    return thread;
}

static void case_busy(void) {
    set *s = new_set(5), *other = new_set(6);
    job j = {create(2), s};
    void *status;
    pthread_t thread = start_blocked(&j);
    CHECK(run(j.model, other) == INGOT_ERR_BUSY);
    CHECK_TEXT(api->last_error(j.model), "in use by another thread");
    CHECK(api->destroy(j.model) == INGOT_ERR_BUSY);
    CHECK(api->selftest(j.model, NULL) == INGOT_ERR_BUSY);
    release(s);
    pthread_join(thread, &status);
    CHECK((intptr_t)status == INGOT_OK && right(s));
    CHECK(run(j.model, other) == INGOT_OK && right(other));
    CHECK(api->destroy(j.model) == INGOT_OK);
    free(s);
    free(other);
}

static void *own_instance(void *argument) {
    const unsigned seed = *(unsigned *)argument;
    ingot_model *model = create((int32_t)(seed % 2 + 1));
    set *s = new_set(seed);
    for (int round = 0; round < 100; round++) {
        fill(s, seed + (unsigned)round);
        CHECK(run(model, s) == INGOT_OK && right(s));
    }
    CHECK(api->destroy(model) == INGOT_OK);
    free(s);
    return NULL;
}

static void case_instances(void) {
    pthread_t threads[4];
    unsigned seeds[4] = {1, 20, 300, 4001};
    for (int i = 0; i < 4; i++) CHECK(pthread_create(&threads[i], NULL, own_instance, &seeds[i]) == 0);
    for (int i = 0; i < 4; i++) pthread_join(threads[i], NULL);
}

static void wait_for(pid_t child) {
    int status = 0;
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

static void case_fork(void) {
    set *s = new_set(5), *other = new_set(6);
    job j = {create(3), s};
    CHECK(run(j.model, s) == INGOT_OK && right(s));
    pid_t child = fork();
    if (child == 0) { /* the pool is rebuilt, here and in a grandchild */
        CHECK(thread_count() == 1 && run(j.model, other) == INGOT_OK && right(other) && thread_count() == 3);
        child = fork();
        if (child == 0) {
            CHECK(run(j.model, s) == INGOT_OK && right(s) && api->destroy(j.model) == INGOT_OK);
            _exit(0);
        }
        wait_for(child);
        CHECK(run(j.model, other) == INGOT_OK && api->destroy(j.model) == INGOT_OK);
        _exit(0);
    }
    wait_for(child);
    child = fork();
    if (child == 0) { /* destroyed without a run */
        CHECK(api->destroy(j.model) == INGOT_OK);
        _exit(0);
    }
    wait_for(child);
    /* Forked while another thread is inside run: in the child that thread does not exist. */
    pthread_t thread = start_blocked(&j);
    child = fork();
    if (child == 0) {
        CHECK(run(j.model, other) == INGOT_OK && right(other) && api->destroy(j.model) == INGOT_OK);
        _exit(0);
    }
    wait_for(child);
    release(s);
    pthread_join(thread, NULL);
    CHECK(right(s) && run(j.model, s) == INGOT_OK && api->destroy(j.model) == INGOT_OK);
    free(s);
    free(other);
}

static void case_no_threads(void) {
    struct rlimit before, tight;
    char error[128] = "";
    long pages = 0;
    ingot_model *model;
    FILE *file = fopen("/proc/self/statm", "r");
    CHECK(file && fscanf(file, "%ld", &pages) == 1);
    fclose(file);
    const int threads = thread_count();
    CHECK(getrlimit(RLIMIT_AS, &before) == 0);
    tight = before;
    tight.rlim_cur = (rlim_t)pages * (rlim_t)sysconf(_SC_PAGESIZE) + (8 << 20);
    CHECK(setrlimit(RLIMIT_AS, &tight) == 0);
    ingot_options options = {sizeof options, 64, NULL, 0, error, sizeof error};
    CHECK(api->create(&options, &model) == INGOT_ERR_THREADS && !model);
    CHECK_TEXT(error, " of 64 could not be started (errno 11)");
    CHECK(setrlimit(RLIMIT_AS, &before) == 0);
    for (int wait = 0; thread_count() != threads && wait < 1000; wait++) usleep(1000);
    CHECK(thread_count() == threads);
    CHECK(api->destroy(create(8)) == INGOT_OK);
}

static void case_selftest(void) {
    double error = -1;
    ingot_model *model = create(2);
    CHECK(api->selftest(NULL, &error) == INGOT_ERR_NULL);
    CHECK(api->selftest(model, &error) == INGOT_OK && error >= 0 && error < 1e-5);
    CHECK(api->selftest(model, NULL) == INGOT_OK);
    CHECK(api->destroy(model) == INGOT_OK);
}

static void case_signals(void) {
    /* Workers take no signal of the process: with all others blocked, it stays pending. */
    sigset_t mine, before, pending;
    ingot_model *model = create(3);
    sigemptyset(&mine);
    sigaddset(&mine, SIGUSR1);
    CHECK(pthread_sigmask(SIG_BLOCK, &mine, &before) == 0);
    CHECK(kill(getpid(), SIGUSR1) == 0 && sigpending(&pending) == 0 && sigismember(&pending, SIGUSR1));
    signal(SIGUSR1, SIG_IGN);
    CHECK(pthread_sigmask(SIG_SETMASK, &before, NULL) == 0 && api->destroy(model) == INGOT_OK);
}

static void case_allocations(void) {
#ifdef COUNT_ALLOCATIONS
    for (int32_t threads = 1; threads <= 3; threads += 2) {
        ingot_model *model = create(threads);
        set *s = new_set(1);
        ingot_tensor wrong = s->in[0];
        wrong.dtype = INGOT_INT8;
        const long before = atomic_load(&allocations);
        for (int i = 0; i < 10; i++) CHECK(run(model, s) == INGOT_OK);
        CHECK(api->run(model, &wrong, 2, s->out, 3) == INGOT_ERR_DTYPE && strlen(api->last_error(model)) > 10);
        CHECK(atomic_load(&allocations) == before);
        CHECK(before > 0 && api->destroy(model) == INGOT_OK);
        free(s);
    }
#endif
}

/* Prints microseconds: create + destroy, and run, for one thread. */
static void case_time(void) {
    struct timespec a, b, c;
    set *s = new_set(1);
    clock_gettime(CLOCK_MONOTONIC, &a);
    for (int i = 0; i < 100; i++) api->destroy(create(1));
    clock_gettime(CLOCK_MONOTONIC, &b);
    for (int i = 0; i < 100; i++) api->destroy(create(2));
    clock_gettime(CLOCK_MONOTONIC, &c);
    const double one = (double)(b.tv_sec - a.tv_sec) * 1e6 + (double)(b.tv_nsec - a.tv_nsec) / 1e3;
    const double two = (double)(c.tv_sec - b.tv_sec) * 1e6 + (double)(c.tv_nsec - b.tv_nsec) / 1e3;
    printf("create+destroy us: 1 thread %.1f, 2 threads %.1f\n", one / 100, two / 100);
    free(s);
}

static const struct { const char *name; void (*function)(void); } cases[] = {
    {"describe", case_describe}, {"create", case_create},       {"memory", case_memory},
    {"arguments", case_arguments}, {"threads", case_threads},   {"sleep", case_sleep},
    {"stress", case_stress},     {"busy", case_busy},           {"instances", case_instances},
    {"fork", case_fork},         {"no_threads", case_no_threads}, {"selftest", case_selftest},
    {"signals", case_signals},   {"allocations", case_allocations}, {"time", case_time},
};

#ifdef LINKED
extern const ingot_api *ingot_demo_api(void);
#endif

int main(int argc, char **argv) {
    CHECK(argc >= 2);
    model_path = argv[1];
#ifdef LINKED
    api = ingot_demo_api();
#else
    void *library = dlopen(model_path, RTLD_NOW | RTLD_LOCAL);
    if (!library) fprintf(stderr, "%s\n", dlerror());
    CHECK(library);
    const ingot_api *(*get)(void);
    *(void **)&get = dlsym(library, "ingot_demo_api");
    CHECK(get);
    api = get();
#endif
    for (int i = 2; i < argc; i++)
        for (unsigned j = 0; j < sizeof cases / sizeof cases[0]; j++)
            if (!strcmp(argv[i], cases[j].name) || !strcmp(argv[i], "all")) {
                alarm(120); /* a hang is a failure */
                cases[j].function();
                printf("ok %s\n", cases[j].name);
                fflush(stdout);
            }
    return 0;
}
