/* cpu.c: does this machine have what the model was compiled for, and how many CPUs may it use? */

#include "ingot_features.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Reads a small file whole; returns its length, 0 if it cannot be read. Plain read(): stdio would allocate. */
static size_t rt_read_file(const char *path, char *text, size_t size) {
    size_t used = 0;
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file >= 0) {
        ssize_t got;
        while (used + 1 < size && (got = read(file, text + used, size - 1 - used)) > 0) used += (size_t)got;
        close(file);
    }
    text[used] = '\0';
    return used;
}

/* ---- CPU features ------------------------------------------------------------------------------------------- */

/* Checks every feature the model was compiled for, and asks Linux for AMX tiles: for all threads of the process. */
static ingot_status rt_check_cpu(char *error, size_t error_size) {
    char missing[256] = "";
    size_t used = 0;
    bool tiles = false;
    rt_cpu cpu;
    rt_read_cpu(&cpu);
    for (const char *name = rt_info.features; *name;) {
        const size_t length = strcspn(name, " ");
        if (!rt_cpu_has(&cpu, name, length) && used + length + 2 < sizeof missing) {
            missing[used++] = ' ';
            memcpy(missing + used, name, length);
            used += length;
        }
        tiles |= length == 8 && !memcmp(name, "amx-tile", 8);
        name += length;
        name += *name == ' ';
    }
    if (used)
        return rt_fail(error, error_size, INGOT_ERR_CPU, "this CPU lacks%s, which the model needs: it was compiled for '%s'",
                       missing, rt_info.target);
#if defined(__x86_64__)
    if (tiles && syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) != 0)
        return rt_fail(error, error_size, INGOT_ERR_CPU,
                       "Linux refused this process AMX tiles (errno %d), which the model needs: it was compiled for '%s'; Linux "
                       "5.16 gives them where arch_prctl is allowed, else compile for x86-64-v4", errno, rt_info.target);
#endif
    (void)tiles;
    return INGOT_OK;
}

/* ---- how many CPUs ------------------------------------------------------------------------------------------ */

/* The CPUs worth of time that one cgroup folder allows, rounded up; 0 if it sets no limit. `v2`: "QUOTA PERIOD" in
 * cpu.max, where QUOTA may be "max"; else two files, with -1 for no limit. */
static int64_t rt_quota_of(const char *folder, size_t length, bool v2) {
    char path[1200], text[64];
    char *end;
    if (length + 32 > sizeof path) return 0;
    memcpy(path, folder, length);
    strcpy(path + length, v2 ? "/cpu.max" : "/cpu.cfs_quota_us");
    if (!rt_read_file(path, text, sizeof text)) return 0;
    const int64_t quota = strtoll(text, &end, 10);
    if (!v2) {
        strcpy(path + length, "/cpu.cfs_period_us");
        if (!rt_read_file(path, text, sizeof text)) return 0;
        end = text;
    }
    const int64_t period = strtoll(end, NULL, 10);
    return quota > 0 && period > 0 ? quota / period + (quota % period != 0) : 0;
}

/* The smallest limit from this process's cgroup up to the root. `self` is /proc/self/cgroup, `mount` /sys/fs/cgroup.
 * In a container the path may name a folder of the host that is not visible here: what cannot be read sets no limit. */
static int64_t rt_cgroup_limit(const char *self, const char *mount) {
    char text[4096], folder[1024];
    int64_t limit = 0;
    rt_read_file(self, text, sizeof text);
    for (char *line = text; *line;) {
        char *next = line + strcspn(line, "\n");
        if (*next) *next++ = '\0';
        char *controllers = strchr(line, ':');
        char *path = controllers ? strchr(controllers + 1, ':') : NULL;
        if (path) {
            *path++ = '\0'; /* "0::/path" is version 2, "4:cpu,cpuacct:/path" version 1 */
            bool v2 = controllers[1] == '\0', cpu = false;
            for (char *name = controllers + 1; !v2 && *name; name += strcspn(name, ",") + (strchr(name, ',') != NULL))
                cpu |= strcspn(name, ",") == 3 && !memcmp(name, "cpu", 3);
            size_t root = strlen(mount) + (v2 ? 0 : 4), length = root + strlen(path);
            if ((v2 || cpu) && length + 1 < sizeof folder) {
                strcpy(folder, mount);
                strcat(folder, v2 ? "" : "/cpu");
                strcat(folder, path);
                for (;; length--) { /* this folder, then each parent */
                    if (length == root || folder[length] == '/' || folder[length] == '\0') {
                        int64_t here = rt_quota_of(folder, length, v2);
                        if (here && (!limit || here < limit)) limit = here;
                    }
                    if (length == root) break;
                }
            }
        }
        line = next;
    }
    return limit;
}

/* A set of CPUs, one bit each: up to 8,192, since calls fail with a smaller set than the kernel's. */
#define RT_WORD_BITS (8 * (int32_t)sizeof(unsigned long))
#define RT_CPUS 8192
#define RT_SYSFS_CPUS "/sys/devices/system/cpu"
typedef unsigned long rt_cpus[RT_CPUS / (8 * sizeof(unsigned long))];

/* The CPUs the calling thread may run on, and how many: 0 if Linux does not say. */
static int32_t rt_affinity(unsigned long *cpus) {
    int32_t count = 0;
    memset(cpus, 0, sizeof(rt_cpus));
    if (sched_getaffinity(0, sizeof(rt_cpus), (cpu_set_t *)(void *)cpus) != 0) return 0;
    for (int32_t i = 0; i < RT_CPUS / RT_WORD_BITS; i++)
        for (unsigned long bits = cpus[i]; bits; bits &= bits - 1) count++;
    return count;
}

/* Takes the slow cores of a big.LITTLE board out of a set of `count` CPUs and returns how many are left: those with at
 * least three quarters of the best one's capacity, which Linux measures against the fastest core of the machine. Where
 * one capacity is not known, or is nonsense, or the machine is larger than any such board, all count as alike. */
static int32_t rt_fast_only(unsigned long *cpus, int32_t count, const char *folder) {
    long capacity[INGOT_MAX_THREADS], best = 0;
    int32_t known = 0, fast = 0;
    char path[256], text[32];
    if (count > INGOT_MAX_THREADS || strlen(folder) > sizeof path - 32) return count;
    for (int32_t i = 0; i < RT_CPUS && known < count; i++) {
        if (!(cpus[i / RT_WORD_BITS] >> i % RT_WORD_BITS & 1)) continue;
        snprintf(path, sizeof path, "%s/cpu%d/cpu_capacity", folder, (int)i);
        if (!rt_read_file(path, text, sizeof text)) return count; /* as on x86: one attempt */
        capacity[known] = strtol(text, NULL, 10);
        if (capacity[known] < 1 || capacity[known] > 1 << 16) return count;
        if (capacity[known] > best) best = capacity[known];
        known++;
    }
    for (int32_t i = 0, seen = 0; i < RT_CPUS && seen < known; i++) {
        unsigned long *word = &cpus[i / RT_WORD_BITS], bit = 1UL << i % RT_WORD_BITS;
        if (!(*word & bit)) continue;
        if (4 * capacity[seen++] < 3 * best) *word &= ~bit;
        else fast++;
    }
    return fast;
}

/* How many threads this process can really run at once; with `fast`, on its fast cores. */
static int32_t rt_cpu_count(bool fast) {
    rt_cpus cpus;
    int32_t count = rt_affinity(cpus);
    if (fast) count = rt_fast_only(cpus, count, RT_SYSFS_CPUS);
    if (count < 1) count = 1;
    int64_t limit = rt_cgroup_limit("/proc/self/cgroup", "/sys/fs/cgroup");
    return limit && limit < count ? (int32_t)limit : count;
}

/* Whether `threads` threads should be kept on `cpus`, the fast cores, because they all fit there: Linux starts a thread
 * on any core, and moves it only once it has been busy for longer than an inference takes. Not where cores are alike. */
static bool rt_fits_fast(unsigned long *cpus, int32_t threads) {
    const int32_t count = rt_affinity(cpus), fast = rt_fast_only(cpus, count, RT_SYSFS_CPUS);
    return threads <= fast && fast < count;
}
