/* The operations of a layer, as all threads of a team compute them together: each returns when all have met. */
#ifndef CUTAWAY_LAYER_H
#define CUTAWAY_LAYER_H

#include <stdlib.h>

#include "attention.h"

enum { FEW_ROWS = 8 };      /* up to which each thread makes them ready for itself, rather than wait for the others */
enum { ROWS_AT_A_TIME = 8 }; /* a thread takes, of work that goes row by row */

typedef struct { /* what a step needs besides its arguments; freed by whoever made it */
    char *memory, *operands;
    size_t operand, hidden_bytes; /* of one operand; of what is between the MLP's products */
    float *joined, *q, *z, *lse, *product;
    void *hidden; /* rows of d_mlp: floats, or an operand */
    float *row; /* of each thread */
    int64_t row_floats;
} Buffers;

static void *claim(const Buffers *b, size_t *used, size_t bytes) {
    size_t at = *used;
    *used += (bytes + 63) / 64 * 64;
    return b->memory ? b->memory + at : 0;
}

/* Places in b->memory; returns how many bytes there must be. */
static size_t lay_out(Buffers *b, const Shape *shape, int64_t rows, int64_t threads) {
    size_t used = 0, each = rows * sizeof(float);
    int64_t q = shape->n_heads * shape->d_head, k = shape->n_kv_heads * shape->d_head;
    b->operands = claim(b, &used, b->operand * (rows <= FEW_ROWS ? threads : 1));
    b->joined = claim(b, &used, each * (q + 2 * k));
    b->q = claim(b, &used, each * q);
    b->z = claim(b, &used, each * q);
    b->lse = claim(b, &used, each * shape->n_heads);
    b->hidden = claim(b, &used, b->hidden_bytes);
    b->product = claim(b, &used, each * shape->d_model);
    b->row_floats = ((shape->d_model > k ? shape->d_model : k) + 15) / 16 * 16;
    b->row = claim(b, &used, threads * b->row_floats * sizeof(float));
    return used;
}

/* For rows of any of `n` matrices. */
static Buffers new_buffers(const Shape *shape, const Matrix *const *matrices, int64_t n, int64_t rows, int64_t threads) {
    Buffers b = {0};
    for (int64_t i = 0; i < n; i++) {
        size_t bytes = operand_bytes(shape, matrices[i], rows);
        if (bytes > b.operand) b.operand = bytes;
    }
    const size_t floats = rows * shape->d_mlp * sizeof(float);
    b.hidden_bytes = floats > b.operand ? floats : b.operand;
    b.memory = aligned_alloc(64, lay_out(&b, shape, rows, threads));
    lay_out(&b, shape, rows, threads);
    return b;
}

static const Norm NO_NORM = {0, 0};

static void prepare_row(
    const Shape *shape, const Norm *norm, const Matrix *w, const float *x, int64_t r, const Operand *to, float *normed,
    const OpenNorm *open) {
    const float *row = x + r * w->depth;
    if (norm->gain) norm_open(shape, norm, row, w->depth, normed, open, r);
    put_row(shape, to, r, norm->gain ? normed : row, w->depth);
}

/* The rows of `x`, normed, as a product takes them. */
static Operand prepare(
    const Team *team, const Shape *shape, const Norm *norm, const Matrix *w, const float *x, int64_t rows, const Buffers *b,
    const OpenNorm *open) {
    float *normed = b->row + team->me * b->row_floats;
    if (rows <= FEW_ROWS) {
        Operand own = new_operand(w, b->operands + team->me * b->operand);
        for (int64_t r = 0; r < rows; r++) prepare_row(shape, norm, w, x, r, &own, normed, team->me ? 0 : open);
        return own;
    }
    Operand to = new_operand(w, b->operands);
    for (int64_t first; (first = take(team, ROWS_AT_A_TIME)) < rows;)
        for (int64_t r = first; r < rows && r < first + ROWS_AT_A_TIME; r++)
            prepare_row(shape, norm, w, x, r, &to, normed, open);
    meet(team);
    return to;
}

/* Turn the first dims of one head, in place; cos and sin are of this row. */
static void rotate(float *x, int64_t dims, int64_t interleaved, const float *cosines, const float *sines) {
    int64_t half = dims / 2;
    for (int64_t i = 0; i < half; i++) {
        int64_t first = interleaved ? 2 * i : i, second = interleaved ? 2 * i + 1 : i + half;
        float a = x[first], b = x[second];
        x[first] = a * cosines[i] - b * sines[i];
        x[second] = b * cosines[i] + a * sines[i];
    }
}

static void qk_norm(const Shape *shape, const Norm *norm, float *x, int64_t heads) {
    if (shape->qk_norm == QK_NORM_FULL) norm_row(shape, norm, x, heads * shape->d_head, x, 0, 0);
    if (shape->qk_norm != QK_NORM_HEAD) return;
    for (int64_t h = 0; h < heads; h++) norm_row(shape, norm, x + h * shape->d_head, shape->d_head, x + h * shape->d_head, 0, 0);
}

/* QKV [rows][(heads + 2 kv_heads) * d_head] with its bias: norms, rotation, storing; queries to `out`. Null `pages` stores
   nothing; `rot_k` may be null. `joined` keeps what was there before norms and rotation. */
static void finish_heads(
    const Shape *shape, const Layer *layer, const Pages *pages, const Step *step, int64_t r, const float *joined,
    const float *cosines, const float *sines, float *out, float *rot_k, float *k) {
    int64_t d = shape->d_head, q_width = shape->n_heads * d, k_width = shape->n_kv_heads * d;
    float *q = out + r * q_width;
    memcpy(q, joined, q_width * sizeof(float));
    memcpy(k, joined + q_width, k_width * sizeof(float));
    qk_norm(shape, &layer->q_norm, q, shape->n_heads);
    qk_norm(shape, &layer->k_norm, k, shape->n_kv_heads);
    if (layer->rope_dims) {
        int64_t at = r * layer->rope_dims / 2;
        for (int64_t h = 0; h < shape->n_heads; h++) rotate(q + h * d, layer->rope_dims, layer->interleaved, cosines + at, sines + at);
        for (int64_t h = 0; h < shape->n_kv_heads; h++) rotate(k + h * d, layer->rope_dims, layer->interleaved, cosines + at, sines + at);
    }
    if (rot_k) memcpy(rot_k + r * k_width, k, k_width * sizeof(float));
    if (!pages) return;
    int64_t size = pages->page_size, page = step->slots[r] / size, offset = step->slots[r] % size;
    for (int64_t h = 0; h < shape->n_kv_heads; h++) {
        int64_t place = (page * shape->n_kv_heads + h) * size + offset;
        put_head(pages, place, k + h * d, joined + q_width + k_width + h * d, d);
    }
}

typedef struct { /* of one layer, for each row */
    const float *cosines, *sines; /* null: no rotation */
} Rotations;

/* Open form: `joined` and `rot_k` are wanted and nothing is stored (`pages` null). */
static void attention_input_body(
    const Team *team, const Shape *shape, const Layer *layer, const Pages *pages, const Step *step, const float *residual,
    const Rotations *turns, float *out, float *joined, float *rot_k, const OpenNorm *open, const Buffers *b) {
    int64_t rows = step->rows, width = layer->qkv.columns;
    Operand x = prepare(team, shape, &layer->norm1, &layer->qkv, residual, rows, b, open);
    After after = {.out = joined, .columns = width, .activation = NO_ACTIVATION};
    product(team, shape, &layer->qkv, &x, rows, &after);
    float *k = b->row + team->me * b->row_floats;
    for (int64_t r; (r = take(team, 1)) < rows;)
        finish_heads(shape, layer, pages, step, r, joined + r * width, turns->cosines, turns->sines, out, rot_k, k);
    meet(team);
}

/* A product added to the residual, through a norm if there is one; `out` may be `residual`. */
static void add_product(
    const Team *team, const Shape *shape, const Matrix *w, const Norm *post, const Operand *x, const float *residual,
    int64_t rows, float *out, float *added, const OpenNorm *open, const Buffers *b) {
    int64_t width = w->columns;
    After after = {.out = out, .columns = width, .activation = NO_ACTIVATION, .residual = residual, .added = added};
    if (post->gain) after = (After){.out = b->product, .columns = width, .activation = NO_ACTIVATION};
    product(team, shape, w, x, rows, &after);
    if (!post->gain) return;
    for (int64_t r; (r = take(team, 1)) < rows;) {
        float *row = b->product + r * width;
        norm_open(shape, post, row, width, row, open, r);
        if (added) memcpy(added + r * width, row, width * sizeof(float));
        for (int64_t i = 0; i < width; i++) out[r * width + i] = residual[r * width + i] + row[i];
    }
    meet(team);
}

static void mlp_input_body(
    const Team *team, const Shape *shape, const Layer *layer, int64_t rows, const float *residual, float *out,
    const Operand *narrow, float *pre, float *linear, const OpenNorm *open, const Buffers *b) {
    Operand x = prepare(team, shape, &layer->norm2, &layer->mlp_in, residual, rows, b, open);
    After after = {
        .out = out, .columns = shape->d_mlp, .pre = pre, .linear = linear, .activation = shape->activation,
        .gated = shape->gated, .narrow = narrow};
    product(team, shape, &layer->mlp_in, &x, rows, &after);
}

/* The product after an activation takes it as it comes from the one before, unless it needs whole rows to quantise. */
static void mlp_body(
    const Team *team, const Shape *shape, const Layer *layer, int64_t rows, const float *residual, float *out,
    const Buffers *b) {
    const Matrix *w = &layer->mlp_out;
    const int direct = shape->bf16 && !w->kind && w->depth == w->padded_depth;
    Operand x = new_operand(w, b->hidden);
    mlp_input_body(team, shape, layer, rows, residual, direct ? 0 : b->hidden, direct ? &x : 0, 0, 0, 0, b);
    if (!direct) x = prepare(team, shape, &NO_NORM, w, b->hidden, rows, b, 0);
    add_product(team, shape, w, &layer->norm2_post, &x, residual, rows, out, 0, 0, b);
}

/* A whole layer; `out` may be `residual`. */
static void layer_body(
    const Team *team, const Shape *shape, const Layer *layer, const Pages *pages, const Step *step, const float *residual,
    const Rotations *turns, float *out, const Buffers *b) {
    int64_t rows = step->rows;
    attention_input_body(team, shape, layer, pages, step, residual, turns, b->q, b->joined, 0, 0, b);
    attend(team, shape, layer, pages, step, b->q, b->z, b->lse);
    Operand z = prepare(team, shape, &NO_NORM, &layer->attention_out, b->z, rows, b, 0);
    add_product(team, shape, &layer->attention_out, &layer->norm1_post, &z, residual, rows, out, 0, 0, b);
    mlp_body(team, shape, layer, rows, out, out, b);
}

#endif
