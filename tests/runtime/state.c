/* Drives the model of test_state.py: y = s + x, and s becomes y; s starts as 10, 20, 30. z are the x above 1. */
#include "ingot.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CHECK(condition) \
    do { \
        if (!(condition)) { \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
            exit(1); \
        } \
    } while (0)

const ingot_api *ingot_sum_api(void);

static const int64_t shape[] = {3};

/* One run; whether y is x, twice x, ... `times` times, on top of the first state. */
static int adds_up(const ingot_api *api, ingot_model *model, float times) {
    float x[3] = {1, 2, 3}, y[3] = {0, 0, 0}, z[3] = {9, 9, 9};
    const ingot_tensor in = {x, sizeof x, INGOT_FLOAT32, 1, shape, INGOT_CPU, 0};
    const ingot_tensor out[] = {{y, sizeof y, INGOT_FLOAT32, 1, shape, INGOT_CPU, 0},
                                {z, sizeof z, INGOT_FLOAT32, 1, shape, INGOT_CPU, 0}};
    CHECK(api->run(model, &in, 1, out, 2) == INGOT_OK);
    for (int i = 0; i < 3; i++)
        if (y[i] != (float)(10 * (i + 1)) + times * x[i]) return 0;
    return 1;
}

/* The model also takes x of two elements, and of no other number. */
static void other_shapes(const ingot_api *api, ingot_model *model) {
    static const int64_t two[] = {2}, four[] = {4};
    int64_t sizes[INGOT_MAX_NDIM] = {-1};
    float x[4] = {5, 0.5f, 0, 0}, y[2], z[2];
    ingot_tensor in = {x, 2 * sizeof *x, INGOT_FLOAT32, 1, two, INGOT_CPU, 0};
    ingot_tensor out[] = {{y, sizeof y, INGOT_FLOAT32, 1, two, INGOT_CPU, 0},
                          {z, sizeof z, INGOT_FLOAT32, 1, two, INGOT_CPU, 0}};
    ingot_model *own;
    CHECK(api->create(NULL, &own) == INGOT_OK);
    CHECK(api->run(own, &in, 1, out, 2) == INGOT_OK && y[0] == 15 && y[1] == 20.5f && z[0] == 5 && z[1] == 0);
    CHECK(api->output_shape(own, 0, sizes) == INGOT_OK && sizes[0] == 2);
    CHECK(api->output_shape(own, 1, sizes) == INGOT_OK && sizes[0] == 1);
    CHECK(api->destroy(own) == INGOT_OK);
    out[0].shape = shape; /* of the other bucket */
    CHECK(api->run(model, &in, 1, out, 2) == INGOT_ERR_SHAPE && strstr(api->last_error(model), "output 'y'"));
    in.shape = four, in.bytes = sizeof x;
    CHECK(api->run(model, &in, 1, out, 2) == INGOT_ERR_SHAPE);
    CHECK(strstr(api->last_error(model), "none of the compiled shapes: x [2]; x [3]"));
    in.shape = NULL;
    CHECK(api->run(model, &in, 1, out, 2) == INGOT_ERR_SHAPE);
    in.ndim = -1;
    CHECK(api->run(model, &in, 1, out, 2) == INGOT_ERR_SHAPE);
    CHECK(api->run(model, &in, 2, out, 2) == INGOT_ERR_COUNT);
}

int main(void) {
    const ingot_api *api = ingot_sum_api();
    const ingot_model_info *info;
    ingot_model *a, *b;
    double error = -1;
    CHECK(api->struct_size == sizeof(ingot_api) && api->describe(&info) == INGOT_OK);
    CHECK(info->struct_size == sizeof *info && info->n_inputs == 1 && info->n_outputs == 2);
    CHECK(info->state_bytes == 128 && !strcmp(info->inputs[0].name, "x") && !strcmp(info->outputs[0].name, "y"));

    /* Memory of the caller's, full of what was there before. */
    void *memory = aligned_alloc(64, (size_t)info->memory_bytes);
    CHECK(memory);
    memset(memory, 0xab, (size_t)info->memory_bytes);
    const ingot_options options = {
        .struct_size = sizeof options, .threads = 2, .memory = memory, .memory_bytes = info->memory_bytes};
    CHECK(api->create(&options, &a) == INGOT_OK && api->create(NULL, &b) == INGOT_OK);

    int64_t sizes[INGOT_MAX_NDIM] = {-1};
    CHECK(api->output_shape(a, 1, sizes) == INGOT_OK && sizes[0] == 0);
    CHECK(adds_up(api, a, 1) && adds_up(api, a, 2) && adds_up(api, a, 3));
    CHECK(api->output_shape(a, 1, sizes) == INGOT_OK && sizes[0] == 2); /* not all of x are above 1 */
    CHECK(api->output_shape(a, 0, sizes) == INGOT_OK && sizes[0] == 3);
    CHECK(api->output_shape(a, 2, sizes) == INGOT_ERR_COUNT && api->output_shape(a, -1, sizes) == INGOT_ERR_COUNT);
    CHECK(api->output_shape(a, 0, NULL) == INGOT_ERR_NULL && api->output_shape(NULL, 0, sizes) == INGOT_ERR_NULL);
    CHECK(adds_up(api, b, 1)); /* each instance has its own */
    CHECK(api->run(a, NULL, 1, NULL, 2) == INGOT_ERR_NULL);
    other_shapes(api, a);
    CHECK(adds_up(api, a, 4)); /* a refused run changes nothing */
    CHECK(api->reset(NULL) == INGOT_ERR_NULL && api->reset(a) == INGOT_OK);
    CHECK(adds_up(api, a, 1) && adds_up(api, a, 2));
    CHECK(api->selftest(a, &error) == INGOT_OK && error == 0);
    CHECK(adds_up(api, a, 1)); /* the selftest leaves a fresh state */
    CHECK(adds_up(api, b, 2));
    CHECK(api->destroy(a) == INGOT_OK && api->destroy(b) == INGOT_OK);
    free(memory);
    return 0;
}
