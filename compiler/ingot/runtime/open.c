/* open.c: ingot_open. Copy it with ingot_open.h, ingot.h and ingot_features.h; it needs libc, libdl and libpthread. */

#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1 /* ElfW */
#endif

#include "ingot_features.h"
#include "ingot_open.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <link.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>

#if defined(__x86_64__)
#define ARCH "x86_64"
#define MACHINE EM_X86_64
#elif defined(__aarch64__)
#define ARCH "aarch64"
#define MACHINE EM_AARCH64
#elif defined(__arm__)
#define ARCH "arm"
#define MACHINE EM_ARM
#elif defined(__riscv)
#define ARCH "riscv64"
#define MACHINE EM_RISCV
#endif

enum { FORMAT = 2, MAX_SEGMENTS = 256, MAX_SECTIONS = 4096, MAX_LOADS = 16, MAX_NOTE = 16 << 20, MAX_TEXT = 256 };

/* The file being opened, and where to say what is wrong with it. */
typedef struct artifact {
    const char *path;
    int fd;
    struct stat info;
    uint64_t size;
    char *error;
    size_t error_bytes;
    ElfW(Phdr) loads[MAX_LOADS];
    int n_loads;
    char *note; /* the JSON metadata, NUL-terminated */
    size_t note_bytes;
} artifact;

static ingot_status fail(const artifact *a, ingot_status status, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

static ingot_status fail(const artifact *a, ingot_status status, const char *format, ...) {
    va_list arguments;
    if (!a->error || !a->error_bytes) return status;
    int used = snprintf(a->error, a->error_bytes, "%s: ", a->path);
    if (used < 0 || (size_t)used >= a->error_bytes) return status;
    va_start(arguments, format);
    vsnprintf(a->error + used, a->error_bytes - (size_t)used, format, arguments);
    va_end(arguments);
    return status;
}

#define DAMAGED(a, why) fail((a), INGOT_ERR_LOAD, "the artifact is damaged: %s", (why))
#define TRUNCATED "truncated, its headers point beyond its end"

/* ---- the file, as data -------------------------------------------------------------------------------------- */

static bool in_file(const artifact *a, uint64_t offset, uint64_t bytes) {
    return offset <= a->size && bytes <= a->size - offset;
}

static bool read_at(const artifact *a, void *to, uint64_t offset, size_t bytes) {
    char *at = to;
    if (!in_file(a, offset, bytes)) return false;
    while (bytes) {
        ssize_t got = pread(a->fd, at, bytes, (off_t)offset);
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) return false;
        at += got, offset += (uint64_t)got, bytes -= (size_t)got;
    }
    return true;
}

/* One loaded segment with these rights holds the range, at the same distance in file and memory. */
static bool inside(const artifact *a, uint64_t offset, uint64_t address, uint64_t file_bytes, uint64_t bytes,
                   uint32_t rights) {
    for (int i = 0; i < a->n_loads; i++) {
        const ElfW(Phdr) *load = &a->loads[i];
        const uint64_t start = address - load->p_vaddr; /* wraps, and then is too large */
        if (start > load->p_memsz || bytes > load->p_memsz - start || (rights & ~load->p_flags)) continue;
        if (!file_bytes ? start >= load->p_filesz
                        : start == offset - load->p_offset && start <= load->p_filesz && file_bytes <= load->p_filesz - start)
            return true;
    }
    return false;
}

static const char *check_segments(artifact *a, const ElfW(Ehdr) *head, ElfW(Phdr) *dynamic) {
    ElfW(Phdr) row;
    uint64_t end = 0;
    for (int pass = 0; pass < 2; pass++) /* first those that are loaded, then those that must lie inside them */
        for (uint64_t i = 0; i < head->e_phnum; i++) {
            if (!read_at(a, &row, head->e_phoff + i * sizeof row, sizeof row)) return TRUNCATED;
            if (row.p_type == PT_LOAD && !pass) {
                if (!in_file(a, row.p_offset, row.p_filesz)) return TRUNCATED;
                if (row.p_align < 4096 || (row.p_align & (row.p_align - 1)) || a->n_loads == MAX_LOADS ||
                    (row.p_vaddr - row.p_offset) % row.p_align || row.p_vaddr < end || row.p_filesz > row.p_memsz ||
                    row.p_memsz - row.p_filesz > 1u << 30 || (uint64_t)row.p_vaddr >> 46 || (uint64_t)row.p_memsz >> 46)
                    return "impossible segment";
                end = (uint64_t)row.p_vaddr + row.p_memsz;
                a->loads[a->n_loads++] = row;
            }
            if (!pass || row.p_type == PT_LOAD) continue;
            switch (row.p_type) {
            case PT_NULL: case PT_GNU_STACK: case 0x70000003 /* RISC-V attributes */: break;
            case PT_DYNAMIC:
                if (dynamic->p_type == PT_DYNAMIC) return "two dynamic tables";
                *dynamic = row;
                /* fall through */
            case PT_NOTE: case PT_PHDR: case PT_TLS: case PT_GNU_EH_FRAME: case PT_GNU_RELRO:
            case 0x6474e553 /* GNU property */: case 0x70000001 /* ARM exception index */:
                if (row.p_filesz && !inside(a, row.p_offset, row.p_vaddr, row.p_filesz,
                                            row.p_type == PT_TLS ? row.p_filesz : row.p_memsz, 0))
                    return "a table lies outside the loaded segments";
                break;
            default: return "unknown segment type";
            }
        }
    return dynamic->p_type == PT_DYNAMIC ? NULL : "no dynamic table";
}

/* Reads the section's note into a->note if it is ours: owner "ingot", type 1. */
static const char *read_note(artifact *a, const ElfW(Shdr) *section) {
    struct { uint32_t name_bytes, bytes, type; char owner[8]; } note;
    if (section->sh_size < sizeof note) return NULL;
    if (!read_at(a, &note, section->sh_offset, sizeof note)) return TRUNCATED;
    if (note.name_bytes != 6 || note.type != 1 || memcmp(note.owner, "ingot", 6)) return NULL;
    if (a->note || note.bytes > section->sh_size - sizeof note || note.bytes > MAX_NOTE)
        return "impossible metadata note";
    a->note = malloc((size_t)note.bytes + 1);
    if (!a->note) return "not enough memory for its metadata";
    a->note_bytes = note.bytes;
    a->note[note.bytes] = '\0';
    return read_at(a, a->note, section->sh_offset + sizeof note, note.bytes) ? NULL : TRUNCATED;
}

/* Sections tell the story of the segments a second time: a flipped bit in either shows as a contradiction. */
static const char *check_sections(artifact *a, const ElfW(Ehdr) *head, const ElfW(Phdr) *dynamic) {
    ElfW(Shdr) row;
    int dynamics = 0;
    for (uint64_t i = 0; i < head->e_shnum; i++) {
        if (!read_at(a, &row, head->e_shoff + i * sizeof row, sizeof row)) return TRUNCATED;
        const uint64_t file_bytes = row.sh_type == SHT_NOBITS ? 0 : row.sh_size;
        const uint32_t rights = PF_R | (row.sh_flags & SHF_WRITE ? PF_W : 0) | (row.sh_flags & SHF_EXECINSTR ? PF_X : 0);
        if (row.sh_type != SHT_NULL && !in_file(a, row.sh_offset, file_bytes)) return TRUNCATED;
        if ((row.sh_flags & SHF_ALLOC) && row.sh_size && (file_bytes || !(row.sh_flags & SHF_TLS)) &&
            !inside(a, row.sh_offset, row.sh_addr, file_bytes, row.sh_size, rights))
            return "a section lies outside the loaded segments, or has other rights";
        if (row.sh_type == SHT_DYNAMIC) {
            dynamics++;
            if (row.sh_offset != dynamic->p_offset || row.sh_addr != dynamic->p_vaddr ||
                row.sh_size != dynamic->p_filesz || row.sh_size != dynamic->p_memsz)
                return "its dynamic table is contradictory";
        }
        const char *why = row.sh_type == SHT_NOTE ? read_note(a, &row) : NULL;
        if (why) return why;
    }
    return dynamics == 1 ? NULL : "its dynamic table is contradictory";
}

static ingot_status check_elf(artifact *a) {
    ElfW(Ehdr) head;
    ElfW(Phdr) dynamic;
    memset(&head, 0, sizeof head);
    memset(&dynamic, 0, sizeof dynamic);
    size_t got = a->size < sizeof head ? (size_t)a->size : sizeof head;
    if (!read_at(a, &head, 0, got)) return fail(a, INGOT_ERR_LOAD, "cannot be read");
    if (memcmp(head.e_ident, ELFMAG, SELFMAG)) return fail(a, INGOT_ERR_LOAD, "this is not a shared library");
    if (got < sizeof head) return DAMAGED(a, TRUNCATED);
    if (head.e_ident[EI_CLASS] != (sizeof(void *) == 8 ? ELFCLASS64 : ELFCLASS32) ||
        head.e_ident[EI_DATA] != ELFDATA2LSB || head.e_machine != MACHINE)
        return fail(a, INGOT_ERR_LOAD, "built for %s (ELF machine %d); this program is for " ARCH,
                    head.e_machine == EM_X86_64 ? "x86_64" : head.e_machine == EM_AARCH64 ? "aarch64" :
                    head.e_machine == EM_ARM ? "arm" : head.e_machine == EM_RISCV ? "riscv64" : "another machine",
                    (int)head.e_machine);
    if (head.e_type != ET_DYN) return fail(a, INGOT_ERR_LOAD, "this ELF file is not a shared library");
    if (head.e_phentsize != sizeof(ElfW(Phdr)) || head.e_shentsize != sizeof(ElfW(Shdr)) ||
        head.e_phnum > MAX_SEGMENTS || head.e_shnum > MAX_SECTIONS || head.e_ident[EI_VERSION] != EV_CURRENT)
        return DAMAGED(a, "impossible header sizes");
    const char *why = check_segments(a, &head, &dynamic);
    if (!why) why = check_sections(a, &head, &dynamic);
    if (why) return DAMAGED(a, why);
    if (!a->note)
        return fail(a, INGOT_ERR_LOAD, "this library is not a model compiled by ingot: it has no .note.ingot section");
    const long page = sysconf(_SC_PAGESIZE);
    for (int i = 0; i < a->n_loads; i++)
        if (page > 0 && a->loads[i].p_align < (unsigned long)page)
            return fail(a, INGOT_ERR_LOAD, "built for memory pages of %llu bytes; this kernel has pages of %ld",
                        (unsigned long long)a->loads[i].p_align, page);
    return INGOT_OK;
}

/* ---- the metadata: JSON ------------------------------------------------------------------------------------- */

/* The end of the string that starts at `at`, or null. The text ends with a NUL, which no JSON string may hold. */
static const char *skip_string(const char *at) {
    if (*at++ != '"') return NULL;
    for (; *at != '"'; at++) {
        if (*at == '\\') at++;
        if (!*at) return NULL;
    }
    return at + 1;
}

/* The end of the value that starts at `at`, or null. Brackets are counted, not matched: enough to find a key. */
static const char *skip_value(const char *at) {
    for (int depth = 0;;) {
        if (*at == '"') {
            at = skip_string(at);
            if (!at) return NULL;
        } else if (*at == '{' || *at == '[') {
            depth++, at++;
        } else if (*at == '}' || *at == ']') {
            if (--depth < 0) return NULL;
            at++;
        } else if (*at == ',' || *at == ':') {
            if (!depth) return NULL;
            at++;
        } else {
            size_t word = strcspn(at, ",:\"{}[]");
            if (!word) return NULL;
            at += word;
        }
        if (!depth) return at;
    }
}

/* The value of a key of the object that starts at `at`, or null. The packager writes no spaces. */
static const char *find(const char *at, const char *key) {
    const size_t length = strlen(key);
    if (!at || *at != '{') return NULL;
    while (*at == '{' || *at == ',') {
        const char *name = at + 1, *end = skip_string(name);
        if (!end || *end != ':') return NULL;
        if ((size_t)(end - name) == length + 2 && !memcmp(name + 1, key, length)) return end + 1;
        at = skip_value(end + 1);
        if (!at) return NULL;
    }
    return NULL;
}

/* Copies a plain string of printable ASCII. */
static bool text_of(const char *at, char *to) {
    size_t used = 0;
    if (!at || *at++ != '"') return false;
    for (; *at != '"'; at++) {
        if (*at < ' ' || *at > '~' || *at == '\\' || used + 1 == MAX_TEXT) return false;
        to[used++] = *at;
    }
    to[used] = '\0';
    return used > 0;
}

static long number_of(const char *at) {
    char *end = NULL;
    if (!at || *at < '0' || *at > '9') return -1;
    errno = 0;
    long value = strtol(at, &end, 10);
    return errno || (*end != ',' && *end != '}') ? -1 : value;
}

static ingot_status check_metadata(const artifact *a, char *name) {
    char arch[MAX_TEXT], target[MAX_TEXT], feature[MAX_TEXT];
    const char *json = a->note, *goal = find(json, "target"), *list = find(goal, "features");
    const long format = number_of(find(json, "format")), abi = number_of(find(json, "abi"));
    const char *end = skip_value(json);
    rt_cpu cpu;
    if (!end || end != json + a->note_bytes || format < 0 || abi < 0) return DAMAGED(a, "its metadata is not valid");
    if (format != FORMAT)
        return fail(a, INGOT_ERR_ABI, "the artifact has format %ld; this loader reads format %d", format, FORMAT);
    if (abi != INGOT_ABI_VERSION)
        return fail(a, INGOT_ERR_ABI, "the artifact has ABI %ld; this loader speaks ABI %d", abi, INGOT_ABI_VERSION);
    if (!text_of(find(json, "name"), name) || strspn(name, "abcdefghijklmnopqrstuvwxyz0123456789_") != strlen(name) ||
        !text_of(find(goal, "arch"), arch) || !text_of(find(goal, "name"), target) || strcmp(arch, ARCH) || !list ||
        *list != '[')
        return DAMAGED(a, "its metadata is not valid");
    rt_read_cpu(&cpu);
    for (list++; *list && *list != ']'; list += *list == ',') {
        if (!text_of(list, feature)) return DAMAGED(a, "its metadata is not valid");
        if (!rt_cpu_has(&cpu, feature, strlen(feature)))
            return fail(a, INGOT_ERR_CPU, "built for " ARCH " %s (%s); this CPU has no %s", feature, target, feature);
        list = skip_string(list);
    }
    return INGOT_OK;
}

/* ---- opening ------------------------------------------------------------------------------------------------ */

/* Files loaded so far. glibc finds a library again by its name, and the name is the descriptor's number: so the
 * descriptor stays open, and no number serves twice. */
typedef struct loaded {
    struct loaded *next;
    struct stat info;
    int fd;
    const ingot_api *api;
} loaded;

static loaded *all;
static pthread_mutex_t all_lock = PTHREAD_MUTEX_INITIALIZER;

static bool same_content(const struct stat *a, const struct stat *b) {
    return a->st_dev == b->st_dev && a->st_ino == b->st_ino && a->st_size == b->st_size &&
           a->st_mtim.tv_sec == b->st_mtim.tv_sec && a->st_mtim.tv_nsec == b->st_mtim.tv_nsec;
}

static ingot_status load(artifact *a, const char *name, const ingot_api **api) {
    char place[PATH_MAX], symbol[MAX_TEXT + 16];
    struct stat now;
    loaded *entry;
    for (entry = all; entry; entry = entry->next) {
        if (entry->info.st_dev != a->info.st_dev || entry->info.st_ino != a->info.st_ino) continue;
        if (!same_content(&entry->info, &a->info))
            return fail(a, INGOT_ERR_LOAD, "the artifact was changed in place after this process loaded it");
        *api = entry->api;
        return INGOT_OK;
    }
    for (entry = all; entry;) /* a program that closes descriptors it does not know lets numbers come back */
        if (entry->fd == a->fd) {
            a->fd = fcntl(a->fd, F_DUPFD_CLOEXEC, a->fd + 1); /* the old one is in use for good */
            if (a->fd < 0) return fail(a, INGOT_ERR_LOAD, "no descriptor is left");
            entry = all;
        } else {
            entry = entry->next;
        }
    snprintf(place, sizeof place, "/proc/self/fd/%d", a->fd);
    if (access(place, F_OK) != 0 && /* no /proc: the path must still mean the file that was checked */
        snprintf(place, sizeof place, "%s%s", strchr(a->path, '/') ? "" : "./", a->path) >= (int)sizeof place)
        return fail(a, INGOT_ERR_LOAD, "the path is too long");
    if (stat(place, &now) != 0 || !same_content(&now, &a->info))
        return fail(a, INGOT_ERR_LOAD, "the artifact changed while it was being checked");
    entry = malloc(sizeof *entry);
    if (!entry) return fail(a, INGOT_ERR_MEMORY, "not enough memory");
    void *library = dlopen(place, RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        free(entry);
        return fail(a, INGOT_ERR_LOAD, "cannot be loaded: %s", dlerror());
    }
    snprintf(symbol, sizeof symbol, "ingot_%s_api", name);
    const ingot_api *(*getter)(void) = NULL;
    void *found = dlsym(library, symbol);
    memcpy(&getter, &found, sizeof getter); /* POSIX's way from an object pointer to a function */
    *entry = (loaded){.next = all, .info = a->info, .fd = a->fd, .api = getter ? getter() : NULL};
    a->fd = -1; /* the library's name from now on */
    all = entry;
    *api = entry->api;
    return INGOT_OK;
}

ingot_status ingot_open(const char *path, const ingot_api **api, char *error, size_t error_bytes) {
    artifact a;
    char name[MAX_TEXT];
    memset(&a, 0, sizeof a);
    a.path = path ? path : "path", a.error = error, a.error_bytes = error_bytes, a.fd = -1;
    if (api) *api = NULL;
    if (!path || !api) return fail(&a, INGOT_ERR_NULL, "path or api is null");
    /* stat first, so that no device or FIFO is opened; O_NONBLOCK for the race between the two. */
    ingot_status status = INGOT_OK;
    if (stat(path, &a.info) != 0) return fail(&a, INGOT_ERR_LOAD, "cannot be opened: %s", strerror(errno));
    if (S_ISREG(a.info.st_mode)) a.fd = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    if (S_ISREG(a.info.st_mode) && (a.fd < 0 || fstat(a.fd, &a.info) != 0))
        status = fail(&a, INGOT_ERR_LOAD, "cannot be opened: %s", strerror(errno));
    else if (!S_ISREG(a.info.st_mode))
        status = fail(&a, INGOT_ERR_LOAD, "this is not a regular file");
    a.size = a.info.st_size > 0 ? (uint64_t)a.info.st_size : 0;
    if (!status) status = check_elf(&a);
    if (!status) status = check_metadata(&a, name);
    if (!status) {
        pthread_mutex_lock(&all_lock);
        status = load(&a, name, api);
        pthread_mutex_unlock(&all_lock);
    }
    if (!status && (!*api || (*api)->abi_version != INGOT_ABI_VERSION || (*api)->struct_size < sizeof(ingot_api))) {
        *api = NULL;
        status = fail(&a, INGOT_ERR_ABI, "the artifact's code and its metadata do not belong together");
    }
    free(a.note);
    if (a.fd >= 0) close(a.fd);
    return status;
}
