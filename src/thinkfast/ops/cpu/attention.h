// One query token against the cached keys and values of its slot.
// Keys lie in blocks of 16 tokens, transposed: [T / 16][dim][16]; values lie as [T][dim]. `dim` is head_dim padded to 16.
// A bfloat16 group of 16 holds element i in the low and element i + 8 in the high half of word i, so that a shift and a
// mask turn one load into two float vectors.
#pragma once
#include <vector>

#include "vec.h"

namespace tf {

// The sweep over keys and values is bound by memory; the machine's own prefetcher alone leaves a quarter of it unused.
constexpr int kAhead = 1024;  // bytes
constexpr int kStart = 2048;  // bytes fetched of a stream before it begins

struct Bf16 {
    uint16_t bits;
};

TF_INLINE void load16(const float* p, v8& low, v8& high) {
    low = load(p);
    high = load(p + 8);
}

TF_INLINE void load16(const Bf16* p, v8& low, v8& high) {
    v8w words = *reinterpret_cast<const v8w_any*>(p);
    low = (v8)(words << 16);
    high = (v8)(words & 0xffff0000u);
}

TF_INLINE void put(float* group, int i, float x) { group[i] = x; }

TF_INLINE void put(Bf16* group, int i, float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    // Round to nearest even; a NaN must not be rounded into an infinity.
    uint32_t rounded = x != x ? 0x7fc00000u : bits + 0x7fffu + ((bits >> 16) & 1u);
    group[(i & 7) * 2 + (i >> 3)].bits = (uint16_t)(rounded >> 16);
}

// Keys and values of one (slot, layer, kv head).
template <class T>
struct KeyValues {
    T *keys, *values;
    const void* next;  // what is read after this
    int dim;

    T* key_block(int token) const { return keys + (size_t)(token / 16) * 16 * dim; }

    void append(int token, const float* k, const float* v) const {
        T* block = key_block(token);
        T* row = values + (size_t)token * dim;
        for (int d = 0; d < dim; d++) {
            put(block + 16 * d, token % 16, k[d]);
            put(row + d / 16 * 16, d % 16, v[d]);
        }
    }
};

// Scores of 16 * B tokens for H query heads.
template <int H, int B, class T>
TF_INLINE void score_blocks(const T* block, int dim, int head_dim, const float* q, float* scores, int lds) {
    v8 acc[H][2 * B];
#pragma GCC unroll 8
    for (int h = 0; h < H; h++)
#pragma GCC unroll 8
        for (int b = 0; b < 2 * B; b++) acc[h][b] = splat(0.0f);
    for (int d = 0; d < head_dim; d++) {
        fetch(block + (size_t)16 * B * d + kAhead / sizeof(T), 16 * B * sizeof(T));
        v8 k[2 * B];
#pragma GCC unroll 8
        for (int b = 0; b < B; b++) load16(block + (size_t)b * 16 * dim + 16 * d, k[2 * b], k[2 * b + 1]);
#pragma GCC unroll 8
        for (int h = 0; h < H; h++) {
            v8 a = splat(q[h * dim + d]);
#pragma GCC unroll 8
            for (int b = 0; b < 2 * B; b++) acc[h][b] += a * k[b];
        }
    }
#pragma GCC unroll 8
    for (int h = 0; h < H; h++)
#pragma GCC unroll 8
        for (int b = 0; b < 2 * B; b++) store(scores + (size_t)h * lds + 8 * b, acc[h][b]);
}

// Sum over tokens of weight * value for H heads and 16 * B channels.
template <int H, int B, class T>
TF_INLINE void weigh(const T* values, int dim, int tokens, const float* weights, int ldw, const float* scale, float* y) {
    v8 acc[H][2 * B];
#pragma GCC unroll 8
    for (int h = 0; h < H; h++)
#pragma GCC unroll 8
        for (int b = 0; b < 2 * B; b++) acc[h][b] = splat(0.0f);
    for (int t = 0; t < tokens; t++) {
        fetch(values + (size_t)t * dim + kAhead / sizeof(T), 16 * B * sizeof(T));
        v8 v[2 * B];
#pragma GCC unroll 8
        for (int b = 0; b < B; b++) load16(values + (size_t)t * dim + 16 * b, v[2 * b], v[2 * b + 1]);
#pragma GCC unroll 8
        for (int h = 0; h < H; h++) {
            v8 a = splat(weights[(size_t)h * ldw + t]);
#pragma GCC unroll 8
            for (int b = 0; b < 2 * B; b++) acc[h][b] += a * v[b];
        }
    }
    for (int h = 0; h < H; h++)
        for (int b = 0; b < 2 * B; b++) store(y + (size_t)h * dim + 8 * b, acc[h][b] * splat(scale[h]));
}

// Turns `tokens` scores into exp(score - max), about zero behind the end; returns 1 / their sum. Meanwhile
// fetches 8 bytes a token of what is read next.
static inline float soften(float* scores, int tokens, const char* following) {
    int padded = round_up(tokens, 16);
    for (int t = tokens; t < padded; t++) scores[t] = -INFINITY;
    v8 top = load(scores), other = load(scores + 8);
    for (int t = 16; t < padded; t += 16) {
        top = larger(load(scores + t), top);
        other = larger(load(scores + t + 8), other);
    }
    v8 m = splat(largest(larger(top, other)));
    v8 total = splat(0.0f), rest = splat(0.0f);
    for (int t = 0; t < padded; t += 16) {
        fetch(following + (size_t)t * 8, 128);
        v8 a = exp_upto88(load(scores + t) - m), b = exp_upto88(load(scores + t + 8) - m);
        store(scores + t, a);
        store(scores + t + 8, b);
        total += a;
        rest += b;
    }
    // A padded place adds about 1e-38, far below the rounding of a sum that holds a one.
    return 1.0f / sum(total + rest);
}

// H consecutive query heads q (H, dim) of one kv head -> y (H, dim). scores: H * lds floats of scratch.
template <int H, class T>
static void attend_heads(const KeyValues<T>& kv, int tokens, int head_dim, const float* q, float* scores, int lds, float* y) {
    constexpr int wide = H == 1 ? 4 : H == 2 ? 2 : 1;
    int blocks = (tokens + 15) / 16, b = 0;
    for (; b + wide <= blocks; b += wide)
        score_blocks<H, wide>(kv.key_block(16 * b), kv.dim, head_dim, q, scores + 16 * b, lds);
    for (; b < blocks; b++) score_blocks<H, 1>(kv.key_block(16 * b), kv.dim, head_dim, q, scores + 16 * b, lds);
    float scale[H];
    const char* following = reinterpret_cast<const char*>(kv.values);
    for (int h = 0; h < H; h++) scale[h] = soften(scores + (size_t)h * lds, tokens, following + (size_t)h * tokens * 8);
    fetch(kv.next, kStart);
    int groups = kv.dim / 16, g = 0;
    for (; g + wide <= groups; g += wide)
        weigh<H, wide>(kv.values + 16 * g, kv.dim, tokens, scores, lds, scale, y + 16 * g);
    for (; g < groups; g++) weigh<H, 1>(kv.values + 16 * g, kv.dim, tokens, scores, lds, scale, y + 16 * g);
}

}  // namespace tf
