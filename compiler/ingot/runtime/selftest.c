/* selftest.c: runs a seeded input and compares with the outputs of an independent interpreter, stored in the artifact.
 *
 * The generator is the same, bit for bit, as in the compiler's selftest.py: a counter-based splitmix64, whose values
 * every element type holds exactly.
 */

#if RT_HAS_SELFTEST
#include <math.h>

/* Element `index` of input number `input`. */
static uint64_t rt_random(uint64_t seed, uint64_t input, uint64_t index) {
    uint64_t z = seed + input * 0xd1342543de82ef95u + (index + 1) * 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

/* float16 bits of a float that is zero or a normal float16 with no more than 11 significant bits. */
static uint16_t rt_to_half(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return value == 0 ? 0 : (uint16_t)((bits >> 16 & 0x8000) | (((bits >> 23 & 0xff) - 112) << 10) | (bits >> 13 & 0x3ff));
}

static uint16_t rt_to_bfloat(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (uint16_t)(bits >> 16);
}

/* Floats are uniform in [-1, 1); 8-bit integers take their whole range; others are 0 or 1, safe as indices. */
static void rt_fill(void *data, const ingot_tensor_info *info, uint64_t seed, uint64_t input) {
    const uint64_t count = info->bytes / rt_dtypes[info->dtype].bytes;
    for (uint64_t i = 0; i < count; i++) {
        const uint64_t z = rt_random(seed, input, i);
        const float value = (float)((int32_t)(z >> 40) - (1 << 23)) / (float)(1 << 23);
        switch ((ingot_dtype)info->dtype) {
        case INGOT_INT8:
        case INGOT_UINT8: ((uint8_t *)data)[i] = (uint8_t)(z >> 56); break;
        case INGOT_BOOL: ((uint8_t *)data)[i] = (uint8_t)(z >> 63); break;
        case INGOT_INT16:
        case INGOT_UINT16: ((uint16_t *)data)[i] = (uint16_t)(z >> 63); break;
        case INGOT_INT32:
        case INGOT_UINT32: ((uint32_t *)data)[i] = (uint32_t)(z >> 63); break;
        case INGOT_INT64:
        case INGOT_UINT64: ((uint64_t *)data)[i] = z >> 63; break;
        case INGOT_FLOAT16: ((uint16_t *)data)[i] = rt_to_half((float)((int32_t)(z >> 53) - 1024) / 1024); break;
        case INGOT_BFLOAT16: ((uint16_t *)data)[i] = rt_to_bfloat((float)((int32_t)(z >> 56) - 128) / 128); break;
        case INGOT_FLOAT32: ((float *)data)[i] = value; break;
        case INGOT_FLOAT64: ((double *)data)[i] = value; break;
        }
    }
}

/* Element `index` of an array, of any type. `data` may lie at any address. */
static double rt_element(const void *data, int32_t dtype, uint64_t index) {
    union {
        int8_t i8; uint8_t u8; int16_t i16; uint16_t u16; int32_t i32; uint32_t u32; int64_t i64; uint64_t u64;
        float f32; double f64;
    } u;
    uint32_t half;
    memcpy(&u, (const uint8_t *)data + index * rt_dtypes[dtype].bytes, rt_dtypes[dtype].bytes);
    switch ((ingot_dtype)dtype) {
    case INGOT_INT8: return u.i8;
    case INGOT_BOOL:
    case INGOT_UINT8: return u.u8;
    case INGOT_INT16: return u.i16;
    case INGOT_UINT16: return u.u16;
    case INGOT_INT32: return u.i32;
    case INGOT_UINT32: return u.u32;
    case INGOT_INT64: return (double)u.i64;
    case INGOT_UINT64: return (double)u.u64;
    case INGOT_FLOAT16: /* move exponent and mantissa to their place in a float, then correct the exponent's bias */
        half = u.u16;
        if ((half & 0x7c00) == 0x7c00) return half & 0x3ff ? NAN : half >> 15 ? -INFINITY : INFINITY;
        u.u32 = (half & 0x7fffu) << 13;
        return half >> 15 ? -u.f32 * 0x1p112 : u.f32 * 0x1p112;
    case INGOT_BFLOAT16: u.u32 = (uint32_t)u.u16 << 16; return u.f32;
    case INGOT_FLOAT32: return u.f32;
    case INGOT_FLOAT64: return u.f64;
    }
    return NAN;
}

/* How far an output is off: for floats max|error| / max|expected|; for 8-bit integers max|error| / 255; for others the
 * share of elements that differ. */
static double rt_deviation(const void *data, int32_t dtype, const rt_expected_output *expected) {
    double worst = 0, largest = 0, different = 0;
    for (uint64_t i = 0; i < expected->count; i++) {
        const double want = rt_element(rt_expected_data + expected->offset, dtype, i);
        const double got = rt_element(data, dtype, i * expected->stride);
        const bool same = got == want || (isnan(got) && isnan(want));
        const double error = same ? 0 : isfinite(got) && isfinite(want) ? fabs(got - want) : INFINITY;
        different += !same;
        if (error > worst) worst = error;
        if (isfinite(want) && fabs(want) > largest) largest = fabs(want);
    }
    if (dtype == INGOT_INT8 || dtype == INGOT_UINT8) return worst / 255;
    if (dtype < INGOT_FLOAT16) return expected->count ? different / (double)expected->count : 0;
    return largest > 0 ? worst / largest : worst;
}

static ingot_status rt_selftest(ingot_model *model, double *max_error) {
    enum { INPUTS = RT_INPUTS, TENSORS = RT_INPUTS + RT_OUTPUTS };
    ingot_tensor tensors[TENSORS + 1];
    double worst = 0;
    ingot_status status = rt_claim(model);
    if (status) return status;
    memset(tensors, 0, sizeof tensors);
    for (int32_t i = 0; i < TENSORS && !status; i++) {
        const ingot_tensor_info *info = i < INPUTS ? &rt_info.inputs[i] : &rt_info.outputs[i - INPUTS];
        tensors[i] = (ingot_tensor){NULL, info->bytes, info->dtype, info->ndim, info->shape, INGOT_CPU, 0};
        if (info->bytes <= SIZE_MAX) tensors[i].data = calloc(1, info->bytes ? (size_t)info->bytes : 1);
        if (!tensors[i].data)
            status = RT_FAIL(model, INGOT_ERR_MEMORY, "selftest: %llu bytes for '%.*s' could not be allocated",
                             (unsigned long long)info->bytes, rt_cut(info->name, 64), info->name);
        else if (i < INPUTS)
            rt_fill(tensors[i].data, info, RT_SELFTEST_SEED, (uint64_t)i);
    }
    rt_clear(model);
    for (int32_t i = 0; i < RT_SELFTEST_RUNS && !status; i++)
        status = rt_run_claimed(model, tensors, INPUTS, tensors + INPUTS, TENSORS - INPUTS);
    rt_clear(model);
    for (int32_t i = INPUTS; i < TENSORS && !status; i++) {
        const ingot_tensor_info *info = &rt_info.outputs[i - INPUTS];
        const rt_expected_output *expected = &rt_expected[i - INPUTS];
        const double deviation = rt_deviation(tensors[i].data, info->dtype, expected);
        if (deviation > worst) worst = deviation;
        if (deviation > expected->tolerance)
            status = RT_FAIL(model, INGOT_ERR_SELFTEST, "selftest: output '%.*s' is off by %.3g, allowed is %.3g",
                             rt_cut(info->name, 64), info->name, deviation, expected->tolerance);
    }
    for (int32_t i = 0; i < TENSORS; i++) free(tensors[i].data);
    if (max_error) *max_error = worst;
    rt_release(model);
    return status;
}

#else

static ingot_status rt_selftest(ingot_model *model, double *max_error) {
    (void)max_error;
    ingot_status status = rt_claim(model);
    if (status) return status;
    status = RT_FAIL(model, INGOT_ERR_UNAVAILABLE, "this artifact was compiled without a selftest");
    rt_release(model);
    return status;
}

#endif
