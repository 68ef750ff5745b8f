/* Norms of rows, and rows made ready for a product. */
#ifndef CUTAWAY_NORM_H
#define CUTAWAY_NORM_H

#include "interface.h"
#include "vector.h"

INLINE Vector load_upto(const float *p, int64_t left) { return left >= LANES ? load(p) : load_some(p, left); }

INLINE void store_upto(float *p, Vector v, int64_t left) {
    if (left >= LANES)
        store(p, v);
    else
        store_some(p, v, left);
}

/* RMSNorm or LayerNorm of one row; `out` may be `x`. */
static void norm_row(
    const Shape *shape, const Norm *norm, const float *x, int64_t width, float *out, float *scale, float *normalized) {
    float mean = 0;
    if (shape->layer_norm) {
        Vector sum = fill(0);
        for (int64_t i = 0; i < width; i += LANES) sum += load_upto(x + i, width - i);
        mean = total(sum) / width;
    }
    Vector squares = fill(0);
    for (int64_t i = 0; i < width; i += LANES) {
        Vector v = load_upto(x + i, width - i) - mean;
        if (width - i < LANES) v = load_some((float *)&v, width - i); /* 0 - mean is not there */
        squares = multiply_add(v, v, squares);
    }
    float divisor = sqrtf(total(squares) / width + shape->norm_eps);
    const float inverse = 1 / divisor;
    if (scale) *scale = divisor;
    for (int64_t i = 0; i < width; i += LANES) {
        Vector v = (load_upto(x + i, width - i) - mean) * inverse;
        Vector gained = v * load_upto(norm->gain + i, width - i);
        if (norm->bias) gained += load_upto(norm->bias + i, width - i);
        if (normalized) store_upto(normalized + i, shape->layer_norm ? gained : v, width - i);
        store_upto(out + i, gained, width - i);
    }
}

/* The open norm's places for row `r`. */
static void norm_open(
    const Shape *shape, const Norm *norm, const float *x, int64_t width, float *out, const OpenNorm *open, int64_t r) {
    norm_row(
        shape, norm, x, width, out, open && open->scale ? open->scale + r : 0,
        open && open->normalized ? open->normalized + r * width : 0);
    if (open && open->out) memcpy(open->out + r * width, out, width * sizeof(float));
}

#endif
