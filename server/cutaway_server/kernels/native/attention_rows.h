/* Scores or probabilities of single rows for all their keys, laid out whole: what attention itself never writes down.

   Each score is one accumulator over d_head, so a row's bits do not depend on the rows beside it. */
#ifndef CUTAWAY_ATTENTION_ROWS_H
#define CUTAWAY_ATTENTION_ROWS_H

#include "attention_vectors.h"
#include "team.h"

typedef struct { /* out [heads][rows][width]; lse [rows][heads], or null for scores */
    const float *lse;
    float *out;
    int64_t rows, width;
} Patterns;

static Workspace carve_rows(const Attention *a, uintptr_t *at) {
    Workspace w = {0};
    w.q = carve(at, a->most * a->shape->d_head * sizeof(float));
    w.key_scales = carve(at, SPLIT * sizeof(float));
    w.value_scales = carve(at, SPLIT * sizeof(float));
    w.scores = carve(at, a->most * SPLIT * sizeof(float));
    w.packed_keys = carve(at, KEYS * a->shape->d_head * sizeof(float));
    return w;
}

/* Keys base + [low, high] of one query head to their places in `to`, a whole row. */
static void put_keys(const float *scores, int64_t base, int64_t low, int64_t high, const float *lse, float *to) {
    for (int64_t i = low; i <= high; i += LANES) {
        const int64_t left = high + 1 - i;
        Vector s = left < LANES ? load_some(scores + i, left) : load(scores + i);
        if (lse) s = exponential(s - fill(*lse));
        store_upto(to + base + i, s, left);
    }
}

static void pattern_of_tile(const Attention *a, const QueryTile *t, const Workspace *w, const Patterns *p) {
    const int64_t heads = a->shape->n_heads, window = a->layer->window;
    const float outside = p->lse ? 0 : -INFINITY;
    take_queries(a, t, w->q);
    for (int64_t i = 0; i < t->rows * a->group; i++) {
        float *to = p->out + ((t->head * a->group + i % a->group) * p->rows + t->first + i / a->group) * p->width;
        for (int64_t j = 0; j < p->width; j++) to[j] = outside;
    }
    for (int64_t split = t->from / SPLIT; split * SPLIT < t->upto; split++) {
        const KeyRange r = range_of(t, split);
        take_scales(a, t, r, w);
        score_with_vectors(a, t, r, w);
        for (int64_t i = 0; i < t->rows * a->group; i++) {
            const int64_t row = t->first + i / a->group, head = t->head * a->group + i % a->group;
            const int64_t position = a->step->positions[row];
            int64_t low = window ? position - window + 1 - r.base : 0, high = position - r.base;
            if (low < r.from - r.base) low = r.from - r.base;
            if (high >= r.upto - r.base) high = r.upto - r.base - 1;
            if (low > high) continue;
            float *scores = w->scores + i * SPLIT;
            scale_scores(a, a->pages->format == PAGES_INT8 ? w->key_scales : 0, scores, low, high);
            put_keys(scores, r.base, low, high, p->lse ? p->lse + row * heads + head : 0,
                    p->out + (head * p->rows + row) * p->width);
        }
    }
}

/* Called by all threads of a team; all have met when it returns. */
static void patterns(
    const Team *team, const Shape *shape, const Layer *layer, const Pages *pages, const Step *step, const float *q,
    const Patterns *p) {
    Attention planned;
    if (team->me == 0) {
        planned = (Attention){
            .shape = shape, .layer = layer, .pages = pages, .step = step, .q = q,
            .group = shape->n_heads / shape->n_kv_heads, .wide = (shape->d_head + TILE - 1) / TILE * TILE};
        planned.most = (rows_a_tile(&planned) * planned.group + 15) / 16 * 16;
        planned.n_tiles = make_tiles(&planned, rows_a_tile(&planned), 0);
        uintptr_t each = 0;
        carve_rows(&planned, &each);
        const int64_t list = (planned.n_tiles * sizeof(QueryTile) + 63) / 64 * 64;
        planned.part_bytes = each;
        planned.tiles = aligned_alloc(64, list + team->threads * each);
        planned.workspaces = (char *)planned.tiles + list;
        make_tiles(&planned, rows_a_tile(&planned), planned.tiles);
        team->crew->shared = &planned;
    }
    meet(team);
    const Attention *a = team->crew->shared;
    uintptr_t at = (uintptr_t)(a->workspaces + team->me * a->part_bytes);
    Workspace w = carve_rows(a, &at);
    Ahead ahead = {0};
    w.ahead = &ahead;
    for (int64_t i; (i = take(team, 1)) < a->n_tiles;) pattern_of_tile(a, a->tiles + i, &w, p);
    meet(team);
    if (team->me == 0) free(planned.tiles);
}

#endif
