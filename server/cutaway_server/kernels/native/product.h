/* Products with packed matrices, 32 columns at a time. Every output is one accumulator over the depth, in order, whatever
   the number of rows, the blocking and the thread: so a row never depends on its neighbours. */
#ifndef CUTAWAY_PRODUCT_H
#define CUTAWAY_PRODUCT_H

#include <stdlib.h>

#include "interface.h"
#include "norm.h"
#include "quantized.h"

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
enum { TILE = 32, ROWS_AT_ONCE = 32, ROWS_A_TASK = 128 };
enum { SMALL = 1 << 17 }; /* products below which waking a thread costs more than it saves */

/* What becomes of a product: + bias, activation (and gate) or soft-cap, + residual. */
typedef struct {
    float *out; /* [rows][columns] */
    int64_t columns;
    const float *residual; /* null: none */
    float *added;          /* what was added to the residual; null: not wanted */
    float *pre, *linear;   /* open MLP: before the activation, and what the gate multiplies; null: not wanted */
    int64_t activation;    /* NO_ACTIVATION, or as in Shape */
    int64_t gated;
    float cap; /* 0: none */
} After;

enum { NO_ACTIVATION = -1 };

INLINE Vector activate(Vector x, int64_t activation) {
    if (activation == SILU) return x / (1.0f + exponential(-x));
    if (activation == RELU) return choose(x < 0.0f, fill(0), x);
    if (activation == GELU_TANH) {
        Vector cube = x * x * x;
        Vector inner = 0.7978845608f * multiply_add(fill(0.044715f), cube, x);
        return 0.5f * x * (1.0f + hyperbolic_tangent(inner));
    }
    float buffer[LANES];
    store(buffer, x);
    for (int i = 0; i < LANES; i++) buffer[i] = 0.5f * buffer[i] * (1.0f + erff(buffer[i] * 0.70710678f));
    return load(buffer);
}

static void finish_gated(const After *after, const float *tile, const float *bias, int64_t row, int64_t column) {
    for (int j = 0; j < 16 && column + j < after->columns; j += LANES) {
        int64_t left = after->columns - column - j, at = row * after->columns + column + j;
        Vector gate = load(tile + j), up = load(tile + 16 + j);
        if (bias) gate += load(bias + j), up += load(bias + 16 + j);
        store_upto(after->out + at, activate(gate, after->activation) * up, left);
        if (after->pre) store_upto(after->pre + at, gate, left);
        if (after->linear) store_upto(after->linear + at, up, left);
    }
}

static void finish_plain(const After *after, const float *tile, const float *bias, int64_t row, int64_t column) {
    for (int j = 0; j < TILE && column + j < after->columns; j += LANES) {
        int64_t left = after->columns - column - j, at = row * after->columns + column + j;
        Vector v = load(tile + j);
        if (bias) v += load(bias + j);
        if (after->pre) store_upto(after->pre + at, v, left);
        if (after->activation != NO_ACTIVATION) v = activate(v, after->activation);
        if (after->cap > 0) v = after->cap * hyperbolic_tangent(v / after->cap);
        if (after->added) store_upto(after->added + at, v, left);
        if (after->residual) v = load_upto(after->residual + at, left) + v;
        store_upto(after->out + at, v, left);
    }
}

/* Rows of `tile` [n][TILE] are rows `row`... of the product, its columns are columns TILE * t... of the matrix. */
static void finish(const Matrix *w, const After *after, const float *tile, int64_t row, int64_t n, int64_t t) {
    const float *bias = w->bias ? w->bias + t * TILE : 0;
    for (int64_t r = 0; r < n; r++)
        if (after->gated)
            finish_gated(after, tile + r * TILE, bias, row + r, t * 16);
        else
            finish_plain(after, tile + r * TILE, bias, row + r, t * TILE);
}

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

#if defined(CUTAWAY_AMX)
/* Tiles of 16 rows (a product's rows are padded to 16), 32 deep; a tile's rows do not know each other. */
static void configure_tiles(void) {
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    for (int i = 0; i < 8; i++) config.bytes[i] = 64, config.rows[i] = 16;
    _tile_loadconfig(&config);
}

static void tile_bf16(
    const Narrow *x, int64_t step, int64_t rows, const uint16_t *w, int64_t block, int64_t depth, float *out) {
    const int64_t wide = step * sizeof(Narrow), two = rows > 16;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < depth; k += 32) {
        _tile_loadd(4, x + k, wide);
        _tile_loadd(6, w + k * 16, 64);
        _tile_loadd(7, w + block + k * 16, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (!two) continue;
        _tile_loadd(5, x + 16 * step + k, wide);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, out, 4 * TILE);
    _tile_stored(1, out + 16, 4 * TILE);
    if (!two) return;
    _tile_stored(2, out + 16 * TILE, 4 * TILE);
    _tile_stored(3, out + 16 * TILE + 16, 4 * TILE);
}
#else
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

/* Rows as a product takes them: bf16 in value and padded, or fp32. */
typedef struct {
    void *data;
    int64_t step; /* elements from row to row */
    int64_t kind; /* of the matrix; rows for a quantised one lie in panels */
} Operand;

static size_t element(const Shape *shape) { return shape->bf16 ? sizeof(Narrow) : sizeof(float); }

static Operand new_operand(const Shape *shape, const Matrix *w, int64_t rows) {
    int64_t padded = (rows + 15) / 16 * 16;
    int64_t bytes = w->kind ? padded / 16 * panel_bytes(w->padded_depth) : padded * w->padded_depth * (int64_t)element(shape);
    return (Operand){aligned_alloc(64, (bytes + 63) / 64 * 64), w->padded_depth, w->kind};
}

static void put_row(const Shape *shape, const Operand *to, int64_t r, const float *x, int64_t depth) {
    if (to->kind) {
        put_quantized_row(to->kind, x, depth, to->step, to->data, r);
        return;
    }
    if (!shape->bf16) {
        memcpy((float *)to->data + r * to->step, x, depth * sizeof(float));
        return;
    }
    Narrow *row = (Narrow *)to->data + r * to->step;
    for (int64_t i = 0; i < to->step; i += LANES) {
        Vector v = i < depth ? load_upto(x + i, depth - i) : fill(0);
#if defined(CUTAWAY_AMX) || defined(__AVX512BF16__)
        store_bf16(row + i, v);
#else
        store(row + i, (Vector)(round_bf16(v) << 16));
#endif
    }
}

static void multiply_task(
    const Shape *shape, const Matrix *w, const Operand *x, int64_t first, int64_t stop, int64_t t, const After *after) {
    float tile[ROWS_AT_ONCE * TILE] __attribute__((aligned(64)));
    int64_t block = w->padded_depth * 16;
    for (int64_t r = first; r < stop; r += ROWS_AT_ONCE) {
        int64_t n = stop - r < ROWS_AT_ONCE ? stop - r : ROWS_AT_ONCE;
        if (w->kind)
            tile_quantized(w, x->data, r, n, t, tile);
        else if (shape->bf16)
            tile_bf16(
                (const Narrow *)x->data + r * x->step, x->step, n, (const uint16_t *)w->data + 2 * t * block, block,
                w->padded_depth, tile);
        else
            tile_fp32(
                (const float *)x->data + r * x->step, x->step, n, (const float *)w->data + 2 * t * block, block,
                w->depth, tile, TILE, 0);
        finish(w, after, tile, r, n, t);
    }
}

static void product(const Shape *shape, const Matrix *w, const Operand *x, int64_t rows, const After *after) {
    int64_t chunks = (rows + ROWS_A_TASK - 1) / ROWS_A_TASK, tasks = w->tiles * chunks;
    int64_t threads = shape->threads, share = tasks / (threads * 8);
#pragma omp parallel num_threads(threads) if (rows * w->tiles * TILE * w->padded_depth > SMALL)
    {
#if defined(CUTAWAY_AMX)
        configure_tiles();
#endif
#pragma omp for schedule(dynamic, share > 0 ? share : 1) nowait
        for (int64_t i = 0; i < tasks; i++) {
            int64_t first = i % chunks * ROWS_A_TASK, stop = first + ROWS_A_TASK;
            multiply_task(shape, w, x, first, stop < rows ? stop : rows, i / chunks, after);
        }
#if defined(CUTAWAY_AMX)
        _tile_release();
#endif
    }
}

#endif
