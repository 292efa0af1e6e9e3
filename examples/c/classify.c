/* classify.c: opens a compiled model at run time, gives it numbers from a text file, prints the best classes.
 *
 *     ingot compile digits.onnx --target native -o digits.so
 *     cc -std=c11 -O2 -I$RUNTIME classify.c $RUNTIME/open.c -o classify -ldl -lpthread
 *     ./classify digits.so ../three.txt
 *
 * $RUNTIME is the folder with ingot.h and open.c; ../README.md says where that is. For models with one float32 input
 * and one float32 output.
 */
#include "ingot_open.h"

#include <stdio.h>
#include <stdlib.h>

static int fail(const char *what, const char *why) {
    fprintf(stderr, "classify: %s: %s\n", what, why);
    return 1;
}

/* Reads exactly `count` numbers; 0 if the file holds fewer. */
static int read_numbers(const char *path, float *to, size_t count) {
    FILE *file = fopen(path, "r");
    size_t i = 0;
    if (!file) return 0;
    while (i < count && fscanf(file, "%f", &to[i]) == 1) i++;
    fclose(file);
    return i == count;
}

static void print_best(const float *scores, size_t count) {
    for (size_t rank = 0; rank < 3 && rank < count; rank++) {
        size_t best = 0;
        for (size_t i = 0; i < count; i++) {
            size_t above = 0; /* how many beat class i */
            for (size_t j = 0; j < count; j++) above += scores[j] > scores[i] || (scores[j] == scores[i] && j < i);
            if (above == rank) best = i;
        }
        printf("class %zu  score %.3f\n", best, (double)scores[best]);
    }
}

int main(int argc, char **argv) {
    if (argc != 3) return fail("usage", "classify model.so numbers.txt");

    char error[256];
    const ingot_api *api;
    if (ingot_open(argv[1], &api, error, sizeof error)) return fail("cannot open", error);

    const ingot_model_info *info;
    api->describe(&info);
    const ingot_tensor_info *in = info->inputs, *out = info->outputs;
    if (info->n_inputs != 1 || info->n_outputs != 1 || in->dtype != INGOT_FLOAT32 || out->dtype != INGOT_FLOAT32)
        return fail(argv[1], "this program is for models with one float32 input and output");

    ingot_model *model;
    const ingot_options options = {sizeof options, 0, NULL, 0, error, sizeof error};
    if (api->create(&options, &model)) return fail("cannot create", error);

    float *input = malloc(in->bytes), *scores = malloc(out->bytes);
    int status = 1;
    if (!input || !scores) {
        fail("cannot run", "not enough memory");
    } else if (!read_numbers(argv[2], input, in->bytes / sizeof *input)) {
        fail(argv[2], "cannot be read, or holds too few numbers");
    } else {
        const ingot_tensor x = {input, in->bytes, in->dtype, in->ndim, in->shape, INGOT_CPU, 0};
        const ingot_tensor y = {scores, out->bytes, out->dtype, out->ndim, out->shape, INGOT_CPU, 0};
        status = api->run(model, &x, 1, &y, 1) ? fail("cannot run", api->last_error(model)) : 0;
    }
    if (!status) print_best(scores, out->bytes / sizeof *scores);

    free(input);
    free(scores);
    api->destroy(model);
    return status;
}
