// Training of causal attention between its projections: rotation of queries and keys (arXiv 2104.09864), softmax over
// the positions so far, several query heads to a key/value head. Scores of kQueries positions exist at a time.
#pragma once
#include <algorithm>

#include "tile.h"

namespace tf {

constexpr int kQueries = 32;

struct Heads {
    int heads, kv_heads, width;  // width is a multiple of 2 kBlock
    const float *cosines, *sines;  // (longest, width / 2)

    int shared() const { return heads / kv_heads; }
    float scale() const { return 1.0f / std::sqrt((float)width); }
    size_t row(bool kv) const { return (size_t)(kv ? kv_heads : heads) * width; }
};

// Turns positions first..first + count of a head by their angles, or back, and scales them; zero up to `size` rows.
static inline void turn(const Heads& h, const float* from, size_t ldf, float* to, size_t ldt, int first, int count, int size, float scale, bool back) {
    const int half = h.width / 2;
    for (int t = 0; t < count; t++)
        for (int c = 0; c < half; c += kLanes) {
            const size_t at = (size_t)(first + t) * half + c;
            vec a = load(from + t * ldf + c), b = load(from + t * ldf + half + c);
            vec cosine = load(h.cosines + at) * scale, sine = load(h.sines + at) * (back ? -scale : scale);
            store(to + t * ldt + c, a * cosine - b * sine);
            store(to + t * ldt + half + c, b * cosine + a * sine);
        }
    for (int t = count; t < size; t++) std::memset(to + t * ldt, 0, sizeof(float) * h.width);
}

static inline void copy_rows(const float* from, size_t ldf, float* to, size_t ldt, int count, int size, int width) {
    for (int t = 0; t < count; t++) std::memcpy(to + t * ldt, from + t * ldf, sizeof(float) * width);
    for (int t = count; t < size; t++) std::memset(to + t * ldt, 0, sizeof(float) * width);
}

// One sequence of `length` rows, one key/value head, whose queries, keys and values begin at q, k and v: the outputs,
// and per query head the logarithm of the sum of exponentials, `log_sums` (shared, length).
static inline void attend(const Heads& h, int length, const float* q, const float* k, const float* v, float* out, float* log_sums) {
    const int P = h.width, size = round_up(length, kQueries);
    Scratch scratch((size_t)size * (3 * P + kQueries) + (size_t)kQueries * 2 * P + 256);
    float *keys = scratch.take((size_t)size * P), *turned = scratch.take((size_t)size * P), *values = scratch.take((size_t)size * P);
    float *scores = scratch.take((size_t)size * kQueries), *query = scratch.take(kQueries * P), *sums = scratch.take(kQueries * P);
    turn(h, k, h.row(true), keys, P, 0, length, size, 1.0f, false);
    transpose(keys, P, turned, size, size, P);
    copy_rows(v, h.row(true), values, P, length, size, P);
    for (int head = 0; head < h.shared(); head++)
        for (int first = 0; first < length; first += kQueries) {
            const int count = std::min(kQueries, length - first), n = first + kQueries;
            turn(h, q + first * h.row(false) + head * P, h.row(false), query, P, first, count, kQueries, h.scale(), false);
            product({query, P, 1}, turned, size, scores, size, kQueries, P, n, false);
            float scale[kQueries] = {};
            for (int t = 0; t < count; t++) {
                float* row = scores + (size_t)t * size;
                vec high = splat<vec>(-INFINITY), total = vec{};
                for (int s = 0; s <= first + t; s += kLanes) {
                    vec x = count_from(s) > first + t ? splat<vec>(-INFINITY) : load(row + s);
                    store(row + s, x);
                    high = larger(high, x);
                }
                const float top = largest(high);
                int s = 0;
                for (; s <= first + t; s += kLanes) {
                    vec x = exp_upto88(load(row + s) - top);
                    total += x;
                    store(row + s, x);
                }
                for (; s < n; s += kLanes) store(row + s, vec{});
                const float all = lanes_sum(total);
                scale[t] = 1.0f / all;
                log_sums[(size_t)head * length + first + t] = top + std::log(all);
            }
            product({scores, size, 1}, values, P, sums, P, kQueries, n, P, false);
            for (int t = 0; t < count; t++)
                for (int c = 0; c < P; c += kLanes) store(out + (first + t) * h.row(false) + head * P + c, load(sums + t * P + c) * scale[t]);
        }
}

// The gradients of queries, keys and values.
static inline void attend_backward(const Heads& h, int length, const float* q, const float* k, const float* v, const float* out,
                                   const float* log_sums, const float* dout, float* dq, float* dk, float* dv) {
    const int P = h.width, size = round_up(length, kQueries);
    const size_t all = (size_t)size * P;
    Scratch scratch(6 * all + 2 * (size_t)size * kQueries + (size_t)kQueries * 4 * P + 256);
    float *keys = scratch.take(all), *turned = scratch.take(all), *values = scratch.take(all), *turned_values = scratch.take(all);
    float *key_sums = scratch.take(all), *value_sums = scratch.take(all);
    float *weights = scratch.take((size_t)size * kQueries), *slopes = scratch.take((size_t)size * kQueries);
    float *query = scratch.take(kQueries * P), *given = scratch.take(kQueries * P), *sums = scratch.take(kQueries * P);
    turn(h, k, h.row(true), keys, P, 0, length, size, 1.0f, false);
    transpose(keys, P, turned, size, size, P);
    copy_rows(v, h.row(true), values, P, length, size, P);
    transpose(values, P, turned_values, size, size, P);
    std::memset(key_sums, 0, sizeof(float) * all);
    std::memset(value_sums, 0, sizeof(float) * all);
    for (int head = 0; head < h.shared(); head++)
        for (int first = 0; first < length; first += kQueries) {
            const int count = std::min(kQueries, length - first), n = first + kQueries;
            const size_t at = first * h.row(false) + head * P;
            turn(h, q + at, h.row(false), query, P, first, count, kQueries, h.scale(), false);
            copy_rows(dout + at, h.row(false), given, P, count, kQueries, P);
            product({query, P, 1}, turned, size, weights, size, kQueries, P, n, false);
            product({given, P, 1}, turned_values, size, slopes, size, kQueries, P, n, false);
            for (int t = 0; t < kQueries; t++) {
                float *row = weights + (size_t)t * size, *slope = slopes + (size_t)t * size;
                const int last = t < count ? first + t : -1;
                int s = 0;
                if (last >= 0) {
                    vec products = vec{};
                    for (int c = 0; c < P; c += kLanes) products += load(given + t * P + c) * load(out + at + t * h.row(false) + c);
                    const float mean = lanes_sum(products), log_sum = log_sums[(size_t)head * length + last];
                    for (; s <= last; s += kLanes) {
                        vec x = load(row + s) - log_sum;
                        vec weight = count_from(s) > last ? vec{} : exp_upto88(x < 0.0f ? x : vec{});
                        store(row + s, weight);
                        store(slope + s, weight * (load(slope + s) - mean));
                    }
                }
                for (; s < n; s += kLanes) {
                    store(row + s, vec{});
                    store(slope + s, vec{});
                }
            }
            product({weights, 1, size}, given, P, value_sums, P, n, kQueries, P, true);
            product({slopes, 1, size}, query, P, key_sums, P, n, kQueries, P, true);
            product({slopes, size, 1}, keys, P, sums, P, kQueries, n, P, false);
            turn(h, sums, P, dq + at, h.row(false), first, count, count, h.scale(), true);
        }
    turn(h, key_sums, P, dk, h.row(true), 0, length, length, 1.0f, true);
    copy_rows(value_sums, P, dv, h.row(true), length, length, P);
}

}  // namespace tf
