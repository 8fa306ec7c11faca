// Y (rows, N) = X (rows, K) * W (K, N), weights packed once in panels of two vectors of columns.
// Every output is one chain of multiply-adds over k in ascending order, whatever the number of rows: a row's result
// does not depend on its neighbours.
#pragma once
#include <vector>

#include "vec.h"

namespace tf {

constexpr int kPanel = 2 * kLanes;

struct Packed {
    int k = 0, n = 0;  // n is padded to whole panels
    const float* data = nullptr;
    std::vector<float> own;  // until `settle` has moved them

    const float* panel(int p) const { return data + (size_t)p * k * kPanel; }
    int panels() const { return n / kPanel; }
    size_t size() const { return (size_t)k * n; }

    // Moves the numbers to `to`; returns what lies behind them.
    float* settle(float* to) {
        std::memcpy(to, own.data(), sizeof(float) * size());
        data = to;
        std::vector<float>().swap(own);
        return to + size();
    }
};

// Stacks row-major (rows_i, k) matrices, the layout of nn.Linear.weight, below each other and packs the transpose.
static inline Packed pack(const std::vector<const float*>& parts, const std::vector<int>& rows, int k) {
    int total = 0;
    for (int r : rows) total += r;
    Packed packed;
    packed.k = k;
    packed.n = round_up(total, kPanel);
    packed.own.assign(packed.size(), 0.0f);
    int column = 0;
    for (size_t part = 0; part < parts.size(); part++) {
        for (int r = 0; r < rows[part]; r++, column++) {
            float* to = packed.own.data() + (size_t)(column / kPanel) * k * kPanel + column % kPanel;
            const float* from = parts[part] + (size_t)r * k;
            for (int i = 0; i < k; i++) to[(size_t)i * kPanel] = from[i];
        }
    }
    return packed;
}

template <int M>
TF_INLINE void multiply(const float* x, int ldx, const float* w, int k, vec (&acc)[M][2]) {
#pragma GCC unroll 8
    for (int r = 0; r < M; r++) acc[r][0] = acc[r][1] = vec{};
#pragma GCC unroll 2
    for (int i = 0; i < k; i++) {
        fetch<2>(w + (size_t)(i + k) * kPanel, sizeof(vec) * 2);  // the next panel; both may be too much for the first level
        vec b0 = load<vec>(w + (size_t)i * kPanel), b1 = load<vec>(w + (size_t)i * kPanel + kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < M; r++) {
            vec a = splat<vec>(x[(size_t)r * ldx + i]);
            acc[r][0] += a * b0;
            acc[r][1] += a * b1;
        }
    }
}

template <int M, bool Add>
static void tile_store(const float* x, int ldx, const float* w, int k, float* y, int ldy) {
    vec acc[M][2];
    multiply<M>(x, ldx, w, k, acc);
#pragma GCC unroll 8
    for (int r = 0; r < M; r++)
#pragma GCC unroll 8
        for (int half = 0; half < 2; half++) {
            float* to = y + (size_t)r * ldy + half * kLanes;
            store(to, Add ? load<vec>(to) + acc[r][half] : acc[r][half]);
        }
}

template <int M>
static void tile_swiglu(const float* x, int ldx, const float* gate, const float* up, int k, float* y, int ldy) {
    vec acc[M][2], gated[M][2];
    multiply<M>(x, ldx, gate, k, gated);
    multiply<M>(x, ldx, up, k, acc);
    for (int r = 0; r < M; r++)
        for (int half = 0; half < 2; half++)
            store(y + (size_t)r * ldy + half * kLanes, silu(gated[r][half]) * acc[r][half]);
}

// Calls f.template run<M>(first row) over blocks of 6 and 4 rows. Buffers hold an even number of rows: an odd row at the
// end is computed together with an idle one, which costs less than a narrower kernel would.
template <class F>
TF_INLINE void over_rows(int rows, F f) {
    if (rows <= 2) return f.template run<2>(0);
    for (int r = 0; r < rows;) {
        int left = rows - r;
        if (left <= 4 || left == 7 || left == 8) {
            f.template run<4>(r);
            r += 4;
        } else {
            f.template run<6>(r);
            r += 6;
        }
    }
}

template <bool Add>
struct PanelJob {
    const float *x, *w;
    int ldx, k;
    float* y;
    int ldy;
    template <int M>
    void run(int r) const {
        tile_store<M, Add>(x + (size_t)r * ldx, ldx, w, k, y + (size_t)r * ldy, ldy);
    }
};

struct SwigluJob {
    const float *x, *gate, *up;
    int ldx, k;
    float* y;
    int ldy;
    template <int M>
    void run(int r) const {
        tile_swiglu<M>(x + (size_t)r * ldx, ldx, gate, up, k, y + (size_t)r * ldy, ldy);
    }
};

// Y = X W, or Y += X W. Writes whole panels: ldy must be at least w.n.
template <bool Add>
static void gemm(const float* x, int ldx, int rows, const Packed& w, float* y, int ldy) {
    for (int p = 0; p < w.panels(); p++)
        over_rows(rows, PanelJob<Add>{x, w.panel(p), ldx, w.k, y + p * kPanel, ldy});
}

// Y = silu(X gate) * (X up).
static void gemm_swiglu(const float* x, int ldx, int rows, const Packed& gate, const Packed& up, float* y, int ldy) {
    for (int p = 0; p < gate.panels(); p++)
        over_rows(rows, SwigluJob{x, gate.panel(p), up.panel(p), ldx, gate.k, y + p * kPanel, ldy});
}

}  // namespace tf
