/* Quantised products with AMX: tiles of 16 rows. Whole rows of integers are 64 deep; groups are as deep as they are, and
   their sums are scaled one group after the other, as quantized_vectors.h does. */
#ifndef CUTAWAY_QUANTIZED_TILES_H
#define CUTAWAY_QUANTIZED_TILES_H

enum { FEWEST_INTEGER_ROWS = 1, FEWEST_GROUP_ROWS = 4, GROUPS_AT_ONCE = 16 };

/* What is at `p` must be in memory here: compilers do not see that tile instructions read it. */
INLINE void written(const void *p) { __asm__ volatile("" : : "r"(p) : "memory"); }

/* Sums in tiles 0 to 3, `depth` integers of 16 rows in 4 and 5, of 16 columns in 6 and 7. */
static void configure_depth(int depth) {
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    for (int i = 0; i < 8; i++) config.bytes[i] = 64, config.rows[i] = 16;
    config.bytes[4] = config.bytes[5] = depth;
    config.rows[6] = config.rows[7] = depth / 4;
    written(&config);
    _tile_loadconfig(&config);
}

/* Up to 32 rows: a panel, and if n > 16 the next one. */
static void amx_rows(const Matrix *w, const Panel *x, const Panel *next, int64_t n, int64_t t, float *tile) {
    int32_t sums[2][2][16][16] __attribute__((aligned(64)));
    const int64_t depth = w->padded_depth, two = n > 16;
    const uint8_t *b = (const uint8_t *)w->data + 2 * t * depth * 16;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < depth; k += 64) {
        _tile_loadd(4, x->values + k, depth);
        _tile_loadd(6, b + k * 16, 64);
        _tile_loadd(7, b + depth * 16 + k * 16, 64);
        _tile_dpbsud(0, 4, 6);
        _tile_dpbsud(1, 4, 7);
        if (!two) continue;
        _tile_loadd(5, next->values + k, depth);
        _tile_dpbsud(2, 5, 6);
        _tile_dpbsud(3, 5, 7);
    }
    _tile_stored(0, sums[0][0], 64);
    _tile_stored(1, sums[0][1], 64);
    if (two) {
        _tile_stored(2, sums[1][0], 64);
        _tile_stored(3, sums[1][1], 64);
    }
    const float *scales = (const float *)w->scales + t * 32;
    for (int64_t r = 0; r < n; r++)
        for (int block = 0; block < 2; block++) {
            Integers sum;
            memcpy(&sum, sums[r / 16][block][r % 16], sizeof sum);
            store(tile + r * 32 + block * 16, scale_row(sum, r < 16 ? x : next, r % 16, scales + block * 16));
        }
}

/* Groups `first`... of 16 columns as signed bytes [groups][32 / 4][16][4], centred. */
INLINE void centre(const int kind, const Matrix *w, int64_t block, int64_t first, int64_t count, int8_t *out) {
    const int four_bit = is_four_bit(kind);
    const int64_t bytes = GROUP * (four_bit ? 8 : 16);
    const uint8_t *data = (const uint8_t *)w->data + (block * (w->padded_depth / GROUP) + first) * bytes;
    const __m512i low = _mm512_set1_epi8(15), above = _mm512_set1_epi8((char)stored_above(kind));
    for (int64_t i = 0; i < count * bytes; i += 64) {
        __m512i v = _mm512_load_si512(data + i);
        if (!four_bit) {
            _mm512_store_si512(out + i, _mm512_sub_epi8(v, above));
            continue;
        }
        int8_t *to = out + i / 256 * 512 + i % 256;
        _mm512_store_si512(to, _mm512_sub_epi8(_mm512_and_si512(v, low), above));
        _mm512_store_si512(to + 256, _mm512_sub_epi8(_mm512_and_si512(_mm512_srli_epi16(v, 4), low), above));
    }
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

/* tile [n][32], 16 of its columns, += some groups of a panel's rows; `columns` are what `centre` made. Two groups, or both
   halves of one, are in flight. */
INLINE void multiply_centred(
    const int kind, const int n, const Matrix *w, int64_t block, int64_t first, int64_t count, const int8_t *columns,
    const Panel *x, float *tile) {
    const int halves = kind == HALVES8 ? 2 : 1, deep = GROUP / halves;
    const int64_t depth = w->padded_depth, units = count * halves;
    const int8_t *rows = x->values + first * GROUP;
    int32_t dots[2][16 * 16] __attribute__((aligned(64)));
    Vector sums[16];
#pragma GCC unroll 16
    for (int r = 0; r < n; r++) sums[r] = first ? load(tile + r * 32) : fill(0);
    for (int64_t u = 0; u < units; u += 2) {
        _tile_zero(0);
        _tile_loadd(4, rows + u * deep, depth);
        _tile_loadd(6, columns + u * deep * 16, 64);
        _tile_dpbssd(0, 4, 6);
        _tile_stored(0, dots[0], 64);
        if (u + 1 < units) {
            _tile_zero(1);
            _tile_loadd(5, rows + (u + 1) * deep, depth);
            _tile_loadd(7, columns + (u + 1) * deep * 16, 64);
            _tile_dpbssd(1, 5, 7);
            _tile_stored(1, dots[1], 64);
        }
        add_group(kind, n, w, block, first + u / halves, 0, dots[0], x, sums);
        if (u + 1 < units) add_group(kind, n, w, block, first + (u + 1) / halves, halves - 1, dots[1], x, sums);
    }
#pragma GCC unroll 16
    for (int r = 0; r < n; r++) store(tile + r * 32, sums[r]);
}

INLINE void groups_of_kind(const int kind, const Matrix *w, const Panel *x, const Panel *next, int64_t n, int64_t t, float *tile) {
    int8_t columns[GROUPS_AT_ONCE * GROUP * 16] __attribute__((aligned(64)));
    const int64_t groups = w->padded_depth / GROUP;
    for (int64_t block = 0; block < 2; block++)
        for (int64_t first = 0; first < groups; first += GROUPS_AT_ONCE) {
            const int64_t count = groups - first < GROUPS_AT_ONCE ? groups - first : GROUPS_AT_ONCE;
            centre(kind, w, 2 * t + block, first, count, columns);
            written(columns);
            if (n <= 8)
                multiply_centred(kind, 8, w, 2 * t + block, first, count, columns, x, tile + block * 16);
            else
                multiply_centred(kind, 16, w, 2 * t + block, first, count, columns, x, tile + block * 16);
            if (n > 16) multiply_centred(kind, 16, w, 2 * t + block, first, count, columns, next, tile + 16 * 32 + block * 16);
        }
}

static void amx_groups(const Matrix *w, const Panel *x, const Panel *next, int64_t n, int64_t t, float *tile) {
    configure_depth(w->kind == HALVES8 ? GROUP / 2 : GROUP);
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
    configure_depth(64);
}

#endif
