/* What attention computes with: tiles of rows that read their keys together, and what one thread needs for a tile. */
#ifndef CUTAWAY_ATTENTION_PLAN_H
#define CUTAWAY_ATTENTION_PLAN_H

#include "pages.h"
#include "product.h"

/* Keys of a split (DESIGN 3), of a packed block and of a block that lies together in a page; query heads a tile has. */
enum { SPLIT = 256, KEYS = 32, LINE = 16, HEADS_A_TILE = 96 };

typedef struct QueryTile { /* rows of one sequence that read their keys together, for one key/value head */
    int64_t first, rows, sequence, head, from, upto; /* keys in [from, upto) */
    int64_t work;                                    /* rows times keys */
} QueryTile;

typedef struct {
    const Shape *shape;
    const Layer *layer;
    const Pages *pages;
    const Step *step;
    const float *q;
    float *out, *lse;
    int64_t group, wide; /* query heads of a key head; d_head, padded to TILE */
    /* The rest is planned by one thread of the team. */
    int64_t most; /* query heads a tile has at most, padded to 16 */
    int64_t n_tiles, splits, part_bytes; /* splits: most of a tile if they are tasks of their own, else 0 */
    QueryTile *tiles;
    char *workspaces, *parts;
} Attention;

typedef struct { /* `most` rows of running softmax */
    float *highest, *sum, *values;
} Softmax;

typedef struct { /* one split of a tile's keys, as positions: all of the split, and those the tile may see */
    int64_t base, from, upto;
} KeyRange;

/* Keys and values that are wanted next. Pages lie anywhere, so the processor cannot guess them; and it takes few requests
   for memory at a time, so they are made little by little between computations, which would else wait behind them. */
typedef struct {
    const char *keys, *values; /* the next lines of the present block of LINE keys */
    int64_t left;              /* lines of it to ask for */
    int64_t key, upto;         /* blocks after it */
    const struct QueryTile *tile;
} Ahead;

typedef struct { /* what one thread needs; which of the packed forms there are depends on how it computes */
    float *q, *scores, *key_scales, *value_scales;
    float *packed_keys, *packed_values;                                 /* vectors: fp32 columns */
    uint16_t *query_parts, *key_lines, *weight_parts, *value_pairs;     /* matrix tiles: bf16 */
    Softmax part, all;
    Ahead *ahead;
} Workspace;

static int uses_matrix_tiles(const Attention *a) {
#if defined(CUTAWAY_AMX)
    return a->pages->format != PAGES_FP32;
#else
    (void)a;
    return 0;
#endif
}

/* The next `bytes` from `*at`. */
static void *carve(uintptr_t *at, int64_t bytes) {
    uintptr_t here = *at;
    *at += (bytes + 63) / 64 * 64;
    return (void *)here;
}

static Softmax carve_softmax(const Attention *a, uintptr_t *at) {
    Softmax s;
    s.highest = carve(at, a->most * sizeof(float));
    s.sum = carve(at, a->most * sizeof(float));
    s.values = carve(at, a->most * a->wide * sizeof(float));
    return s;
}

static Workspace carve_workspace(const Attention *a, uintptr_t *at) {
    const int64_t d = a->shape->d_head, narrow = sizeof(uint16_t);
    Workspace w = {0};
    w.q = carve(at, a->most * d * sizeof(float));
    w.key_scales = carve(at, SPLIT * sizeof(float));
    w.value_scales = carve(at, SPLIT * sizeof(float));
    w.part = carve_softmax(a, at);
    w.all = carve_softmax(a, at);
    if (uses_matrix_tiles(a)) {
        w.scores = carve(at, LINE * SPLIT * sizeof(float));
        w.query_parts = carve(at, 3 * a->most * a->wide * narrow);
        w.key_lines = carve(at, 4 * LINE * a->wide * narrow);
        w.weight_parts = carve(at, 2 * LINE * SPLIT * narrow);
        w.value_pairs = carve(at, SPLIT * a->wide * narrow);
    } else {
        w.scores = carve(at, a->most * SPLIT * sizeof(float));
        w.packed_keys = carve(at, KEYS * d * sizeof(float));
        w.packed_values = carve(at, KEYS * a->wide * sizeof(float));
    }
    return w;
}

static int64_t workspace_bytes(const Attention *a) {
    uintptr_t end = 0;
    carve_workspace(a, &end);
    return end;
}

/* Where key `key` of the tile's sequence lies, counted in vectors of a head; the LINE keys of its block follow. */
static int64_t place_of(const Attention *a, const QueryTile *t, int64_t key) {
    int64_t size = a->pages->page_size, page = a->step->block_table[t->sequence * a->step->table_stride + key / size];
    return (page * a->shape->n_kv_heads + t->head) * size + key % size;
}

static KeyRange range_of(const QueryTile *t, int64_t split) {
    KeyRange r = {split * SPLIT, t->from, t->upto};
    if (r.from < r.base) r.from = r.base;
    if (r.upto > r.base + SPLIT) r.upto = r.base + SPLIT;
    return r;
}

/* A split of `t` is wanted next; null: nothing is. */
static void look_ahead(Ahead *ahead, const QueryTile *t, int64_t split) {
    *ahead = (Ahead){.tile = t};
    if (!t) return;
    KeyRange r = range_of(t, split);
    ahead->key = r.from / LINE * LINE, ahead->upto = r.upto;
}

static void next_block(const Attention *a, Ahead *ahead) {
    const int64_t bytes = a->shape->d_head * PAGE_ELEMENT[a->pages->format], place = place_of(a, ahead->tile, ahead->key);
    ahead->keys = (const char *)a->pages->keys + place * bytes;
    ahead->values = (const char *)a->pages->values + place * bytes;
    ahead->left = (LINE * bytes + 63) / 64;
    ahead->key += LINE;
    if (a->pages->format != PAGES_INT8) return;
    __builtin_prefetch(a->pages->key_scales + place, 0, 2);
    __builtin_prefetch(a->pages->value_scales + place, 0, 2);
}

/* Asks for `n` more lines of the keys, and of the values, that are wanted next. */
INLINE void ask(const Attention *a, Ahead *ahead, int64_t n) {
    if (ahead->left == 0) {
        if (ahead->key >= ahead->upto) return;
        next_block(a, ahead);
    }
    if (n > ahead->left) n = ahead->left;
    ahead->left -= n;
    for (int64_t i = 0; i < n; i++, ahead->keys += 64, ahead->values += 64) {
        __builtin_prefetch(ahead->keys, 0, 2);
        __builtin_prefetch(ahead->values, 0, 2);
    }
}

/* Scales of a split's keys and values; 0 for keys the tile may not see, so that nothing there is used. */
static void take_scales(const Attention *a, const QueryTile *t, KeyRange r, const Workspace *w) {
    if (a->pages->format != PAGES_INT8) return;
    for (int64_t key = r.base; key < r.upto; key += LINE) {
        int64_t place = key + LINE > r.from ? place_of(a, t, key) : 0;
        for (int64_t i = 0; i < LINE; i++) {
            int seen = key + i >= r.from && key + i < r.upto;
            w->key_scales[key - r.base + i] = seen ? a->pages->key_scales[place + i] : 0;
            w->value_scales[key - r.base + i] = seen ? a->pages->value_scales[place + i] : 0;
        }
    }
}

static void take_queries(const Attention *a, const QueryTile *t, float *to) {
    int64_t d = a->shape->d_head, heads = a->shape->n_heads;
    for (int64_t r = 0; r < t->rows; r++)
        memcpy(
            to + r * a->group * d, a->q + ((t->first + r) * heads + t->head * a->group) * d,
            a->group * d * sizeof(float));
}

/* Tiles of every sequence and head; null `tiles`: only how many. */
static int64_t make_tiles(const Attention *a, int64_t most_rows, QueryTile *tiles) {
    int64_t n = 0, window = a->layer->window;
    for (int64_t s = 0; s < a->step->sequences; s++)
        for (int64_t first = a->step->query_starts[s]; first < a->step->query_starts[s + 1]; first += most_rows) {
            int64_t left = a->step->query_starts[s + 1] - first, rows = left < most_rows ? left : most_rows;
            int64_t from = window ? a->step->positions[first] - window + 1 : 0;
            int64_t upto = a->step->positions[first + rows - 1] + 1;
            if (from < 0) from = 0;
            for (int64_t head = 0; head < a->shape->n_kv_heads; head++, n++)
                if (tiles) tiles[n] = (QueryTile){first, rows, s, head, from, upto, rows * (upto - from)};
        }
    return n;
}

/* The longest first, so that none starts when the others are done; heads that share pages beside one another. */
static int by_work(const void *a, const void *b) {
    const QueryTile *x = a, *y = b;
    if (x->work != y->work) return x->work < y->work ? 1 : -1;
    if (x->first != y->first) return x->first < y->first ? -1 : 1;
    return (x->head > y->head) - (x->head < y->head);
}

static int64_t rows_a_tile(const Attention *a) {
    int64_t most = a->group < HEADS_A_TILE ? HEADS_A_TILE / a->group : 1, longest = 1;
    for (int64_t s = 0; s < a->step->sequences; s++) {
        int64_t rows = a->step->query_starts[s + 1] - a->step->query_starts[s];
        if (rows > longest) longest = rows;
    }
    return longest < most ? longest : most;
}

/* Tiles, and memory for all threads: one allocation, at `a->tiles`. */
static void plan_attention(Attention *a, int64_t threads) {
    int64_t rows = rows_a_tile(a), work = 0, splits = 0;
    a->most = (rows * a->group + 15) / 16 * 16;
    a->n_tiles = make_tiles(a, rows, 0);
    int64_t list = (a->n_tiles * sizeof(QueryTile) + 63) / 64 * 64;
    QueryTile *tiles = malloc(list);
    make_tiles(a, rows, tiles);
    qsort(tiles, a->n_tiles, sizeof *tiles, by_work);
    for (int64_t i = 0; i < a->n_tiles; i++) {
        int64_t here = (tiles[i].upto + SPLIT - 1) / SPLIT;
        if (here > splits) splits = here;
        work += tiles[i].work;
    }
    /* Whole tiles are tasks unless one of them would keep the other threads waiting. */
    int apart = a->n_tiles && threads > 1 && splits > 1 && tiles[0].work * 2 * threads > work;
    a->splits = apart ? splits : 0;
    uintptr_t part = 0;
    carve_softmax(a, &part);
    a->part_bytes = part;
    a->tiles = aligned_alloc(64, list + threads * workspace_bytes(a) + a->n_tiles * a->splits * a->part_bytes);
    memcpy(a->tiles, tiles, a->n_tiles * sizeof *tiles);
    free(tiles);
    a->workspaces = (char *)a->tiles + list;
    a->parts = a->workspaces + threads * workspace_bytes(a);
}

#endif
