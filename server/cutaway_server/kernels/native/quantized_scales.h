/* The scales of quantised matrices, for 16 columns of one group. */
#ifndef CUTAWAY_QUANTIZED_SCALES_H
#define CUTAWAY_QUANTIZED_SCALES_H

enum { VECTORS_A_BLOCK = 16 / LANES }; /* vectors of a block of 16 columns */

INLINE Vector load_half(const uint16_t *p) {
#if defined(__AVX512F__)
    return (Vector)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#elif defined(__F16C__)
    return (Vector)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
#else /* finite ones: their exponent is 112 less than a float's */
    Halves h;
    memcpy(&h, p, sizeof h);
    Bits wide = __builtin_convertvector(h, Bits);
    return (Vector)(((Bits)((Vector)((wide & 0x7fff) << 13) * 0x1p112f)) | (wide & 0x8000) << 16);
#endif
}

INLINE Vector load_bytes(const uint8_t *p) {
#if defined(__AVX512F__)
    return (Vector)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)));
#else
    typedef uint8_t Bytes __attribute__((vector_size(LANES)));
    Bytes b;
    memcpy(&b, p, sizeof b);
    return __builtin_convertvector(__builtin_convertvector(b, Integers), Vector);
#endif
}

INLINE Vector load_signed_bytes(const int8_t *p) {
#if defined(__AVX512F__)
    return (Vector)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
#else
    typedef int8_t Bytes __attribute__((vector_size(LANES)));
    Bytes b;
    memcpy(&b, p, sizeof b);
    return __builtin_convertvector(__builtin_convertvector(b, Integers), Vector);
#endif
}

INLINE int is_four_bit(int kind) { return kind == GROUP4 || kind == MIN4 || kind == SUPER4; }
INLINE int has_minimum(int kind) { return kind == MIN4 || kind == MIN8 || kind == SUPER4 || kind == SUPER8; }

/* What a stored integer is above q. */
INLINE int stored_above(int kind) { return is_four_bit(kind) ? (kind == GROUP4 ? 8 : 0) : 128; }

/* What multiplies the integers of a group (a half group of HALVES8), and what is added to each weight. */
INLINE void load_scales(
    const int kind, const Matrix *w, int64_t block, int64_t group, int half, int part, Vector *scale, Vector *minimum) {
    const int64_t groups = w->padded_depth / GROUP, supers = w->padded_depth / SUPER, lane = part * LANES;
    const uint16_t *scales = w->scales;
    const int64_t at = (block * groups + group) * 16, of_super = (block * supers + group / (SUPER / GROUP)) * 16;
    if (kind == GROUP8 || kind == GROUP4) *scale = load_half(scales + at + lane);
    if (kind == MIN8 || kind == MIN4) {
        *scale = load_half(scales + 2 * at + lane);
        *minimum = load_half(scales + 2 * at + 16 + lane);
    }
    if (kind == SUPER8 || kind == SUPER4) {
        const uint8_t *parts = (const uint8_t *)w->parts + 2 * at + lane;
        *scale = load_half(scales + 2 * of_super + lane) * load_bytes(parts);
        *minimum = -(load_half(scales + 2 * of_super + 16 + lane) * load_bytes(parts + 16));
    }
    if (kind == HALVES8) {
        const int8_t *parts = (const int8_t *)w->parts + 2 * at + half * 16 + lane;
        *scale = load_half(scales + of_super + lane) * load_signed_bytes(parts);
    }
}

#endif
