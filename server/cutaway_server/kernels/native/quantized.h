/* Products with quantised matrices: integers over groups of the depth, summed exactly, then scaled in fp32, group after
   group. Integer sums have no order, so every instruction set and number of rows gives a row the same bits.

   Integers lie in blocks of 16 columns as bytes [columns/16][depth/4][16][4], stored + 128, or two in a byte: vector v of
   a group of 32 has depth 4v... in its low halves and 16 + 4v... in its high ones. Scales lie as [columns/16][group][16],
   and with a minimum as [columns/16][group][2][16]: fp16, except ROW8's. */
#ifndef CUTAWAY_QUANTIZED_H
#define CUTAWAY_QUANTIZED_H

#include <stdlib.h>

#include "interface.h"
#include "vector.h"

enum { GROUP = 32, SUPER = 256 };

/* Of a Matrix; w is what an integer q stands for, q centred unless there is a minimum. */
enum {
    PLAIN,
    ROW8,    /* w = q * scale[column], scales fp32; rows of activations have one scale, not one a group */
    GROUP8,  /* w = q * scale */
    GROUP4,  /* w = (q - 8) * scale */
    MIN8,    /* w = q * scale + minimum */
    MIN4,
    SUPER8,  /* w = q * (scale * part) - minimum * part, the first of 256, parts (bytes) of 32 */
    SUPER4,
    HALVES8, /* w = q * (scale * part), the scale of 256, signed parts of 16 */
};

/* Sixteen rows of activations: integers [16][padded_depth]; then for each group and row (the rows side by side) its scale,
   its sum in fp32 and minus the sum of its integers; then minus the sums of its halves [group][2][16]. */
typedef struct {
    int8_t *values;
    float *scales, *sums;
    int32_t *minus, *minus_halves;
} Panel;

static int64_t panel_bytes(int64_t padded_depth) { return 16 * padded_depth + padded_depth / GROUP * 16 * 5 * 4; }

INLINE Panel panel(void *data, int64_t row, int64_t padded_depth) {
    int8_t *values = (int8_t *)data + row / 16 * panel_bytes(padded_depth);
    const int64_t width = padded_depth / GROUP * 16;
    float *scales = (float *)(values + 16 * padded_depth);
    int32_t *minus = (int32_t *)(scales + 2 * width);
    return (Panel){values, scales, scales + width, minus, minus + width};
}

INLINE Integers larger_integers(Integers a, Integers b) {
    Integers mask = a > b;
    return (a & mask) | (b & ~mask);
}

INLINE int32_t largest_integer(Integers v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_epi32((__m512i)v);
#else
    int32_t most = v[0];
    for (int i = 1; i < LANES; i++) most = v[i] > most ? v[i] : most;
    return most;
#endif
}

INLINE int32_t sum_of_integers(Integers v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_epi32((__m512i)v);
#else
    int32_t sum = 0;
    for (int i = 0; i < LANES; i++) sum += v[i];
    return sum;
#endif
}

INLINE void store_bytes(int8_t *to, Integers v) {
#if defined(__AVX512F__)
    _mm_storeu_si128((__m128i *)to, _mm512_cvtepi32_epi8((__m512i)v));
#else
    for (int i = 0; i < LANES; i++) to[i] = (int8_t)v[i];
#endif
}

/* 32 floats, the last of them zero from `left` on. */
INLINE void load_group(const float *x, int64_t left, Vector *v) {
#pragma GCC unroll 8
    for (int i = 0; i < GROUP / LANES; i++) {
        int64_t here = left - i * LANES;
        v[i] = here >= LANES ? load(x + i * LANES) : here > 0 ? load_some(x + i * LANES, here) : fill(0);
    }
}

/* Magnitudes as integers, which keep their order, with NaN above all. */
INLINE Integers magnitudes(const Vector *v) {
    Integers most = (Integers)v[0] & 0x7fffffff;
#pragma GCC unroll 8
    for (int i = 1; i < GROUP / LANES; i++) {
        Integers here = (Integers)v[i] & 0x7fffffff;
        most = larger_integers(most, here);
    }
    return most;
}

INLINE float largest_magnitude(Integers magnitudes) {
    int32_t top = largest_integer(magnitudes);
    float value;
    memcpy(&value, &top, sizeof value);
    return value;
}

/* Round 32 floats times `inverse` to integers, nearest even; returns the sums of both halves in `sums`. */
INLINE void round_group(const Vector *v, float inverse, int8_t *to, int32_t *sums) {
    const Vector magic = fill(12582912.0f);
    const Integers some = (Integers){0} - (inverse != 0); /* 0 times what is not finite is not 0 */
    Integers halves[2] = {{0}, {0}};
#pragma GCC unroll 8
    for (int i = 0; i < GROUP / LANES; i++) {
        Integers q = ((Integers)(v[i] * inverse + magic) - 0x4b400000) & some;
        store_bytes(to + i * LANES, q);
        halves[i * LANES / 16] += q;
    }
    for (int half = 0; half < 2; half++) sums[half] = sum_of_integers(halves[half]);
}

/* What 127 stands for, and what makes 127 of it; a row that is not finite gets a scale that is not, and zeros. */
INLINE float inverse_of(float most, float *scale) {
    *scale = most / 127;
    float inverse = most > 0 && most <= 3.4e38f ? 127 / most : 0;
    return inverse <= 3.4e38f ? inverse : 0; /* of magnitudes below 1e-36 nothing is left */
}

static void quantize_groups(const float *x, int64_t depth, int64_t padded_depth, int64_t row, const Panel *to) {
    for (int64_t g = 0; g < padded_depth / GROUP; g++) {
        Vector v[GROUP / LANES];
        int32_t halves[2];
        int64_t at = g * 16 + row;
        load_group(x + g * GROUP, depth - g * GROUP, v);
        float inverse = inverse_of(largest_magnitude(magnitudes(v)), &to->scales[at]);
        round_group(v, inverse, to->values + row * padded_depth + g * GROUP, halves);
        to->sums[at] = to->scales[at] * (float)(halves[0] + halves[1]);
        to->minus[at] = -halves[0] - halves[1];
        to->minus_halves[g * 32 + row] = -halves[0];
        to->minus_halves[g * 32 + 16 + row] = -halves[1];
    }
}

/* One scale for the row, in its first group's place, as is minus the sum of all its integers. */
static void quantize_row(const float *x, int64_t depth, int64_t padded_depth, int64_t row, const Panel *to) {
    Vector v[GROUP / LANES];
    Integers most = {0};
    int32_t halves[2], minus = 0;
    for (int64_t g = 0; g < padded_depth / GROUP; g++) {
        load_group(x + g * GROUP, depth - g * GROUP, v);
        most = larger_integers(most, magnitudes(v));
    }
    float inverse = inverse_of(largest_magnitude(most), &to->scales[row]);
    for (int64_t g = 0; g < padded_depth / GROUP; g++) {
        load_group(x + g * GROUP, depth - g * GROUP, v);
        round_group(v, inverse, to->values + row * padded_depth + g * GROUP, halves);
        minus -= halves[0] + halves[1];
    }
    to->minus[row] = minus;
}

/* Row `row` of `data`, as products with matrices of this kind take it. */
static void put_quantized_row(int64_t kind, const float *x, int64_t depth, int64_t padded_depth, void *data, int64_t row) {
    Panel to = panel(data, row, padded_depth);
    (kind == ROW8 ? quantize_row : quantize_groups)(x, depth, padded_depth, row % 16, &to);
}

#include "quantized_scales.h"
#include "quantized_vectors.h"
#if defined(CUTAWAY_AMX)
#include "quantized_tiles.h"
#endif

/* tile [n][32] = rows from `row`, a multiple of 16, times columns 32 t... of a quantised matrix; n <= 32, and `tile` has
   places for 32 rows. */
static void tile_quantized(const Matrix *w, void *data, int64_t row, int64_t n, int64_t t, float *tile) {
    for (; w->next && t >= w->own; w = w->next) t -= w->own;
    const Panel panels[2] = {panel(data, row, w->padded_depth), panel(data, row + 16, w->padded_depth)};
#if defined(CUTAWAY_AMX)
    if (w->kind != ROW8 && n >= FEWEST_GROUP_ROWS) {
        amx_groups(w, &panels[0], &panels[1], n, t, tile);
        return;
    }
#endif
    const int64_t most = w->kind == ROW8 ? MOST_INTEGER_ROWS : MOST_GROUP_ROWS;
    for (int64_t block = 0; block < 2; block += BLOCKS)
        for (int64_t r = 0; r < n; r += most)
            quantized_vectors(
                w, &panels[r / 16], r % 16, n - r < most ? n - r : most, 2 * t + block, tile + r * 32 + block * 16);
}

#endif
