/* A stand-in for a batch of candidates: it announces one, and then behaves as its arguments say. */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* Executed instructions of `rounds` rounds of a loop, by the emulator's counter; 0 where there is none. */
static unsigned long long count(long rounds) {
    const char *path = getenv("INGOT_COUNTER");
    int fd = path ? open(path, O_RDONLY) : -1;
    if (fd < 0) return 0;
    const volatile uint64_t *counter = mmap(NULL, 8, PROT_READ, MAP_SHARED, fd, 0);
    if (counter == MAP_FAILED) return 0;
    uint64_t before = *counter;
    for (volatile long n = rounds; n; n--) continue;
    return *counter - before;
}

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
    if (!strcmp(what, "count")) printf("%llu\n%llu\n", count(1000), count(11000));
    if (!strcmp(what, "arguments"))
        for (int i = 2; i < argc; i++) puts(argv[i]);
    if (!strcmp(what, "wrong")) return puts("{\"candidate\": 1, \"ns\": [1], \"error\": 0.5, \"noise\": 0}") < 0;
    puts("{\"candidate\": 1, \"ns\": [200], \"error\": 0, \"noise\": 0}");
    return 0;
}
