/* A split with vectors, all in fp32: keys and values are packed as a product's columns, so that each score is one
   accumulator over d_head and each value one over the keys, in order, however many rows the tile has. */
#ifndef CUTAWAY_ATTENTION_VECTORS_H
#define CUTAWAY_ATTENTION_VECTORS_H

#include "attention_softmax.h"
#include "turn.h"

/* LANES keys from element `at`, to `out` [d][16]. */
static void turn_keys(const void *page, int64_t format, int64_t at, int64_t d, float *out) {
    Vector v[LANES];
    int64_t i = 0;
    for (; format == PAGES_BF16 && i + 2 * LANES <= d; i += 2 * LANES) { /* two neighbours in a word */
        for (int key = 0; key < LANES; key++) memcpy(&v[key], (const uint16_t *)page + at + key * d + i, sizeof(Vector));
        turn(v);
        for (int j = 0; j < LANES; j++) {
            store(out + (i + 2 * j) * 16, (Vector)((Bits)v[j] << 16));
            store(out + (i + 2 * j + 1) * 16, (Vector)((Bits)v[j] & 0xffff0000u));
        }
    }
    for (; i < d; i += LANES) {
        for (int key = 0; key < LANES; key++) v[key] = load_page(page, format, at + key * d + i, d - i);
        turn(v);
        for (int j = 0; j < LANES && i + j < d; j++) store(out + (i + j) * 16, v[j]);
    }
}

/* Keys [start, start + KEYS) that the tile may see; other columns are left as they are. */
static void pack_keys(const Attention *a, const QueryTile *t, int64_t start, Ahead *ahead, float *out) {
    const int64_t d = a->shape->d_head;
    for (int64_t block = start; block < start + KEYS; block += LINE)
        if (block < t->upto && block + LINE > t->from)
            for (int64_t key = block; key < block + LINE; key += LANES) {
                ask(a, ahead, LANES);
                turn_keys(
                    a->pages->keys, a->pages->format, place_of(a, t, key) * d, d, out + (block - start) * d + key % LINE);
            }
}

/* Values of `n` keys, all of one block of LINE, as columns [wide / 16][KEYS][16]. */
static void pack_line(const Attention *a, int64_t place, int64_t n, float *out) {
    const int64_t d = a->shape->d_head, format = a->pages->format, at = place * d;
    const void *page = a->pages->values;
    for (int64_t i = 0; i < d; i += LANES) {
        float *to = out + i / 16 * KEYS * 16 + i % 16;
        if (d - i < LANES)
            for (int64_t key = 0; key < n; key++) store(to + key * 16, load_page(page, format, at + key * d + i, d - i));
        else if (format == PAGES_BF16)
            for (int64_t key = 0; key < n; key++) store(to + key * 16, load_page(page, PAGES_BF16, at + key * d + i, LANES));
        else
            for (int64_t key = 0; key < n; key++) store(to + key * 16, load_page(page, format, at + key * d + i, LANES));
    }
}

/* Values of keys [start, stop), all of one block of KEYS. */
static void pack_values(
    const Attention *a, const QueryTile *t, int64_t start, int64_t stop, Ahead *ahead, float *out) {
    for (int64_t key = start, next; key < stop; key = next) {
        next = key / LINE * LINE + LINE;
        if (next > stop) next = stop;
        ask(a, ahead, 8);
        pack_line(a, place_of(a, t, key), next - key, out + (key - start) * 16);
    }
}

static void score_with_vectors(const Attention *a, const QueryTile *t, KeyRange r, const Workspace *w) {
    const int64_t d = a->shape->d_head;
    for (int64_t start = r.from / KEYS * KEYS; start < r.upto; start += KEYS) {
        pack_keys(a, t, start, w->ahead, w->packed_keys);
        ask(a, w->ahead, 8);
        tile_fp32(w->q, d, t->rows * a->group, w->packed_keys, d * 16, d, w->scores + start - r.base, SPLIT, 0);
    }
}

/* One split of a tile's keys: softmax of its rows over these keys alone. */
static void attend_with_vectors(const Attention *a, const QueryTile *t, KeyRange r, const Workspace *w, const Softmax *to) {
    const int64_t n = t->rows * a->group;
    score_with_vectors(a, t, r, w);
    for (int64_t i = 0; i < n; i++)
        weigh(a, w, w->scores + i * SPLIT, r.base, r.from - r.base, r.upto - r.base,
              a->step->positions[t->first + i / a->group], to->highest + i, to->sum + i);
    int add = 0;
    for (int64_t start = r.from, stop; start < r.upto; start = stop, add = 1) {
        stop = start / KEYS * KEYS + KEYS;
        if (stop > r.upto) stop = r.upto;
        pack_values(a, t, start, stop, w->ahead, w->packed_values);
        ask(a, w->ahead, 8);
        for (int64_t c = 0; c < a->wide; c += TILE)
            tile_fp32(w->scores + start - r.base, SPLIT, n, w->packed_values + c * KEYS, KEYS * 16, stop - start,
                      to->values + c, a->wide, add);
    }
}

#endif
