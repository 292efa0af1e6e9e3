/* cpu.c: does this machine have what the model was compiled for, and how many CPUs may it use? */

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/auxv.h>
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

#if defined(__x86_64__)
#include <cpuid.h>

enum { RT_EAX, RT_EBX, RT_ECX, RT_EDX };
enum { RT_STATE_AVX = 0x6, RT_STATE_AVX512 = 0xe6, RT_STATE_AMX = 0x60000 };

/* Where CPUID says it, and which register state the operating system must save for it (XCR0). */
typedef struct rt_feature {
    const char *name;
    uint32_t leaf, subleaf, reg, bit, state;
} rt_feature;

static const rt_feature rt_features[] = {
    {"sse3", 1, 0, RT_ECX, 0, 0},
    {"ssse3", 1, 0, RT_ECX, 9, 0},
    {"fma", 1, 0, RT_ECX, 12, RT_STATE_AVX},
    {"cx16", 1, 0, RT_ECX, 13, 0},
    {"sse4.1", 1, 0, RT_ECX, 19, 0},
    {"sse4.2", 1, 0, RT_ECX, 20, 0},
    {"movbe", 1, 0, RT_ECX, 22, 0},
    {"popcnt", 1, 0, RT_ECX, 23, 0},
    {"avx", 1, 0, RT_ECX, 28, RT_STATE_AVX},
    {"f16c", 1, 0, RT_ECX, 29, RT_STATE_AVX},
    {"bmi", 7, 0, RT_EBX, 3, 0},
    {"avx2", 7, 0, RT_EBX, 5, RT_STATE_AVX},
    {"bmi2", 7, 0, RT_EBX, 8, 0},
    {"avx512f", 7, 0, RT_EBX, 16, RT_STATE_AVX512},
    {"avx512dq", 7, 0, RT_EBX, 17, RT_STATE_AVX512},
    {"avx512cd", 7, 0, RT_EBX, 28, RT_STATE_AVX512},
    {"avx512bw", 7, 0, RT_EBX, 30, RT_STATE_AVX512},
    {"avx512vl", 7, 0, RT_EBX, 31, RT_STATE_AVX512},
    {"avx512vnni", 7, 0, RT_ECX, 11, RT_STATE_AVX512},
    {"amx-bf16", 7, 0, RT_EDX, 22, RT_STATE_AMX},
    {"avx512fp16", 7, 0, RT_EDX, 23, RT_STATE_AVX512},
    {"amx-tile", 7, 0, RT_EDX, 24, RT_STATE_AMX},
    {"amx-int8", 7, 0, RT_EDX, 25, RT_STATE_AMX},
    {"avxvnni", 7, 1, RT_EAX, 4, RT_STATE_AVX},
    {"avx512bf16", 7, 1, RT_EAX, 5, RT_STATE_AVX512},
    {"lzcnt", 0x80000001u, 0, RT_ECX, 5, 0},
};

static bool rt_feature_present(const rt_feature *feature) {
    uint32_t regs[4] = {0, 0, 0, 0};
    if (!__get_cpuid_count(1, 0, &regs[0], &regs[1], &regs[2], &regs[3])) return false;
    uint32_t state = 0, high = 0;
    if (regs[RT_ECX] >> 27 & 1) __asm__ volatile("xgetbv" : "=a"(state), "=d"(high) : "c"(0)); /* OSXSAVE */
    if ((state & feature->state) != feature->state) return false;
    return __get_cpuid_count(feature->leaf, feature->subleaf, &regs[0], &regs[1], &regs[2], &regs[3]) &&
           (regs[feature->reg] >> feature->bit & 1);
}

#elif defined(__riscv)

/* Letters are bits of AT_HWCAP; the longer names are bits of the hwprobe system call's IMA_EXT_0 word. */
typedef struct rt_feature {
    const char *name;
    uint64_t hwcap, hwprobe;
} rt_feature;

static const rt_feature rt_features[] = {
    {"m", 1u << ('m' - 'a'), 0}, {"a", 1u << 0, 0},           {"f", 1u << ('f' - 'a'), 0},
    {"d", 1u << ('d' - 'a'), 0}, {"c", 1u << ('c' - 'a'), 0}, {"v", 1u << ('v' - 'a'), 0},
    {"zba", 0, 1u << 3},         {"zbb", 0, 1u << 4},         {"zbs", 0, 1u << 5},
    {"zfh", 0, 1u << 27},
};

static bool rt_feature_present(const rt_feature *feature) {
    struct { int64_t key; uint64_t value; } probe = {4, 0}; /* RISCV_HWPROBE_KEY_IMA_EXT_0 */
    if (feature->hwcap) return (getauxval(AT_HWCAP) & feature->hwcap) == feature->hwcap;
    /* Kernels before 6.4 cannot tell: believe the target then, as its board is known to have the extension. */
    if (syscall(258, &probe, 1, 0, NULL, 0) != 0 || probe.key != 4) return true;
    return (probe.value & feature->hwprobe) == feature->hwprobe;
}

#else

/* Bits of AT_HWCAP and AT_HWCAP2 as numbers: a target's own headers may be older than its CPU. */
typedef struct rt_feature {
    const char *name;
    unsigned long hwcap, hwcap2;
} rt_feature;

static const rt_feature rt_features[] = {
#if defined(__aarch64__)
    {"neon", 1ul << 1, 0},
    {"aes", 1ul << 3 | 1ul << 4, 0}, /* AES and PMULL */
    {"sha2", 1ul << 5 | 1ul << 6, 0}, /* SHA1 and SHA256 */
    {"crc", 1ul << 7, 0},
    {"lse", 1ul << 8, 0},
    {"fullfp16", 1ul << 9 | 1ul << 10, 0}, /* scalar and vector */
    {"rdm", 1ul << 12, 0},
    {"rcpc", 1ul << 15, 0},
    {"dotprod", 1ul << 20, 0},
    {"sve", 1ul << 22, 0},
    {"fp16fml", 1ul << 23, 0},
    {"sve2", 0, 1ul << 1},
    {"i8mm", 0, 1ul << 13},
    {"bf16", 0, 1ul << 14},
#elif defined(__arm__)
    {"thumb2", 1ul << 1, 0}, /* Linux has a bit for Thumb only; version 2 comes with ARMv7, the baseline */
    {"neon", 1ul << 12, 0},
    {"vfp3", 1ul << 13, 0},
    {"vfp4", 1ul << 16, 0},
    {"hwdiv", 1ul << 17 | 1ul << 18, 0}, /* in ARM and in Thumb state */
#else
#error "ingot's runtime knows x86_64, aarch64, arm and riscv64"
#endif
};

static bool rt_feature_present(const rt_feature *feature) {
    return (getauxval(AT_HWCAP) & feature->hwcap) == feature->hwcap &&
           (getauxval(AT_HWCAP2) & feature->hwcap2) == feature->hwcap2;
}

#endif

static bool rt_has_feature(const char *name, size_t length) {
    for (size_t i = 0; i < sizeof rt_features / sizeof rt_features[0]; i++)
        if (strlen(rt_features[i].name) == length && !memcmp(rt_features[i].name, name, length))
            return rt_feature_present(&rt_features[i]);
    return false; /* a name this runtime does not know cannot be promised */
}

/* Checks every feature the model was compiled for, and asks Linux for AMX tiles: threads started before that would
 * not get them. */
static ingot_status rt_check_cpu(char *error, size_t error_size) {
    bool tiles = false;
    for (const char *name = rt_info.features; *name;) {
        size_t length = strcspn(name, " ");
        if (length && !rt_has_feature(name, length))
            return rt_fail(error, error_size, INGOT_ERR_CPU,
                           "this CPU lacks '%.*s', which the model needs: it was compiled for '%s'", (int)length, name,
                           rt_info.target);
        tiles |= length == 8 && !memcmp(name, "amx-tile", 8);
        name += length;
        name += *name == ' ';
    }
#if defined(__x86_64__)
    if (tiles && syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) != 0)
        return rt_fail(error, error_size, INGOT_ERR_CPU,
                       "Linux refused the use of AMX tiles (errno %d): it needs version 5.16", errno);
#endif
    (void)tiles;
    return INGOT_OK;
}

/* ---- how many CPUs ------------------------------------------------------------------------------------------ */

/* The CPUs worth of time that one cgroup folder allows, rounded up; 0 if it sets no limit. `v2`: "QUOTA PERIOD" in
 * cpu.max, where QUOTA may be "max"; else two files, with -1 for no limit. */
static int64_t rt_quota_of(const char *folder, size_t length, bool v2) {
    char path[1200], text[64];
    int64_t quota, period;
    char *end;
    if (length + 32 > sizeof path) return 0;
    memcpy(path, folder, length);
    strcpy(path + length, v2 ? "/cpu.max" : "/cpu.cfs_quota_us");
    if (!rt_read_file(path, text, sizeof text)) return 0;
    quota = strtoll(text, &end, 10);
    if (!v2) {
        strcpy(path + length, "/cpu.cfs_period_us");
        if (!rt_read_file(path, text, sizeof text)) return 0;
        end = text;
    }
    period = strtoll(end, NULL, 10);
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
            bool v2 = controllers[1] == '\0';
            bool cpu = false;
            for (char *name = controllers + 1; !v2 && *name; name += strcspn(name, ",") + (strchr(name, ',') != NULL))
                cpu |= strcspn(name, ",") == 3 && !memcmp(name, "cpu", 3);
            size_t root = strlen(mount) + (v2 ? 0 : 4);
            size_t length = root + strlen(path);
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
    unsigned long mask[128]; /* 8,192 CPUs: with a smaller mask than the kernel's the call fails */
    int32_t count = 0;
    memset(mask, 0, sizeof mask);
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
