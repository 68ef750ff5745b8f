/* Quantised products with AMX: tiles of 16 rows, 64 deep. Groups are less deep: each has a tile of its own that is zeros
   elsewhere, which costs no time, and sums are scaled one group after the other, as quantized_vectors.h does. */
#ifndef CUTAWAY_QUANTIZED_TILES_H
#define CUTAWAY_QUANTIZED_TILES_H

enum { FEWEST_GROUP_ROWS = 4, UNITS_AT_ONCE = 16 };

/* What is at `p` must be in memory here: compilers do not see that tile instructions read it. */
INLINE void written(const void *p) { __asm__ volatile("" : : "r"(p) : "memory"); }

/* A unit is what has one scale: a group, or half of one. */
INLINE int64_t unit_depth(int kind) { return kind == HALVES8 ? GROUP / 2 : GROUP; }

/* Units of 16 columns from group `first` as signed bytes, centred: [units][64 / 4][16][4]. Each is where its depth is within 64;
   the rest stays as it is, zeros. */
INLINE void centre(const int kind, const Matrix *w, int64_t block, int64_t first, int64_t units, int8_t *out) {
    const int64_t deep = unit_depth(kind), each = 64 / deep, bytes = deep * (is_four_bit(kind) ? 8 : 16);
    const uint8_t *data = (const uint8_t *)w->data + block * w->padded_depth / deep * bytes + first * (GROUP / deep) * bytes;
    const __m512i low = _mm512_set1_epi8(15), above = _mm512_set1_epi8((char)stored_above(kind));
    for (int64_t u = 0; u < units; u++, data += bytes) {
        int8_t *to = out + u * 1024 + u % each * deep * 16;
        for (int64_t i = 0; i < bytes; i += 64) {
            __m512i v = _mm512_load_si512(data + i);
            if (!is_four_bit(kind)) {
                _mm512_store_si512(to + i, _mm512_sub_epi8(v, above));
                continue;
            }
            _mm512_store_si512(to + i, _mm512_sub_epi8(_mm512_and_si512(v, low), above));
            _mm512_store_si512(to + 256 + i, _mm512_sub_epi8(_mm512_and_si512(_mm512_srli_epi16(v, 4), low), above));
        }
    }
}

/* dots [4] = a panel's rows times four units. What lies after the last unit may be multiplied, too, and is not used. */
INLINE void dot_units(const int kind, const int8_t *rows, int64_t depth, const int8_t *columns, int32_t dots[4][256]) {
    _tile_loadd(4, rows, depth);
    _tile_zero(0);
    _tile_loadd(6, columns, 64);
    _tile_dpbssd(0, 4, 6);
    _tile_stored(0, dots[0], 64);
    _tile_zero(1);
    _tile_loadd(7, columns + 1024, 64);
    _tile_dpbssd(1, 4, 7);
    _tile_stored(1, dots[1], 64);
    if (kind != HALVES8) _tile_loadd(4, rows + 64, depth);
    _tile_zero(2);
    _tile_loadd(6, columns + 2048, 64);
    _tile_dpbssd(2, 4, 6);
    _tile_stored(2, dots[2], 64);
    _tile_zero(3);
    _tile_loadd(7, columns + 3072, 64);
    _tile_dpbssd(3, 4, 7);
    _tile_stored(3, dots[3], 64);
}

/* Sums of one group (or half) of n rows are added, scaled, to theirs. */
INLINE void add_group(
    const int kind, const int n, const Matrix *w, int64_t block, int64_t g, int half, const int32_t *dots, const Panel *x,
    Vector *sums) {
    Vector scale, minimum;
    load_scales(kind, w, block, g, half, 0, &scale, &minimum);
#pragma GCC unroll 16
    for (int r = 0; r < n; r++) {
        Integers dot;
        memcpy(&dot, dots + r * 16, sizeof dot);
        Vector scaled = __builtin_convertvector(dot, Vector) * fill(x->scales[g * 16 + r]);
        sums[r] = multiply_add(scaled, scale, sums[r]);
        if (has_minimum(kind)) sums[r] = multiply_add(minimum, fill(x->sums[g * 16 + r]), sums[r]);
    }
}

/* tile [n][32], 16 of its columns, += some units of a panel's rows, from group `first`; `columns` are what `centre` made.
   The next four units are multiplied while the sums of four are scaled. */
INLINE void multiply_centred(
    const int kind, const int n, const Matrix *w, int64_t block, int64_t first, int64_t units, const int8_t *columns,
    const Panel *x, float *tile) {
    const int64_t depth = w->padded_depth, deep = unit_depth(kind), halves = GROUP / deep;
    const int8_t *rows = x->values + first * GROUP;
    int32_t dots[2][4][256] __attribute__((aligned(64)));
    Vector sums[16];
#pragma GCC unroll 16
    for (int r = 0; r < n; r++) sums[r] = first ? load(tile + r * 32) : fill(0);
    dot_units(kind, rows, depth, columns, dots[0]);
    for (int64_t u = 0; u < units; u += 4) {
        if (u + 4 < units) dot_units(kind, rows + (u + 4) * deep, depth, columns + (u + 4) * 1024, dots[u / 4 % 2 ^ 1]);
        for (int64_t i = 0; i < 4 && u + i < units; i++)
            add_group(kind, n, w, block, first + (u + i) / halves, (u + i) % halves, dots[u / 4 % 2][i], x, sums);
    }
#pragma GCC unroll 16
    for (int r = 0; r < n; r++) store(tile + r * 32, sums[r]);
}

INLINE void groups_of_kind(const int kind, const Matrix *w, const Panel *x, const Panel *next, int64_t n, int64_t t, float *tile) {
    int8_t columns[UNITS_AT_ONCE * 1024] __attribute__((aligned(64)));
    const int64_t halves = GROUP / unit_depth(kind), groups = w->padded_depth / GROUP, step = UNITS_AT_ONCE / halves;
    memset(columns, 0, sizeof columns);
    for (int64_t block = 2 * t; block < 2 * t + 2; block++)
        for (int64_t first = 0; first < groups; first += step) {
            const int64_t units = (groups - first < step ? groups - first : step) * halves;
            float *out = tile + block % 2 * 16;
            centre(kind, w, block, first, units, columns);
            written(columns);
            if (n <= 8)
                multiply_centred(kind, 8, w, block, first, units, columns, x, out);
            else
                multiply_centred(kind, 16, w, block, first, units, columns, x, out);
            if (n > 16) multiply_centred(kind, 16, w, block, first, units, columns, next, out + 16 * 32);
        }
}

static void amx_groups(const Matrix *w, const Panel *x, const Panel *next, int64_t n, int64_t t, float *tile) {
#define CASE(kind) case kind: groups_of_kind(kind, w, x, next, n, t, tile); break
    switch (w->kind) {
        CASE(GROUP8);
        CASE(GROUP4);
        CASE(MIN8);
        CASE(MIN4);
        CASE(SUPER8);
        CASE(SUPER4);
        CASE(HALVES8);
    }
#undef CASE
}

#endif
