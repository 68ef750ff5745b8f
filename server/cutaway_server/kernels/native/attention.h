/* Attention over pages. Keys go in splits of 256 from position 0, merged in order; inside a split each score and each
   value is one accumulator in order, so neither the rows of a tile nor the threads can change a row's bits.

   No key outside what a tile's rows may see is used, so pages may hold anything there. */
#ifndef CUTAWAY_ATTENTION_H
#define CUTAWAY_ATTENTION_H

#include <stdlib.h>

#include "product.h"

enum { SPLIT = 256, KEYS = 32, HEADS_A_TILE = 32 };

typedef struct { /* rows of one sequence that read their keys together, for one key/value head */
    int64_t first, rows, sequence, head, from, upto; /* keys in [from, upto) */
} QueryTile;

typedef struct {
    const Shape *shape;
    const Layer *layer;
    const Pages *pages;
    const Step *step;
    const float *q;
    float *out, *lse;
    int64_t group, wide; /* query heads of a key head; d_head, padded to TILE */
    int64_t most;        /* query heads a tile has at most */
} Attention;

typedef struct { /* `most` rows of running softmax */
    float *highest, *sum, *values;
} Softmax;

typedef struct { /* what one thread needs */
    float *q, *scores, *keys, *values;
    Softmax part, all;
} Workspace;

static int64_t softmax_floats(const Attention *a) { return a->most * (2 + a->wide); }

static Softmax softmax_at(const Attention *a, float *p) { return (Softmax){p, p + a->most, p + 2 * a->most}; }

static int64_t workspace_floats(const Attention *a) {
    int64_t n = a->most * a->shape->d_head + a->most * SPLIT + KEYS * a->shape->d_head + KEYS * a->wide;
    return (n + 2 * softmax_floats(a) + 15) / 16 * 16;
}

static Workspace workspace_at(const Attention *a, float *p) {
    Workspace w;
    w.keys = p, p += KEYS * a->shape->d_head;
    w.values = p, p += KEYS * a->wide;
    w.scores = p, p += a->most * SPLIT;
    w.q = p, p += a->most * a->shape->d_head;
    w.part = softmax_at(a, p), p += softmax_floats(a);
    w.all = softmax_at(a, p);
    return w;
}

INLINE Vector load_page(const void *page, int64_t bf16, int64_t i, int64_t left) {
    if (!bf16) return load_upto((const float *)page + i, left);
    if (left >= LANES) return load_bf16((const uint16_t *)page + i);
    uint16_t buffer[LANES] = {0};
    memcpy(buffer, (const uint16_t *)page + i, left * sizeof(uint16_t));
    return load_bf16(buffer);
}

#if LANES == 16
/* 16 rows of 16 floats, turned. */
INLINE void transpose(Vector v[16]) {
    __m512 a[16], b[16];
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_ps((__m512)v[i], (__m512)v[i + 1]);
        a[i + 1] = _mm512_unpackhi_ps((__m512)v[i], (__m512)v[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        b[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a[i]), _mm512_castps_pd(a[i + 2])));
        b[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a[i]), _mm512_castps_pd(a[i + 2])));
        b[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a[i + 1]), _mm512_castps_pd(a[i + 3])));
        b[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a[i + 1]), _mm512_castps_pd(a[i + 3])));
    }
    for (int i = 0; i < 4; i++) {
        __m512 even = _mm512_shuffle_f32x4(b[i], b[i + 4], 0x88), odd = _mm512_shuffle_f32x4(b[i], b[i + 4], 0xdd);
        __m512 even2 = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0x88);
        __m512 odd2 = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0xdd);
        v[i] = (Vector)_mm512_shuffle_f32x4(even, even2, 0x88);
        v[i + 8] = (Vector)_mm512_shuffle_f32x4(even, even2, 0xdd);
        v[i + 4] = (Vector)_mm512_shuffle_f32x4(odd, odd2, 0x88);
        v[i + 12] = (Vector)_mm512_shuffle_f32x4(odd, odd2, 0xdd);
    }
}
#endif

/* 16 keys of a page [16][d] to [d][16] fp32. */
static void turn_keys(const void *page, int64_t bf16, int64_t at, int64_t d, float *out) {
    int64_t i = 0;
#if LANES == 16
    for (; bf16 && i + 32 <= d; i += 32) { /* two neighbours at once */
        Vector v[16];
        for (int key = 0; key < 16; key++) memcpy(&v[key], (const uint16_t *)page + at + key * d + i, sizeof(Vector));
        transpose(v);
        for (int j = 0; j < 16; j++) {
            store(out + (i + 2 * j) * 16, (Vector)((Bits)v[j] << 16));
            store(out + (i + 2 * j + 1) * 16, (Vector)((Bits)v[j] & 0xffff0000u));
        }
    }
    for (; i + 16 <= d; i += 16) {
        Vector v[16];
        for (int key = 0; key < 16; key++) v[key] = load_page(page, bf16, at + key * d + i, 16);
        transpose(v);
        for (int j = 0; j < 16; j++) store(out + (i + j) * 16, v[j]);
    }
#endif
    for (; i < d; i += LANES) {
        int64_t n = d - i < LANES ? d - i : LANES;
        for (int key = 0; key < 16; key++) {
            float buffer[LANES];
            store(buffer, load_page(page, bf16, at + key * d + i, n));
            for (int64_t j = 0; j < n; j++) out[(i + j) * 16 + key] = buffer[j];
        }
    }
}

/* The element where key `key` of the tile's sequence starts in its page. */
static int64_t place_of(const Attention *a, const QueryTile *t, int64_t key) {
    int64_t size = a->pages->page_size, page = a->step->block_table[t->sequence * a->step->table_stride + key / size];
    return ((page * a->shape->n_kv_heads + t->head) * size + key % size) * a->shape->d_head;
}

/* Keys [start, start + KEYS) that the tile may see, packed as a product's columns; other columns are left as they are. */
static void pack_keys(const Attention *a, const QueryTile *t, int64_t start, float *out) {
    int64_t d = a->shape->d_head;
    for (int64_t key = start; key < start + KEYS; key += 16)
        if (key < t->upto && key + 16 > t->from)
            turn_keys(a->pages->keys, a->pages->bf16, place_of(a, t, key), d, out + (key - start) * d);
}

/* Values of `n` keys, all of one block of 16, packed as a product's columns: [wide / 16][KEYS][16]. */
static void pack_block(const Attention *a, int64_t at, int64_t n, float *out) {
    int64_t d = a->shape->d_head, bf16 = a->pages->bf16;
    const uint16_t *narrow = (const uint16_t *)a->pages->values + at;
    const float *full = (const float *)a->pages->values + at;
    for (int64_t i = 0; i < d; i += LANES) {
        float *to = out + i / 16 * KEYS * 16 + i % 16;
        if (d - i < LANES)
            for (int64_t key = 0; key < n; key++) store(to + key * 16, load_page(a->pages->values, bf16, at + key * d + i, d - i));
        else if (bf16)
            for (int64_t key = 0; key < n; key++) store(to + key * 16, load_bf16(narrow + key * d + i));
        else
            for (int64_t key = 0; key < n; key++) store(to + key * 16, load(full + key * d + i));
    }
}

/* Values of keys [start, stop), all of one block of KEYS. */
static void pack_values(const Attention *a, const QueryTile *t, int64_t start, int64_t stop, float *out) {
    for (int64_t key = start, next; key < stop; key = next) {
        next = key / 16 * 16 + 16;
        if (next > stop) next = stop;
        pack_block(a, place_of(a, t, key), next - key, out + (key - start) * 16);
    }
}

/* Asks for keys and values [start, start + KEYS) ahead of their use: pages lie anywhere. */
static void fetch_ahead(const Attention *a, const QueryTile *t, int64_t start) {
    int64_t each = a->pages->bf16 ? 2 : 4, bytes = 16 * a->shape->d_head * each;
    for (int64_t key = start; key < start + KEYS && key < t->upto; key += 16) {
        int64_t at = place_of(a, t, key) * each;
        for (int64_t i = 0; i < bytes; i += 64) {
            __builtin_prefetch((const char *)a->pages->keys + at + i, 0, 2);
            __builtin_prefetch((const char *)a->pages->values + at + i, 0, 2);
        }
    }
}

/* Scores to weights e^(s - highest) of one row, 0 where it may not see; `scores` are those of keys [base, base + SPLIT),
   of which the tile uses [start, stop). */
static void weigh(const Attention *a, float *scores, int64_t base, int64_t start, int64_t stop, int64_t position,
                  float *highest, float *sum) {
    int64_t window = a->layer->window, low = window ? position - window + 1 - base : 0, high = position - base;
    if (low < start) low = start;
    if (high >= stop) high = stop - 1;
    *highest = -INFINITY, *sum = 0;
    if (low > high) {
        memset(scores + start, 0, (stop - start) * sizeof(float));
        return;
    }
    Integers lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
    const int64_t first = low / LANES * LANES, end = high / LANES * LANES + LANES;
    Vector most = fill(-INFINITY), cap = fill(a->shape->attention_cap);
    for (int64_t i = first; i < end; i += LANES) {
        Vector s = load(scores + i) * a->shape->attention_scale;
        if (a->shape->attention_cap > 0) s = cap * hyperbolic_tangent(s / cap);
        Integers at = lane + (int32_t)i;
        s = choose((at >= (int32_t)low) & (at <= (int32_t)high), s, fill(-INFINITY));
        store(scores + i, s);
        most = larger(s, most);
    }
    *highest = largest(most);
    Vector sums = fill(0), least = fill(*highest);
    for (int64_t i = first; i < end; i += LANES) {
        Vector p = exponential(load(scores + i) - least);
        store(scores + i, p);
        sums += p;
    }
    *sum = total(sums);
    if (first > start) memset(scores + start, 0, (first - start) * sizeof(float));
    if (end < stop) memset(scores + end, 0, (stop - end) * sizeof(float));
}

/* One split of a tile's keys: softmax of its rows over these keys alone. */
static void attend_split(const Attention *a, const QueryTile *t, int64_t split, const Workspace *w, const Softmax *to) {
    int64_t n = t->rows * a->group, d = a->shape->d_head, base = split * SPLIT;
    int64_t from = t->from > base ? t->from : base, upto = t->upto < base + SPLIT ? t->upto : base + SPLIT;
    fetch_ahead(a, t, from / KEYS * KEYS);
    fetch_ahead(a, t, from / KEYS * KEYS + KEYS);
    for (int64_t start = from / KEYS * KEYS; start < upto; start += KEYS) {
        fetch_ahead(a, t, start + 2 * KEYS);
        pack_keys(a, t, start, w->keys);
        tile_fp32(w->q, d, n, w->keys, d * 16, d, w->scores + start - base, SPLIT, 0);
    }
    for (int64_t i = 0; i < n; i++)
        weigh(a, w->scores + i * SPLIT, base, from - base, upto - base, a->step->positions[t->first + i / a->group],
              to->highest + i, to->sum + i);
    int add = 0;
    for (int64_t start = from; start < upto; add = 1) {
        int64_t stop = start / KEYS * KEYS + KEYS;
        if (stop > upto) stop = upto;
        pack_values(a, t, start, stop, w->values);
        for (int64_t c = 0; c < a->wide; c += TILE)
            tile_fp32(
                w->scores + start - base, SPLIT, n, w->values + c * KEYS, KEYS * 16, stop - start, to->values + c, a->wide, add);
        start = stop;
    }
}

static void merge(const Attention *a, int64_t n, const Softmax *part, Softmax *all) {
    for (int64_t i = 0; i < n; i++) {
        if (part->highest[i] == -INFINITY) continue; /* the row sees none of these keys */
        float before = all->highest[i], now = part->highest[i], top = now < before ? before : now;
        float keep = expf(before - top), weight = expf(now - top);
        all->highest[i] = top;
        all->sum[i] = all->sum[i] * keep + part->sum[i] * weight;
        float *to = all->values + i * a->wide;
        const float *from = part->values + i * a->wide;
        for (int64_t j = 0; j < a->wide; j += LANES) store(to + j, load(to + j) * keep + load(from + j) * weight);
    }
}

static void clear(const Attention *a, int64_t n, Softmax *s) {
    for (int64_t i = 0; i < n; i++) s->highest[i] = -INFINITY, s->sum[i] = 0;
    memset(s->values, 0, n * a->wide * sizeof(float));
}

static void write_out(const Attention *a, const QueryTile *t, const Softmax *all) {
    int64_t d = a->shape->d_head, heads = a->shape->n_heads;
    for (int64_t i = 0; i < t->rows * a->group; i++) {
        int64_t head = (t->first + i / a->group) * heads + t->head * a->group + i % a->group;
        for (int64_t j = 0; j < d; j += LANES)
            store_upto(a->out + head * d + j, load(all->values + i * a->wide + j) / all->sum[i], d - j);
        a->lse[head] = all->highest[i] + logf(all->sum[i]);
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
            int64_t oldest = window ? a->step->positions[first] - window + 1 : 0;
            int64_t upto = a->step->positions[first + rows - 1] + 1;
            for (int64_t head = 0; head < a->shape->n_kv_heads; head++, n++)
                if (tiles) tiles[n] = (QueryTile){first, rows, s, head, oldest > 0 ? oldest : 0, upto};
        }
    return n;
}

/* Work of one call, shared by the team. */
typedef struct {
    QueryTile *tiles;
    int64_t n, splits; /* of the longest */
    float *parts;      /* [n][splits] of softmax; null: a thread does all splits of a tile */
    int64_t each;      /* floats of one */
} Work;

/* Tiles beside one another, each through all its splits. */
static void attend_tiles(const Team *team, const Attention *a, const Work *work, Workspace *w) {
    for (int64_t i; (i = take(team, 1)) < work->n;) {
        const QueryTile *t = work->tiles + work->n - 1 - i; /* the longest of a prompt first */
        take_queries(a, t, w->q);
        clear(a, t->rows * a->group, &w->all);
        for (int64_t split = t->from / SPLIT; split * SPLIT < t->upto; split++) {
            attend_split(a, t, split, w, &w->part);
            merge(a, t->rows * a->group, &w->part, &w->all);
        }
        write_out(a, t, &w->all);
    }
}

/* Few tiles: their splits beside one another, then merged in the same order as above. */
static void attend_splits(const Team *team, const Attention *a, const Work *work, Workspace *w) {
    for (int64_t i; (i = take(team, 1)) < work->n * work->splits;) {
        const QueryTile *t = work->tiles + i / work->splits;
        int64_t split = i % work->splits;
        if ((split + 1) * SPLIT <= t->from || split * SPLIT >= t->upto) continue;
        Softmax part = softmax_at(a, work->parts + i * work->each);
        take_queries(a, t, w->q);
        attend_split(a, t, split, w, &part);
    }
    meet(team);
    for (int64_t i; (i = take(team, 1)) < work->n;) {
        const QueryTile *t = work->tiles + i;
        clear(a, t->rows * a->group, &w->all);
        for (int64_t split = t->from / SPLIT; split * SPLIT < t->upto; split++) {
            Softmax part = softmax_at(a, work->parts + (i * work->splits + split) * work->each);
            merge(a, t->rows * a->group, &part, &w->all);
        }
        write_out(a, t, &w->all);
    }
}

static Work plan_work(const Attention *a, int64_t most_rows, int64_t threads) {
    Work work = {.n = make_tiles(a, most_rows, 0)};
    work.tiles = malloc(work.n * sizeof *work.tiles);
    make_tiles(a, most_rows, work.tiles);
    for (int64_t i = 0; i < work.n; i++) {
        int64_t here = (work.tiles[i].upto + SPLIT - 1) / SPLIT;
        if (here > work.splits) work.splits = here;
    }
    work.each = (softmax_floats(a) + 15) / 16 * 16;
    if (work.splits > 1 && threads > 1 && work.n < 4 * threads)
        work.parts = aligned_alloc(64, work.n * work.splits * work.each * sizeof(float));
    return work;
}

/* All of the team; `a` is each thread's own. */
static void attend(const Team *team, Attention *a) {
    int64_t most_rows = a->group < HEADS_A_TILE ? HEADS_A_TILE / a->group : 1, longest = 0;
    for (int64_t s = 0; s < a->step->sequences; s++) {
        int64_t rows = a->step->query_starts[s + 1] - a->step->query_starts[s];
        if (rows > longest) longest = rows;
    }
    if (longest < most_rows) most_rows = longest > 0 ? longest : 1;
    a->most = most_rows * a->group;
    Work work;
    if (team->me == 0) {
        work = plan_work(a, most_rows, team->threads);
        team->crew->shared = &work;
    }
    meet(team);
    const Work *all = team->crew->shared;
    float *memory = aligned_alloc(64, workspace_floats(a) * sizeof(float));
    Workspace w = workspace_at(a, memory);
    (all->parts ? attend_splits : attend_tiles)(team, a, all, &w);
    free(memory);
    meet(team);
    if (team->me == 0) free(work.tiles), free(work.parts);
}

#endif
