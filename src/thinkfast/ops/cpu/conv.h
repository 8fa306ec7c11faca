// Around the scan of Mamba-2 in training, a chunk at a time: the causal convolution with SiLU in front of it, the gated
// norm behind it, and their gradients.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "tile.h"

namespace tf {

constexpr int kMaxTaps = 4;

struct Mixer {
    int heads, width, state, groups, taps, chunk;  // width, state and chunk are multiples of kBlock
    float eps;

    int inner() const { return heads * width; }
    int conv() const { return inner() + 2 * groups * state; }
    int row() const { return inner() + conv() + heads; }  // z, x, B, C, dt
    int wide() const { return 2 * (shared() * width + state); }  // z, x, B, C of a group
    int steps() const { return round_up(heads, kBlock); }        // room for dt of all heads
    int shared() const { return heads / groups; }
    int chunks(int length) const { return (length + chunk - 1) / chunk; }
    size_t kept() const { return (size_t)width * state; }
    // Gradients that are summed over tokens: taps (conv, taps), bias, dt_bias, A_log, D, norm.
    int sums() const { return conv() * (taps + 1) + 3 * heads + inner(); }
};

// Where z, x, B, C and dt of a group lie; one token's `ld` floats behind those of the token before, dt's `ld_dt`.
template <class Float>
struct Columns {
    Float *z, *x, *b, *c, *dt;
    size_t ld, ld_dt;

    // A row a token: z, x, B, C, dt of all groups.
    static Columns together(const Mixer& m, Float* rows, int group) {
        const int slice = m.shared() * m.width;
        Float* b = rows + 2 * m.inner() + group * m.state;
        return {rows + group * slice, rows + m.inner() + group * slice, b, b + m.groups * m.state,
                rows + m.inner() + m.conv() + group * m.shared(), (size_t)m.row(), (size_t)m.row()};
    }

    // A group behind the other, each (tokens, wide), then dt (tokens, steps): a group's columns are one stream, which the
    // processor sees coming. From token `first` on.
    static Columns apart(const Mixer& m, Float* made, size_t tokens, size_t first, int group) {
        const int slice = m.shared() * m.width;
        Float* z = made + (group * tokens + first) * m.wide();
        return {z, z + slice, z + 2 * slice, z + 2 * slice + m.state,
                made + m.groups * tokens * m.wide() + first * m.steps() + group * m.shared(), (size_t)m.wide(), (size_t)m.steps()};
    }
};

struct Weights {
    const float *taps, *bias, *dt_bias, *a_log, *d, *norm;  // taps (conv, taps)
};

// Gradients of the weights, in the order of `sums`.
struct Sums {
    float *taps, *bias, *dt_bias, *a_log, *d, *norm;

    Sums(const Mixer& m, float* at) {
        taps = at;
        bias = taps + m.conv() * m.taps;
        dt_bias = bias + m.conv();
        a_log = dt_bias + m.heads;
        d = a_log + m.heads;
        norm = d + m.heads;
    }
};

// x, B or C of one head or group: `width` channels from `channel` on, convolved.
class Part {
   public:
    static size_t floats(const Mixer& m, int width) { return (size_t)width * (3 * m.chunk + 4 * kMaxTaps) + 128; }

    Part(const Mixer& m, const Weights& w, int width, Scratch& scratch) : m_(m), w_(w), width_(width) {
        taps_ = scratch.take((size_t)m.taps * width);
        dtaps_ = scratch.take((size_t)m.taps * width);
        bias_ = scratch.take(width);
        dbias_ = scratch.take(width);
        out = scratch.take((size_t)m.chunk * width);
        slope_ = scratch.take((size_t)m.chunk * width);
        grad = scratch.take((size_t)(m.chunk + m.taps) * width);
    }

    // Begins with a sequence.
    void start(int channel) {
        channel_ = channel;
        for (int c = 0; c < width_; c++) {
            bias_[c] = w_.bias[channel + c];
            for (int k = 0; k < m_.taps; k++) taps_[k * width_ + c] = w_.taps[(channel + c) * m_.taps + k];
        }
        std::memset(dtaps_, 0, sizeof(float) * m_.taps * width_);
        std::memset(dbias_, 0, sizeof(float) * width_);
        std::memset(grad, 0, sizeof(float) * (m_.chunk + m_.taps) * width_);
    }

    // out (chunk, width) of `count` positions from `first` on of the sequence whose inputs begin at `column`, `ld` apart;
    // zero behind.
    template <bool Slopes>
    void forward(const float* column, size_t ld, int first, int count) {
        auto run = m_.taps == 4 ? &Part::convolve<4, Slopes> : m_.taps == 3 ? &Part::convolve<3, Slopes> : &Part::convolve<2, Slopes>;
        (this->*run)(column, ld, first, count);
        std::memset(out + count * width_, 0, sizeof(float) * (m_.chunk - count) * width_);
    }

    // From the gradient of `out`, which is in `grad`, that of the inputs, into `to`. Chunks come last to first.
    void backward(const float* column, float* to, size_t ld, int first, int count) {
        auto run = m_.taps == 4 ? &Part::differentiate<4> : m_.taps == 3 ? &Part::differentiate<3> : &Part::differentiate<2>;
        (this->*run)(column, to, ld, first, count);
        std::memcpy(grad + m_.chunk * width_, grad, sizeof(float) * (m_.taps - 1) * width_);
    }

    // Behind a sequence: the gradients of taps and bias.
    void finish(Sums& sums) const {
        for (int c = 0; c < width_; c++) {
            sums.bias[channel_ + c] = dbias_[c];
            for (int k = 0; k < m_.taps; k++) sums.taps[(channel_ + c) * m_.taps + k] = dtaps_[k * width_ + c];
        }
    }

    float *out, *grad;  // (chunk, width); behind the gradient the first rows of the chunk that follows

   private:
    // The last K - 1 inputs of a column before position t, oldest first; zero before the sequence.
    template <int K>
    static void before(const float* column, size_t ld, int t, vec* in) {
        for (int k = 0; k < K - 1; k++) in[k] = t - K + 1 + k < 0 ? vec{} : load(column + (t - K + 1 + k) * ld);
    }

    // Column by column, so that the last inputs stay in registers. What loops need is taken out of the object first: for
    // the compiler a store of a vector may change any member.
    template <int K, bool Slopes>
    void convolve(const float* inputs, size_t ld, int first, int count) {
        const int width = width_;
        for (int c = 0; c < width; c += kLanes) {
            const float* column = inputs + c;
            float *to = out + c, *slope = slope_ + c;
            vec tap[K], in[K];
            for (int k = 0; k < K; k++) tap[k] = load(taps_ + k * width + c);
            before<K>(column, ld, first, in);
            const vec bias = load(bias_ + c);
            column += first * ld;
            for (int t = 0; t < count; t++, column += ld, to += width, slope += width) {
                in[K - 1] = load(column);
                vec x = bias;
                for (int k = 0; k < K; k++) x += in[k] * tap[k];
                for (int k = 0; k < K - 1; k++) in[k] = in[k + 1];
                vec gate = sigmoid(x);
                store(to, x * gate);
                if (Slopes) store(slope, gate + x * gate * (1.0f - gate));
            }
        }
    }

    template <int K>
    void differentiate(const float* inputs, float* gradients, size_t ld, int first, int count) {
        const int width = width_;
        for (int c = 0; c < width; c += kLanes) {
            const float* column = inputs + c;
            float* to = gradients + c + (first + count) * ld;
            float *slope = slope_ + count * width + c, *up = grad + count * width + c;
            vec tap[K], in[K], g[K], sums[K], total = load(dbias_ + c);
            for (int k = 0; k < K; k++) tap[k] = load(taps_ + k * width + c), sums[k] = load(dtaps_ + k * width + c);
            // Backwards: the gradients of this and the positions behind, and the inputs of this and those before.
            for (int k = 0; k < K - 1; k++) g[k] = load(up + k * width);
            before<K>(column, ld, first + count, in);
            for (int t = first + count - 1; t >= first; t--) {
                to -= ld, slope -= width, up -= width;
                for (int k = K - 1; k > 0; k--) g[k] = g[k - 1], in[k] = in[k - 1];
                g[0] = load(up) * load(slope);
                in[0] = t < K - 1 ? vec{} : load(column + (t - K + 1) * ld);
                store(up, g[0]);
                total += g[0];
                vec d = vec{};
                for (int k = 0; k < K; k++) {
                    sums[k] += g[0] * in[k];
                    d += g[K - 1 - k] * tap[k];
                }
                store(to, d);
            }
            store(dbias_ + c, total);
            for (int k = 0; k < K; k++) store(dtaps_ + k * width + c, sums[k]);
        }
    }

    const Mixer& m_;
    const Weights& w_;
    const int width_;
    int channel_ = 0;
    float *taps_, *dtaps_, *bias_, *dbias_, *slope_;
};

// The gated norm of n channels: out = y silu(z) / rms * weight.
static inline void gated_norm(const float* y, const float* z, const float* weight, float* out, int n, float eps) {
    vec squares = vec{};
    for (int c = 0; c < n; c += kLanes) {
        vec gated = load(y + c) * silu(load(z + c));
        squares += gated * gated;
        store(out + c, gated);
    }
    float scale = 1.0f / std::sqrt(lanes_sum(squares) / n + eps);
    for (int c = 0; c < n; c += kLanes) store(out + c, load(out + c) * scale * load(weight + c));
}

// Its gradients for `rows` rows: y in steps of ldy, dout of ld, z and dz of ldz, dy of n, and dweight, to which is added.
// `gates` (rows, n), `scales` and `backs` (rows) are room.
static inline void gated_norm_backward(const float* y, size_t ldy, const float* dout, size_t ld, const float* z, float* dz, size_t ldz,
                                       const float* weight, float* dy, float* dweight, float* gates, float* scales, float* backs, int rows, int n, float eps) {
    for (int t = 0; t < rows; t++) {
        const float *value = y + t * ldy, *given = dout + t * ld, *x = z + t * ldz;
        vec squares = vec{}, products = vec{};
        for (int c = 0; c < n; c += kLanes) {
            vec gate = sigmoid(load(x + c)), gated = load(value + c) * load(x + c) * gate;
            squares += gated * gated;
            products += gated * load(weight + c) * load(given + c);
            store(gates + t * n + c, gate);
        }
        scales[t] = 1.0f / std::sqrt(lanes_sum(squares) / n + eps);
        backs[t] = lanes_sum(products) * scales[t] * scales[t] * scales[t] / n;
    }
    for (int c = 0; c < n; c += kLanes) {
        const vec by = load(weight + c);
        vec total = load(dweight + c);
        for (int t = 0; t < rows; t++) {
            vec x = load(z + t * ldz + c), gate = load(gates + t * n + c), open = x * gate, value = load(y + t * ldy + c);
            vec gated = value * open, g = load(dout + t * ld + c) * scales[t], d = by * g - gated * backs[t];
            total += g * gated;
            store(dy + t * n + c, d * open);
            store(dz + t * ldz + c, d * value * (gate + open * (1.0f - gate)));
        }
        store(dweight + c, total);
    }
}

// Memory that will be needed soon, asked for a few lines of cache at a time between other work: all at once they would wait
// for each other, and what is needed now behind them.
class Ahead {
   public:
    // `rows` rows of `width` floats, `ld` apart.
    void add(const float* from, size_t ld, int rows, int width) {
        if (rows > 0) pieces_[count_++] = {reinterpret_cast<const char*>(from), ld * sizeof(float), rows, (int)(width * sizeof(float))};
    }

    void some(int lines = 48) {
        while (lines > 0 && now_ < count_) {
            const Piece& piece = pieces_[now_];
            for (; byte_ < piece.width && lines > 0; byte_ += 64, lines--) __builtin_prefetch(piece.from + row_ * piece.ld + byte_, 0, 2);
            if (byte_ < piece.width) return;
            byte_ = 0;
            if (++row_ == piece.rows) row_ = 0, now_++;
        }
    }

   private:
    struct Piece {
        const char* from;
        size_t ld;
        int rows, width;
    };

    Piece pieces_[16];
    int count_ = 0, now_ = 0, row_ = 0, byte_ = 0;
};

// The columns of a group for positions first..last.
template <class Float>
static inline void add_columns(Ahead& ahead, const Mixer& m, const Columns<Float>& at, int first, int last) {
    const int slice = m.shared() * m.width, count = last - first;
    if (at.ld == (size_t)m.wide()) return ahead.add(at.z + first * at.ld, m.wide(), count, m.wide());
    ahead.add(at.z + first * at.ld, at.ld, count, slice);
    ahead.add(at.x + first * at.ld, at.ld, count, slice);
    ahead.add(at.b + first * at.ld, at.ld, count, m.state);
    ahead.add(at.c + first * at.ld, at.ld, count, m.state);
}

}  // namespace tf
