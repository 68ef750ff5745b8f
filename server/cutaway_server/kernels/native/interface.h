/* What Python passes: plain structs, mirrored field by field in kernels/native.py. Nothing here owns memory.

   Matrices are packed in blocks of 16 output columns: bf16 as [columns/16][depth/2][16][2], fp32 as [columns/16][depth][16].
   Columns are padded to a multiple of 32 and depth of bf16 to a multiple of 32, with zeros. */
#ifndef CUTAWAY_INTERFACE_H
#define CUTAWAY_INTERFACE_H

#include <stdint.h>

typedef struct {
    const void *data;
    const float *bias; /* padded like the columns; null: none */
    int64_t columns;   /* as the model has them */
    int64_t tiles;     /* of 32 columns, padding included */
    int64_t depth;
    int64_t padded_depth;
} Matrix;

typedef struct {
    const float *gain; /* null: no norm */
    const float *bias; /* null: none */
} Norm;

enum { QK_NORM_NONE, QK_NORM_HEAD, QK_NORM_FULL };
enum { SILU, GELU, GELU_TANH, RELU };

typedef struct {
    int64_t d_model, n_heads, n_kv_heads, d_head, d_mlp;
    int64_t layer_norm, qk_norm, activation, gated; /* gate and up alternate in blocks of 16 columns */
    int64_t bf16;                                   /* weights; else fp32 */
    int64_t threads;
    float norm_eps, attention_scale;
    float attention_cap, logit_cap; /* 0: none */
} Shape;

typedef struct {
    Matrix qkv, attention_out, mlp_in, mlp_out;
    Norm norm1, norm1_post, norm2, norm2_post, q_norm, k_norm;
    int64_t window; /* 0: none */
    int64_t rope_dims, interleaved;
} Layer;

enum { PAGES_FP32, PAGES_BF16, PAGES_INT8 };

typedef struct { /* of one layer: [pages][kv_heads][page_size][d_head] */
    void *keys, *values;
    float *key_scales, *value_scales; /* [pages][kv_heads][page_size], of int8; else null */
    int64_t page_size;                /* a multiple of 16 */
    int64_t format;
} Pages;

typedef struct { /* rows of a flat batch */
    const int64_t *positions, *slots, *query_starts, *block_table;
    int64_t rows, sequences, table_stride;
} Step;

/* Where the open form of an operation wants a norm's values; any may be null. */
typedef struct {
    float *scale, *normalized, *out;
} OpenNorm;

#endif
