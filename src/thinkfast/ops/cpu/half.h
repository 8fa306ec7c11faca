// The two halves of a layer, each with its norm in front and its residual: x + mixer(norm(x)) and x + mlp(norm(x)).
// A tile of rows passes through all that does not look at other rows before the next tile does.
#pragma once
#include <memory>

#include "panel.h"
#include "scan.h"

namespace tf {

// x / rms(x) * weight, row by row.
struct Norm {
    const float* weight;
    int width;
    float eps;

    void forward(const float* x, int rows, float* out, int ldo) const {
        for (int t = 0; t < rows; t++) rms_norm(x + (size_t)t * width, weight, out + (size_t)t * ldo, width, eps);
    }

    // dx from dout (rows, ldd), plus `past` (rows, width) where there is one; to dweight is added.
    void backward(const float* x, const float* dout, int ldd, const float* past, int rows, float* dx, float* dweight) const {
        for (int t = 0; t < rows; t++) {
            const float *in = x + (size_t)t * width, *g = dout + (size_t)t * ldd;
            vec squares = vec{}, products = vec{};
            for (int c = 0; c < width; c += kLanes) {
                vec v = load(in + c);
                squares += v * v;
                products += v * load(weight + c) * load(g + c);
            }
            float scale = 1.0f / std::sqrt(lanes_sum(squares) / width + eps), back = lanes_sum(products) * scale * scale * scale / width;
            for (int c = 0; c < width; c += kLanes) {
                vec v = load(in + c), d = load(g + c), own = load(weight + c) * d * scale - v * back;
                store(dx + (size_t)t * width + c, past ? load(past + (size_t)t * width + c) + own : own);
                store(dweight + c, load(dweight + c) + d * v * scale);
            }
        }
    }
};

// silu(gate) * up.
static inline void gate_forward(const float* gate, const float* up, float* out, int64_t count) {
    for (int64_t i = 0; i < count; i += kLanes) store(out + i, silu(load(gate + i)) * load(up + i));
}

// `dout` becomes dup; dgate, and out once more.
static inline void gate_backward(const float* gate, const float* up, float* dout, float* dgate, float* out, int64_t count) {
    for (int64_t i = 0; i < count; i += kLanes) {
        vec x = load(gate + i), u = load(up + i), d = load(dout + i), s = sigmoid(x), open = x * s;
        store(out + i, open * u);
        store(dout + i, d * open);
        store(dgate + i, d * u * s * (1.0f + x * (1.0f - s)));
    }
}

// Gradients of weights are in the order gate (hidden, width), up, down (width, hidden), norm.
struct Mlp {
    Norm norm;
    int hidden;
    const float *gate, *up, *down;

    size_t sums() const { return (size_t)norm.width * (3 * hidden + 1); }

    // gated and raised (rows, hidden) are kept for the way back.
    void forward(int64_t rows, const float* x, float* gated, float* raised, float* out, int threads) const {
        const int D = norm.width, M = hidden, ldu = D + kSpread, ldh = M + kSpread;
        const Panels gates(gate, M, D, true), ups(up, M, D, true), downs(down, D, M, true);
        tiles(rows, threads, [&](int64_t first, int count) {
            Scratch scratch((size_t)kTile * (ldu + ldh));
            float *u = scratch.take((size_t)kTile * ldu), *h = scratch.take((size_t)kTile * ldh);
            norm.forward(x + first * D, count, u, ldu);
            multiply(u, ldu, gates, gated + first * M, M, count, false);
            multiply(u, ldu, ups, raised + first * M, M, count, false);
            for (int t = 0; t < count; t++) gate_forward(gated + (first + t) * M, raised + (first + t) * M, h + (size_t)t * ldh, M);
            std::memcpy(out + first * D, x + first * D, sizeof(float) * count * D);
            multiply(h, ldh, downs, out + first * D, D, count, true);
        });
    }

    void backward(int64_t rows, const float* x, const float* gated, const float* raised, const float* dout, float* dx, float* dweights,
                  int threads) const {
        const int D = norm.width, M = hidden, ldu = D + kSpread, ldh = M + kSpread;
        const size_t matrix = (size_t)D * M;
        const Panels gates(gate, M, D, false), ups(up, M, D, false), downs(down, D, M, false);
        const Floats found(parts_of(rows) * sums());
        parts(rows, threads, [&](int part, int64_t first, int count, bool fresh) {
            Scratch scratch((size_t)kTile * (2 * ldu + 3 * ldh));
            float *u = scratch.take((size_t)kTile * ldu), *du = scratch.take((size_t)kTile * ldu);
            float *h = scratch.take((size_t)kTile * ldh), *dh = scratch.take((size_t)kTile * ldh), *dg = scratch.take((size_t)kTile * ldh);
            float* to = found.get() + part * sums();
            const float* given = dout + first * D;
            norm.forward(x + first * D, count, u, ldu);
            multiply(given, D, downs, dh, ldh, count, false);
            for (int t = 0; t < count; t++) {
                const size_t at = (first + t) * M, row = (size_t)t * ldh;
                gate_backward(gated + at, raised + at, dh + row, dg + row, h + row, M);
            }
            outer(dg, ldh, M, u, ldu, D, count, to, !fresh);
            outer(dh, ldh, M, u, ldu, D, count, to + matrix, !fresh);
            outer(given, D, D, h, ldh, M, count, to + 2 * matrix, !fresh);
            multiply(dg, ldh, gates, du, ldu, count, false);
            multiply(dh, ldh, ups, du, ldu, count, true);
            if (fresh) std::memset(to + 3 * matrix, 0, sizeof(float) * D);
            norm.backward(x + first * D, du, ldu, given, count, dx + first * D, to + 3 * matrix);
        });
        add_up(found.get(), parts_of(rows), sums(), sums(), dweights, threads);
    }
};

// The projections around a mixer. The first one's columns are those of `Columns::apart`. Gradients of weights are in the order
// in (row, width), out (width, inner), norm.
struct Ends {
    Norm norm;
    const Mixer& mixer;
    const float *in, *out;

    size_t sums() const { return (size_t)norm.width * (mixer.row() + mixer.inner() + 1); }
    size_t made(int64_t rows) const { return rows * (mixer.groups * mixer.wide() + mixer.steps()); }

    // The rows of the first projection that make the columns of a group, or behind the last group dt.
    std::vector<Run> runs(int group) const {
        const int slice = mixer.shared() * mixer.width, b = 2 * mixer.inner() + group * mixer.state;
        if (group == mixer.groups) return {{mixer.inner() + mixer.conv(), mixer.heads}};
        return {{group * slice, slice}, {mixer.inner() + group * slice, slice}, {b, mixer.state}, {b + mixer.groups * mixer.state, mixer.state}};
    }

    // Calls part(group, where the tile's columns of that group begin in `all`, how far apart its rows are) for all groups and dt.
    template <class Float, class Task>
    void each(Float* all, int64_t rows, int64_t first, const Task& task) const {
        for (int group = 0; group <= mixer.groups; group++) {
            const int ld = group < mixer.groups ? mixer.wide() : mixer.steps();
            task(group, all + group * rows * mixer.wide() + first * ld, ld);
        }
    }

    std::vector<std::unique_ptr<Panels>> entrance(bool turned) const {
        std::vector<std::unique_ptr<Panels>> all;
        for (int group = 0; group <= mixer.groups; group++) all.push_back(std::make_unique<Panels>(in, runs(group), norm.width, turned));
        return all;
    }

    void enter(int64_t rows, const float* x, float* made, int threads) const {
        const int D = norm.width, ldu = D + kSpread;
        const auto ins = entrance(true);
        tiles(rows, threads, [&](int64_t first, int count) {
            Scratch scratch((size_t)kTile * ldu);
            float* u = scratch.take((size_t)kTile * ldu);
            norm.forward(x + first * D, count, u, ldu);
            each(made, rows, first, [&](int group, float* to, int ld) { multiply(u, ldu, *ins[group], to, ld, count, false); });
        });
    }

    void leave(int64_t rows, const float* x, const float* mixed, float* result, int threads) const {
        const int D = norm.width, inner = mixer.inner();
        const Panels outs(out, D, inner, true);
        tiles(rows, threads, [&](int64_t first, int count) {
            std::memcpy(result + first * D, x + first * D, sizeof(float) * count * D);
            multiply(mixed + first * inner, inner, outs, result + first * D, D, count, true);
        });
    }

    // `found` (parts, sums) is filled by both ways back.
    void leave_backward(int64_t rows, const float* mixed, const float* dout, float* dmixed, float* found, int threads) const {
        const int D = norm.width, inner = mixer.inner();
        const Panels outs(out, D, inner, false);
        parts(rows, threads, [&](int part, int64_t first, int count, bool fresh) {
            float* to = found + part * sums() + (size_t)mixer.row() * D;
            multiply(dout + first * D, D, outs, dmixed + first * inner, inner, count, false);
            outer(dout + first * D, D, D, mixed + first * inner, inner, inner, count, to, !fresh);
        });
    }

    void enter_backward(int64_t rows, const float* x, const float* dmade, const float* dout, float* dx, float* found, int threads) const {
        const int D = norm.width, ldu = D + kSpread;
        const auto ins = entrance(false);
        parts(rows, threads, [&](int part, int64_t first, int count, bool fresh) {
            Scratch scratch((size_t)kTile * 2 * ldu);
            float *u = scratch.take((size_t)kTile * ldu), *du = scratch.take((size_t)kTile * ldu);
            float *to = found + part * sums(), *dnorm = to + (size_t)D * (mixer.row() + mixer.inner());
            norm.forward(x + first * D, count, u, ldu);
            each(dmade, rows, first, [&](int group, const float* given, int ld) {
                multiply(given, ld, *ins[group], du, ldu, count, group > 0);
                for (const Run& run : runs(group)) {
                    outer(given, ld, run.count, u, ldu, D, count, to + (size_t)run.first * D, !fresh);
                    given += run.count;
                }
            });
            if (fresh) std::memset(dnorm, 0, sizeof(float) * D);
            norm.backward(x + first * D, du, ldu, dout + first * D, count, dx + first * D, dnorm);
        });
    }
};

}  // namespace tf
