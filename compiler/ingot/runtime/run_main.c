/* run_main.c: a program that runs a model on raw files, once or several times in a row. It is not part of any artifact: `ingot.emulator` builds it
 * to run artifacts of other architectures under qemu-user, and it works the same on the board itself.
 *
 *     run_main MODEL.so SYMBOL THREADS FOLDER RUNS     reads FOLDER/in0, in1, ...; writes FOLDER/out0, out1, ...
 *
 * Each file holds the tensors of all runs, one after the other; FOLDER/shapes the outputs' shapes, INGOT_MAX_NDIM numbers
 * of 64 bits for each output of each run.
 *
 * Ends with 0, or with 1 and one sentence on standard error. The caller has checked the file's metadata; `create`
 * checks the CPU.
 */
#define _POSIX_C_SOURCE 200809L
#include "ingot.h"

#include <dlfcn.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

enum { ALIGNMENT = 64, PATH_BYTES = 4096 };

static _Noreturn void fail(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fputc('\n', stderr);
    exit(1);
}

static FILE *open_file(const char *folder, const char *side, int32_t i, const char *mode) {
    char path[PATH_BYTES];
    const int n = snprintf(path, sizeof path, "%s/%s%d", folder, side, (int)i);
    if (n < 0 || n >= PATH_BYTES) fail("the folder's path is too long");
    FILE *file = fopen(path, mode);
    if (!file) fail("cannot open %s", path);
    return file;
}

/* The tensors of one side, with aligned memory of their own. */
static ingot_tensor *tensors(const ingot_tensor_info *info, int32_t count) {
    ingot_tensor *all = calloc((size_t)count + 1, sizeof *all);
    if (!all) fail("out of memory");
    for (int32_t i = 0; i < count; i++) {
        /* aligned_alloc takes multiples of the alignment only, and none for an empty tensor would be null. */
        const size_t room = ((size_t)info[i].bytes + ALIGNMENT) / ALIGNMENT * ALIGNMENT;
        if (posix_memalign(&all[i].data, ALIGNMENT, room)) fail("out of memory for tensor %s", info[i].name);
        all[i].bytes = info[i].bytes;
        all[i].dtype = info[i].dtype;
        all[i].ndim = info[i].ndim;
        all[i].shape = info[i].shape;
        all[i].device = INGOT_CPU;
    }
    return all;
}

int main(int argc, char **argv) {
    if (argc != 6) fail("usage: run_main MODEL.so SYMBOL THREADS FOLDER RUNS");
    void *library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
    if (!library) fail("%s", dlerror());
    const ingot_api *(*get)(void) = NULL;
    *(void **)&get = dlsym(library, argv[2]); /* the cast POSIX prescribes: C has none from object to function */
    if (!get) fail("%s is not exported", argv[2]);
    const ingot_api *api = get();
    if (api->abi_version != INGOT_ABI_VERSION) fail("the artifact has ABI %u", (unsigned)api->abi_version);
    const ingot_model_info *info = NULL;
    if (api->describe(&info) != INGOT_OK) fail("describe failed");

    char error[512] = "";
    const ingot_options options = {
        .struct_size = sizeof options, .threads = atoi(argv[3]), .error = error, .error_bytes = sizeof error};
    ingot_model *model = NULL;
    const ingot_status created = api->create(&options, &model);
    if (created != INGOT_OK) fail("%s (status %d)", error, (int)created);

    ingot_tensor *in = tensors(info->inputs, info->n_inputs), *out = tensors(info->outputs, info->n_outputs);
    const long runs = atol(argv[5]);
    FILE **files = calloc((size_t)(info->n_inputs + info->n_outputs) + 1, sizeof *files);
    if (!files) fail("out of memory");
    FILE **results = files + info->n_inputs;
    for (int32_t i = 0; i < info->n_inputs; i++) files[i] = open_file(argv[4], "in", i, "rb");
    for (int32_t i = 0; i < info->n_outputs; i++) results[i] = open_file(argv[4], "out", i, "wb");
    char path[PATH_BYTES];
    snprintf(path, sizeof path, "%s/shapes", argv[4]);
    FILE *shapes = fopen(path, "wb");
    if (!shapes) fail("cannot open %s", path);
    for (long run = 0; run < runs; run++) {
        for (int32_t i = 0; i < info->n_inputs; i++)
            if (fread(in[i].data, 1, (size_t)in[i].bytes, files[i]) != in[i].bytes)
                fail("the file of input %s does not have %ld x %llu bytes", info->inputs[i].name, runs,
                     (unsigned long long)in[i].bytes);
        const ingot_status status = api->run(model, in, info->n_inputs, out, info->n_outputs);
        if (status != INGOT_OK) fail("%s (status %d)", api->last_error(model), (int)status);
        for (int32_t i = 0; i < info->n_outputs; i++) {
            int64_t shape[INGOT_MAX_NDIM] = {0};
            if (api->output_shape(model, i, shape) != INGOT_OK) fail("%s", api->last_error(model));
            if (fwrite(out[i].data, 1, (size_t)out[i].bytes, results[i]) != out[i].bytes ||
                fwrite(shape, sizeof shape, 1, shapes) != 1)
                fail("cannot write output %s", info->outputs[i].name);
        }
    }
    for (int32_t i = 0; i < info->n_inputs; i++) {
        if (fgetc(files[i]) != EOF) fail("the file of input %s is too long", info->inputs[i].name);
        fclose(files[i]);
    }
    for (int32_t i = 0; i < info->n_outputs; i++)
        if (fclose(results[i])) fail("cannot write output %s", info->outputs[i].name);
    if (fclose(shapes)) fail("cannot write %s", path);
    free(files);
    for (int32_t i = 0; i < info->n_inputs; i++) free(in[i].data);
    for (int32_t i = 0; i < info->n_outputs; i++) free(out[i].data);
    free(in);
    free(out);
    api->destroy(model);
    return 0;
}
