/* A stand-in for a batch of candidates: it announces one, and then behaves as its arguments say. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

int main(int argc, char **argv) {
    const char *what = argc > 1 ? argv[1] : "ok";
    puts("{\"begin\": 0}");
    puts("{\"candidate\": 0, \"ns\": [100], \"error\": 0, \"noise\": 0}");
    puts("{\"begin\": 1}");
    fflush(stdout);
    if (!strcmp(what, "crash")) abort();
    if (!strcmp(what, "illegal")) __builtin_trap();
    if (!strcmp(what, "status")) return fprintf(stderr, "no memory\n"), 3;
    if (!strcmp(what, "sleep")) sleep(argc > 2 ? (unsigned)atoi(argv[2]) : 1000);
    for (volatile unsigned n = 0; !strcmp(what, "hang"); n++) continue;
    while (!strcmp(what, "spam")) puts("a line without an end to what follows it, again and again and again");
    if (!strcmp(what, "garbage")) return fwrite("\x1b[2J\xff\xfe\0x\n{\"candi", 1, 16, stdout) != 16;
    if (!strcmp(what, "arguments"))
        for (int i = 2; i < argc; i++) puts(argv[i]);
    puts("{\"candidate\": 1, \"ns\": [200], \"error\": 0, \"noise\": 0}");
    return 0;
}
