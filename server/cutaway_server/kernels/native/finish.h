/* What becomes of a product's sums. */
#ifndef CUTAWAY_FINISH_H
#define CUTAWAY_FINISH_H

#include "operand.h"

enum { NO_ACTIVATION = -1 };

/* + bias, activation (and gate) or soft-cap, + residual. */
typedef struct {
    float *out; /* [rows][columns]; null: only `narrow` is wanted */
    int64_t columns;
    const float *residual; /* null: none */
    float *added;          /* what was added to the residual; null: not wanted */
    float *pre, *linear;   /* open MLP: before the activation, and what the gate multiplies; null: not wanted */
    int64_t activation;    /* NO_ACTIVATION, or as in Shape */
    int64_t gated;
    float cap;             /* 0: none */
    const Operand *narrow; /* the result as rows of the next product, whose depth needs no padding; null: not wanted */
} After;

/* A tile's sums [n][TILE], the product's rows `row`... and columns of tile `t`, of which the first `done` rows are finished.
   Matrix instructions leave the vector units idle, so a tile is finished, row by row, while the next is multiplied. */
typedef struct {
    float tiles[2][ROWS_AT_ONCE * TILE] __attribute__((aligned(64)));
    const float *tile, *bias;
    const After *after;
    int64_t row, n, t, done, way;
    const Matrix *integers; /* the sums are of this matrix (ROW8), with rows of `panels`, and not scaled yet; null: floats */
    Panel panels[ROWS_AT_ONCE / 16];
} Unfinished;

enum { ANY_WAY, COPY, ADD, GATE_NARROW };

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

INLINE void put_result(const After *after, int64_t row, int64_t column, Vector v, int64_t left) {
    if (after->out) store_upto(after->out + row * after->columns + column, v, left);
    if (after->narrow) store_narrow((Narrow *)after->narrow->data + row * after->narrow->step + column, v);
}

INLINE void finish_gated(const After *after, const float *tile, const float *bias, int64_t row, int64_t column) {
    for (int j = 0; j < 16 && column + j < after->columns; j += LANES) {
        int64_t left = after->columns - column - j, at = row * after->columns + column + j;
        Vector gate = load(tile + j), up = load(tile + 16 + j);
        if (bias) gate += load(bias + j), up += load(bias + 16 + j);
        put_result(after, row, column + j, activate(gate, after->activation) * up, left);
        if (after->pre) store_upto(after->pre + at, gate, left);
        if (after->linear) store_upto(after->linear + at, up, left);
    }
}

INLINE void finish_plain(const After *after, const float *tile, const float *bias, int64_t row, int64_t column) {
    for (int j = 0; j < TILE && column + j < after->columns; j += LANES) {
        int64_t left = after->columns - column - j, at = row * after->columns + column + j;
        Vector v = load(tile + j);
        if (bias) v += load(bias + j);
        if (after->pre) store_upto(after->pre + at, v, left);
        if (after->activation != NO_ACTIVATION) v = activate(v, after->activation);
        if (after->cap > 0) v = after->cap * hyperbolic_tangent(v / after->cap);
        if (after->added) store_upto(after->added + at, v, left);
        if (after->residual) v = load_upto(after->residual + at, left) + v;
        put_result(after, row, column + j, v, left);
    }
}

INLINE void finish_any(const Unfinished *u, const float *sums, const float *bias, int64_t row) {
    if (u->after->gated)
        finish_gated(u->after, sums, bias, row, u->t * 16);
    else
        finish_plain(u->after, sums, bias, row, u->t * TILE);
}

/* The way of most products, in the fewest instructions: they compete with those that feed the matrix unit. */
static int usual_way(const Matrix *w, const After *after) {
    if (w->bias || after->pre || after->linear || after->added || after->cap > 0) return ANY_WAY;
    if (after->columns % (after->gated ? TILE / 2 : TILE)) return ANY_WAY;
    if (after->gated) return after->activation == SILU && after->narrow && !after->out ? GATE_NARROW : ANY_WAY;
    if (after->activation != NO_ACTIVATION || after->narrow) return ANY_WAY;
    return after->residual ? ADD : COPY;
}

INLINE void finish_usual(const int way, const Unfinished *u, const float *sums, int64_t row) {
    const After *after = u->after;
    if (way == GATE_NARROW) {
        Narrow *to = (Narrow *)after->narrow->data + row * after->narrow->step + u->t * TILE / 2;
#pragma GCC unroll 4
        for (int j = 0; j < TILE / 2; j += LANES) store_narrow(to + j, activate(load(sums + j), SILU) * load(sums + TILE / 2 + j));
        return;
    }
    const int64_t at = row * after->columns + u->t * TILE;
    const float *residual = after->residual + at;
    float *out = after->out + at;
    Vector v[TILE / LANES];
#pragma GCC unroll 8
    for (int j = 0; j < TILE / LANES; j++) v[j] = load(sums + j * LANES);
    if (way == ADD)
#pragma GCC unroll 8
        for (int j = 0; j < TILE / LANES; j++) v[j] = load(residual + j * LANES) + v[j];
#pragma GCC unroll 8
    for (int j = 0; j < TILE / LANES; j++) store(out + j * LANES, v[j]);
}

static void scale_integers(Unfinished *u, int64_t from, int64_t stop) {
    float *tile = u->tiles[u->tile != u->tiles[0]];
    const float *scales = (const float *)u->integers->scales + u->t * TILE;
    for (int64_t r = from; r < stop; r++)
        for (int j = 0; j < TILE; j += LANES) {
            Integers sum;
            memcpy(&sum, tile + r * TILE + j, sizeof sum);
            store(tile + r * TILE + j, scale_row(sum, &u->panels[r / 16], r % 16, scales + j));
        }
}

/* Up to `rows` more. */
static void finish_some(Unfinished *u, int64_t rows) {
    const int64_t from = u->done, stop = u->n - from < rows ? u->n : from + rows, first = u->row;
    const float *sums = u->tile, *bias = u->bias ? u->bias + u->t * TILE : 0;
    if (u->integers) scale_integers(u, from, stop);
    if (u->way == ANY_WAY)
        for (int64_t r = from; r < stop; r++) finish_any(u, sums + r * TILE, bias, first + r);
    else if (u->way == GATE_NARROW)
        for (int64_t r = from; r < stop; r++) finish_usual(GATE_NARROW, u, sums + r * TILE, first + r);
    else if (u->way == ADD)
        for (int64_t r = from; r < stop; r++) finish_usual(ADD, u, sums + r * TILE, first + r);
    else
        for (int64_t r = from; r < stop; r++) finish_usual(COPY, u, sums + r * TILE, first + r);
    u->done = stop;
}

enum { FINISHED_A_STEP = 2 };

static void finish_all(Unfinished *u) { finish_some(u, u->n); }

/* Where the next tile's sums go. */
static float *next_tile(Unfinished *u) { return u->tiles[u->tile == u->tiles[0]]; }

#endif
