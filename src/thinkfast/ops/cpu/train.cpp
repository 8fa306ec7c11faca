// C interface of the kernels for training; see training.py. Everything is float32; sums over tokens are made in an order
// that does not depend on the number of threads.
#include <algorithm>

#include "attend.h"
#include "scan.h"

using namespace tf;

namespace {

constexpr int kRows = 64;       // of a norm that are one task
constexpr int kElements = 8192;  // of a gate that are one task

Mixer mixer_of(const int32_t* sizes, double eps) {
    return {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], (float)eps};
}

Weights weights_of(const float* const* w) { return {w[0], w[1], w[2], w[3], w[4], w[5]}; }

// Calls task(sequence, group, first row, length, where its states are) for every sequence and group.
template <class Task>
void each(const Mixer& m, int sequences, const int64_t* bounds, int threads, const Task& task) {
    std::vector<size_t> chunks(sequences + 1, 0);
    for (int i = 0; i < sequences; i++) chunks[i + 1] = chunks[i] + m.chunks((int)(bounds[i + 1] - bounds[i]));
    share(sequences * m.groups, threads, [&](int index) {
        int i = index / m.groups, group = index % m.groups;
        size_t states = (chunks[i] * m.groups + group * (chunks[i + 1] - chunks[i])) * m.shared() * m.kept();
        task(i, group, (size_t)bounds[i], (int)(bounds[i + 1] - bounds[i]), states);
    });
}

}  // namespace

extern "C" {

// out (rows, width) = x / rms(x) * weight.
void tf_norm(const float* x, const float* weight, float* out, int64_t rows, int32_t width, double eps, int32_t threads) {
    share((int)((rows + kRows - 1) / kRows), threads, [&](int block) {
        int64_t last = std::min<int64_t>(rows, (block + 1) * (int64_t)kRows);
        for (int64_t r = block * (int64_t)kRows; r < last; r++) rms_norm(x + r * width, weight, out + r * width, width, (float)eps);
    });
}

// dx (rows, width) and dweight (blocks of 64 rows, width).
void tf_norm_backward(const float* x, const float* weight, const float* dout, float* dx, float* dweight, int64_t rows, int32_t width,
                      double eps, int32_t threads) {
    share((int)((rows + kRows - 1) / kRows), threads, [&](int block) {
        float* sums = dweight + (int64_t)block * width;
        std::memset(sums, 0, sizeof(float) * width);
        int64_t last = std::min<int64_t>(rows, (block + 1) * (int64_t)kRows);
        for (int64_t r = block * (int64_t)kRows; r < last; r++) {
            const float *in = x + r * width, *g = dout + r * width;
            vec squares = vec{}, products = vec{};
            for (int c = 0; c < width; c += kLanes) {
                vec v = load(in + c);
                squares += v * v;
                products += v * load(weight + c) * load(g + c);
            }
            float scale = 1.0f / std::sqrt(sum(squares) / width + (float)eps), back = sum(products) * scale * scale * scale / width;
            for (int c = 0; c < width; c += kLanes) {
                vec v = load(in + c), d = load(g + c);
                store(dx + r * width + c, load(weight + c) * d * scale - v * back);
                store(sums + c, load(sums + c) + d * v * scale);
            }
        }
    });
}

// out = silu(gate) * up.
void tf_gate(const float* gate, const float* up, float* out, int64_t count, int32_t threads) {
    share((int)((count + kElements - 1) / kElements), threads, [&](int block) {
        int64_t last = std::min<int64_t>(count, (block + 1) * (int64_t)kElements);
        for (int64_t i = block * (int64_t)kElements; i < last; i += kLanes) store(out + i, silu(load(gate + i)) * load(up + i));
    });
}

// `dout` becomes dup; dgate, and out once more.
void tf_gate_backward(const float* gate, const float* up, float* dout, float* dgate, float* out, int64_t count, int32_t threads) {
    share((int)((count + kElements - 1) / kElements), threads, [&](int block) {
        int64_t last = std::min<int64_t>(count, (block + 1) * (int64_t)kElements);
        for (int64_t i = block * (int64_t)kElements; i < last; i += kLanes) {
            vec x = load(gate + i), u = load(up + i), d = load(dout + i), s = sigmoid(x), open = x * s;
            store(out + i, open * u);
            store(dout + i, d * open);
            store(dgate + i, d * u * s * (1.0f + x * (1.0f - s)));
        }
    });
}

// sizes: heads, width, state, groups, taps, chunk. Sequence i has the rows from bounds[i] to bounds[i + 1].
void tf_mixer(const int32_t* sizes, double eps, const float* const* weights, int32_t sequences, const int64_t* bounds, const float* rows,
              float* y, float* out, float* states, int32_t threads) {
    const Mixer m = mixer_of(sizes, eps);
    const Weights w = weights_of(weights);
    each(m, sequences, bounds, threads, [&](int, int group, size_t first, int length, size_t kept) {
        scan_forward(m, w, group, length, rows + first * m.row(), y + first * m.inner(), out + first * m.inner(), states + kept);
    });
}

// drows, and sums (sequences, all weights in the order of `Sums`).
void tf_mixer_backward(const int32_t* sizes, double eps, const float* const* weights, int32_t sequences, const int64_t* bounds,
                       const float* rows, const float* y, const float* states, const float* dout, float* drows, float* sums,
                       int32_t threads) {
    const Mixer m = mixer_of(sizes, eps);
    const Weights w = weights_of(weights);
    each(m, sequences, bounds, threads, [&](int i, int group, size_t first, int length, size_t kept) {
        size_t at = first * m.inner(), row = first * m.row();
        scan_backward(m, w, group, length, rows + row, y + at, states + kept, dout + at, drows + row, Sums(m, sums + (size_t)i * m.sums()));
    });
}

// q and out (rows, heads * width), k and v (rows, kv_heads * width); sizes: heads, kv_heads, width.
void tf_attend(const int32_t* sizes, const float* cosines, const float* sines, int32_t sequences, const int64_t* bounds, const float* q,
               const float* k, const float* v, float* out, float* log_sums, int32_t threads) {
    const Heads h{sizes[0], sizes[1], sizes[2], cosines, sines};
    share(sequences * h.kv_heads, threads, [&](int index) {
        const size_t first = bounds[index / h.kv_heads], length = bounds[index / h.kv_heads + 1] - first, group = index % h.kv_heads;
        const size_t query = first * h.row(false) + group * h.shared() * h.width, key = first * h.row(true) + group * h.width;
        attend(h, (int)length, q + query, k + key, v + key, out + query, log_sums + first * h.heads + group * h.shared() * length);
    });
}

void tf_attend_backward(const int32_t* sizes, const float* cosines, const float* sines, int32_t sequences, const int64_t* bounds,
                        const float* q, const float* k, const float* v, const float* out, const float* log_sums, const float* dout,
                        float* dq, float* dk, float* dv, int32_t threads) {
    const Heads h{sizes[0], sizes[1], sizes[2], cosines, sines};
    share(sequences * h.kv_heads, threads, [&](int index) {
        const size_t first = bounds[index / h.kv_heads], length = bounds[index / h.kv_heads + 1] - first, group = index % h.kv_heads;
        const size_t query = first * h.row(false) + group * h.shared() * h.width, key = first * h.row(true) + group * h.width;
        attend_backward(h, (int)length, q + query, k + key, v + key, out + query, log_sums + first * h.heads + group * h.shared() * length,
                        dout + query, dq + query, dk + key, dv + key);
    });
}

}  // extern "C"
