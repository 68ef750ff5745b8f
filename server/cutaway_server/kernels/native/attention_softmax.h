/* Scores to weights within a split, splits merged in order, and the result of a tile. */
#ifndef CUTAWAY_ATTENTION_SOFTMAX_H
#define CUTAWAY_ATTENTION_SOFTMAX_H

#include "attention_plan.h"

INLINE float highest_of(Vector v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)v);
#else
    return largest(v);
#endif
}

INLINE float sum_of(Vector v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#else
    return total(v);
#endif
}

INLINE Integers lanes_from(int64_t i) {
    Integers v;
    for (int lane = 0; lane < LANES; lane++) v[lane] = (int32_t)i + lane;
    return v;
}

/* Products q.k to scores; returns the highest of those the row may see, which are [low, high]. Others get -inf. */
INLINE float scale_scores(const Attention *a, const float *key_scales, float *scores, int64_t low, int64_t high) {
    const int64_t first = low / LANES * LANES, end = high / LANES * LANES + LANES;
    const Vector scale = fill(a->shape->attention_scale), cap = fill(a->shape->attention_cap), none = fill(-INFINITY);
    const int capped = a->shape->attention_cap > 0;
    Integers lanes = lanes_from(first);
    Vector most = none;
    for (int64_t i = first; i < end; i += LANES, lanes += LANES) {
        Vector s = load(scores + i);
        if (key_scales) s *= load(key_scales + i);
        s *= scale;
        if (capped) s = cap * hyperbolic_tangent(s / cap);
        s = choose((lanes >= (int32_t)low) & (lanes <= (int32_t)high), s, none);
        store(scores + i, s);
        most = larger(s, most);
    }
    return highest_of(most);
}

/* One row of a split: products to weights e^(score - highest), times the values' scales if there are any; 0 where it may
   not see. `scores` are those of keys base..., of which the weights in [start, stop) are wanted. */
static void weigh(
    const Attention *a, const Workspace *w, float *scores, int64_t base, int64_t start, int64_t stop, int64_t position,
    float *highest, float *sum) {
    const int quantised = a->pages->format == PAGES_INT8;
    int64_t window = a->layer->window, low = window ? position - window + 1 - base : 0, high = position - base;
    if (low < start) low = start;
    if (high >= stop) high = stop - 1;
    *highest = -INFINITY, *sum = 0;
    if (low > high) {
        memset(scores + start, 0, (stop - start) * sizeof(float));
        return;
    }
    *highest = scale_scores(a, quantised ? w->key_scales : 0, scores, low, high);
    const int64_t first = low / LANES * LANES, end = high / LANES * LANES + LANES;
    const Vector least = fill(*highest);
    Vector sums = fill(0);
    for (int64_t i = first; i < end; i += LANES) {
        Vector p = exponential(load(scores + i) - least);
        sums += p;
        if (quantised) p *= load(w->value_scales + i);
        store(scores + i, p);
    }
    *sum = sum_of(sums);
    if (first > start) memset(scores + start, 0, (first - start) * sizeof(float));
    if (end < stop) memset(scores + end, 0, (stop - end) * sizeof(float));
}

static void clear(const Attention *a, int64_t n, const Softmax *s) {
    for (int64_t i = 0; i < n; i++) s->highest[i] = -INFINITY, s->sum[i] = 0;
    memset(s->values, 0, n * a->wide * sizeof(float));
}

/* One more split of `n` query heads. */
static void merge(const Attention *a, int64_t n, const Softmax *part, const Softmax *all) {
    for (int64_t i = 0; i < n; i++) {
        if (part->sum[i] == 0) continue; /* the row sees none of these keys */
        float before = all->highest[i], now = part->highest[i], top = now < before ? before : now;
        float keep = expf(before - top), weight = expf(now - top);
        all->highest[i] = top;
        all->sum[i] = all->sum[i] * keep + part->sum[i] * weight;
        float *to = all->values + i * a->wide;
        const float *from = part->values + i * a->wide;
        for (int64_t j = 0; j < a->wide; j += LANES) store(to + j, load(to + j) * keep + load(from + j) * weight);
    }
}

static void write_out(const Attention *a, const QueryTile *t, const Softmax *all) {
    int64_t d = a->shape->d_head, heads = a->shape->n_heads;
    for (int64_t i = 0; i < t->rows * a->group; i++) {
        int64_t head = (t->first + i / a->group) * heads + t->head * a->group + i % a->group;
        for (int64_t j = 0; j < d; j += LANES)
            store_upto(a->out + head * d + j, load(all->values + i * a->wide + j) / all->sum[i], d - j);
        a->lse[head] = all->highest[i] + logf(all->sum[i]);
    }
}

#endif
