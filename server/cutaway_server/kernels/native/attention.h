/* Attention over pages. Keys go in splits of 256 from position 0, merged in order, and inside a split a row's arithmetic is
   the same whatever rows its tile has: so neither neighbours, chunks nor threads can change a row's bits.

   No key outside what a tile's rows may see is used, so pages may hold anything there. */
#ifndef CUTAWAY_ATTENTION_H
#define CUTAWAY_ATTENTION_H

#include "attention_matrix.h"
#include "attention_plan.h"
#include "attention_softmax.h"
#include "attention_vectors.h"
#include "team.h"

static void start_tile(const Attention *a, const QueryTile *t, const Workspace *w) {
    take_queries(a, t, w->q);
#if defined(CUTAWAY_AMX)
    if (uses_matrix_tiles(a)) take_query_parts(a, t, w);
#endif
}

static void attend_split(const Attention *a, const QueryTile *t, int64_t split, const Workspace *w, const Softmax *to) {
    const KeyRange r = range_of(t, split);
    take_scales(a, t, r, w);
#if defined(CUTAWAY_AMX)
    if (uses_matrix_tiles(a)) {
        attend_with_tiles(a, t, r, w, to);
        return;
    }
#endif
    attend_with_vectors(a, t, r, w, to);
}

/* A tile through all its splits, in order; `next` (or null) comes after it. */
static void attend_tile(const Attention *a, const QueryTile *t, const QueryTile *next, const Workspace *w) {
    const int64_t first = t->from / SPLIT, last = (t->upto - 1) / SPLIT;
    start_tile(a, t, w);
    clear(a, t->rows * a->group, &w->all);
    for (int64_t split = first; split <= last; split++) {
        if (split < last)
            look_ahead(w->ahead, t, split + 1);
        else
            look_ahead(w->ahead, next, next ? next->from / SPLIT : 0);
        attend_split(a, t, split, w, &w->part);
        merge(a, t->rows * a->group, &w->part, &w->all);
    }
    write_out(a, t, &w->all);
}

static Softmax part_at(const Attention *a, int64_t tile, int64_t split) {
    uintptr_t at = (uintptr_t)(a->parts + (tile * a->splits + split) * a->part_bytes);
    return carve_softmax(a, &at);
}

/* Task `i` of those that are one split of a tile, kept until all are there; `next` comes after it. */
static void attend_part(const Attention *a, int64_t i, int64_t next, const Workspace *w) {
    const QueryTile *t = a->tiles + i / a->splits, *after = a->tiles + next / a->splits;
    const int64_t split = i % a->splits;
    if ((split + 1) * SPLIT <= t->from || split * SPLIT >= t->upto) return;
    Softmax part = part_at(a, i / a->splits, split);
    look_ahead(w->ahead, next < a->n_tiles * a->splits ? after : 0, next % a->splits);
    start_tile(a, t, w);
    attend_split(a, t, split, w, &part);
}

/* The parts of a tile, merged in the order of attend_tile. */
static void merge_tile(const Attention *a, int64_t tile, const Workspace *w) {
    const QueryTile *t = a->tiles + tile;
    clear(a, t->rows * a->group, &w->all);
    for (int64_t split = t->from / SPLIT; split * SPLIT < t->upto; split++) {
        Softmax part = part_at(a, tile, split);
        merge(a, t->rows * a->group, &part, &w->all);
    }
    write_out(a, t, &w->all);
}

/* Called by all threads of a team; all have met when it returns. */
static void attend(
    const Team *team, const Shape *shape, const Layer *layer, const Pages *pages, const Step *step, const float *q,
    float *out, float *lse) {
    Attention planned;
    if (team->me == 0) {
        planned = (Attention){
            .shape = shape, .layer = layer, .pages = pages, .step = step, .q = q, .out = out, .lse = lse,
            .group = shape->n_heads / shape->n_kv_heads, .wide = (shape->d_head + TILE - 1) / TILE * TILE};
        plan_attention(&planned, team->threads);
        team->crew->shared = &planned;
    }
    meet(team);
    const Attention *a = team->crew->shared;
    uintptr_t at = (uintptr_t)(a->workspaces + team->me * workspace_bytes(a));
    Workspace w = carve_workspace(a, &at);
    Ahead ahead = {0};
    w.ahead = &ahead;
    const int64_t tasks = a->splits ? a->n_tiles * a->splits : a->n_tiles;
    for (int64_t i = take(team, 1), next; i < tasks; i = next) {
        next = take(team, 1);
        if (a->splits)
            attend_part(a, i, next, &w);
        else
            attend_tile(a, a->tiles + i, next < tasks ? a->tiles + next : 0, &w);
    }
    if (a->splits) {
        meet(team);
        for (int64_t i; (i = take(team, 1)) < a->n_tiles;) merge_tile(a, i, &w);
    }
    meet(team);
    if (team->me == 0) free(planned.tiles);
}

#endif
