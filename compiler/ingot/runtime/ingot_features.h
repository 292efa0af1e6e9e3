/* ingot_features.h: does this CPU have an instruction set that a model asks for? For the runtime and the loader. */
#ifndef INGOT_FEATURES_H
#define INGOT_FEATURES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/auxv.h>
#include <unistd.h>

#if defined(__x86_64__)
#include <cpuid.h>

enum { RT_EAX, RT_EBX, RT_ECX, RT_EDX };
enum { RT_STATE_AVX = 0x6, RT_STATE_AVX512 = 0xe6, RT_STATE_AMX = 0x60000 };

/* Where CPUID says it, and which register state the operating system must save for it (XCR0). */
typedef struct rt_feature {
    const char *name;
    uint32_t leaf, reg, bit, state;
} rt_feature;

static const uint32_t rt_leaves[][2] = {{1, 0}, {7, 0}, {7, 1}, {0x80000001u, 0}};
enum { RT_LEAF_1, RT_LEAF_7, RT_LEAF_7_1, RT_LEAF_EXTENDED, RT_LEAVES };

static const rt_feature rt_features[] = {
    {"sse3", RT_LEAF_1, RT_ECX, 0, 0},                       {"ssse3", RT_LEAF_1, RT_ECX, 9, 0},
    {"fma", RT_LEAF_1, RT_ECX, 12, RT_STATE_AVX},            {"cx16", RT_LEAF_1, RT_ECX, 13, 0},
    {"sse4.1", RT_LEAF_1, RT_ECX, 19, 0},                    {"sse4.2", RT_LEAF_1, RT_ECX, 20, 0},
    {"movbe", RT_LEAF_1, RT_ECX, 22, 0},                     {"popcnt", RT_LEAF_1, RT_ECX, 23, 0},
    {"avx", RT_LEAF_1, RT_ECX, 28, RT_STATE_AVX},            {"f16c", RT_LEAF_1, RT_ECX, 29, RT_STATE_AVX},
    {"bmi", RT_LEAF_7, RT_EBX, 3, 0},                        {"avx2", RT_LEAF_7, RT_EBX, 5, RT_STATE_AVX},
    {"bmi2", RT_LEAF_7, RT_EBX, 8, 0},                       {"avx512f", RT_LEAF_7, RT_EBX, 16, RT_STATE_AVX512},
    {"avx512dq", RT_LEAF_7, RT_EBX, 17, RT_STATE_AVX512},    {"avx512cd", RT_LEAF_7, RT_EBX, 28, RT_STATE_AVX512},
    {"avx512bw", RT_LEAF_7, RT_EBX, 30, RT_STATE_AVX512},    {"avx512vl", RT_LEAF_7, RT_EBX, 31, RT_STATE_AVX512},
    {"avx512vnni", RT_LEAF_7, RT_ECX, 11, RT_STATE_AVX512},  {"amx-bf16", RT_LEAF_7, RT_EDX, 22, RT_STATE_AMX},
    {"avx512fp16", RT_LEAF_7, RT_EDX, 23, RT_STATE_AVX512},  {"amx-tile", RT_LEAF_7, RT_EDX, 24, RT_STATE_AMX},
    {"amx-int8", RT_LEAF_7, RT_EDX, 25, RT_STATE_AMX},       {"avxvnni", RT_LEAF_7_1, RT_EAX, 4, RT_STATE_AVX},
    {"avx512bf16", RT_LEAF_7_1, RT_EAX, 5, RT_STATE_AVX512}, {"lzcnt", RT_LEAF_EXTENDED, RT_ECX, 5, 0},
};

/* Read once per check: on a virtual machine each CPUID is a trip to the hypervisor. */
typedef struct rt_cpu {
    uint32_t words[RT_LEAVES][4], state;
} rt_cpu;

static inline void rt_read_cpu(rt_cpu *cpu) {
    uint32_t high = 0;
    memset(cpu, 0, sizeof *cpu);
    for (int i = 0; i < RT_LEAVES; i++) {
        uint32_t *w = cpu->words[i];
        __get_cpuid_count(rt_leaves[i][0], rt_leaves[i][1], &w[RT_EAX], &w[RT_EBX], &w[RT_ECX], &w[RT_EDX]);
    }
    if (cpu->words[RT_LEAF_1][RT_ECX] >> 27 & 1) /* OSXSAVE: xgetbv exists */
        __asm__ volatile("xgetbv" : "=a"(cpu->state), "=d"(high) : "c"(0));
}

static inline bool rt_present(const rt_cpu *cpu, const rt_feature *feature) {
    return (cpu->state & feature->state) == feature->state &&
           (cpu->words[feature->leaf][feature->reg] >> feature->bit & 1);
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

typedef struct rt_cpu {
    uint64_t hwcap, hwprobe;
} rt_cpu;

static inline void rt_read_cpu(rt_cpu *cpu) {
    struct { int64_t key; uint64_t value; } probe = {4, 0}; /* RISCV_HWPROBE_KEY_IMA_EXT_0 */
    cpu->hwcap = getauxval(AT_HWCAP);
    /* Kernels before 6.4 cannot tell: believe the target then, as its board is known to have the extension. */
    cpu->hwprobe = syscall(258, &probe, 1, 0, NULL, 0) || probe.key != 4 ? UINT64_MAX : probe.value;
}

static inline bool rt_present(const rt_cpu *cpu, const rt_feature *feature) {
    return !(feature->hwcap & ~cpu->hwcap) && !(feature->hwprobe & ~cpu->hwprobe);
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

typedef struct rt_cpu {
    unsigned long hwcap, hwcap2;
} rt_cpu;

static inline void rt_read_cpu(rt_cpu *cpu) {
    cpu->hwcap = getauxval(AT_HWCAP);
    cpu->hwcap2 = getauxval(AT_HWCAP2);
}

static inline bool rt_present(const rt_cpu *cpu, const rt_feature *feature) {
    return !(feature->hwcap & ~cpu->hwcap) && !(feature->hwcap2 & ~cpu->hwcap2);
}

#endif

static inline bool rt_cpu_has(const rt_cpu *cpu, const char *name, size_t length) {
    for (size_t i = 0; i < sizeof rt_features / sizeof rt_features[0]; i++)
        if (strlen(rt_features[i].name) == length && !memcmp(rt_features[i].name, name, length))
            return rt_present(cpu, &rt_features[i]);
    return false; /* a name this runtime does not know cannot be promised */
}

/* The same for one question. */
static inline bool rt_has_feature(const char *name, size_t length) {
    rt_cpu cpu;
    rt_read_cpu(&cpu);
    return rt_cpu_has(&cpu, name, length);
}

#endif /* INGOT_FEATURES_H */
