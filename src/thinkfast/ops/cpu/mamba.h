// One token through a Mamba-2 mixer: convolution, state update and output, gated norm (arXiv 2405.21060).
#pragma once
#include <algorithm>
#include <vector>

#include "gemm.h"
#include "vec.h"

namespace tf {

struct MambaShape {
    int heads = 0, head_dim = 0, state = 0, groups = 0, taps = 0;

    int inner() const { return heads * head_dim; }
    int channels() const { return inner() + 2 * groups * state; }
    int channels_padded() const { return round_up(channels(), kSpare); }
    int head_padded() const { return round_up(head_dim, 8); }
    // Floats one slot keeps a layer: the ring of past convolution inputs, then the state.
    size_t ring_size() const { return (size_t)(taps - 1) * channels_padded(); }
    size_t slot_size() const { return ring_size() + (size_t)heads * head_padded() * state; }
};

struct MambaWeights {
    Packed in_proj, out_proj;
    std::vector<float> conv, conv_bias;            // (taps, channels_padded), (channels_padded)
    std::vector<float> a, d, dt_bias, norm;        // a = -exp(A_log)
};

// Channels [first, last) of the convolution, in place. The past input of position p lies at ring row p % (taps - 1). Taps:
// their number where known when compiling, else 0. Meanwhile fetches the ring `next`.
template <int Taps>
static void convolve(const MambaShape& s, const MambaWeights& w, float* ring, const float* next, float* channels, int position, int first, int last) {
    int ld = s.channels_padded(), past = (Taps ? Taps : s.taps) - 1;
    float* rows[64];
    for (int j = 0; j < past; j++) rows[j] = ring + (size_t)((position + j) % past) * ld;
    if (position == 0)
        for (int j = 0; j < past; j++) std::fill(rows[j] + first, rows[j] + last, 0.0f);
    for (int c = first; c < std::min(last, s.channels()); c += kLanes) {
        vec x = load(channels + c), y = load(w.conv_bias.data() + c);
        for (int j = 0; j < past; j++) {
            fetch(next + (size_t)j * ld + c, sizeof y);
            y += load(rows[j] + c) * load(w.conv.data() + (size_t)j * ld + c);
        }
        y += x * load(w.conv.data() + (size_t)past * ld + c);
        if (past) store(rows[0] + c, x);
        y = silu(y);
        if (c + kLanes <= s.channels()) store(channels + c, y);
        else std::memcpy(channels + c, &y, sizeof(float) * (s.channels() - c));  // the steps stand behind them
    }
}

// V vectors X of channels of one head: state (N, V) = decay * state + b * (dt x); y = sum over n of c * state + d * x.
// Meanwhile fetches as much of what is read next.
template <class X, int V>
static void sweep(float* state, const float* next, int n_state, float decay, float dt, float d, const float* x, const float* b, const float* c, float* y) {
    constexpr int lanes = sizeof(X) / sizeof(float);
    X input[V], acc[V];
#pragma GCC unroll 8
    for (int i = 0; i < V; i++) {
        X here = load<X>(x + lanes * i);
        input[i] = here * dt;
        acc[i] = here * d;
    }
#pragma GCC unroll 2
    for (int n = 0; n < n_state; n++, state += lanes * V, next += lanes * V) {
        fetch(next, sizeof(X) * V);
        X bn = splat<X>(b[n]), cn = splat<X>(c[n]);
#pragma GCC unroll 8
        for (int i = 0; i < V; i++) {
            X s = load<X>(state + lanes * i) * decay;
            s += bn * input[i];
            store(state + lanes * i, s);
            acc[i] += cn * s;
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < V; i++) store(y + lanes * i, acc[i]);
}

// Steps and decays of all heads; both have room for a whole vector behind their end.
static inline void pace(const MambaShape& s, const MambaWeights& w, const float* dt, float* steps, float* decays) {
    for (int h = 0; h < s.heads; h += kLanes) {
        vec step = softplus(load(dt + h) + load(w.dt_bias.data() + h));
        store(steps + h, step);
        store(decays + h, exp_upto88(step * load(w.a.data() + h)));
    }
}

// Heads [first, last) of one row. `state`: that of all heads; `next`: the same of the row that comes next.
static inline void update_state(const MambaShape& s, const MambaWeights& w, float* state, const float* next, bool fresh, const float* xbc,
                                const float* steps, const float* decays, float* y, int first, int last) {
    const size_t head_size = (size_t)s.head_padded() * s.state;
    for (int h = first; h < last; h++) {
        float* here = state + h * head_size;
        const float* after = h + 1 < last ? here + head_size : next + first * head_size;
        if (fresh) std::fill(here, here + head_size, 0.0f);
        const float* b = xbc + s.inner() + (size_t)(h / (s.heads / s.groups)) * s.state;
        const float* c = b + (size_t)s.groups * s.state;
        for (int begin = 0; begin < s.head_dim;) {
            float part[4 * kLanes];  // where a head ends within a vector, the next one may be another thread's
            int left = s.head_padded() - begin, take = left >= 4 * kLanes ? 4 * kLanes : left >= 2 * kLanes ? 2 * kLanes : left >= kLanes ? kLanes : 8;
            auto run = take == 4 * kLanes ? sweep<vec, 4> : take == 2 * kLanes ? sweep<vec, 2> : take == kLanes ? sweep<vec, 1> : sweep<v8, 1>;
            size_t at = (size_t)h * s.head_dim + begin;
            bool whole = begin + take <= s.head_dim;
            run(here, after, s.state, decays[h], steps[h], w.d[h], xbc + at, b, c, whole ? y + at : part);
            if (!whole) std::memcpy(y + at, part, sizeof(float) * (s.head_dim - begin));
            begin += take;
            here += (size_t)take * s.state;
            after += (size_t)take * s.state;
        }
    }
}

// y <- RMSNorm by group of (y * silu(z)) * weight; y has room for kSpare more values behind its end.
static inline void gated_norm(const MambaShape& s, const MambaWeights& w, const float* z, float* y, float eps) {
    for (int i = 0; i < s.inner(); i += kLanes) store(y + i, load(y + i) * silu(load(z + i)));
    int size = s.inner() / s.groups;
    for (int g = 0; g < s.groups; g++) rms_norm(y + (size_t)g * size, w.norm.data() + (size_t)g * size, y + (size_t)g * size, size, eps);
}

}  // namespace tf
