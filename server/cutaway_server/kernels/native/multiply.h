/* The inner products: rows times TILE packed columns. Every output is one accumulator over the depth, in order, whatever
   the number of rows and the blocking: so a row never depends on its neighbours. */
#ifndef CUTAWAY_MULTIPLY_H
#define CUTAWAY_MULTIPLY_H

#include "interface.h"
#include "vector.h"

#if defined(CUTAWAY_AMX) || defined(__AVX512BF16__)
typedef uint16_t Narrow; /* a row's element for a product with bf16 weights */
#else
typedef float Narrow; /* bf16 in value */
#endif

#if defined(__AVX512F__)
enum { MOST_ROWS = 14, VECTORS = 2 };
#elif defined(__AVX2__)
enum { MOST_ROWS = 6, VECTORS = 2 };
#else
enum { MOST_ROWS = 2, VECTORS = 4 };
#endif
enum { TILE = 32, ROWS_AT_ONCE = 32 };

/* Where vector `v` of column `c` starts: blocks of 16 columns lie `block` elements apart. */
#define PLACE(c, v, block, each) (((c) + (v) * LANES) / 16 * (block) + ((c) + (v) * LANES) % 16 * (each))

/* out [n][stride] (+)= x [n][step] times packed fp32 columns c... */
INLINE void multiply_fp32(
    const int n, const float *x, int64_t step, const float *w, int64_t block, int64_t c, int64_t depth, float *out,
    int64_t stride, int add) {
    Vector sums[MOST_ROWS][VECTORS];
#pragma GCC unroll 16
    for (int r = 0; r < n; r++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) sums[r][v] = add ? load(out + r * stride + c + v * LANES) : fill(0);
    for (int64_t k = 0; k < depth; k++) {
        Vector columns[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) columns[v] = load(w + PLACE(c, v, block, 1) + k * 16);
#pragma GCC unroll 16
        for (int r = 0; r < n; r++) {
            Vector value = fill(x[r * step + k]);
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) sums[r][v] = multiply_add(value, columns[v], sums[r][v]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < n; r++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) store(out + r * stride + c + v * LANES, sums[r][v]);
}

#if !defined(CUTAWAY_AMX)
/* The same with bf16 columns, whose depth lies in pairs. */
INLINE void multiply_bf16(
    const int n, const Narrow *x, int64_t step, const uint16_t *w, int64_t block, int64_t c, int64_t depth, float *out,
    int64_t stride) {
    Vector sums[MOST_ROWS][VECTORS];
#pragma GCC unroll 16
    for (int r = 0; r < n; r++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) sums[r][v] = fill(0);
    for (int64_t k = 0; k < depth; k += 2) {
        Bits pairs[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) memcpy(&pairs[v], w + PLACE(c, v, block, 2) + k * 16, sizeof(Bits));
#pragma GCC unroll 16
        for (int r = 0; r < n; r++) {
#if defined(__AVX512BF16__)
            int32_t pair;
            memcpy(&pair, x + r * step + k, sizeof pair);
            __m512bh value = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++)
                sums[r][v] = (Vector)_mm512_dpbf16_ps((__m512)sums[r][v], value, (__m512bh)pairs[v]);
#else
            Vector even = fill(x[r * step + k]), odd = fill(x[r * step + k + 1]);
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) {
                sums[r][v] = multiply_add(even, (Vector)(pairs[v] << 16), sums[r][v]);
                sums[r][v] = multiply_add(odd, (Vector)(pairs[v] & 0xffff0000u), sums[r][v]);
            }
#endif
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < n; r++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) store(out + r * stride + c + v * LANES, sums[r][v]);
}
#endif

/* Calls CALL(n) with a constant, so that the accumulators are registers. */
#if defined(__AVX512F__)
#define WITH_ROWS(n, CALL)                                                                                             \
    switch (n) {                                                                                                       \
        case 1: CALL(1); break;                                                                                        \
        case 2: CALL(2); break;                                                                                        \
        case 3: CALL(3); break;                                                                                        \
        case 4: CALL(4); break;                                                                                        \
        case 5: CALL(5); break;                                                                                        \
        case 6: CALL(6); break;                                                                                        \
        case 7: CALL(7); break;                                                                                        \
        case 8: CALL(8); break;                                                                                        \
        case 9: CALL(9); break;                                                                                        \
        case 10: CALL(10); break;                                                                                      \
        case 11: CALL(11); break;                                                                                      \
        case 12: CALL(12); break;                                                                                      \
        case 13: CALL(13); break;                                                                                      \
        default: CALL(14);                                                                                             \
    }
#elif defined(__AVX2__)
#define WITH_ROWS(n, CALL)                                                                                             \
    switch (n) {                                                                                                       \
        case 1: CALL(1); break;                                                                                        \
        case 2: CALL(2); break;                                                                                        \
        case 3: CALL(3); break;                                                                                        \
        case 4: CALL(4); break;                                                                                        \
        case 5: CALL(5); break;                                                                                        \
        default: CALL(6);                                                                                              \
    }
#else
#define WITH_ROWS(n, CALL)                                                                                             \
    switch (n) {                                                                                                       \
        case 1: CALL(1); break;                                                                                        \
        default: CALL(2);                                                                                              \
    }
#endif

/* The next rows to take of `left`: as even as MOST_ROWS allows. */
INLINE int64_t next_rows(int64_t left) {
    int64_t parts = (left + MOST_ROWS - 1) / MOST_ROWS;
    return (left + parts - 1) / parts;
}

/* out [rows][stride] (+)= x [rows][step] times TILE packed fp32 columns. */
static void tile_fp32(
    const float *x, int64_t step, int64_t rows, const float *w, int64_t block, int64_t depth, float *out,
    int64_t stride, int add) {
    for (int64_t r = 0, n; r < rows; r += n) {
        n = next_rows(rows - r);
        for (int64_t c = 0; c < TILE; c += VECTORS * LANES) {
#define CALL(N) multiply_fp32(N, x + r * step, step, w, block, c, depth, out + r * stride, stride, add)
            WITH_ROWS(n, CALL)
#undef CALL
        }
    }
}

#if !defined(CUTAWAY_AMX)
/* out [rows][TILE] = x [rows][step] times TILE packed bf16 columns. */
static void tile_bf16(
    const Narrow *x, int64_t step, int64_t rows, const uint16_t *w, int64_t block, int64_t depth, float *out) {
    for (int64_t r = 0, n; r < rows; r += n) {
        n = next_rows(rows - r);
        for (int64_t c = 0; c < TILE; c += VECTORS * LANES) {
#define CALL(N) multiply_bf16(N, x + r * step, step, w, block, c, depth, out + r * TILE, TILE)
            WITH_ROWS(n, CALL)
#undef CALL
        }
    }
}
#endif

#endif
