/* The operations of kernels/interface.py, once for each instruction set: compiled with -DVARIANT=<name> and its flags. */
#include <omp.h>

#include "attention.h"
#include "pages.h"

#define JOIN(a, b) a##_##b
#define NAME(variant, operation) JOIN(variant, operation)
#define OPERATION(name) __attribute__((visibility("default"))) void NAME(VARIANT, name)

enum { ALONE = 8192 }; /* elements below which waking a thread costs more than it saves */

/* The rows of `residual`, normed, as a product takes them. */
static void prepare(
    const Shape *shape, const Norm *norm, const Matrix *w, const float *x, int64_t rows, Operand *to, const OpenNorm *open) {
#pragma omp parallel num_threads(shape->threads) if (rows * w->depth > ALONE)
    {
        float *normed = malloc(w->depth * sizeof(float));
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++) {
            const float *row = x + r * w->depth;
            if (norm->gain) norm_open(shape, norm, row, w->depth, normed, open, r);
            put_row(shape, to, r, norm->gain ? normed : row, w->depth);
        }
        free(normed);
    }
}

static const Norm NO_NORM = {0, 0};

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

/* Open form: `joined` and `rot_k` are wanted and nothing is stored (`pages` null). */
OPERATION(attention_input)(
    const Shape *shape, const Layer *layer, const Pages *pages, const Step *step, const float *residual,
    const float *cosines, const float *sines, float *out, float *joined, float *rot_k, const OpenNorm *open) {
    int64_t rows = step->rows, width = layer->qkv.columns, k_width = shape->n_kv_heads * shape->d_head;
    Operand x = new_operand(shape, &layer->qkv, rows);
    float *all = joined ? joined : malloc(rows * width * sizeof(float));
    prepare(shape, &layer->norm1, &layer->qkv, residual, rows, &x, open);
    After after = {.out = all, .columns = width, .activation = NO_ACTIVATION};
    product(shape, &layer->qkv, &x, rows, &after);
#pragma omp parallel num_threads(shape->threads) if (rows * width > ALONE)
    {
        float *k = malloc(k_width * sizeof(float));
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++)
            finish_heads(shape, layer, pages, step, r, all + r * width, cosines, sines, out, rot_k, k);
        free(k);
    }
    if (!joined) free(all);
    free(x.data);
}

OPERATION(paged_attention)(
    const Shape *shape, const Layer *layer, const Pages *pages, const Step *step, const float *q, float *out, float *lse) {
    Attention a = new_attention(shape, layer, pages, step, q, out, lse);
    Crew crew = {0};
#pragma omp parallel num_threads(shape->threads)
    {
        Team team = {omp_get_thread_num(), omp_get_num_threads(), &crew};
        attend(&team, &a);
#if defined(CUTAWAY_AMX)
        _tile_release();
#endif
    }
}

/* A product added to the residual, through a norm if there is one. */
static void add_product(
    const Shape *shape, const Matrix *w, const Norm *post, const float *x, const float *residual, int64_t rows, float *out,
    float *added, const OpenNorm *open) {
    int64_t width = w->columns;
    Operand operand = new_operand(shape, w, rows);
    prepare(shape, &NO_NORM, w, x, rows, &operand, 0);
    After after = {.out = out, .columns = width, .activation = NO_ACTIVATION, .residual = post->gain ? 0 : residual, .added = post->gain ? 0 : added};
    product(shape, w, &operand, rows, &after);
    free(operand.data);
    if (!post->gain) return;
#pragma omp parallel for num_threads(shape->threads) if (rows * width > ALONE) schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        float *row = out + r * width;
        norm_open(shape, post, row, width, row, open, r);
        if (added) memcpy(added + r * width, row, width * sizeof(float));
        for (int64_t i = 0; i < width; i++) row[i] = residual[r * width + i] + row[i];
    }
}

OPERATION(attention_output)(
    const Shape *shape, const Layer *layer, int64_t rows, const float *z, const float *residual, float *out, float *added,
    const OpenNorm *open) {
    add_product(shape, &layer->attention_out, &layer->norm1_post, z, residual, rows, out, added, open);
}

OPERATION(mlp_output)(
    const Shape *shape, const Layer *layer, int64_t rows, const float *hidden, const float *residual, float *out,
    float *added, const OpenNorm *open) {
    add_product(shape, &layer->mlp_out, &layer->norm2_post, hidden, residual, rows, out, added, open);
}

OPERATION(mlp_input)(
    const Shape *shape, const Layer *layer, int64_t rows, const float *residual, float *out, float *pre, float *linear,
    const OpenNorm *open) {
    Operand x = new_operand(shape, &layer->mlp_in, rows);
    prepare(shape, &layer->norm2, &layer->mlp_in, residual, rows, &x, open);
    After after = {
        .out = out, .columns = shape->d_mlp, .pre = pre, .linear = linear, .activation = shape->activation,
        .gated = shape->gated};
    product(shape, &layer->mlp_in, &x, rows, &after);
    free(x.data);
}

OPERATION(unembed)(
    const Shape *shape, const Matrix *w, const Norm *norm, int64_t rows, const float *residual, float *out,
    const OpenNorm *open) {
    Operand x = new_operand(shape, w, rows);
    prepare(shape, norm, w, residual, rows, &x, open);
    After after = {.out = out, .columns = w->columns, .activation = NO_ACTIVATION, .cap = shape->logit_cap};
    product(shape, w, &x, rows, &after);
    free(x.data);
}

/* x [rows][depth] times the matrix, plus its bias. */
OPERATION(linear)(const Shape *shape, const Matrix *w, int64_t rows, const float *x, float *out) {
    Operand operand = new_operand(shape, w, rows);
    prepare(shape, &NO_NORM, w, x, rows, &operand, 0);
    After after = {.out = out, .columns = w->columns, .activation = NO_ACTIVATION};
    product(shape, w, &operand, rows, &after);
    free(operand.data);
}
