/* Rows as a product takes them: bf16 in value, or fp32, or quantised; padded. */
#ifndef CUTAWAY_OPERAND_H
#define CUTAWAY_OPERAND_H

#include "interface.h"
#include "multiply.h"
#include "norm.h"
#include "quantized.h"

typedef struct {
    void *data;
    int64_t step; /* elements from row to row */
    int64_t kind; /* of the matrix; rows for a quantised one lie in panels */
} Operand;

static size_t element(const Shape *shape) { return shape->bf16 ? sizeof(Narrow) : sizeof(float); }

/* Bytes of an operand of `rows` rows, which AMX wants in whole tiles. */
static size_t operand_bytes(const Shape *shape, const Matrix *w, int64_t rows) {
    int64_t padded = (rows + 15) / 16 * 16;
    if (w->kind) return padded / 16 * panel_bytes(w->padded_depth);
    return (padded * w->padded_depth * element(shape) + 63) / 64 * 64;
}

static Operand new_operand(const Matrix *w, void *memory) { return (Operand){memory, w->padded_depth, w->kind}; }

INLINE void store_narrow(Narrow *to, Vector v) {
#if defined(CUTAWAY_AMX) || defined(__AVX512BF16__)
    store_bf16(to, v);
#else
    store(to, (Vector)(round_bf16(v) << 16));
#endif
}

static void put_row(const Shape *shape, const Operand *to, int64_t r, const float *x, int64_t depth) {
    if (to->kind) {
        put_quantized_row(to->kind, x, depth, to->step, to->data, r);
        return;
    }
    if (!shape->bf16) {
        memcpy((float *)to->data + r * to->step, x, depth * sizeof(float));
        return;
    }
    Narrow *row = (Narrow *)to->data + r * to->step;
    for (int64_t i = 0; i < to->step; i += LANES) store_narrow(row + i, i < depth ? load_upto(x + i, depth - i) : fill(0));
}

#endif
