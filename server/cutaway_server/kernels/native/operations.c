/* The operations of kernels/interface.py, once for each instruction set: compiled with -DVARIANT=<name> and its flags.
   Each opens one parallel region. */
#include <omp.h>

#include "attention_rows.h"
#include "layer.h"

#define JOIN(a, b) a##_##b
#define NAME(variant, operation) JOIN(variant, operation)
#define OPERATION(name) __attribute__((visibility("default"))) void NAME(VARIANT, name)

/* Has all threads of a team make the call, which sees its `team`. */
#define TOGETHER(threads, ...)                                                                                         \
    do {                                                                                                               \
        Crew crew = {0};                                                                                               \
        _Pragma("omp parallel num_threads(threads) if (threads > 1)") {                                                \
            const Team here = {omp_get_thread_num(), omp_get_num_threads(), &crew}, *team = &here;                     \
            start_tiles();                                                                                             \
            __VA_ARGS__;                                                                                               \
            stop_tiles();                                                                                              \
        }                                                                                                              \
    } while (0)

enum { SMALL = 1 << 17 }; /* multiplications below which waking a thread costs more than it saves */

static int64_t threads_for(const Shape *shape, int64_t work) {
    int64_t most = shape->threads < MOST_THREADS ? shape->threads : MOST_THREADS;
    return work > SMALL ? most : 1;
}

static int64_t work_of(const Matrix *w, int64_t rows) { return rows * w->tiles * TILE * w->padded_depth; }

OPERATION(attention_input)(
    const Shape *shape, const Layer *layer, const Pages *pages, const Step *step, const float *residual,
    const Rotations *turns, float *out, float *joined, float *rot_k, const OpenNorm *open) {
    const Matrix *w = &layer->qkv;
    const int64_t threads = threads_for(shape, work_of(w, step->rows));
    Buffers b = new_buffers(shape, &w, 1, step->rows, threads);
    float *all = joined ? joined : b.joined;
    TOGETHER(
        threads,
        attention_input_body(team, shape, layer, pages, step, residual, turns, out, all, rot_k, open, &b));
    free(b.memory);
}

OPERATION(paged_attention)(
    const Shape *shape, const Layer *layer, const Pages *pages, const Step *step, const float *q, float *out, float *lse) {
    int64_t keys = 0;
    for (int64_t s = 0; s < step->sequences; s++) {
        int64_t first = step->query_starts[s], stop = step->query_starts[s + 1];
        if (stop > first) keys += (stop - first) * (step->positions[stop - 1] + 1);
    }
    const int64_t threads = threads_for(shape, keys * shape->n_heads * shape->d_head);
    TOGETHER(threads, attend(team, shape, layer, pages, step, q, out, lse));
}

/* Of every row of a step: probabilities (scores, if `lse` is null) of all its keys, [heads][rows][width]. */
OPERATION(patterns)(
    const Shape *shape, const Layer *layer, const Pages *pages, const Step *step, const float *q, const float *lse,
    float *out, int64_t width) {
    const Patterns wanted = {.lse = lse, .out = out, .rows = step->rows, .width = width};
    const int64_t threads = threads_for(shape, step->rows * width * shape->n_heads * shape->d_head);
    TOGETHER(threads, patterns(team, shape, layer, pages, step, q, &wanted));
}

static void add_together(
    const Shape *shape, const Matrix *w, const Norm *post, const float *x, const float *residual, int64_t rows, float *out,
    float *added, const OpenNorm *open) {
    const int64_t threads = threads_for(shape, work_of(w, rows));
    Buffers b = new_buffers(shape, &w, 1, rows, threads);
    TOGETHER(threads, {
        Operand operand = prepare(team, shape, &NO_NORM, w, x, rows, &b, 0);
        add_product(team, shape, w, post, &operand, residual, rows, out, added, open, &b);
    });
    free(b.memory);
}

OPERATION(attention_output)(
    const Shape *shape, const Layer *layer, int64_t rows, const float *z, const float *residual, float *out, float *added,
    const OpenNorm *open) {
    add_together(shape, &layer->attention_out, &layer->norm1_post, z, residual, rows, out, added, open);
}

OPERATION(mlp_output)(
    const Shape *shape, const Layer *layer, int64_t rows, const float *hidden, const float *residual, float *out,
    float *added, const OpenNorm *open) {
    add_together(shape, &layer->mlp_out, &layer->norm2_post, hidden, residual, rows, out, added, open);
}

OPERATION(mlp_input)(
    const Shape *shape, const Layer *layer, int64_t rows, const float *residual, float *out, float *pre, float *linear,
    const OpenNorm *open) {
    const Matrix *w = &layer->mlp_in;
    const int64_t threads = threads_for(shape, work_of(w, rows));
    Buffers b = new_buffers(shape, &w, 1, rows, threads);
    TOGETHER(threads, mlp_input_body(team, shape, layer, rows, residual, out, 0, pre, linear, open, &b));
    free(b.memory);
}

static void layers_body(
    const Team *team, const Shape *shape, const Layer *layers, const Pages *pages, const Step *step,
    const Rotations *turns, int64_t first, int64_t stop, const float *residual, float *out, const Buffers *b) {
    for (int64_t i = first; i < stop; i++)
        layer_body(team, shape, layers + i, pages + i, step, i == first ? residual : out, turns + i, out, b);
}

/* Layers [first, stop) of a step, in which nobody looks or edits; `layers`, `pages` and `turns` are those of the model. */
OPERATION(layers)(
    const Shape *shape, const Layer *layers, const Pages *pages, const Step *step, const Rotations *turns, int64_t first,
    int64_t stop, const float *residual, float *out) {
    const int64_t n = stop - first;
    const Matrix *matrices[4 * n];
    int64_t work = 0;
    for (int64_t i = 0; i < n; i++) {
        const Layer *layer = layers + first + i;
        const Matrix *here[] = {&layer->qkv, &layer->attention_out, &layer->mlp_in, &layer->mlp_out};
        for (int j = 0; j < 4; j++) matrices[4 * i + j] = here[j], work += work_of(here[j], step->rows);
    }
    const int64_t threads = threads_for(shape, work);
    Buffers b = new_buffers(shape, matrices, 4 * n, step->rows, threads);
    TOGETHER(threads, layers_body(team, shape, layers, pages, step, turns, first, stop, residual, out, &b));
    free(b.memory);
}

static void product_body(
    const Team *team, const Shape *shape, const Matrix *w, const Norm *norm, int64_t rows, const float *x, float *out,
    float cap, const OpenNorm *open, const Buffers *b) {
    Operand operand = prepare(team, shape, norm, w, x, rows, b, open);
    After after = {.out = out, .columns = w->columns, .activation = NO_ACTIVATION, .cap = cap};
    product(team, shape, w, &operand, rows, &after);
}

OPERATION(unembed)(
    const Shape *shape, const Matrix *w, const Norm *norm, int64_t rows, const float *residual, float *out,
    const OpenNorm *open) {
    const int64_t threads = threads_for(shape, work_of(w, rows));
    Buffers b = new_buffers(shape, &w, 1, rows, threads);
    TOGETHER(threads, product_body(team, shape, w, norm, rows, residual, out, shape->logit_cap, open, &b));
    free(b.memory);
}

/* x [rows][depth] times the matrix, plus its bias. */
OPERATION(linear)(const Shape *shape, const Matrix *w, int64_t rows, const float *x, float *out) {
    const int64_t threads = threads_for(shape, work_of(w, rows));
    Buffers b = new_buffers(shape, &w, 1, rows, threads);
    TOGETHER(threads, product_body(team, shape, w, &NO_NORM, rows, x, out, 0, 0, &b));
    free(b.memory);
}
