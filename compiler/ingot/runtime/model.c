/* model.c: create, run, destroy, describe, last_error, version, reset, output_shape; checks every argument by name. */

#include <stdarg.h>
#include <stdio.h>

struct ingot_model {
    rt_pool pool;
    atomic_int owner;           /* the process that is inside a call on this instance, or 0 */
    bool allocated;             /* create allocated the block: destroy frees it */
    int32_t half;               /* which half of the state the latest run has left */
    const rt_bucket *bucket;    /* the shapes of the latest run, or null */
    _Atomic(const char *) error; /* what last_error gives */
    char text[512];
};

/* The header and the metadata promise RT_INSTANCE_BYTES; the arena follows at a 64-byte boundary. */
_Static_assert(sizeof(struct ingot_model) <= RT_INSTANCE_BYTES, "raise INSTANCE_BYTES in packager/metadata.py");
_Static_assert(RT_INSTANCE_BYTES % INGOT_MEMORY_ALIGNMENT == 0, "the arena must be aligned");

/* ---- messages ----------------------------------------------------------------------------------------------- */

/* The length of text, at most `most` bytes, cut where a UTF-8 character begins. */
static int rt_cut(const char *text, size_t most) {
    size_t length = strnlen(text, most + 1);
    if (length > most)
        for (length = most; length > 0 && ((unsigned char)text[length] & 0xc0) == 0x80;) length--;
    return (int)length;
}

static ingot_status rt_fail(char *text, size_t size, ingot_status status, const char *format, ...) {
    char line[512];
    va_list arguments;
    if (!text || !size) return status;
    va_start(arguments, format);
    vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    int length = rt_cut(line, size - 1);
    memcpy(text, line, (size_t)length);
    text[length] = '\0';
    return status;
}

/* Fails a call on an instance that this thread owns. */
#define RT_FAIL(model, status, ...) \
    (atomic_store(&(model)->error, (model)->text), rt_fail((model)->text, sizeof(model)->text, status, __VA_ARGS__))

/* "[1,3,224,224]" */
static const char *rt_shape(char *text, size_t size, const int64_t *shape, int32_t ndim) {
    size_t used = 1;
    text[0] = '[';
    text[1] = '\0';
    for (int32_t i = 0; i < ndim && used < size; i++)
        used += (size_t)snprintf(text + used, size - used, i ? ",%lld" : "%lld", (long long)shape[i]);
    if (used + 1 < size) memcpy(text + used, "]", 2);
    return text;
}

/* ---- arguments ---------------------------------------------------------------------------------------------- */

static const struct { const char *name; uint32_t bytes; } rt_dtypes[] = {
    [INGOT_BOOL] = {"bool", 1},         [INGOT_INT8] = {"int8", 1},       [INGOT_UINT8] = {"uint8", 1},
    [INGOT_INT16] = {"int16", 2},       [INGOT_UINT16] = {"uint16", 2},   [INGOT_INT32] = {"int32", 4},
    [INGOT_UINT32] = {"uint32", 4},     [INGOT_INT64] = {"int64", 8},     [INGOT_UINT64] = {"uint64", 8},
    [INGOT_FLOAT16] = {"float16", 2},   [INGOT_BFLOAT16] = {"bfloat16", 2}, [INGOT_FLOAT32] = {"float32", 4},
    [INGOT_FLOAT64] = {"float64", 8},
};
enum { RT_DTYPES = sizeof rt_dtypes / sizeof rt_dtypes[0] };

static ingot_status rt_check_shape(ingot_model *model, const char *kind, const ingot_tensor *given,
                                   const ingot_tensor_info *info) {
    char found[176], wanted[176]; /* 8 dimensions of 20 digits */
    int name = rt_cut(info->name, 64);
    bool same = given->ndim == info->ndim;
    for (int32_t i = 0; same && i < info->ndim; i++) same = given->shape[i] == info->shape[i];
    if (same) return INGOT_OK;
    if (given->ndim < 0 || given->ndim > INGOT_MAX_NDIM)
        return RT_FAIL(model, INGOT_ERR_SHAPE, "%s '%.*s': ndim %d, expected %d", kind, name, info->name, (int)given->ndim,
                       (int)info->ndim);
    return RT_FAIL(model, INGOT_ERR_SHAPE, "%s '%.*s': shape %s, expected %s", kind, name, info->name,
                   rt_shape(found, sizeof found, given->shape, given->ndim),
                   rt_shape(wanted, sizeof wanted, info->shape, info->ndim));
}

static ingot_status rt_check_tensor(ingot_model *model, const char *kind, const ingot_tensor *given,
                                    const ingot_tensor_info *info) {
    int name = rt_cut(info->name, 64);
    const uint32_t size = rt_dtypes[info->dtype].bytes;
    if (!given->data && info->bytes)
        return RT_FAIL(model, INGOT_ERR_NULL, "%s '%.*s': data is null", kind, name, info->name);
    if (!given->shape && given->ndim)
        return RT_FAIL(model, INGOT_ERR_NULL, "%s '%.*s': shape is null", kind, name, info->name);
    if (given->device != INGOT_CPU)
        return RT_FAIL(model, INGOT_ERR_DEVICE, "%s '%.*s': device %d, expected %d (CPU)", kind, name, info->name,
                       (int)given->device, INGOT_CPU);
    if (given->dtype != info->dtype)
        return RT_FAIL(model, INGOT_ERR_DTYPE, "%s '%.*s': dtype %s, expected %s", kind, name, info->name,
                       given->dtype >= 0 && given->dtype < RT_DTYPES ? rt_dtypes[given->dtype].name : "unknown",
                       rt_dtypes[info->dtype].name);
    ingot_status status = rt_check_shape(model, kind, given, info);
    if (status) return status;
    if (given->bytes != info->bytes)
        return RT_FAIL(model, INGOT_ERR_BYTES, "%s '%.*s': bytes %llu, expected %llu", kind, name, info->name,
                       (unsigned long long)given->bytes, (unsigned long long)info->bytes);
    if ((uintptr_t)given->data % size)
        return RT_FAIL(model, INGOT_ERR_ALIGNMENT, "%s '%.*s': data at %p, expected a multiple of %u (the size of %s)", kind,
                       name, info->name, given->data, (unsigned)size, rt_dtypes[info->dtype].name);
    return INGOT_OK;
}

static bool rt_overlap(const ingot_tensor *a, const ingot_tensor *b) {
    uintptr_t first = (uintptr_t)a->data, second = (uintptr_t)b->data;
    return a->bytes && b->bytes && (first <= second ? second - first < a->bytes : first - second < b->bytes);
}

/* Kernels are compiled on the promise that what they write is nothing they read. */
static ingot_status rt_check_overlap(ingot_model *model, const ingot_tensor *inputs, const ingot_tensor *outputs) {
    for (int32_t o = 0; o < rt_info.n_outputs; o++) {
        const ingot_tensor_info *info = &rt_info.outputs[o];
        for (int32_t i = 0; i < rt_info.n_inputs + o; i++) {
            bool input = i < rt_info.n_inputs;
            const ingot_tensor_info *other = input ? &rt_info.inputs[i] : &rt_info.outputs[i - rt_info.n_inputs];
            if (rt_overlap(&outputs[o], input ? &inputs[i] : &outputs[i - rt_info.n_inputs]))
                return RT_FAIL(model, INGOT_ERR_OVERLAP, "output '%.*s': memory overlaps that of %s '%.*s'",
                               rt_cut(info->name, 64), info->name, input ? "input" : "output", rt_cut(other->name, 64),
                               other->name);
        }
    }
    return INGOT_OK;
}

static ingot_status rt_check_tensors(ingot_model *model, const char *kind, const ingot_tensor *given, int32_t count,
                                     const ingot_tensor_info *infos, int32_t wanted) {
    ingot_status status = INGOT_OK;
    if (count != wanted)
        return RT_FAIL(model, INGOT_ERR_COUNT, "%d %ss given, expected %d", (int)count, kind, (int)wanted);
    if (count && !given) return RT_FAIL(model, INGOT_ERR_NULL, "%ss is null", kind);
    for (int32_t i = 0; i < count && !status; i++) status = rt_check_tensor(model, kind, &given[i], &infos[i]);
    return status;
}

/* ---- ownership ---------------------------------------------------------------------------------------------- */

/* Claims the instance for this thread. A claim made before a fork belongs to a thread that this process lacks. */
static ingot_status rt_claim(ingot_model *model) {
    int mine = (int)getpid(), found = 0;
    if (!model) return INGOT_ERR_NULL;
    if (atomic_compare_exchange_strong(&model->owner, &found, mine)) return INGOT_OK;
    if (found != mine && atomic_compare_exchange_strong(&model->owner, &found, mine)) return INGOT_OK;
    /* The owner may be writing model->text: point at a constant instead. */
    atomic_store(&model->error, "the instance is already in use by another thread: create one per thread");
    return INGOT_ERR_BUSY;
}

static void rt_release(ingot_model *model) { atomic_store(&model->owner, 0); }

/* ---- state -------------------------------------------------------------------------------------------------- */

static uint8_t *rt_state(ingot_model *model, int32_t half) {
    return (uint8_t *)model + RT_INSTANCE_BYTES + RT_ARENA_BYTES + (half ? (size_t)RT_STATE_BYTES : 0);
}

static void rt_clear(ingot_model *model) {
    model->half = 0;
#ifdef RT_INITIAL_STATE
    memcpy(rt_state(model, 0), rt_weights + RT_INITIAL_STATE, RT_STATE_BYTES);
#else
    memset(rt_state(model, 0), 0, RT_STATE_BYTES);
#endif
}

static ingot_status rt_reset(ingot_model *model) {
    ingot_status status = rt_claim(model);
    if (!status) rt_clear(model), rt_release(model);
    return status;
}

static ingot_status rt_output_shape(ingot_model *model, int32_t output, int64_t *shape) {
    ingot_status status = shape ? rt_claim(model) : INGOT_ERR_NULL;
    if (status) return status;
    if (output < 0 || output >= rt_info.n_outputs) {
        status = RT_FAIL(model, INGOT_ERR_COUNT, "no output %d, there are %d", (int)output, (int)rt_info.n_outputs);
    } else {
        const ingot_tensor_info *info = model->bucket ? &model->bucket->outputs[output] : &rt_info.outputs[output];
        for (int32_t i = 0; i < info->ndim; i++) shape[i] = info->shape[i];
        for (const rt_count *count = rt_counts; count->output >= 0; count++)
            if (count->output == output)
                memcpy(&shape[count->axis], rt_state(model, model->half) + count->offset, sizeof *shape);
    }
    rt_release(model);
    return status;
}

/* ---- the table's functions ---------------------------------------------------------------------------------- */

static ingot_status rt_create(const ingot_options *options, ingot_model **result) {
    static const ingot_options defaults = {.struct_size = sizeof(ingot_options)};
    const bool known = options && options->struct_size >= sizeof(ingot_options);
    char *error = known ? options->error : NULL;
    const size_t size = known && options->error_bytes < SIZE_MAX ? (size_t)options->error_bytes : 0;
    const size_t needed = RT_INSTANCE_BYTES + RT_ARENA_BYTES + 2 * (size_t)RT_STATE_BYTES;
    if (!result) return rt_fail(error, size, INGOT_ERR_NULL, "model is null");
    *result = NULL;
    if (!options) options = &defaults;
    if (options->struct_size < sizeof(ingot_options)) return INGOT_ERR_ABI; /* too old to have room for a message */
    if (options->threads < 0 || options->threads > INGOT_MAX_THREADS)
        return rt_fail(error, size, INGOT_ERR_THREADS, "threads is %d, expected 0 to %d", (int)options->threads,
                       INGOT_MAX_THREADS);
    ingot_status status = rt_check_cpu(error, size);
    if (status) return status;

    void *memory = options->memory;
    if ((uintptr_t)memory % INGOT_MEMORY_ALIGNMENT)
        return rt_fail(error, size, INGOT_ERR_ALIGNMENT, "memory at %p, expected a multiple of %d", memory,
                       INGOT_MEMORY_ALIGNMENT);
    if (memory && options->memory_bytes < needed)
        return rt_fail(error, size, INGOT_ERR_MEMORY, "memory_bytes is %llu, needed are %llu",
                       (unsigned long long)options->memory_bytes, (unsigned long long)needed);
    if (!memory && !(memory = rt_allocate(needed)))
        return rt_fail(error, size, INGOT_ERR_MEMORY, "%llu bytes could not be allocated", (unsigned long long)needed);

    ingot_model *model = memory;
    memset(model, 0, sizeof *model);
    atomic_init(&model->owner, 0);
    atomic_init(&model->error, "");
    model->allocated = !options->memory;
    rt_clear(model);
    int32_t threads = options->threads ? options->threads : rt_cpu_count(true);
    if (threads > INGOT_MAX_THREADS) threads = INGOT_MAX_THREADS;
    status = rt_pool_start(&model->pool, threads, error, size);
    if (status) {
        if (model->allocated) free(model);
        return status;
    }
    *result = model;
    return INGOT_OK;
}

static ingot_status rt_run_claimed(ingot_model *model, const ingot_tensor *inputs, int32_t n_inputs,
                                   const ingot_tensor *outputs, int32_t n_outputs) {
    rt_pool *pool = &model->pool;
    const rt_bucket *bucket = rt_choose(inputs, n_inputs);
    if (!bucket) return RT_FAIL(model, INGOT_ERR_SHAPE, "%s", RT_SIZES);
    ingot_status status = rt_check_tensors(model, "input", inputs, n_inputs, bucket->inputs, rt_info.n_inputs);
    if (!status) status = rt_check_tensors(model, "output", outputs, n_outputs, bucket->outputs, rt_info.n_outputs);
    if (!status) status = rt_check_overlap(model, inputs, outputs);
    if (status) return status;
    if (pool->threads > 1 && (pool->pid != getpid() || pool->started != pool->threads - 1)) {
        atomic_store(&model->error, model->text);
        status = rt_pool_start(pool, pool->threads, model->text, sizeof model->text);
        if (status) return status;
    }
    const rt_frame frame = {rt_weights, (uint8_t *)model + RT_INSTANCE_BYTES,
                            {rt_state(model, model->half), rt_state(model, !model->half)}, inputs, outputs, pool};
    bucket->forward(&frame);
    model->half = !model->half, model->bucket = bucket;
    return INGOT_OK;
}

static ingot_status rt_run(ingot_model *model, const ingot_tensor *inputs, int32_t n_inputs,
                           const ingot_tensor *outputs, int32_t n_outputs) {
    ingot_status status = rt_claim(model);
    if (status) return status;
    status = rt_run_claimed(model, inputs, n_inputs, outputs, n_outputs);
    rt_release(model);
    return status;
}

static ingot_status rt_destroy(ingot_model *model) {
    ingot_status status = rt_claim(model);
    if (status) return status;
    rt_pool_stop(&model->pool);
    if (model->allocated) free(model);
    return INGOT_OK;
}

static ingot_status rt_describe(const ingot_model_info **info) {
    if (!info) return INGOT_ERR_NULL;
    *info = &rt_info;
    return INGOT_OK;
}

static const char *rt_last_error(const ingot_model *model) {
    return model ? atomic_load(&((ingot_model *)(uintptr_t)model)->error) : "model is null";
}

static const char *rt_version(void) { return rt_info.compiler; }
