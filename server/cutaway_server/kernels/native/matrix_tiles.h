/* Products of bf16, and of rows of integers, with AMX: tiles of 16 rows (a product's rows are padded to 16), 64 bytes deep; a
   tile's rows do not know each other. */
#ifndef CUTAWAY_MATRIX_TILES_H
#define CUTAWAY_MATRIX_TILES_H

#include "finish.h"

#if defined(CUTAWAY_AMX)
/* Tile registers: 0 to 3 for sums and 4, 5 for rows, of `rows` rows each; 6 and 7 for weights. */
static void set_tiles(int64_t rows) {
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    for (int i = 0; i < 8; i++) config.bytes[i] = 64, config.rows[i] = i < 6 ? rows : 16;
    __asm__ volatile("" : : "r"(&config) : "memory"); /* gcc 12 takes the next line to read 8 bytes only */
    _tile_loadconfig(&config);
}

static void start_tiles(void) { set_tiles(16); }

static void stop_tiles(void) { _tile_release(); }

enum { AHEAD = 64 }; /* of the depth: 2 KiB of each block */

/* Asks for one step's two tiles of weights before their use; past its end a matrix goes on with its next columns. */
INLINE void fetch_ahead(const uint16_t *w, int64_t block, int64_t k, int64_t depth) {
    const int64_t later = k + AHEAD;
    const uint16_t *p = w + (later < depth ? later : later - depth + block / 8) * 16;
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) __builtin_prefetch(p + i * 32), __builtin_prefetch(p + block + i * 32);
}

/* Loads a tile of weights: loads of single lines wait for memory beside one another, better than those of whole tiles. */
INLINE void touch(const void *tile) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) {
        __m512i line = _mm512_load_si512((const char *)tile + i * 64);
        __asm__ volatile("" : : "v"(line));
    }
}

/* out [rows][TILE] = up to 32 rows times TILE columns, while `before` is finished. `fresh`: nobody has read these columns yet. */
static void tile_bf16(
    const Narrow *x, int64_t step, int64_t rows, const uint16_t *w, int64_t block, int64_t depth, int fresh, float *out,
    Unfinished *before) {
    const int64_t wide = step * sizeof(Narrow), two = rows > 16;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < depth; k += 32) {
        if (fresh && two) fetch_ahead(w, block, k, depth);
        if (fresh && !two) touch(w + k * 16), touch(w + block + k * 16);
        _tile_loadd(4, x + k, wide);
        _tile_loadd(6, w + k * 16, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, w + block + k * 16, 64);
        _tile_dpbf16ps(1, 4, 7);
        if (two) {
            _tile_loadd(5, x + 16 * step + k, wide);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        finish_some(before, FINISHED_A_STEP);
    }
    _tile_stored(0, out, 4 * TILE);
    _tile_stored(1, out + 16, 4 * TILE);
    if (!two) return;
    _tile_stored(2, out + 16 * TILE, 4 * TILE);
    _tile_stored(3, out + 16 * TILE + 16, 4 * TILE);
}

/* The same with integers: sums of `n` rows of `panels` and columns of tile `t`. */
static void tile_integers(
    const Matrix *w, const Panel *panels, int64_t n, int64_t t, int fresh, int32_t *out, Unfinished *before) {
    const int64_t depth = w->padded_depth, block = depth * 16;
    const uint8_t *columns = (const uint8_t *)w->data + 2 * t * block;
    const int two = n > 16;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < depth; k += 64) { /* loads and products in turn: 2 x faster than loads first */
        if (fresh) touch(columns + k * 16), touch(columns + block + k * 16);
        _tile_loadd(4, panels[0].values + k, depth);
        _tile_loadd(6, columns + k * 16, 64);
        _tile_dpbsud(0, 4, 6);
        _tile_loadd(7, columns + block + k * 16, 64);
        _tile_dpbsud(1, 4, 7);
        if (two) {
            _tile_loadd(5, panels[1].values + k, depth);
            _tile_dpbsud(2, 5, 6);
            _tile_dpbsud(3, 5, 7);
        }
        finish_some(before, 2 * FINISHED_A_STEP);
    }
    _tile_stored(0, out, 4 * TILE);
    _tile_stored(1, out + 16, 4 * TILE);
    if (!two) return;
    _tile_stored(2, out + 16 * TILE, 4 * TILE);
    _tile_stored(3, out + 16 * TILE + 16, 4 * TILE);
}
#else
static void start_tiles(void) {}

static void set_tiles(int64_t rows) { (void)rows; }

static void stop_tiles(void) {}
#endif

#endif
