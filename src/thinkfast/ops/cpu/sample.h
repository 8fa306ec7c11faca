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

constexpr int kStretch = 256;  // weights that are summed up together

static inline double sum(v8d x) { return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7])); }

static inline double total_of(const double* weights) {
    v8d even = v8d{}, odd = v8d{}, x;
    for (int i = 0; i < kStretch; i += 16) {
        std::memcpy(&x, weights + i, sizeof x);
        even += x;
        std::memcpy(&x, weights + i + 8, sizeof x);
        odd += x;
    }
    return sum(even + odd);
}

// Returns the token and its log-probability under softmax(logits); -1 where the logits hold a NaN or no finite maximum.
// Writes behind the logits, up to a multiple of kLanes.
static inline int draw(float* logits, int vocab, const Draw& how, uint64_t key, uint64_t counter,
                       std::vector<double>& weights, std::vector<int>& ids, double* logprob) {
    int padded = round_up(vocab, kLanes), stretches = (vocab + kStretch - 1) / kStretch;
    std::fill(logits + vocab, logits + padded, -INFINITY);
    vec tops = load(logits);
    auto broken = tops != tops;
    for (int i = kLanes; i < padded; i += kLanes) {
        vec x = load(logits + i);
        broken |= x != x;
        tops = larger(x, tops);
    }
    float top = largest(tops);
    *logprob = NAN;
    bool bad = !std::isfinite(top);
    for (int i = 0; i < kLanes; i++) bad |= broken[i] != 0;
    if (bad) return -1;
    weights.assign((size_t)stretches * kStretch, 0.0);
    auto exponentials = [&](double inverse) {
        double total = 0.0;
        for (int s = 0; s < stretches; s++) {
            int end = std::min(padded, (s + 1) * kStretch);
            for (int i = s * kStretch; i < end; i += 8) {
                v8d x = exp_negative((__builtin_convertvector(load<v8>(logits + i), v8d) - (double)top) * inverse);
                std::memcpy(&weights[i], &x, sizeof x);
            }
            total += total_of(&weights[(size_t)s * kStretch]);
        }
        return total;
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
            for (int s = 0; s < stretches; s++) total += total_of(&weights[(size_t)s * kStretch]);
        }
        double target = uniform(key, counter) * total, reached = 0.0, before = 0.0;
        int stretch = 0;
        for (int s = 0; s < stretches && reached <= target; s++) {
            double next = reached + total_of(&weights[(size_t)s * kStretch]);
            if (next > reached) stretch = s, before = reached;
            reached = next;
        }
        // Rounding may leave the target behind the last weight: then the last token that has one is taken.
        reached = before;
        for (int i = stretch * kStretch; i < std::min(vocab, (stretch + 1) * kStretch) && reached <= target; i++) {
            if (weights[i] > 0.0) chosen = i;
            reached += weights[i];
        }
    }
    *logprob = (double)logits[chosen] - (double)top - std::log(normaliser);
    return chosen;
}

}  // namespace tf
