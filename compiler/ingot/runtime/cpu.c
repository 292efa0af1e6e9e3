/* cpu.c: does this machine have what the model was compiled for, and how many CPUs may it use? */

#include "ingot_features.h"

#include <errno.h>
#include <fcntl.h>
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

/* The CPUs this process may run on. */
static int32_t rt_affinity_count(void) {
    unsigned long mask[128] = {0}; /* 8,192 CPUs: with a smaller mask than the kernel's the call fails */
    int32_t count = 0;
    if (sched_getaffinity(0, sizeof mask, (cpu_set_t *)(void *)mask) != 0) return 1;
    for (size_t i = 0; i < sizeof mask / sizeof mask[0]; i++)
        for (unsigned long bits = mask[i]; bits; bits &= bits - 1) count++;
    return count > 0 ? count : 1;
}

/* How many threads this process can really run at once. */
static int32_t rt_cpu_count(void) {
    int32_t count = rt_affinity_count();
    int64_t limit = rt_cgroup_limit("/proc/self/cgroup", "/sys/fs/cgroup");
    return limit && limit < count ? (int32_t)limit : count;
}
