// One token through a Mamba-2 mixer: convolution, state update and output, gated norm (arXiv 2405.21060).
#pragma once
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

// The past input of position p lies at ring row p % (taps - 1). Taps: their number where known when compiling, else 0.
template <int Taps>
static void convolve(const MambaShape& s, const MambaWeights& w, float* ring, const float* in, int position, float* out) {
    int ld = s.channels_padded(), past = (Taps ? Taps : s.taps) - 1;
    float* rows[64];
    for (int j = 0; j < past; j++) rows[j] = ring + (size_t)((position + j) % past) * ld;
    for (int c = 0; c < ld; c += kLanes) {
        vec x = load<vec>(in + c), y = load<vec>(w.conv_bias.data() + c);
        for (int j = 0; j < past; j++) y += load<vec>(rows[j] + c) * load<vec>(w.conv.data() + (size_t)j * ld + c);
        y += x * load<vec>(w.conv.data() + (size_t)past * ld + c);
        if (past) store(rows[0] + c, x);
        store(out + c, silu(y));
    }
}

// 8 * V channels of one head: state (N, 8 V) = decay * state + b * (dt x); y = sum over n of c * state + d * x.
// Meanwhile fetches as much of what is read next.
template <int V>
static void sweep(float* state, const float* next, int n_state, float decay, float dt, float d, const float* x, const float* b, const float* c, float* y) {
    v8 input[V], acc[V];
#pragma GCC unroll 8
    for (int i = 0; i < V; i++) {
        v8 here = load(x + 8 * i);
        input[i] = here * splat(dt);
        acc[i] = here * splat(d);
    }
    for (int n = 0; n < n_state; n++, state += 8 * V, next += 8 * V) {
        fetch(next, sizeof(v8) * V);
        v8 bn = splat(b[n]), cn = splat(c[n]);
#pragma GCC unroll 8
        for (int i = 0; i < V; i++) {
            v8 s = load(state + 8 * i) * splat(decay);
            s += bn * input[i];
            store(state + 8 * i, s);
            acc[i] += cn * s;
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < V; i++) store(y + 8 * i, acc[i]);
}

// Heads ascend: where head_dim is not a multiple of 8, what one head writes behind its end the next one overwrites.
static inline void update_state(const MambaShape& s, const MambaWeights& w, float* state, const float* next, const float* xbc, const float* dt, float* y) {
    for (int h = 0; h < s.heads; h++) {
        int group = h / (s.heads / s.groups);
        const float* b = xbc + s.inner() + (size_t)group * s.state;
        const float* c = b + (size_t)s.groups * s.state;
        float step = softplus(dt[h] + w.dt_bias[h]);
        float decay = std::exp(step * w.a[h]);
        const float* x = xbc + (size_t)h * s.head_dim;
        float* out = y + (size_t)h * s.head_dim;
        int left = s.head_padded() / 8;
        while (left > 0) {
            int take = left >= 4 ? 4 : left >= 2 ? 2 : 1;
            auto run = take == 4 ? sweep<4> : take == 2 ? sweep<2> : sweep<1>;
            run(state, (h + 1 < s.heads ? state + 8 * take * s.state : next), s.state, decay, step, w.d[h], x, b, c, out);
            state += (size_t)8 * take * s.state;
            x += 8 * take;
            out += 8 * take;
            left -= take;
        }
    }
}

// y <- RMSNorm by group of (y * silu(z)) * weight; y has room for kSpare more values behind its end.
static inline void gated_norm(const MambaShape& s, const MambaWeights& w, const float* z, float* y, float eps) {
    for (int i = 0; i < s.inner(); i += kLanes) store(y + i, load<vec>(y + i) * silu(load<vec>(z + i)));
    int size = s.inner() / s.groups;
    for (int g = 0; g < s.groups; g++) rms_norm(y + (size_t)g * size, w.norm.data() + (size_t)g * size, y + (size_t)g * size, size, eps);
}

}  // namespace tf
