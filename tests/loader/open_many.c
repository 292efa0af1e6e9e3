/* open_many.c: opens each artifact named, in a process of its own; prints "STATUS MESSAGE", or "CRASH" with how it ended.
 * An artifact that opens also runs its selftest.
 */
#define _GNU_SOURCE 1
#include "ingot_open.h"

#include <stdio.h>
#include <sys/wait.h>
#include <unistd.h>

static int open_one(const char *path) {
    char error[400] = "";
    const ingot_api *api;
    int status = ingot_open(path, &api, error, sizeof error);
    if (!status) {
        const ingot_options options = {sizeof options, 1, NULL, 0, error, sizeof error};
        ingot_model *model;
        status = api->create(&options, &model);
        if (!status) {
            status = api->selftest(model, NULL);
            if (status) snprintf(error, sizeof error, "%s", api->last_error(model));
            api->destroy(model);
        }
    }
    printf("%d %s\n", status, error);
    fflush(stdout);
    return 0;
}

int main(int argc, char **argv) {
    for (int i = 1; i < argc; i++) {
        int how = 0;
        fflush(stdout);
        pid_t child = fork();
        if (!child) _exit(open_one(argv[i]));
        if (child < 0 || waitpid(child, &how, 0) != child || how) printf("CRASH %d\n", how);
    }
    return 0;
}
