// Y (rows, N) = X (rows, K) * W (K, N), weights packed once in panels of two vectors of columns, as float32 or bfloat16.
// Every output is one chain of multiply-adds over k in ascending order, whatever the number of rows: a row's result
// does not depend on its neighbours. Bfloat16 weights are widened and multiplied in float32: where this was written the
// processor's own bfloat16 product (vdpbf16ps) runs at .57 of the rate of float32.
#pragma once
#include <vector>

#include "bf16.h"
#include "vec.h"

namespace tf {

constexpr int kPanel = 2 * kLanes;
constexpr int kDepth = 128;  // rows of a panel that stay in the first level of cache with those of X
constexpr int kTile = 64;    // rows of X at most, an even number

struct Packed {
    int k = 0, n = 0;  // n is padded to whole panels
    bool half = false;
    const char* data = nullptr;
    std::vector<char> own;  // until `settle` has moved them

    size_t row_bytes() const { return (size_t)kPanel * (half ? sizeof(Bf16) : sizeof(float)); }
    const char* at(int panel, int row) const { return data + ((size_t)panel * k + row) * row_bytes(); }
    int panels() const { return n / kPanel; }
    size_t bytes() const { return (size_t)panels() * k * row_bytes(); }

    // Moves the numbers to `to`; returns what lies behind them.
    char* settle(char* to) {
        std::memcpy(to, own.data(), bytes());
        data = to;
        std::vector<char>().swap(own);
        return to + bytes();
    }
};

// Stacks row-major (rows_i, k) matrices, the layout of nn.Linear.weight, below each other and packs the transpose.
static inline Packed pack(const std::vector<const float*>& parts, const std::vector<int>& rows, int k, bool half) {
    int total = 0;
    for (int r : rows) total += r;
    Packed packed;
    packed.k = k;
    packed.n = round_up(total, kPanel);
    packed.half = half;
    packed.own.assign(packed.bytes(), 0);
    int column = 0;
    for (size_t part = 0; part < parts.size(); part++) {
        for (int r = 0; r < rows[part]; r++, column++) {
            char* to = packed.own.data() + (size_t)(column / kPanel) * k * packed.row_bytes();
            const float* from = parts[part] + (size_t)r * k;
            for (int i = 0; i < k; i++, to += packed.row_bytes()) {
                if (half) reinterpret_cast<Bf16*>(to)[place(column % kPanel, kPanel)] = rounded(from[i]);
                else reinterpret_cast<float*>(to)[column % kPanel] = from[i];
            }
        }
    }
    return packed;
}

// Y (M, two vectors) += X (M, k) * W (k, two vectors), from zero where `fresh`. Meanwhile fetches as many lines as rows.
template <int M>
static void multiply(const float* x, int ldx, const float* w, int k, float* y, int ldy, bool fresh, const char* ahead) {
    vec acc[M][2];
#pragma GCC unroll 12
    for (int r = 0; r < M; r++)
#pragma GCC unroll 2
        for (int part = 0; part < 2; part++) acc[r][part] = fresh ? vec{} : load(y + (size_t)r * ldy + part * kLanes);
#pragma GCC unroll 2
    for (int i = 0; i < k; i++) {
        fetch<2>(ahead + (size_t)i * 64, 64);
        vec b0 = load(w + (size_t)i * kPanel), b1 = load(w + (size_t)i * kPanel + kLanes);
#pragma GCC unroll 12
        for (int r = 0; r < M; r++) {
            vec a = splat(x[(size_t)r * ldx + i]);
            acc[r][0] += a * b0;
            acc[r][1] += a * b1;
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < M; r++)
#pragma GCC unroll 2
        for (int part = 0; part < 2; part++) store(y + (size_t)r * ldy + part * kLanes, acc[r][part]);
}

// Rows to take at once of those that are left. Buffers hold an even number of rows: an odd row at the end is computed
// together with an idle one, which costs less than a narrower kernel would.
static inline int rows_at_once(int left) {
    if (kLanes == 16) {
        if (left >= 19 || left == 17 || left == 18 || left == 11 || left == 12) return 12;
        if (left >= 13 || left == 7 || left == 8) return 8;
        return left >= 9 || left >= 5 ? 6 : left >= 3 ? 4 : 2;
    }
    return left <= 2 ? 2 : left <= 4 || left == 7 || left == 8 ? 4 : 6;
}

// Memory that will be read after a product: what is left of it to fetch while multiplying. Once a stretch is done, so
// many `bytes` follow from `offset` on behind each of the addresses from `next` on.
struct Ahead {
    const char *at = nullptr, *end = nullptr;
    const char* const *next = nullptr, *const *last = nullptr;
    size_t offset = 0, bytes = 0;

    // Where the next `size` bytes lie, or some that lie beside them; `idle` where nothing is left.
    const char* take(size_t size, const char* idle) {
        if (at >= end) {
            if (next == last) return idle;
            at = *next++ + offset;
            end = at + bytes;
        }
        at += size;
        return at - size;
    }
};

// Widens `k` rows of a panel.
static inline const float* widen(const char* rows, int k, float* to) {
    for (int i = 0; i < k; i++) {
        vec parts[2];
        load_pair(reinterpret_cast<const Bf16*>(rows) + (size_t)i * kPanel, parts[0], parts[1]);
        store(to + (size_t)i * kPanel, parts[0]);
        store(to + (size_t)i * kPanel + kLanes, parts[1]);
    }
    return to;
}

// The columns of one panel: Y = X W, or Y += X W.
static inline void gemm_panel(const float* x, int ldx, int rows, const Packed& w, int panel, float* y, int ldy, bool add, Ahead& later) {
    alignas(64) float wide[kDepth * kPanel];
    for (int k = 0; k < w.k; k += kDepth) {
        int depth = w.k - k < kDepth ? w.k - k : kDepth;
        const char* from = w.at(panel, k);
        const char *ahead = from + depth * w.row_bytes(), *enough = ahead + depth * w.row_bytes();
        const float* block = w.half ? widen(from, depth, wide) : reinterpret_cast<const float*>(from);
        for (int r = 0; r < rows;) {
            const float* in = x + (size_t)r * ldx + k;
            float* out = y + (size_t)r * ldy;
            bool fresh = k == 0 && !add;
            // The weights that come next first, then whatever else is wanted; both may be too much for the first level.
            const size_t size = (size_t)depth * 64;
            const char* next = ahead < enough ? ahead : later.take(size, from);
            ahead += size;
            int take = rows_at_once(rows - r);
            auto run = take == 2 ? multiply<2> : take == 4 ? multiply<4> : take == 6 ? multiply<6> : take == 8 ? multiply<8> : multiply<12>;
            run(in, ldx, block, depth, out, ldy, fresh, next);
            r += take;
        }
    }
}

// Panels [first, last) of Y = X W, or of Y += X W. Writes whole panels: ldy must be at least w.n.
static inline void gemm(const float* x, int ldx, int rows, const Packed& w, float* y, int ldy, bool add, int first, int last, Ahead& later) {
    for (int p = first; p < last; p++) gemm_panel(x, ldx, rows, w, p, y + (size_t)p * kPanel, ldy, add, later);
}

// Panels [first, last) of Y = silu(X gate) * (X up).
static inline void gemm_swiglu(const float* x, int ldx, int rows, const Packed& gate, const Packed& up, float* y, int ldy, int first, int last, Ahead& later) {
    alignas(64) float gated[kTile * kPanel], raised[kTile * kPanel];
    for (int p = first; p < last; p++) {
        gemm_panel(x, ldx, rows, gate, p, gated, kPanel, false, later);
        gemm_panel(x, ldx, rows, up, p, raised, kPanel, false, later);
        for (int r = 0; r < rows; r++)
            for (int c = 0; c < kPanel; c += kLanes)
                store(y + (size_t)r * ldy + p * kPanel + c, silu(load(gated + r * kPanel + c)) * load(raised + r * kPanel + c));
    }
}

}  // namespace tf
