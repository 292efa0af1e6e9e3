/* ingot_open.h: opens a model.so at run time, after checking that it can run here. Implemented by open.c:
 *
 *     cc -std=c11 program.c open.c -ldl -lpthread
 */
#ifndef INGOT_OPEN_H
#define INGOT_OPEN_H

#include "ingot.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Gives the functions of the artifact at `path`.
 *
 * Before anything of the file is mapped, its ELF headers and metadata are checked as data: truncated, made for another
 * machine, ABI or CPU, or no ingot artifact at all. No code of a refused file runs, its constructors included. Then the
 * very descriptor that was checked is loaded.
 *
 * There is no close: code that threads may be running is never unmapped. The artifact stays loaded and its descriptor
 * open until the process ends; opening the same file again costs nothing more and gives the same table. May be called
 * from any thread.
 *
 * On failure *api is null, and `error` (which may be null) says in one sentence why:
 * INGOT_ERR_LOAD, INGOT_ERR_ABI, INGOT_ERR_CPU, INGOT_ERR_MEMORY, or INGOT_ERR_NULL for a null argument.
 */
ingot_status ingot_open(const char *path, const ingot_api **api, char *error, size_t error_bytes);

#ifdef __cplusplus
}
#endif
#endif /* INGOT_OPEN_H */
