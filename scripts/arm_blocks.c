/* A plugin for qemu-user: how often each block of instructions was executed, and its code, to the file INGOT_BLOCKS. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

typedef uint64_t qemu_plugin_id_t;
struct qemu_plugin_tb;
struct qemu_plugin_insn;
#define EXPORT __attribute__((visibility("default")))
EXPORT int qemu_plugin_version = PLUGIN_VERSION;
void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t, void (*)(qemu_plugin_id_t, struct qemu_plugin_tb *));
void qemu_plugin_register_atexit_cb(qemu_plugin_id_t, void (*)(qemu_plugin_id_t, void *), void *);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *, size_t);
const void *qemu_plugin_insn_data(const struct qemu_plugin_insn *);
void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb *, int, void *, uint64_t);

struct block {
    uint64_t executed;
    size_t length;
    struct block *next;
    uint32_t code[];
};
static struct block *blocks;

static void translate(qemu_plugin_id_t id, struct qemu_plugin_tb *tb) {
    (void)id;
    size_t length = qemu_plugin_tb_n_insns(tb);
    struct block *block = calloc(1, sizeof *block + 4 * length);
    if (!block) abort();
    block->length = length;
    for (size_t i = 0; i < length; i++)
        block->code[i] = *(const uint32_t *)qemu_plugin_insn_data(qemu_plugin_tb_get_insn(tb, i));
    block->next = blocks;
    blocks = block;
    qemu_plugin_register_vcpu_tb_exec_inline(tb, 0, &block->executed, 1);
}

static void finish(qemu_plugin_id_t id, void *data) {
    (void)id;
    (void)data;
    const char *path = getenv("INGOT_BLOCKS");
    FILE *file = path ? fopen(path, "w") : NULL;
    if (!file) return;
    for (struct block *block = blocks; block; block = block->next) {
        fprintf(file, "%llu ", (unsigned long long)block->executed);
        for (size_t i = 0; i < block->length; i++) fprintf(file, "%08x", block->code[i]);
        fputc('\n', file);
    }
    fclose(file);
}

EXPORT int qemu_plugin_install(qemu_plugin_id_t id, const void *info, int argc, char **argv) {
    (void)info;
    (void)argc;
    (void)argv;
    qemu_plugin_register_vcpu_tb_trans_cb(id, translate);
    qemu_plugin_register_atexit_cb(id, finish, NULL);
    return 0;
}
