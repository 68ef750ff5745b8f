/* Products with packed matrices, TILE columns at a time: rows made ready, tasks, and what becomes of the sums. */
#ifndef CUTAWAY_PRODUCT_H
#define CUTAWAY_PRODUCT_H

#include "matrix_tiles.h"
#include "team.h"

enum { ROWS_A_TASK = 512 };

/* Sums of up to ROWS_AT_ONCE rows from `r` and columns of tile `t`; `before` may be finished meanwhile. */
static void multiply_tile(
    const Shape *shape, const Matrix *w, const Operand *x, int64_t r, int64_t n, int64_t t, float *out,
    Unfinished *before) {
    const int64_t block = w->padded_depth * 16;
#if defined(CUTAWAY_AMX)
    if (w->kind == ROW8) {
        const Panel panels[] = {panel(x->data, r, w->padded_depth), panel(x->data, r + 16, w->padded_depth)};
        tile_integers(w, panels, n, t, r == 0, (int32_t *)out, before);
        return;
    }
#endif
    if (w->kind) {
        tile_quantized(w, x->data, r, n, t, out);
        return;
    }
    if (!shape->bf16) {
        const float *columns = (const float *)w->data + 2 * t * block;
        tile_fp32((const float *)x->data + r * x->step, x->step, n, columns, block, w->depth, out, TILE, 0);
        return;
    }
    const uint16_t *columns = (const uint16_t *)w->data + 2 * t * block;
    const Narrow *rows = (const Narrow *)x->data + r * x->step;
#if defined(CUTAWAY_AMX)
    tile_bf16(rows, x->step, n, columns, block, w->padded_depth, r == 0, out, before);
#else
    (void)before;
    tile_bf16(rows, x->step, n, columns, block, w->padded_depth, out);
#endif
}

static void multiply_task(
    const Shape *shape, const Matrix *w, const Operand *x, int64_t first, int64_t stop, int64_t t, Unfinished *u) {
    for (int64_t r = first; r < stop; r += ROWS_AT_ONCE) {
        const int64_t n = stop - r < ROWS_AT_ONCE ? stop - r : ROWS_AT_ONCE;
        float *tile = next_tile(u);
        multiply_tile(shape, w, x, r, n, t, tile, u);
        finish_all(u);
        u->tile = tile, u->row = r, u->n = n, u->t = t, u->done = 0;
        if (u->integers)
            for (int i = 0; i < ROWS_AT_ONCE / 16; i++) u->panels[i] = panel(x->data, r + 16 * i, w->padded_depth);
    }
}

/* All of the team: x times the matrix, then they meet. */
static void product(
    const Team *team, const Shape *shape, const Matrix *w, const Operand *x, int64_t rows, const After *after) {
    int64_t chunks = (rows + ROWS_A_TASK - 1) / ROWS_A_TASK, tasks = w->tiles * chunks;
    Unfinished u;
    u.after = after, u.bias = w->bias, u.tile = u.tiles[1], u.n = u.done = 0;
    u.way = usual_way(w, after);
#if defined(CUTAWAY_AMX)
    u.integers = w->kind == ROW8 ? w : 0;
#else
    u.integers = 0;
#endif
    const int few = rows < 16 && (!w->kind || u.integers);
    if (few) set_tiles(rows);
    for (int64_t i; (i = take_near(team, tasks)) >= 0;) {
        int64_t first = i % chunks * ROWS_A_TASK, stop = first + ROWS_A_TASK;
        multiply_task(shape, w, x, first, stop < rows ? stop : rows, i / chunks, &u);
    }
    finish_all(&u);
    if (few) set_tiles(16);
    meet(team);
}

#endif
