// C interface of the kernels for training; see training.py. Everything is float32; sums over tokens are made in an order
// that does not depend on the number of threads.
#include <algorithm>

#include "attend.h"
#include "half.h"
#include "scan.h"

using namespace tf;

namespace {

constexpr int kElements = 8192;  // of a gate that are one task

Mixer mixer_of(const int32_t* sizes, double eps) {
    return {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], (float)eps};
}

Weights weights_of(const float* const* w) { return {w[0], w[1], w[2], w[3], w[4], w[5]}; }

// Calls task(sequence, group, first row, length, where its states are) for every sequence and group. Groups of one sequence
// write to the same lines of a cache: they come far apart, so that threads which work at once seldom meet.
template <class Task>
void each(const Mixer& m, int sequences, const int64_t* bounds, int threads, const Task& task) {
    std::vector<size_t> chunks(sequences + 1, 0);
    for (int i = 0; i < sequences; i++) chunks[i + 1] = chunks[i] + m.chunks((int)(bounds[i + 1] - bounds[i]));
    share(sequences * m.groups, threads, [&](int index) {
        const int i = index % sequences, group = index / sequences;
        size_t states = (chunks[i] * m.groups + group * (chunks[i + 1] - chunks[i])) * m.shared() * m.kept();
        task(i, group, (size_t)bounds[i], (int)(bounds[i + 1] - bounds[i]), states);
    });
}

Mlp mlp_of(const int32_t* sizes, double eps, const float* const* w) { return {{w[3], sizes[0], (float)eps}, sizes[1], w[0], w[1], w[2]}; }

Ends ends_of(const Mixer& m, int width, double eps, const float* const* w) { return {{w[2], width, (float)eps}, m, w[0], w[1]}; }

}  // namespace

extern "C" {

// out (rows, width) = x / rms(x) * weight.
void tf_norm(const float* x, const float* weight, float* out, int64_t rows, int32_t width, double eps, int32_t threads) {
    const Norm norm{weight, width, (float)eps};
    tiles(rows, threads, [&](int64_t first, int count) { norm.forward(x + first * width, count, out + first * width, width); });
}

// dx (rows, width) and dweight (width).
void tf_norm_backward(const float* x, const float* weight, const float* dout, float* dx, float* dweight, int64_t rows, int32_t width,
                      double eps, int32_t threads) {
    const Norm norm{weight, width, (float)eps};
    const Floats found((size_t)parts_of(rows) * width);
    parts(rows, threads, [&](int part, int64_t first, int count, bool fresh) {
        float* to = found.get() + (size_t)part * width;
        if (fresh) std::memset(to, 0, sizeof(float) * width);
        norm.backward(x + first * width, dout + first * width, width, nullptr, count, dx + first * width, to);
    });
    add_up(found.get(), parts_of(rows), width, width, dweight, threads);
}

// out = silu(gate) * up.
void tf_gate(const float* gate, const float* up, float* out, int64_t count, int32_t threads) {
    share((int)((count + kElements - 1) / kElements), threads, [&](int block) {
        const int64_t i = block * (int64_t)kElements;
        gate_forward(gate + i, up + i, out + i, std::min<int64_t>(kElements, count - i));
    });
}

// `dout` becomes dup; dgate, and out once more.
void tf_gate_backward(const float* gate, const float* up, float* dout, float* dgate, float* out, int64_t count, int32_t threads) {
    share((int)((count + kElements - 1) / kElements), threads, [&](int block) {
        const int64_t i = block * (int64_t)kElements;
        gate_backward(gate + i, up + i, dout + i, dgate + i, out + i, std::min<int64_t>(kElements, count - i));
    });
}

// out (rows, width) = x + mlp(norm(x)); gated and raised (rows, hidden) are kept for the gradients. Sizes: width, hidden;
// weights: gate, up, down, norm.
void tf_mlp(const int32_t* sizes, double eps, const float* const* weights, int64_t rows, const float* x, float* gated, float* raised,
            float* out, int32_t threads) {
    mlp_of(sizes, eps, weights).forward(rows, x, gated, raised, out, threads);
}

// dx, and dweights in the order of the weights.
void tf_mlp_backward(const int32_t* sizes, double eps, const float* const* weights, int64_t rows, const float* x, const float* gated,
                     const float* raised, const float* dout, float* dx, float* dweights, int32_t threads) {
    mlp_of(sizes, eps, weights).backward(rows, x, gated, raised, dout, dx, dweights, threads);
}

// sizes: heads, width, state, groups, taps, chunk. Sequence i has the rows from bounds[i] to bounds[i + 1].
void tf_mixer(const int32_t* sizes, double eps, const float* const* weights, int32_t sequences, const int64_t* bounds, const float* rows,
              float* y, float* out, float* states, int32_t threads) {
    const Mixer m = mixer_of(sizes, eps);
    const Weights w = weights_of(weights);
    each(m, sequences, bounds, threads, [&](int, int group, size_t first, int length, size_t kept) {
        const auto in = Columns<const float>::together(m, rows + first * m.row(), group);
        const size_t at = first * m.inner();
        scan_forward(m, w, group, length, in, y + at + group * m.shared() * m.width, m.inner(), out + at, states + kept);
    });
}

// drows, and sums (sequences, all weights in the order of `Sums`).
void tf_mixer_backward(const int32_t* sizes, double eps, const float* const* weights, int32_t sequences, const int64_t* bounds,
                       const float* rows, const float* y, const float* states, const float* dout, float* drows, float* sums,
                       int32_t threads) {
    const Mixer m = mixer_of(sizes, eps);
    const Weights w = weights_of(weights);
    each(m, sequences, bounds, threads, [&](int i, int group, size_t first, int length, size_t kept) {
        const auto in = Columns<const float>::together(m, rows + first * m.row(), group);
        const auto to = Columns<float>::together(m, drows + first * m.row(), group);
        const size_t at = first * m.inner();
        scan_backward(m, w, group, length, in, y + at + group * m.shared() * m.width, m.inner(), states + kept, dout + at, to,
                      Sums(m, sums + (size_t)i * m.sums()));
    });
}

// out (rows, width) = x + out_proj(mixer(in_proj(norm(x)))). `made` holds what in_proj makes, as `Columns::apart` says, y
// (groups, rows, slice) and mixed (rows, inner) what is before and behind the gated norm. Weights: in_proj, out_proj, norm,
// the mixer's.
void tf_layer(const int32_t* sizes, int32_t width, double norm_eps, double eps, const float* const* weights, int32_t sequences,
              const int64_t* bounds, const float* x, float* made, float* y, float* mixed, float* states, float* out, int32_t threads) {
    const Mixer m = mixer_of(sizes, eps);
    const Ends ends = ends_of(m, width, norm_eps, weights);
    const int64_t rows = bounds[sequences];
    ends.enter(rows, x, made, threads);
    const Weights w = weights_of(weights + 3);
    each(m, sequences, bounds, threads, [&](int, int group, size_t first, int length, size_t kept) {
        const auto in = Columns<const float>::apart(m, made, rows, first, group);
        const int slice = m.shared() * m.width;
        scan_forward(m, w, group, length, in, y + (group * rows + first) * slice, slice, mixed + first * m.inner(), states + kept);
    });
    ends.leave(rows, x, mixed, out, threads);
}

// dx, and dweights in the order of the weights.
void tf_layer_backward(const int32_t* sizes, int32_t width, double norm_eps, double eps, const float* const* weights, int32_t sequences,
                       const int64_t* bounds, const float* x, const float* made, const float* y, const float* mixed, const float* states,
                       const float* dout, float* dx, float* dweights, int32_t threads) {
    const Mixer m = mixer_of(sizes, eps);
    const Ends ends = ends_of(m, width, norm_eps, weights);
    const int64_t rows = bounds[sequences];
    const Floats dmixed(rows * m.inner()), dmade(ends.made(rows));
    const Floats found(parts_of(rows) * ends.sums()), sums((size_t)sequences * m.sums());
    ends.leave_backward(rows, mixed, dout, dmixed.get(), found.get(), threads);
    const Weights w = weights_of(weights + 3);
    each(m, sequences, bounds, threads, [&](int i, int group, size_t first, int length, size_t kept) {
        const auto in = Columns<const float>::apart(m, made, rows, first, group);
        const auto to = Columns<float>::apart(m, dmade.get(), rows, first, group);
        const int slice = m.shared() * m.width;
        scan_backward(m, w, group, length, in, y + (group * rows + first) * slice, slice, states + kept, dmixed.get() + first * m.inner(),
                      to, Sums(m, sums.get() + (size_t)i * m.sums()));
    });
    ends.enter_backward(rows, x, dmade.get(), dout, dx, found.get(), threads);
    add_up(found.get(), parts_of(rows), ends.sums(), ends.sums(), dweights, threads);
    add_up(sums.get(), sequences, m.sums(), m.sums(), dweights + ends.sums(), threads);
}

// q and out (rows, heads * width), k and v (rows, kv_heads * width); sizes: heads, kv_heads, width.
void tf_attend(const int32_t* sizes, const float* cosines, const float* sines, int32_t sequences, const int64_t* bounds, const float* q,
               const float* k, const float* v, float* out, float* log_sums, int32_t threads) {
    const Heads h{sizes[0], sizes[1], sizes[2], cosines, sines};
    share(sequences * h.kv_heads, threads, [&](int index) {
        const size_t first = bounds[index / h.kv_heads], group = index % h.kv_heads;
        const int length = (int)(bounds[index / h.kv_heads + 1] - bounds[index / h.kv_heads]);
        const size_t query = first * h.row(false) + group * h.shared() * h.width, key = first * h.row(true) + group * h.width;
        attend(h, length, q + query, k + key, v + key, out + query, log_sums + first * h.heads + group * h.shared() * length);
    });
}

void tf_attend_backward(const int32_t* sizes, const float* cosines, const float* sines, int32_t sequences, const int64_t* bounds,
                        const float* q, const float* k, const float* v, const float* out, const float* log_sums, const float* dout,
                        float* dq, float* dk, float* dv, int32_t threads) {
    const Heads h{sizes[0], sizes[1], sizes[2], cosines, sines};
    share(sequences * h.kv_heads, threads, [&](int index) {
        const size_t first = bounds[index / h.kv_heads], group = index % h.kv_heads;
        const int length = (int)(bounds[index / h.kv_heads + 1] - bounds[index / h.kv_heads]);
        const size_t query = first * h.row(false) + group * h.shared() * h.width, key = first * h.row(true) + group * h.width;
        attend_backward(h, length, q + query, k + key, v + key, out + query, log_sums + first * h.heads + group * h.shared() * length,
                        dout + query, dq + query, dk + key, dv + key);
    });
}

}  // extern "C"
