/* Products with packed matrices, TILE columns at a time: rows made ready, tasks, and what becomes of the sums. */
#ifndef CUTAWAY_PRODUCT_H
#define CUTAWAY_PRODUCT_H

#include "interface.h"
#include "multiply.h"
#include "norm.h"
#include "quantized.h"
#include "team.h"

enum { ROWS_A_TASK = 128 };

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

/* Rows as a product takes them: bf16 in value and padded, or fp32. */
typedef struct {
    void *data;
    int64_t step; /* elements from row to row */
    int64_t kind; /* of the matrix; rows for a quantised one lie in panels */
} Operand;

static size_t element(const Shape *shape) { return shape->bf16 ? sizeof(Narrow) : sizeof(float); }

/* Bytes of an operand of `rows` rows, which AMX wants in whole tiles. */
static size_t operand_bytes(const Shape *shape, const Matrix *w, int64_t rows) {
    int64_t padded = (rows + 15) / 16 * 16;
    if (w->kind) return padded / 16 * panel_bytes(w->padded_depth);
    return (padded * w->padded_depth * element(shape) + 63) / 64 * 64;
}

static Operand new_operand(const Matrix *w, void *memory) { return (Operand){memory, w->padded_depth, w->kind}; }

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
                w->padded_depth, tile, r == 0);
        else
            tile_fp32(
                (const float *)x->data + r * x->step, x->step, n, (const float *)w->data + 2 * t * block, block,
                w->depth, tile, TILE, 0);
        finish(w, after, tile, r, n, t);
    }
}

/* All of the team: x times the matrix, then they meet. */
static void product(
    const Team *team, const Shape *shape, const Matrix *w, const Operand *x, int64_t rows, const After *after) {
    int64_t chunks = (rows + ROWS_A_TASK - 1) / ROWS_A_TASK, tasks = w->tiles * chunks;
    for (int64_t i; (i = take_near(team, tasks)) >= 0;) {
        int64_t first = i % chunks * ROWS_A_TASK, stop = first + ROWS_A_TASK;
        multiply_task(shape, w, x, first, stop < rows ? stop : rows, i / chunks, after);
    }
    meet(team);
}

#endif
