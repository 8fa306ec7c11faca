// Query tokens against cached keys and values, which lie in pages of 32 tokens. Pages may belong to many slots: what
// slots have in common is read once for all of them.
//
// A page holds, of every layer and kv head, the keys transposed as [dim][32] and then the values as [32][dim]; `dim` is
// head_dim padded to 32. Scores are softened in chunks of 8 pages with a running maximum (arXiv 1805.02867), so that a
// query's arithmetic depends on its own tokens alone, not on who else reads the chunk.
#pragma once
#include <algorithm>
#include <vector>

#include "bf16.h"
#include "vec.h"

namespace tf {

constexpr int kPage = 32;             // tokens of a page, and numbers that are loaded together
constexpr int kChunk = 8;             // pages
constexpr int kParts = kPage / kLanes;
constexpr int kTogether = kLanes / 4;  // queries that share a load
constexpr int kBatch = 32;            // queries whose scores of a chunk are in hand at once
constexpr int kScores = kChunk * kPage;

TF_INLINE void load_group(const float* p, vec (&to)[kParts]) {
#pragma GCC unroll 4
    for (int i = 0; i < kParts; i++) to[i] = load(p + i * kLanes);
}

TF_INLINE void load_group(const Bf16* p, vec (&to)[kParts]) {
#pragma GCC unroll 2
    for (int i = 0; i < kParts / 2; i++) load_pair(p + 2 * i * kLanes, to[i], to[i + kParts / 2]);
}

TF_INLINE void store_group(float* p, const vec (&from)[kParts]) {
#pragma GCC unroll 4
    for (int i = 0; i < kParts; i++) store(p + i * kLanes, from[i]);
}

TF_INLINE void store_group(Bf16* p, const vec (&from)[kParts]) {
#pragma GCC unroll 2
    for (int i = 0; i < kParts / 2; i++) store_pair(p + 2 * i * kLanes, from[i], from[i + kParts / 2]);
}

TF_INLINE int at_place(const float*, int i) { return i; }

TF_INLINE int at_place(const Bf16*, int i) { return place(i, kPage); }

// Writes the key and value (head_dim padded to dim) of one token of a page.
template <class T>
static void append(T* page, int token, int dim, const float* k, const float* v) {
    T* row = page + (size_t)(kPage + token) * dim;
    T* column = page + at_place(page, token);
    for (int d = 0; d < dim; d += kPage) {
        T keys[kPage];
        vec group[kParts];
        load_group(v + d, group);
        store_group(row + d, group);
        load_group(k + d, group);
        store_group(keys, group);
#pragma GCC unroll 32
        for (int i = 0; i < kPage; i++) column[(size_t)kPage * (d + i)] = keys[at_place(page, i)];
    }
}

// One query head of one row: what it asks, how many tokens it sees, the pages of the chunk at hand, and its running
// softmax. y (dim) holds the weighted sum of values so far, to be divided by `total`.
struct Query {
    const float* q;
    float* y;
    int tokens;
    const char* const* pages;
    float top, total;
};

// Scores of a page's 32 tokens for H queries. Meanwhile fetches as many bytes.
template <int H, class T>
static void score_page(const T* keys, int head_dim, Query* const* queries, float* scores, const char* ahead) {
    // Two chains of sums, of even and of odd numbers of the keys: one alone would wait for itself.
    vec acc[2][H][kParts] = {};
    for (int d = 0; d < head_dim; d += 2)
#pragma GCC unroll 2
        for (int odd = 0; odd < 2; odd++) {
            fetch(ahead + (size_t)(d + odd) * kPage * sizeof(T), kPage * sizeof(T));
            vec k[kParts];
            load_group(keys + (size_t)kPage * (d + odd), k);
#pragma GCC unroll 8
            for (int h = 0; h < H; h++) {
                vec a = splat(queries[h]->q[d + odd]);
#pragma GCC unroll 4
                for (int i = 0; i < kParts; i++) acc[odd][h][i] += a * k[i];
            }
        }
#pragma GCC unroll 8
    for (int h = 0; h < H; h++)
#pragma GCC unroll 4
        for (int i = 0; i < kParts; i++) store(scores + (size_t)h * kScores + i * kLanes, acc[0][h][i] + acc[1][h][i]);
}

// Adds weight * value over `tokens` tokens of a page to the queries' sums.
template <int H, class T>
static void weigh_page(const T* values, int dim, int tokens, Query* const* queries, const float* weights, const char* ahead) {
    for (int part = 0; part < dim; part += kPage) {
        // Two chains of sums, of even and of odd tokens: one alone would wait for itself.
        vec acc[2][H][kParts];
#pragma GCC unroll 8
        for (int h = 0; h < H; h++)
#pragma GCC unroll 4
            for (int i = 0; i < kParts; i++) acc[0][h][i] = load(queries[h]->y + part + i * kLanes), acc[1][h][i] = vec{};
        for (int t = 0; t < tokens; t += 2)
#pragma GCC unroll 2
            for (int odd = 0; odd < 2; odd++) {
                fetch(ahead + ((size_t)(t + odd) * dim + part) * sizeof(T), kPage * sizeof(T));
                vec v[kParts];
                load_group(values + (size_t)(t + odd) * dim + part, v);
#pragma GCC unroll 8
                for (int h = 0; h < H; h++) {
                    vec a = splat(weights[(size_t)h * kScores + t + odd]);
#pragma GCC unroll 4
                    for (int i = 0; i < kParts; i++) acc[odd][h][i] += a * v[i];
                }
            }
#pragma GCC unroll 8
        for (int h = 0; h < H; h++)
#pragma GCC unroll 4
            for (int i = 0; i < kParts; i++) store(queries[h]->y + part + i * kLanes, acc[0][h][i] + acc[1][h][i]);
    }
}

// Turns the scores of a chunk into 2^(score - maximum), zero behind `tokens` of them, and rescales what came before.
static inline void soften(Query& query, float* scores, int tokens, int dim) {
    int padded = round_up(tokens, kPage);
    for (int t = tokens; t < padded; t++) scores[t] = -INFINITY;
    vec even = splat(query.top), odd = even;
    for (int t = 0; t < padded; t += 2 * kLanes) {
        even = larger(load(scores + t), even);
        odd = larger(load(scores + t + kLanes), odd);
    }
    float top = largest(larger(even, odd));
    vec m = splat(top), total = vec{}, rest = vec{};
    for (int t = 0; t < padded; t += 2 * kLanes) {
        vec a = exp2_upto0(load(scores + t) - m), b = exp2_upto0(load(scores + t + kLanes) - m);
        store(scores + t, a);
        store(scores + t + kLanes, b);
        total += a;
        rest += b;
    }
    if (query.total == 0.0f) {
        for (int d = 0; d < dim; d += kLanes) store(query.y + d, vec{});
        query.total = sum(total + rest);
    } else {
        vec scale = exp2_upto0(splat(query.top) - m);
        for (int d = 0; d < dim; d += kLanes) store(query.y + d, load(query.y + d) * scale);
        query.total = query.total * scale[0] + sum(total + rest);
    }
    query.top = top;
}

// Calls run(first, H, fresh) over runs of at most kTogether queries that read the same `page`; `fresh` tells that the
// query before them does not.
template <class F>
TF_INLINE void over_readers(Query* const* queries, int n, int page, F run) {
    for (int i = 0; i < n;) {
        const char* here = queries[i]->pages[page];
        bool fresh = i == 0 || queries[i - 1]->pages[page] != here;
        int take = 1;
        while (take < kTogether && i + take < n && queries[i + take]->pages[page] == here) take++;
        run(i, take, fresh);
        i += take;
    }
}

// The chunk that begins with token `from`, for n queries that see at least one of its tokens, of the layer and kv head
// whose keys lie `offset` bytes behind the begin of a page. `next`: two pages that are read after it.
// scores: kBatch * kScores floats of scratch.
template <class T>
static void attend_chunk(Query* const* all, int n, int from, const char* const* next, size_t offset, int dim, int head_dim, float* scores) {
    const size_t values = offset + sizeof(T) * kPage * dim;
    for (int begin = 0; begin < n; begin += kBatch) {
        int held = std::min(kBatch, n - begin), longest = 0;
        Query* const* queries = all + begin;
        auto seen = [&](int i) { return std::min(kScores, queries[i]->tokens - from); };
        for (int i = 0; i < held; i++) longest = std::max(longest, seen(i));
        int used = (longest + kPage - 1) / kPage;
        // What is read two pages later, keys of all pages first, then values.
        auto later = [&](int i, int order) {
            order += 2;
            if (order < used) return queries[i]->pages[order] + offset;
            if (order < 2 * used) return queries[i]->pages[order - used] + values;
            return next[std::min(order - 2 * used, 1)] + offset;
        };
        for (int p = 0; p < used; p++)
            over_readers(queries, held, p, [&](int i, int take, bool fresh) {
                const char* keys = queries[i]->pages[p] + offset;
                auto run = take >= 4 ? score_page<4, T> : take == 3 ? score_page<3, T> : take == 2 ? score_page<2, T> : score_page<1, T>;
                run(reinterpret_cast<const T*>(keys), head_dim, queries + i, scores + (size_t)i * kScores + p * kPage, fresh ? later(i, p) : keys);
            });
        for (int i = 0; i < held; i++) {
            soften(*queries[i], scores + (size_t)i * kScores, seen(i), dim);
            for (int t = round_up(seen(i), kPage); t < used * kPage; t++) scores[(size_t)i * kScores + t] = 0.0f;
        }
        for (int p = 0; p < used; p++)
            over_readers(queries, held, p, [&](int i, int take, bool fresh) {
                const char* from_values = queries[i]->pages[p] + values;
                auto run = take >= 4 ? weigh_page<4, T> : take == 3 ? weigh_page<3, T> : take == 2 ? weigh_page<2, T> : weigh_page<1, T>;
                int tokens = std::min(kPage, longest - p * kPage);
                run(reinterpret_cast<const T*>(from_values), dim, tokens, queries + i, scores + (size_t)i * kScores + p * kPage,
                    fresh ? later(i, used + p) : from_values);
            });
    }
}

}  // namespace tf
