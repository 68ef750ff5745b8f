/* Vectors of LANES floats: 16 with AVX-512, 8 with AVX2, else 4. Sums that must not depend on the variant's caller are
   written as explicit fused multiply-adds where the machine has them; nothing is contracted (-ffp-contract=off). */
#ifndef CUTAWAY_VECTOR_H
#define CUTAWAY_VECTOR_H

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif

#define INLINE static inline __attribute__((always_inline))

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

INLINE Vector load(const float *p) {
    Vector v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE void store(float *p, Vector v) { memcpy(p, &v, sizeof v); }

INLINE Vector fill(float x) { return x - (Vector){0}; }

INLINE Vector multiply_add(Vector a, Vector b, Vector c) {
#if defined(__AVX512F__)
    return (Vector)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
    return (Vector)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

/* Lanes of `yes` where the comparison's mask is set, else of `no`. */
INLINE Vector choose(Integers mask, Vector yes, Vector no) {
    return (Vector)(((Integers)yes & mask) | ((Integers)no & ~mask));
}

/* Of two, b where one is NaN. */
INLINE Vector larger(Vector a, Vector b) {
#if defined(__AVX512F__)
    return (Vector)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return choose(a > b, a, b);
#endif
}

INLINE Vector smaller(Vector a, Vector b) {
#if defined(__AVX512F__)
    return (Vector)_mm512_min_ps((__m512)a, (__m512)b);
#else
    return choose(a < b, a, b);
#endif
}

INLINE Vector load_bf16(const uint16_t *p) {
#if defined(__AVX512F__) /* compilers make more of the general form */
    return (Vector)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16);
#else
    Halves h;
    memcpy(&h, p, sizeof h);
    return (Vector)(__builtin_convertvector(h, Bits) << 16);
#endif
}

/* Nearest even; NaN stays NaN. */
INLINE Bits round_bf16(Vector x) {
    Bits u = (Bits)x;
    Bits rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    Bits nan = (Bits)(x != x);
    return (rounded & ~nan) | (nan & 0x7fc0);
}

INLINE void store_bf16(uint16_t *p, Vector x) {
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16((__m512i)round_bf16(x)));
#else
    Halves h = __builtin_convertvector(round_bf16(x), Halves);
    memcpy(p, &h, sizeof h);
#endif
}

/* The first n < LANES floats, zeros after them. */
INLINE Vector load_some(const float *p, int64_t n) {
    float buffer[LANES] = {0};
    memcpy(buffer, p, n * sizeof(float));
    return load(buffer);
}

INLINE void store_some(float *p, Vector v, int64_t n) {
    float buffer[LANES];
    store(buffer, v);
    memcpy(p, buffer, n * sizeof(float));
}

/* Sums lane by lane, always in the same order. */
INLINE float total(Vector v) {
    float buffer[LANES], sum = 0;
    store(buffer, v);
    for (int i = 0; i < LANES; i++) sum += buffer[i];
    return sum;
}

INLINE float largest(Vector v) {
    float buffer[LANES], most = -INFINITY;
    store(buffer, v);
    for (int i = 0; i < LANES; i++) most = buffer[i] > most || buffer[i] != buffer[i] ? buffer[i] : most;
    return most;
}

/* e^x to 1.5 units in the last place (the polynomial of Cephes' expf); 1 at 0, 0 below -87.3, e^88 above 88. */
INLINE Vector exponential(Vector x) {
    const Vector lowest = fill(-87.33654f), highest = fill(88.0f), magic = fill(12582912.0f);
    Vector y = larger(lowest, smaller(highest, x));
    Vector shifted = multiply_add(y, fill(1.44269504f), magic);
    Integers power = (Integers)shifted - 0x4b400000;
    Vector n = shifted - magic;
    y = multiply_add(n, fill(-0.693359375f), y);
    y = multiply_add(n, fill(2.12194440e-4f), y);
    Vector p = fill(1.9875691500e-4f);
    p = multiply_add(p, y, fill(1.3981999507e-3f));
    p = multiply_add(p, y, fill(8.3334519073e-3f));
    p = multiply_add(p, y, fill(4.1665795894e-2f));
    p = multiply_add(p, y, fill(1.6666665459e-1f));
    p = multiply_add(p, y, fill(5.0000001201e-1f));
    p = multiply_add(p * y, y, y) + 1.0f;
    Vector result = p * (Vector)((power + 127) << 23);
    return (Vector)((Integers)result & ~(Integers)(x < lowest));
}

/* tanh, by its series near 0, where 1 - 2 / (e^2x + 1) would lose digits. */
INLINE Vector hyperbolic_tangent(Vector x) {
    Vector square = x * x;
    Vector series = multiply_add(square, fill(-17.0f / 315), fill(2.0f / 15));
    series = multiply_add(series, square, fill(-1.0f / 3));
    series = multiply_add(series * square, x, x);
    Vector far = 1.0f - 2.0f / (exponential(2.0f * x) + 1.0f);
    return choose(square < 0.01f, series, far);
}

#endif
