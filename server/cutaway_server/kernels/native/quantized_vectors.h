/* Quantised products with vectors: a few rows times one or two blocks of 16 columns. */
#ifndef CUTAWAY_QUANTIZED_VECTORS_H
#define CUTAWAY_QUANTIZED_VECTORS_H

#if defined(__AVX512F__)
enum { MOST_GROUP_ROWS = 4, MOST_INTEGER_ROWS = 8, BLOCKS = 2 };
#elif defined(__AVX2__)
enum { MOST_GROUP_ROWS = 2, MOST_INTEGER_ROWS = 4, BLOCKS = 1 };
#else
enum { MOST_GROUP_ROWS = 1, MOST_INTEGER_ROWS = 1, BLOCKS = 1 };
#endif

INLINE Bits load_bits(const uint8_t *p) {
    Bits v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE int32_t four(const int8_t *x) {
    int32_t word;
    memcpy(&word, x, sizeof word);
    return word;
}

/* In each lane, sum += four unsigned bytes of w times four signed ones of x; `small` ones are below 16. */
INLINE Integers dot(Integers sum, Bits w, int32_t x, const int small) {
#if defined(__AVX512VNNI__)
    (void)small;
    return (Integers)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, _mm512_set1_epi32(x));
#elif defined(__AVX512BW__)
    const __m512i one = _mm512_set1_epi16(1), sixteen = _mm512_set1_epi16(16), all = _mm512_set1_epi32(x);
    if (small) return sum + (Integers)_mm512_madd_epi16(_mm512_maddubs_epi16((__m512i)w, all), one);
    __m512i low = _mm512_maddubs_epi16((__m512i)(w & 0x0f0f0f0f), all); /* of all 8 bits it could overflow */
    __m512i high = _mm512_maddubs_epi16((__m512i)(w >> 4 & 0x0f0f0f0f), all);
    return sum + (Integers)_mm512_madd_epi16(low, one) + (Integers)_mm512_madd_epi16(high, sixteen);
#elif defined(__AVXVNNI__)
    (void)small;
    return (Integers)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)w, _mm256_set1_epi32(x));
#elif defined(__AVX2__)
    const __m256i one = _mm256_set1_epi16(1), sixteen = _mm256_set1_epi16(16), all = _mm256_set1_epi32(x);
    if (small) return sum + (Integers)_mm256_madd_epi16(_mm256_maddubs_epi16((__m256i)w, all), one);
    __m256i low = _mm256_maddubs_epi16((__m256i)(w & 0x0f0f0f0f), all);
    __m256i high = _mm256_maddubs_epi16((__m256i)(w >> 4 & 0x0f0f0f0f), all);
    return sum + (Integers)_mm256_madd_epi16(low, one) + (Integers)_mm256_madd_epi16(high, sixteen);
#else
    (void)small;
    for (int i = 0; i < 4; i++) sum += (Integers)(w >> 8 * i & 255) * (int32_t)(int8_t)((uint32_t)x >> 8 * i);
    return sum;
#endif
}

/* dots [n][BLOCKS * VECTORS_A_BLOCK] += a group, or half of it, of n rows `depth` apart times BLOCKS blocks `apart`. */
INLINE void dot_group(
    const int n, const int four_bit, const int half_group, const uint8_t *w, int64_t apart, const int8_t *x, int64_t depth,
    Integers dots[][BLOCKS * VECTORS_A_BLOCK]) {
    const int steps = four_bit || half_group ? 4 : 8;
#pragma GCC unroll 8
    for (int k = 0; k < steps; k++)
#pragma GCC unroll 8
        for (int v = 0; v < BLOCKS * VECTORS_A_BLOCK; v++) {
            Bits weights = load_bits(w + v / VECTORS_A_BLOCK * apart + k * 64 + v % VECTORS_A_BLOCK * 4 * LANES);
#pragma GCC unroll 8
            for (int r = 0; r < n; r++) {
                const int8_t *four_of = x + r * depth + 4 * k;
                if (!four_bit) {
                    dots[r][v] = dot(dots[r][v], weights, four(four_of), 0);
                    continue;
                }
                dots[r][v] = dot(dots[r][v], weights & 0x0f0f0f0f, four(four_of), 1);
                dots[r][v] = dot(dots[r][v], weights >> 4 & 0x0f0f0f0f, four(four_of + 16), 1);
            }
        }
}

/* out [n][32] = n rows from `row` times BLOCKS blocks. The order of every sum is: group after group, first its integers,
   then its minimum. */
INLINE void multiply_groups(const int kind, const int n, const Matrix *w, const Panel *x, int64_t row, int64_t block, float *out) {
    const int four_bit = is_four_bit(kind), halves = kind == HALVES8 ? 2 : 1, above = stored_above(kind);
    const int64_t depth = w->padded_depth, groups = depth / GROUP, bytes = GROUP * (four_bit ? 8 : 16), apart = groups * bytes;
    const uint8_t *data = (const uint8_t *)w->data + block * apart;
    const int8_t *values = x->values + row * depth;
    Vector sums[MOST_GROUP_ROWS][BLOCKS * VECTORS_A_BLOCK] = {{{0}}};
    for (int64_t g = 0; g < groups; g++)
#pragma GCC unroll 2
        for (int half = 0; half < halves; half++) {
            Integers dots[MOST_GROUP_ROWS][BLOCKS * VECTORS_A_BLOCK];
            const int32_t *minus = halves == 2 ? x->minus_halves + (2 * g + half) * 16 + row : x->minus + g * 16 + row;
#pragma GCC unroll 8
            for (int r = 0; r < n; r++)
#pragma GCC unroll 8
                for (int v = 0; v < BLOCKS * VECTORS_A_BLOCK; v++) dots[r][v] = (Integers){0} + above * minus[r];
            dot_group(n, four_bit, halves == 2, data + g * bytes + half * 256, apart, values + g * GROUP + half * 16, depth, dots);
#pragma GCC unroll 8
            for (int v = 0; v < BLOCKS * VECTORS_A_BLOCK; v++) {
                Vector scale, minimum;
                load_scales(kind, w, block + v / VECTORS_A_BLOCK, g, half, v % VECTORS_A_BLOCK, &scale, &minimum);
#pragma GCC unroll 8
                for (int r = 0; r < n; r++) {
                    Vector scaled = __builtin_convertvector(dots[r][v], Vector) * fill(x->scales[g * 16 + row + r]);
                    sums[r][v] = multiply_add(scaled, scale, sums[r][v]);
                    if (has_minimum(kind)) sums[r][v] = multiply_add(minimum, fill(x->sums[g * 16 + row + r]), sums[r][v]);
                }
            }
        }
#pragma GCC unroll 8
    for (int r = 0; r < n; r++)
#pragma GCC unroll 8
        for (int v = 0; v < BLOCKS * VECTORS_A_BLOCK; v++) store(out + r * 32 + v * LANES, sums[r][v]);
}

/* A row's integers, less what storing the columns + 128 added to them, scaled. */
INLINE Vector scale_row(Integers sum, const Panel *x, int64_t row, const float *scales) {
    return __builtin_convertvector(sum + 128 * x->minus[row], Vector) * load(scales) * fill(x->scales[row]);
}

INLINE void multiply_rows(const int n, const Matrix *w, const Panel *x, int64_t row, int64_t block, float *out) {
    const int64_t depth = w->padded_depth, apart = depth * 16;
    const uint8_t *data = (const uint8_t *)w->data + block * apart;
    const int8_t *values = x->values + row * depth;
    Integers sums[MOST_INTEGER_ROWS][BLOCKS * VECTORS_A_BLOCK] = {{{0}}};
    for (int64_t k = 0; k < depth; k += 4)
#pragma GCC unroll 8
        for (int v = 0; v < BLOCKS * VECTORS_A_BLOCK; v++) {
            Bits weights = load_bits(data + v / VECTORS_A_BLOCK * apart + k * 16 + v % VECTORS_A_BLOCK * 4 * LANES);
#pragma GCC unroll 8
            for (int r = 0; r < n; r++) sums[r][v] = dot(sums[r][v], weights, four(values + r * depth + k), 0);
        }
    const float *scales = (const float *)w->scales + block * 16;
#pragma GCC unroll 8
    for (int r = 0; r < n; r++)
#pragma GCC unroll 8
        for (int v = 0; v < BLOCKS * VECTORS_A_BLOCK; v++)
            store(out + r * 32 + v * LANES, scale_row(sums[r][v], x, row + r, scales + v * LANES));
}

/* Up to MOST_GROUP_ROWS rows; the numbers are constants below, so that sums are registers. */
INLINE void some_groups(const int kind, const Matrix *w, const Panel *x, int64_t row, int64_t n, int64_t block, float *out) {
    if (n == 1)
        multiply_groups(kind, 1, w, x, row, block, out);
    else if (n == 2 && MOST_GROUP_ROWS > 2)
        multiply_groups(kind, 2, w, x, row, block, out);
    else
        multiply_groups(kind, MOST_GROUP_ROWS, w, x, row, block, out);
}

static void some_rows(const Matrix *w, const Panel *x, int64_t row, int64_t n, int64_t block, float *out) {
    if (n == 1)
        multiply_rows(1, w, x, row, block, out);
    else if (n == 2 && MOST_INTEGER_ROWS > 2)
        multiply_rows(2, w, x, row, block, out);
    else if (n <= 4 && MOST_INTEGER_ROWS > 4)
        multiply_rows(4, w, x, row, block, out);
    else
        multiply_rows(MOST_INTEGER_ROWS, w, x, row, block, out);
}

/* out [n][32] = n of a panel's rows from `row` times BLOCKS blocks of columns. A few rows more may be multiplied: the panel,
   and `out`, have 16. */
static void quantized_vectors(const Matrix *w, const Panel *x, int64_t row, int64_t n, int64_t block, float *out) {
#define CASE(kind) case kind: some_groups(kind, w, x, row, n, block, out); break
    switch (w->kind) {
        CASE(GROUP8);
        CASE(GROUP4);
        CASE(MIN8);
        CASE(MIN4);
        CASE(SUPER8);
        CASE(SUPER4);
        CASE(HALVES8);
        default: some_rows(w, x, row, n, block, out);
    }
#undef CASE
}

#endif
