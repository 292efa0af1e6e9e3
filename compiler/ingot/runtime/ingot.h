/* ingot.h: the one ABI of every compiled model. Copy this header next to the artifact.
 *
 * An artifact (model.so or libmodel.a) exports ONE function, `const ingot_api *ingot_<name>_api(void)`.
 * All else goes through the table it returns. No function exits, prints or throws; every one returns
 * an ingot_status. `run` allocates nothing.
 *
 * One instance belongs to one thread at a time (INGOT_ERR_BUSY otherwise); any number of instances may run at once.
 * After a fork the child may use and destroy the instances it inherited: their threads are started anew.
 */
#ifndef INGOT_H
#define INGOT_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Raised when a struct below changes shape; `ingot_api.abi_version` says what the artifact was built for. */
#define INGOT_ABI_VERSION 1

/* Dimensions of a tensor are at most this many. */
#define INGOT_MAX_NDIM 8

/* The most threads one model instance may use. */
#define INGOT_MAX_THREADS 64

/* Caller-given memory (ingot_options.memory) must be aligned to this many bytes. */
#define INGOT_MEMORY_ALIGNMENT 64

typedef enum ingot_status {
    INGOT_OK = 0,
    INGOT_ERR_NULL = 1,        /* a pointer that must not be null is null */
    INGOT_ERR_COUNT = 2,       /* wrong number of inputs or outputs */
    INGOT_ERR_DTYPE = 3,       /* wrong element type */
    INGOT_ERR_SHAPE = 4,       /* wrong rank or dimension */
    INGOT_ERR_BYTES = 5,       /* `bytes` is not the size of the tensor */
    INGOT_ERR_ALIGNMENT = 6,   /* data is not aligned to its element size, or memory to 64 */
    INGOT_ERR_DEVICE = 7,      /* tensor lies on a device this model does not run on */
    INGOT_ERR_CPU = 8,         /* this CPU lacks a feature the model was compiled for */
    INGOT_ERR_MEMORY = 9,      /* allocation failed, or the memory given is too small */
    INGOT_ERR_THREADS = 10,    /* a thread could not be started, or the count is out of range */
    INGOT_ERR_ABI = 11,        /* caller and artifact disagree on the ABI version */
    INGOT_ERR_SELFTEST = 12,   /* selftest ran and its outputs differ from those stored */
    INGOT_ERR_UNAVAILABLE = 13,/* the artifact was built without this (e.g. --no-selftest) */
    INGOT_ERR_LOAD = 14,       /* ingot_open: not an ingot artifact, or it cannot be loaded here */
    INGOT_ERR_BUSY = 15,       /* the same instance is already running in another thread */
    INGOT_ERR_OVERLAP = 16     /* an output's memory overlaps that of an input or of another output */
} ingot_status;

typedef enum ingot_dtype {
    INGOT_BOOL = 0, INGOT_INT8 = 1, INGOT_UINT8 = 2, INGOT_INT16 = 3, INGOT_UINT16 = 4, INGOT_INT32 = 5,
    INGOT_UINT32 = 6, INGOT_INT64 = 7, INGOT_UINT64 = 8, INGOT_FLOAT16 = 9, INGOT_BFLOAT16 = 10,
    INGOT_FLOAT32 = 11, INGOT_FLOAT64 = 12
} ingot_dtype;

typedef enum ingot_device { INGOT_CPU = 0, INGOT_CUDA = 1 } ingot_device;

/* A dense, C-contiguous tensor owned by the caller. The memory of an output overlaps no other tensor's. */
typedef struct ingot_tensor {
    void *data;           /* aligned to its element size */
    uint64_t bytes;       /* size of data; must equal the product of shape times the element size */
    int32_t dtype;        /* ingot_dtype */
    int32_t ndim;
    const int64_t *shape; /* ndim entries */
    int32_t device;       /* ingot_device */
    int32_t reserved;     /* 0 */
} ingot_tensor;

/* What the model expects or gives; lives as long as the artifact is loaded. A model that was compiled for several input
 * shapes shows the largest one here, and takes all of them. */
typedef struct ingot_tensor_info {
    const char *name;     /* as in the source model */
    int32_t dtype;
    int32_t ndim;
    const int64_t *shape;
    uint64_t bytes;
    int32_t quant_count;  /* 0: not quantised; 1: per tensor; n: per channel along quant_axis */
    int32_t quant_axis;
    const float *scales;          /* real = scale * (q - zero_point) */
    const int32_t *zero_points;
} ingot_tensor_info;

typedef struct ingot_model_info {
    uint32_t struct_size;
    uint32_t abi_version;
    const char *name;
    const char *compiler;       /* "ingot 0.1.0" */
    const char *target;         /* "raspberry-pi-4" */
    const char *triple;         /* "aarch64-unknown-linux-gnu" */
    const char *features;       /* space separated, what `create` checks on this CPU */
    const char *source_sha256;  /* of the ONNX or TFLite file, hex */
    const char *precision;      /* "fp32" */
    int32_t n_inputs, n_outputs;
    const ingot_tensor_info *inputs, *outputs;
    uint64_t arena_bytes;       /* intermediate tensors of one instance */
    uint64_t memory_bytes;      /* what `create` needs at options.memory: arena, pool and state */
    uint64_t weights_bytes;     /* read-only, mapped from the file, shared by all instances and processes */
    uint64_t state_bytes;       /* tensors that a run leaves to the next one; 0: the model keeps no state */
} ingot_model_info;

typedef struct ingot_options {
    uint32_t struct_size;    /* sizeof(ingot_options) */
    int32_t threads;         /* 0: as many as affinity and cgroup allow, of unlike cores the fast; 1: none is started */
    void *memory;            /* null: create allocates; else at least memory_bytes, aligned to 64 */
    uint64_t memory_bytes;   /* size of memory */
    char *error;             /* null, or where create writes why it failed */
    uint64_t error_bytes;    /* size of error */
} ingot_options;

typedef struct ingot_model ingot_model;

typedef struct ingot_api {
    uint32_t abi_version;  /* INGOT_ABI_VERSION of the artifact */
    uint32_t struct_size;  /* sizeof(ingot_api) of the artifact: later versions append */
    ingot_status (*create)(const ingot_options *options, ingot_model **model);  /* options may be null */
    ingot_status (*run)(ingot_model *model, const ingot_tensor *inputs, int32_t n_inputs,
                        const ingot_tensor *outputs, int32_t n_outputs);
    ingot_status (*destroy)(ingot_model *model);
    ingot_status (*describe)(const ingot_model_info **info);
    const char *(*last_error)(const ingot_model *model);  /* of the latest failed call on model */
    const char *(*version)(void);
    /* Runs the stored seeded input and compares with stored outputs of an independent interpreter. State is reset
     * before and after. max_error (may be null) receives the largest |error| / max|expected|. */
    ingot_status (*selftest)(ingot_model *model, double *max_error);
    /* Puts the state that runs leave to the next one back to its first value. */
    ingot_status (*reset)(ingot_model *model);
    /* The shape of an output (by its number) in the latest run, into `shape`, which has room for its ndim. It is that of
     * describe, except where a size depends on data: there describe tells the largest one, which is how the output lies
     * in memory, and zeros lie behind its last entry. Before the first run these sizes are 0. */
    ingot_status (*output_shape)(ingot_model *model, int32_t output, int64_t *shape);
} ingot_api;

#ifdef __cplusplus
}
#endif
#endif /* INGOT_H */
