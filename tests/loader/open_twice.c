/* open_twice.c: what ingot_open promises about one process: the same table for the same file, descriptors kept, a file
 * that was replaced is a new one, null arguments are refused. Ends with the line number of what failed.
 *
 *     open_twice A.so B.so PLACE     A and B are different models of different names; PLACE does not exist
 */
#define _GNU_SOURCE 1
#include "ingot_open.h"

#include <dirent.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define CHECK(condition) \
    do { \
        if (!(condition)) { \
            fprintf(stderr, "line %d: %s: %s\n", __LINE__, #condition, error); \
            return 1; \
        } \
    } while (0)

static int descriptors(void) {
    int count = 0;
    DIR *folder = opendir("/proc/self/fd");
    while (folder && readdir(folder)) count++;
    if (folder) closedir(folder);
    return count;
}

static const char *name_of(const ingot_api *api) {
    const ingot_model_info *info;
    return api->describe(&info) == INGOT_OK ? info->name : "";
}

static void *open_in_thread(void *path) {
    const ingot_api *api = NULL;
    return ingot_open(path, &api, NULL, 0) == INGOT_OK ? (void *)(size_t)api : NULL;
}

int main(int argc, char **argv) {
    char error[256] = "", small[8];
    const ingot_api *a = NULL, *b = NULL, *again = NULL;
    pthread_t threads[8];
    CHECK(argc == 4);
    CHECK(ingot_open(NULL, &a, error, sizeof error) == INGOT_ERR_NULL && !a);
    CHECK(ingot_open(argv[1], NULL, error, sizeof error) == INGOT_ERR_NULL);
    CHECK(ingot_open(argv[3], &a, NULL, 0) == INGOT_ERR_LOAD && !a);
    CHECK(ingot_open(argv[3], &a, small, sizeof small) == INGOT_ERR_LOAD && strlen(small) < sizeof small);

    CHECK(symlink(argv[1], argv[3]) == 0);
    CHECK(ingot_open(argv[3], &a, error, sizeof error) == INGOT_OK && a);
    const int before = descriptors();
    CHECK(ingot_open(argv[1], &again, error, sizeof error) == INGOT_OK && again == a); /* the same file by another name */
    CHECK(descriptors() == before);
    CHECK(ingot_open(argv[0], &again, error, sizeof error) == INGOT_ERR_LOAD && !again && descriptors() == before);

    /* A program that closes every descriptor: the next file gets the number that was the first library's name. */
    for (int fd = 3; fd < 64; fd++) close(fd);
    CHECK(unlink(argv[3]) == 0 && symlink(argv[2], argv[3]) == 0);
    for (size_t i = 0; i < 8; i++) CHECK(pthread_create(&threads[i], NULL, open_in_thread, argv[3]) == 0);
    CHECK(ingot_open(argv[3], &b, error, sizeof error) == INGOT_OK && b && b != a);
    for (size_t i = 0; i < 8; i++) {
        void *found;
        CHECK(pthread_join(threads[i], &found) == 0 && found == (void *)(size_t)b);
    }
    CHECK(strcmp(name_of(a), name_of(b)) != 0);

    /* Changed in place: the pages of the loaded library have changed with it. */
    FILE *file = fopen(argv[2], "r+b");
    CHECK(file && fseek(file, 0, SEEK_END) == 0 && fputc('\n', file) == '\n' && fclose(file) == 0);
    CHECK(ingot_open(argv[2], &again, error, sizeof error) == INGOT_ERR_LOAD && strstr(error, "changed in place"));
    return 0;
}
