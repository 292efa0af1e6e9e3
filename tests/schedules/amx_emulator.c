/* amx_emulator.c: runs Intel's tile instructions on a CPU that has none, for the tests of the kernels that use them.
 *
 * Where the CPU has them, `amx_start` asks Linux for tiles and the instructions run as they are. Elsewhere they raise
 * #UD: a handler of SIGILL decodes them (Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2),
 * checks everything that would fault, executes them on a state of the thread's own and steps over them. What would
 * fault is written down (`amx_faults`), not raised, so that one test fails and not all of them.
 */
#define _GNU_SOURCE
#include <cpuid.h>
#include <math.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

enum { TILES = 8, ROWS = 16, BYTES = 64, ZONES = 64, KINDS = 12 };

typedef struct tile {
    uint8_t row[ROWS][BYTES];
} tile;

typedef struct state {
    uint8_t config[64]; /* all zeros: not configured */
    tile tiles[TILES];
} state;

static _Thread_local state tiles;
static struct sigaction before;
static char faults[512];
static _Atomic long counts[KINDS]; /* of all threads */
static const uint8_t *zones[ZONES][2]; /* memory that no instruction may touch */
static int n_zones;

static const char *const names[KINDS] = {"ldtilecfg",  "sttilecfg",  "tilerelease", "tilezero", "tileloadd", "tileloaddt1",
                                         "tilestored", "tdpbf16ps", "tdpbssd",     "tdpbsud",  "tdpbusd",   "tdpbuud"};
enum {
    LDTILECFG, STTILECFG, TILERELEASE, TILEZERO, TILELOADD, TILELOADDT1, TILESTORED, TDPBF16PS, TDPBSSD, TDPBSUD, TDPBUSD, TDPBUUD
};

static void fault(const char *name, const char *why) {
    if (!faults[0]) snprintf(faults, sizeof faults, "%s: %s", name, why);
}

static int rows_of(int t) { return tiles.config[48 + t]; }
static int bytes_of(int t) { return tiles.config[16 + 2 * t] | tiles.config[17 + 2 * t] << 8; }

static void clear(int t) { memset(&tiles.tiles[t], 0, sizeof tiles.tiles[t]); }

/* Says whether an instruction may use tile `t`. */
static int usable(const char *name, int t) {
    if (tiles.config[0] == 0) return fault(name, "#UD, tiles are not configured"), 0;
    if (t >= TILES || !rows_of(t) || !bytes_of(t)) return fault(name, "#UD, the tile is not configured"), 0;
    return 1;
}

static int allowed(const char *name, const uint8_t *memory, int size) {
    for (int i = 0; i < n_zones; i++)
        if (memory < zones[i][1] && memory + size > zones[i][0])
            return fault(name, "reads or writes outside a buffer"), 0;
    return 1;
}

static void load_config(const uint8_t *from) {
    const char *name = names[LDTILECFG];
    if (!allowed(name, from, 64)) return;
    memset(&tiles, 0, sizeof tiles);
    if (from[0] == 0) return; /* palette 0: as TILERELEASE */
    if (from[0] != 1) return fault(name, "#GP, palette");
    if (from[1] != 0) return fault(name, "start_row is for interrupted loads");
    for (int i = 2; i < 64; i++)
        if ((i < 16 || (i >= 32 && i < 48) || i >= 56) && from[i]) return fault(name, "#GP, a reserved byte is set");
    for (int t = 0; t < TILES; t++) {
        int bytes = from[16 + 2 * t] | from[17 + 2 * t] << 8, rows = from[48 + t];
        if (bytes > BYTES || rows > ROWS) return fault(name, "#GP, a tile is too large");
        if (!bytes != !rows) return fault(name, "#GP, a tile has rows without columns, or columns without rows");
    }
    memcpy(tiles.config, from, 64);
}

static void move(const char *name, int t, uint8_t *memory, int64_t stride, int stores) {
    if (!usable(name, t)) return;
    if (!stores) clear(t);
    for (int r = 0; r < rows_of(t); r++, memory += stride) {
        if (!allowed(name, memory, bytes_of(t))) return;
        if (stores) memcpy(memory, tiles.tiles[t].row[r], (size_t)bytes_of(t));
        else memcpy(tiles.tiles[t].row[r], memory, (size_t)bytes_of(t));
    }
}

/* A denormal counts as zero, as operand and as result. */
static inline float flushed(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0.0f, x) : x; }

static float half(const uint8_t *bytes) {
    uint32_t bits = (uint32_t)(bytes[0] | bytes[1] << 8) << 16;
    float value;
    memcpy(&value, &bits, 4);
    return flushed(value);
}

static void multiply(const char *name, int kind, int c, int a, int b) {
    if (!usable(name, a) || !usable(name, b) || !usable(name, c)) return;
    if (a == b || a == c || b == c) return fault(name, "#UD, a tile is named twice");
    if (bytes_of(a) % 4 || bytes_of(b) % 4 || bytes_of(c) % 4) return fault(name, "#UD, columns are no multiple of four bytes");
    if (rows_of(c) != rows_of(a) || bytes_of(c) != bytes_of(b) || bytes_of(a) / 4 != rows_of(b))
        return fault(name, "#UD, the tiles' sizes do not fit each other");
    const int n = bytes_of(c) / 4, depth = bytes_of(a) / 4;
    float second_factors[ROWS][BYTES / 2];
    if (kind == TDPBF16PS)
        for (int k = 0; k < depth; k++)
            for (int j = 0; j < 2 * n; j++) second_factors[k][j] = half(&tiles.tiles[b].row[k][2 * j]);
    for (int m = 0; m < rows_of(c); m++) {
        uint8_t *row = tiles.tiles[c].row[m];
        if (kind == TDPBF16PS) {
            float sums[BYTES / 2] = {0}; /* of even products and of odd ones */
            for (int k = 0; k < depth; k++) {
                const float first[2] = {half(&tiles.tiles[a].row[m][4 * k]), half(&tiles.tiles[a].row[m][4 * k + 2])};
                for (int j = 0; j < 2 * n; j++) sums[j] = flushed(fmaf(first[j % 2], second_factors[k][j], sums[j]));
            }
            for (int j = 0; j < n; j++) {
                float old;
                memcpy(&old, row + 4 * j, 4);
                old = flushed(flushed(old) + flushed(sums[2 * j] + sums[2 * j + 1]));
                memcpy(row + 4 * j, &old, 4);
            }
            continue;
        }
        for (int j = 0; j < n; j++) {
            uint32_t sum;
            memcpy(&sum, row + 4 * j, 4);
            for (int k = 0; k < depth; k++)
                for (int i = 0; i < 4; i++) {
                    const uint8_t x = tiles.tiles[a].row[m][4 * k + i], y = tiles.tiles[b].row[k][4 * j + i];
                    const int first = kind == TDPBSSD || kind == TDPBSUD ? (int8_t)x : x;
                    const int second = kind == TDPBSSD || kind == TDPBUSD ? (int8_t)y : y;
                    sum += (uint32_t)(first * second);
                }
            memcpy(row + 4 * j, &sum, 4);
        }
    }
    /* Upper rows and the columns beyond are zeros already. */
}

static greg_t general(const ucontext_t *context, int number) {
    static const int places[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                   REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    return context->uc_mcontext.gregs[places[number]];
}

/* Executes the instruction at `code`; returns its length, 0 if it is none of ours. */
static int execute(const uint8_t *code, const ucontext_t *context) {
    if (code[0] != 0xc4 || (code[1] & 0x1f) != 2) return 0; /* three-byte VEX, map 0F 38 */
    const int w = code[2] >> 7, vvvv = ~code[2] >> 3 & 15, l = code[2] >> 2 & 1, pp = code[2] & 3, opcode = code[3];
    const int r = !(code[1] >> 7), x = !(code[1] >> 6 & 1), b = !(code[1] >> 5 & 1);
    const int mod = code[4] >> 6, reg = code[4] >> 3 & 7, rm = code[4] & 7;
    if (w || l || (opcode != 0x49 && opcode != 0x4b && opcode != 0x5c && opcode != 0x5e)) return 0;
    if (opcode == 0x5c || opcode == 0x5e) {
        static const int integers[4] = {TDPBUUD, TDPBUSD, TDPBSUD, TDPBSSD}; /* by prefix: none, 66, F3, F2 */
        if (mod != 3 || r || b || vvvv > 7) return 0;
        if (opcode == 0x5c && pp != 2) return 0;
        const int kind = opcode == 0x5c ? TDPBF16PS : integers[pp];
        counts[kind]++;
        multiply(names[kind], kind, reg, rm, vvvv);
        return 5;
    }
    if (vvvv) return 0;
    if (mod == 3) {
        if (opcode != 0x49 || rm) return 0;
        if (pp == 0 && reg == 0) {
            counts[TILERELEASE]++;
            memset(&tiles, 0, sizeof tiles);
            return 5;
        }
        if (pp != 3 || r) return 0;
        counts[TILEZERO]++;
        if (usable(names[TILEZERO], reg)) clear(reg);
        return 5;
    }
    /* An operand in memory: base, perhaps index and displacement. */
    const uint8_t *next = code + 5;
    int64_t base = 0, index = 0;
    int has_base = 1, number = rm | b << 3;
    if (rm == 4) {
        const int sib = *next++, i = (sib >> 3 & 7) | x << 3;
        number = (sib & 7) | b << 3;
        if (i != 4) index = (int64_t)((uint64_t)general(context, i) << (sib >> 6));
        has_base = !(mod == 0 && (sib & 7) == 5);
    } else if (opcode == 0x4b) {
        return 0; /* loads and stores of tiles need the SIB byte */
    }
    const int from_next = rm == 5 && mod == 0;
    int32_t displacement = 0;
    if (mod == 1) displacement = (int8_t)*next++;
    else if (mod == 2 || !has_base || from_next) memcpy(&displacement, next, 4), next += 4;
    base = from_next ? (int64_t)(intptr_t)next : has_base ? general(context, number) : 0;
    uint8_t *memory = (uint8_t *)(intptr_t)(base + displacement);
    if (opcode == 0x4b) {
        static const int kinds[4] = {-1, TILELOADDT1, TILESTORED, TILELOADD};
        if (kinds[pp] < 0 || r) return 0;
        counts[kinds[pp]]++;
        move(names[kinds[pp]], reg, memory, index, kinds[pp] == TILESTORED);
    } else {
        if (reg || pp > 1) return 0;
        memory += index;
        counts[pp ? STTILECFG : LDTILECFG]++;
        if (!pp) load_config(memory);
        else if (allowed(names[STTILECFG], memory, 64)) memcpy(memory, tiles.config, 64);
    }
    return (int)(next - code);
}

static void on_illegal(int number, siginfo_t *info, void *context) {
    greg_t *rip = &((ucontext_t *)context)->uc_mcontext.gregs[REG_RIP];
    const int length = execute((const uint8_t *)(intptr_t)*rip, context);
    if (length) {
        *rip += length;
        return;
    }
    sigaction(number, &before, NULL); /* somebody else's: it is raised again */
    (void)info;
}

/* Returns 1 where the CPU runs the instructions, 0 where they are emulated from now on, -1 where neither is possible. */
int amx_start(void) {
    unsigned a = 0, b = 0, c = 0, d = 0, low = 0, high = 0;
    __get_cpuid_count(1, 0, &a, &b, &c, &d);
    if (c >> 27 & 1) __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    d = 0;
    __get_cpuid_count(7, 0, &a, &b, &c, &d);
    if ((d >> 22 & 1) && (d >> 24 & 1) && (d >> 25 & 1) && (low & 0x60000) == 0x60000)
        return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) ? -1 : 1;
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_sigaction = on_illegal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    return sigaction(SIGILL, &action, &before) ? -1 : 0;
}

void amx_stop(void) { sigaction(SIGILL, &before, NULL); }

const char *amx_faults(void) { return faults; }

long amx_count(const char *name) {
    for (int i = 0; i < KINDS; i++)
        if (!strcmp(names[i], name)) return counts[i];
    return -1;
}

/* 1 if the calling thread holds tiles. */
int amx_is_configured(void) { return tiles.config[0] != 0; }

void amx_reset(void) {
    faults[0] = 0;
    n_zones = 0;
    for (int i = 0; i < KINDS; i++) counts[i] = 0;
    memset(&tiles, 0, sizeof tiles);
}

int amx_forbid(const uint8_t *begin, const uint8_t *end) {
    if (n_zones == ZONES) return 0;
    zones[n_zones][0] = begin;
    zones[n_zones++][1] = end;
    return 1;
}
