// Draws one token from a row of logits; engine/sampling.py holds the same sampler in numpy.
#pragma once
#include <algorithm>
#include <vector>

#include "vec.h"

namespace tf {

struct Draw {
    double temperature, top_p;
    int top_k;
};

// Uniform in (0, 1): the SplitMix64 stream of `key` at `counter`.
static inline double uniform(uint64_t key, uint64_t counter) {
    uint64_t z = key + (counter + 1) * 0x9e3779b97f4a7c15ULL;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
    z ^= z >> 31;
    return ((double)(z >> 11) + 0.5) * 0x1p-53;
}

// Sets the weights that top-k and top-p cut off to zero. Order: larger logit first, then smaller id.
static inline void filter(const float* logits, int vocab, const Draw& how, std::vector<double>& weights, std::vector<int>& ids) {
    auto before = [&](int a, int b) { return logits[a] > logits[b] || (logits[a] == logits[b] && a < b); };
    auto after = [&](int a, int b) { return before(b, a); };
    ids.resize(vocab);
    for (int i = 0; i < vocab; i++) ids[i] = i;
    int kept = vocab;
    if (how.top_k > 0 && how.top_k < vocab) {
        kept = how.top_k;
        std::nth_element(ids.begin(), ids.begin() + (kept - 1), ids.end(), before);
        for (int i = kept; i < vocab; i++) weights[ids[i]] = 0.0;
    }
    if (how.top_p >= 1.0) return;
    double total = 0.0, reached = 0.0;
    for (int i = 0; i < vocab; i++) total += weights[i];
    std::make_heap(ids.begin(), ids.begin() + kept, after);
    while (kept > 0 && reached < how.top_p * total) {
        reached += weights[ids[0]];
        std::pop_heap(ids.begin(), ids.begin() + kept, after);
        kept--;
    }
    for (int i = 0; i < kept; i++) weights[ids[i]] = 0.0;
}

// Returns the token and its log-probability under softmax(logits); -1 where the logits hold a NaN or no finite maximum.
// Writes behind the logits, up to a multiple of 8.
static inline int draw(float* logits, int vocab, const Draw& how, uint64_t key, uint64_t counter,
                       std::vector<double>& weights, std::vector<int>& ids, double* logprob) {
    int padded = round_up(vocab, 8);
    std::fill(logits + vocab, logits + padded, -INFINITY);
    v8 tops = load(logits);
    v8i broken = tops != tops;
    for (int i = 8; i < padded; i += 8) {
        v8 x = load(logits + i);
        broken |= x != x;
        tops = larger(x, tops);
    }
    float top = largest(tops);
    *logprob = NAN;
    bool bad = !std::isfinite(top);
    for (int i = 0; i < 8; i++) bad |= broken[i] != 0;
    if (bad) return -1;
    weights.resize(padded);
    // A place behind the end adds at most 1e-304, far below the rounding of a sum that holds a one.
    auto exponentials = [&](double inverse) {
        v4d total = splat(0.0);
        for (int i = 0; i < padded; i += 4) {
            v4d x = __builtin_convertvector(load<v4>(logits + i), v4d);
            x = exp_negative((x - splat((double)top)) * splat(inverse));
            std::memcpy(&weights[i], &x, sizeof x);
            total += x;
        }
        return (total[0] + total[1]) + (total[2] + total[3]);
    };
    double normaliser = exponentials(1.0);
    int chosen = 0;
    if (how.temperature == 0.0) {
        while (logits[chosen] != top) chosen++;
    } else {
        double total = how.temperature == 1.0 ? normaliser : exponentials(1.0 / how.temperature);
        if (how.top_k > 0 || how.top_p < 1.0) {
            filter(logits, vocab, how, weights, ids);
            total = 0.0;
            for (int i = 0; i < vocab; i++) total += weights[i];
        }
        double target = uniform(key, counter) * total, reached = 0.0;
        for (int i = 0; i < vocab; i++) {
            if (weights[i] > 0.0) chosen = i;
            reached += weights[i];
            if (reached > target) break;
        }
    }
    *logprob = (double)logits[chosen] - (double)top - std::log(normaliser);
    return chosen;
}

}  // namespace tf
