/* Keys and values as pages store them: fp32, bf16, or int8 with one fp32 scale for each vector of a head. */
#ifndef CUTAWAY_PAGES_H
#define CUTAWAY_PAGES_H

#include "interface.h"
#include "norm.h"

typedef int8_t Bytes __attribute__((vector_size(LANES)));

static const int64_t PAGE_ELEMENT[] = {[PAGES_FP32] = 4, [PAGES_BF16] = 2, [PAGES_INT8] = 1};

INLINE Vector load_int8(const int8_t *p) {
#if defined(__AVX512F__)
    return (Vector)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
#else
    Bytes bytes;
    memcpy(&bytes, p, sizeof bytes);
    return __builtin_convertvector(bytes, Vector);
#endif
}

/* LANES elements from element `i` of `page`, or `left` of them and zeros; int8 without its scale. */
INLINE Vector load_page(const void *page, int64_t format, int64_t i, int64_t left) {
    const int64_t each = PAGE_ELEMENT[format];
    const char *from = (const char *)page + i * each;
    char buffer[4 * LANES] = {0};
    if (left < LANES) from = memcpy(buffer, from, left * each);
    if (format == PAGES_FP32) return load((const float *)from);
    return format == PAGES_BF16 ? load_bf16((const uint16_t *)from) : load_int8((const int8_t *)from);
}

static void put_bf16(uint16_t *to, const float *x, int64_t n) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) store_bf16(to + i, load(x + i));
    if (i == n) return;
    uint16_t buffer[LANES];
    store_bf16(buffer, load_some(x + i, n - i));
    memcpy(to + i, buffer, (n - i) * sizeof(uint16_t));
}

/* As cache/pages.py's `quantize`, bit for bit: scale = largest / 127; what is not finite makes the scale so. */
static float put_int8(int8_t *to, const float *x, int64_t n) {
    float most = 0;
    int finite = 1;
    for (int64_t i = 0; i < n; i++) {
        float size = fabsf(x[i]);
        if (!(size <= 3.402823466e38f)) finite = 0;
        if (size > most) most = size;
    }
    if (!finite) {
        memset(to, 0, n);
        return NAN;
    }
    float scale = most / 127.0f, divisor = scale > 0 ? scale : 1.0f;
    for (int64_t i = 0; i < n; i++) to[i] = (int8_t)rintf(x[i] / divisor);
    return scale;
}

/* One head's key and value of n numbers each, as vector `place` of its pages. */
static void put_head(const Pages *pages, int64_t place, const float *key, const float *value, int64_t n) {
    const int64_t at = place * n;
    if (pages->format == PAGES_FP32) {
        memcpy((float *)pages->keys + at, key, n * sizeof(float));
        memcpy((float *)pages->values + at, value, n * sizeof(float));
    } else if (pages->format == PAGES_BF16) {
        put_bf16((uint16_t *)pages->keys + at, key, n);
        put_bf16((uint16_t *)pages->values + at, value, n);
    } else {
        pages->key_scales[place] = put_int8((int8_t *)pages->keys + at, key, n);
        pages->value_scales[place] = put_int8((int8_t *)pages->values + at, value, n);
    }
}

#endif
