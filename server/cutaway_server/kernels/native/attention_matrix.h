/* A split with AMX's matrix tiles, which multiply bf16 and add in fp32: keys as pages hold them times the queries, and
   weights times values. So that nothing is lost, a query goes as the sum of three bf16 numbers (exactly its 24 bits) and a
   weight as that of two (to 2^-17 of it); keys and values are bf16, or int8, which bf16 holds exactly, with their scales
   applied in fp32. Rows of these products do not know each other, so one row takes the same way as many. */
#ifndef CUTAWAY_ATTENTION_MATRIX_H
#define CUTAWAY_ATTENTION_MATRIX_H

#if defined(CUTAWAY_AMX)

#include "attention_softmax.h"
#include "turn.h"

enum { DEEP = 32, PARTS = 3, TILE_ELEMENTS = 512 }; /* a tile: 16 rows of 32 bf16 */

/* The upper halves of 32 words. */
INLINE __m512i upper_halves(__m512i low, __m512i high) {
    const __m512i odd = _mm512_set_epi16(
        63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5,
        3, 1);
    return _mm512_permutex2var_epi16(low, odd, high);
}

/* x to its upper bf16; what is left of it. */
INLINE Vector cut_bf16(Vector x, Vector *left) {
    Vector part = (Vector)((Bits)x & 0xffff0000u);
    *left = x - part;
    return part;
}

/* 16 query heads as three tiles for each 32 of d_head, [d / 32][PARTS][pair][head][2]; of `n` heads, zeros after them. */
static void split_queries(const float *q, int64_t n, int64_t d, uint16_t *out) {
    for (int64_t i = 0; i < d; i += DEEP, out += PARTS * TILE_ELEMENTS) {
        Vector low[16], high[16], turned[16];
        for (int head = 0; head < 16; head++) {
            low[head] = head < n ? load_upto(q + head * d + i, d - i) : fill(0);
            high[head] = head < n && i + 16 < d ? load_upto(q + head * d + i + 16, d - i - 16) : fill(0);
        }
        for (int part = 0; part < PARTS; part++) {
            for (int head = 0; head < 16; head++) {
                Vector a = cut_bf16(low[head], &low[head]), b = cut_bf16(high[head], &high[head]);
                turned[head] = (Vector)upper_halves((__m512i)a, (__m512i)b);
            }
            turn(turned);
            for (int pair = 0; pair < 16; pair++) memcpy(out + part * TILE_ELEMENTS + pair * 32, &turned[pair], 64);
        }
    }
}

/* 32 elements of a row of d from element `at`, as bf16, zeros past its end. */
INLINE __m512i load_row(const void *page, int64_t format, int64_t at, int64_t left) {
    if (format == PAGES_BF16) {
        __mmask32 mask = left >= DEEP ? 0xffffffffu : (1u << left) - 1;
        return _mm512_maskz_loadu_epi16(mask, (const uint16_t *)page + at);
    }
    __mmask32 mask = left >= DEEP ? 0xffffffffu : (1u << left) - 1;
    __m256i bytes = _mm256_maskz_loadu_epi8(mask, (const int8_t *)page + at);
    __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(bytes)));
    __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(bytes, 1)));
    return upper_halves((__m512i)low, (__m512i)high);
}

/* Where the tiles of LINE keys from `place` lie, and bytes from row to row: in the page, or copied to `to`. */
static const char *key_tiles(const Attention *a, int64_t place, uint16_t *to, int64_t *step) {
    const int64_t d = a->shape->d_head, format = a->pages->format;
    *step = a->wide * sizeof(uint16_t);
    if (format == PAGES_BF16 && d % DEEP == 0) return (const char *)a->pages->keys + place * *step;
    for (int64_t key = 0; key < LINE; key++)
        for (int64_t i = 0; i < d; i += DEEP)
            _mm512_storeu_si512(to + key * a->wide + i, load_row(a->pages->keys, format, (place + key) * d + i, d - i));
    return (const char *)to;
}

/* Products [key][head] of up to four blocks of LINE keys with 16 query heads: out [n][16][16]. */
static void multiply_keys(
    const Attention *a, const char *const keys[4], int64_t step, int64_t n, const uint16_t *q, Ahead *ahead, float *out) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t i = 0; i < a->wide / DEEP; i++, q += PARTS * TILE_ELEMENTS) {
        _tile_loadd(5, q, 64);
        _tile_loadd(6, q + TILE_ELEMENTS, 64);
        _tile_loadd(7, q + 2 * TILE_ELEMENTS, 64);
#define BLOCK(N)                                                                                                       \
    if (n > N) {                                                                                                       \
        _tile_loadd(4, keys[N] + i * 64, step);                                                                        \
        _tile_dpbf16ps(N, 4, 5);                                                                                       \
        _tile_dpbf16ps(N, 4, 6);                                                                                       \
        _tile_dpbf16ps(N, 4, 7);                                                                                       \
        ask(a, ahead, 6);                                                                                              \
    }
        BLOCK(0)
        BLOCK(1)
        BLOCK(2)
        BLOCK(3)
#undef BLOCK
    }
    _tile_stored(0, out, 64);
    if (n > 1) _tile_stored(1, out + 256, 64);
    if (n > 2) _tile_stored(2, out + 512, 64);
    if (n > 3) _tile_stored(3, out + 768, 64);
}

/* The first `n` columns of a square [16][16] to rows `step` apart. */
static void turn_columns(const float *from, int64_t n, float *to, int64_t step) {
    for (int64_t c = 0; c < n; c += 4, to += 4 * step) {
        __m512 v[4], a[4];
        for (int i = 0; i < 4; i++) {
            const float *row = from + i * 16 + c;
            v[i] = _mm512_castps128_ps512(_mm_load_ps(row));
            v[i] = _mm512_insertf32x4(v[i], _mm_load_ps(row + 64), 1);
            v[i] = _mm512_insertf32x4(v[i], _mm_load_ps(row + 128), 2);
            v[i] = _mm512_insertf32x4(v[i], _mm_load_ps(row + 192), 3);
        }
        a[0] = _mm512_unpacklo_ps(v[0], v[1]), a[1] = _mm512_unpackhi_ps(v[0], v[1]);
        a[2] = _mm512_unpacklo_ps(v[2], v[3]), a[3] = _mm512_unpackhi_ps(v[2], v[3]);
        _mm512_store_ps(to, _mm512_shuffle_ps(a[0], a[2], 0x44));
        _mm512_store_ps(to + step, _mm512_shuffle_ps(a[0], a[2], 0xee));
        _mm512_store_ps(to + 2 * step, _mm512_shuffle_ps(a[1], a[3], 0x44));
        _mm512_store_ps(to + 3 * step, _mm512_shuffle_ps(a[1], a[3], 0xee));
    }
}

/* Products of `n` of 16 query heads with a split's keys: scores [n][SPLIT]. */
static void score_with_tiles(
    const Attention *a, const QueryTile *t, KeyRange r, int64_t n, const uint16_t *q, const Workspace *w) {
    float products[4 * 256] __attribute__((aligned(64)));
    for (int64_t key = r.from / LINE * LINE, blocks; key < r.upto; key += LINE * blocks) {
        blocks = (r.upto - key + LINE - 1) / LINE;
        if (blocks > 4) blocks = 4;
        const char *keys[4];
        int64_t step = 0;
        for (int64_t b = 0; b < blocks; b++) {
            keys[b] = key_tiles(a, place_of(a, t, key + b * LINE), w->key_lines + b * LINE * a->wide, &step);
        }
        multiply_keys(a, keys, step, blocks, q, w->ahead, products);
        for (int64_t b = 0; b < blocks; b++) {
            ask(a, w->ahead, 4);
            turn_columns(products + b * 256, n, w->scores + key + b * LINE - r.base, SPLIT);
        }
    }
}

/* Two keys' rows, word by word beside one another: 16 columns to `to`, the next 16 to the tile after it. */
INLINE void put_pair(__m512i even, __m512i odd, uint16_t *to) {
    const __m512i lower = _mm512_set_epi16(
        47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i upper = _mm512_add_epi16(lower, _mm512_set1_epi16(16));
    _mm512_store_si512(to, _mm512_permutex2var_epi16(even, lower, odd));
    _mm512_store_si512(to + SPLIT * 16, _mm512_permutex2var_epi16(even, upper, odd));
}

/* Values of LINE keys, of which the tile may see [low, high); zeros for the others. */
static void pair_line(
    const Attention *a, int64_t place, int64_t low, int64_t high, const int64_t format, Ahead *ahead, uint16_t *out) {
    const int64_t d = a->shape->d_head;
    for (int64_t i = 0; i < d; i += DEEP, out += 2 * SPLIT * 16) {
        const int64_t at = place * d + i, left = d - i;
        for (int64_t key = 0; key < LINE; key += 2) {
            __m512i even = _mm512_setzero_si512(), odd = even;
            if (key >= low && key < high) even = load_row(a->pages->values, format, at + key * d, left);
            if (key + 1 >= low && key + 1 < high) odd = load_row(a->pages->values, format, at + (key + 1) * d, left);
            put_pair(even, odd, out + key / 2 * 32);
        }
        ask(a, ahead, 4);
    }
}

/* The split's values as tiles [wide / 16][SPLIT / 32][pair of keys][16][2]. */
static void pair_values(const Attention *a, const QueryTile *t, KeyRange r, Ahead *ahead, uint16_t *out) {
    const int64_t end = (r.upto + DEEP - 1) / DEEP * DEEP;
    for (int64_t key = r.from / DEEP * DEEP; key < end; key += LINE) {
        const int64_t low = r.from - key, high = r.upto - key, seen = low < LINE && high > 0;
        const int64_t place = seen ? place_of(a, t, key) : 0;
        uint16_t *to = out + (key - r.base) / 2 * 32;
        if (a->pages->format == PAGES_BF16)
            pair_line(a, place, low, high, PAGES_BF16, ahead, to);
        else
            pair_line(a, place, low, high, PAGES_INT8, ahead, to);
    }
}

/* Weights of `n` rows at keys [start, stop) to two tiles for each 32 keys, [SPLIT / 32][2][16][32]. */
static void split_weights(const float *scores, int64_t n, int64_t start, int64_t stop, uint16_t *out) {
    for (int64_t i = start; i < stop; i += DEEP)
        for (int64_t row = 0; row < n; row++) {
            uint16_t *to = out + i / DEEP * 2 * TILE_ELEMENTS + row * DEEP;
            Vector low = load(scores + row * SPLIT + i), high = load(scores + row * SPLIT + i + 16), left, other;
            low = cut_bf16(low, &left), high = cut_bf16(high, &other);
            _mm512_store_si512(to, upper_halves((__m512i)low, (__m512i)high));
            Bits a = (Bits)left + 0x8000, b = (Bits)other + 0x8000; /* to nearest */
            _mm512_store_si512(to + TILE_ELEMENTS, upper_halves((__m512i)a, (__m512i)b));
        }
}

/* Values [16][wide] of 16 rows of weights, over tiles [first, end) of 32 keys. */
static void multiply_values(
    const Attention *a, const uint16_t *weights, const uint16_t *pairs, int64_t first, int64_t end, Ahead *ahead,
    float *out) {
    const int64_t apart = SPLIT * 16, wide = a->wide; /* apart: from 16 columns to the next */
    for (int64_t c = 0; c < wide; c += 64, pairs += 4 * apart) {
        const int four = wide - c >= 64;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t i = first; i < end; i++) {
            const uint16_t *weight = weights + i * 2 * TILE_ELEMENTS, *value = pairs + i * TILE_ELEMENTS;
            _tile_loadd(4, weight, 64);
            _tile_loadd(5, weight + TILE_ELEMENTS, 64);
            _tile_loadd(6, value, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(0, 5, 6);
            _tile_loadd(7, value + apart, 64);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(1, 5, 7);
            ask(a, ahead, 4);
            if (!four) continue;
            _tile_loadd(6, value + 2 * apart, 64);
            _tile_dpbf16ps(2, 4, 6);
            _tile_dpbf16ps(2, 5, 6);
            _tile_loadd(7, value + 3 * apart, 64);
            _tile_dpbf16ps(3, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
            ask(a, ahead, 4);
        }
        _tile_stored(0, out + c, wide * 4);
        _tile_stored(1, out + c + 16, wide * 4);
        if (!four) continue;
        _tile_stored(2, out + c + 32, wide * 4);
        _tile_stored(3, out + c + 48, wide * 4);
    }
}

/* The tile's queries in bf16 parts, 16 heads at a time. */
static void take_query_parts(const Attention *a, const QueryTile *t, const Workspace *w) {
    const int64_t n = t->rows * a->group, each = PARTS * 16 * a->wide;
    for (int64_t i = 0; i < n; i += 16)
        split_queries(w->q + i * a->shape->d_head, n - i, a->shape->d_head, w->query_parts + i / 16 * each);
}

/* One split of a tile's keys: softmax of its rows over these keys alone. */
static void attend_with_tiles(const Attention *a, const QueryTile *t, KeyRange r, const Workspace *w, const Softmax *to) {
    const int64_t rows = t->rows * a->group, each = PARTS * 16 * a->wide;
    const int64_t start = (r.from - r.base) / DEEP * DEEP, stop = (r.upto - r.base + DEEP - 1) / DEEP * DEEP;
    for (int64_t i = 0; i < rows; i += 16) {
        const int64_t n = rows - i < 16 ? rows - i : 16;
        score_with_tiles(a, t, r, n, w->query_parts + i / 16 * each, w);
        if (i == 0) pair_values(a, t, r, w->ahead, w->value_pairs);
        for (int64_t j = 0; j < n; j++) {
            ask(a, w->ahead, 16);
            weigh(a, w, w->scores + j * SPLIT, r.base, start, stop, a->step->positions[t->first + (i + j) / a->group],
                  to->highest + i + j, to->sum + i + j);
        }
        split_weights(w->scores, n, start, stop, w->weight_parts);
        multiply_values(
            a, w->weight_parts, w->value_pairs, start / DEEP, stop / DEEP, w->ahead, to->values + i * a->wide);
    }
}

#endif
#endif
