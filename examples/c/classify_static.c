/* classify_static.c: the model is part of the program. No file to find, no dlopen, and no heap: the model works in
 * memory whose size its header gives as a constant. For the digits model of the quickstart.
 *
 *     ingot compile digits.onnx --target native --emit a -o libdigits.a
 *     ingot compile digits.onnx --target native --emit c-header -o digits.h
 *     cc -std=c11 -O2 -I. classify_static.c libdigits.a -o classify_static -lm -lpthread
 *     ./classify_static < ../three.txt
 */
#include "digits.h"

#include <stdio.h>

static _Alignas(INGOT_MEMORY_ALIGNMENT) unsigned char memory[INGOT_DIGITS_MEMORY_BYTES];

int main(void) {
    static const int64_t image_shape[] = {1, 1, 8, 8}, scores_shape[] = {1, 10};
    float image[64], scores[10];
    const ingot_tensor x = {image, sizeof image, INGOT_FLOAT32, 4, image_shape, INGOT_CPU, 0};
    const ingot_tensor y = {scores, sizeof scores, INGOT_FLOAT32, 2, scores_shape, INGOT_CPU, 0};

    char error[256] = "";
    const ingot_options options = {sizeof options, 1, memory, sizeof memory, error, sizeof error};
    const ingot_api *api = ingot_digits_api();
    ingot_model *model;
    if (api->create(&options, &model)) {
        fprintf(stderr, "cannot create: %s\n", error);
        return 1;
    }

    for (int i = 0; i < 64; i++)
        if (scanf("%f", &image[i]) != 1) {
            fprintf(stderr, "64 numbers are needed, %d were given\n", i);
            return 1;
        }
    if (api->run(model, &x, 1, &y, 1)) {
        fprintf(stderr, "cannot run: %s\n", api->last_error(model));
        return 1;
    }
    int best = 0;
    for (int i = 1; i < 10; i++)
        if (scores[i] > scores[best]) best = i;
    printf("class %d  score %.3f\n", best, (double)scores[best]);
    api->destroy(model);
    return 0;
}
