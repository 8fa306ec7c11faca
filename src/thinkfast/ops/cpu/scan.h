// Training of Mamba-2 between its two projections: convolution and SiLU, softplus, chunked scan (arXiv 2405.21060),
// skip, gated norm. Forward keeps the recurrence's output and its states at the chunks' starts; backward computes the
// rest again, which costs less than reading it.
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
    int shared() const { return heads / groups; }
    int chunks(int length) const { return (length + chunk - 1) / chunk; }
    size_t kept() const { return (size_t)width * state; }
    // Gradients that are summed over tokens: taps (conv, taps), bias, dt_bias, A_log, D, norm.
    int sums() const { return conv() * (taps + 1) + 3 * heads + inner(); }
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

    // out (chunk, width) of `count` positions from `first` on of the sequence whose rows begin at `rows`; zero behind.
    template <bool Slopes>
    void forward(const float* rows, int first, int count) {
        auto run = m_.taps == 4 ? &Part::convolve<4, Slopes> : m_.taps == 3 ? &Part::convolve<3, Slopes> : &Part::convolve<2, Slopes>;
        (this->*run)(rows, first, count);
        std::memset(out + count * width_, 0, sizeof(float) * (m_.chunk - count) * width_);
    }

    // From the gradient of `out`, which is in `grad`, that of the inputs, into `drows`. Chunks come last to first.
    void backward(const float* rows, float* drows, int first, int count) {
        auto run = m_.taps == 4 ? &Part::differentiate<4> : m_.taps == 3 ? &Part::differentiate<3> : &Part::differentiate<2>;
        (this->*run)(rows, drows, first, count);
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
    // Columns from `c` on of an input; positions before the sequence are zero.
    vec input(const float* rows, int t, int c) const {
        return t < 0 ? vec{} : load(rows + (size_t)t * m_.row() + m_.inner() + channel_ + c);
    }

    // Column by column, so that the last inputs stay in registers.
    template <int K, bool Slopes>
    void convolve(const float* rows, int first, int count) {
        for (int c = 0; c < width_; c += kLanes) {
            vec tap[K], in[K];
            for (int k = 0; k < K; k++) tap[k] = load(taps_ + k * width_ + c);
            for (int k = 1; k < K; k++) in[k] = input(rows, first - K + k, c);
            const vec bias = load(bias_ + c);
            for (int t = 0; t < count; t++) {
                for (int k = 0; k < K - 1; k++) in[k] = in[k + 1];
                in[K - 1] = input(rows, first + t, c);
                vec x = bias;
                for (int k = 0; k < K; k++) x += in[k] * tap[k];
                vec gate = sigmoid(x);
                store(out + t * width_ + c, x * gate);
                if (Slopes) store(slope_ + t * width_ + c, gate * (1.0f + x * (1.0f - gate)));
            }
        }
    }

    template <int K>
    void differentiate(const float* rows, float* drows, int first, int count) {
        for (int c = 0; c < width_; c += kLanes) {
            vec tap[K], in[K], g[K], sums[K], total = load(dbias_ + c);
            for (int k = 0; k < K; k++) tap[k] = load(taps_ + k * width_ + c), sums[k] = load(dtaps_ + k * width_ + c);
            // Backwards: the gradients of this and the positions behind, and the inputs of this and those before.
            for (int k = 0; k < K - 1; k++) g[k] = load(grad + (count + k) * width_ + c);
            for (int k = 0; k < K - 1; k++) in[k] = input(rows, first + count - K + k + 1, c);
            for (int t = count - 1; t >= 0; t--) {
                for (int k = K - 1; k > 0; k--) g[k] = g[k - 1], in[k] = in[k - 1];
                g[0] = load(grad + t * width_ + c) * load(slope_ + t * width_ + c);
                in[0] = input(rows, first + t - K + 1, c);
                store(grad + t * width_ + c, g[0]);
                total += g[0];
                vec d = vec{};
                for (int k = 0; k < K; k++) {
                    sums[k] += g[0] * in[k];
                    d += g[K - 1 - k] * tap[k];
                }
                store(drows + (size_t)(first + t) * m_.row() + m_.inner() + channel_ + c, d);
            }
            store(dbias_ + c, total);
            for (int k = 0; k < K; k++) store(dtaps_ + k * width_ + c, sums[k]);
        }
    }

    const Mixer& m_;
    const Weights& w_;
    const int width_;
    int channel_ = 0;
    float *taps_, *dtaps_, *bias_, *dbias_, *slope_;
};

// The values of every head of a group.
static inline std::vector<Part> heads_of(const Mixer& m, const Weights& w, int group, Scratch& scratch) {
    std::vector<Part> parts;
    parts.reserve(m.shared());
    for (int i = 0; i < m.shared(); i++) {
        parts.emplace_back(m, w, m.width, scratch);
        parts[i].start((group * m.shared() + i) * m.width);
    }
    return parts;
}

// The decays of one head in one chunk.
struct Decays {
    float *dt, *step, *gate, *start, *end;  // dt; its derivative; (chunk, chunk) between, from the start, to the end
    float kept;                             // over the whole chunk

    static size_t floats(const Mixer& m) { return (size_t)m.chunk * (m.chunk + 6) + 128; }

    Decays(const Mixer& m, Scratch& scratch) {
        gate = scratch.take((size_t)m.chunk * m.chunk);
        dt = scratch.take(m.chunk);
        step = scratch.take(m.chunk);
        start = scratch.take(m.chunk);
        end = scratch.take(m.chunk);
        high_ = scratch.take(m.chunk);
        low_ = scratch.take(m.chunk);
    }

    // `raw`: dt before bias and softplus, `stride` apart; `size` positions of which `count` are real.
    void compute(const float* raw, size_t stride, float bias, float a, int count, int size, int ld) {
        for (int t = 0; t < size; t++) dt[t] = t < count ? raw[t * stride] + bias : 0.0f;
        for (int t = 0; t < size; t += kLanes) {
            vec x = load(dt + t);
            store(step + t, sigmoid(x));
            store(dt + t, softplus(x));
        }
        // Sums in two floats: the difference of two of them keeps its digits, also behind a large decay.
        double total = 0;
        for (int t = 0; t < size; t++) {
            if (t >= count) dt[t] = step[t] = 0.0f;
            total += (double)(dt[t] * a);
            high_[t] = (float)total;
            low_[t] = (float)(total - high_[t]);
        }
        for (int t = 0; t < size; t++) {
            for (int s = 0; s < size; s += kLanes) {
                if (s > t) {
                    store(gate + t * ld + s, vec{});
                    continue;
                }
                vec x = (high_[t] - load(high_ + s)) + (low_[t] - load(low_ + s));
                store(gate + t * ld + s, count_from(s) > t ? vec{} : exp_upto88(x > 0.0f ? vec{} : x));
            }
        }
        for (int t = 0; t < size; t += kLanes) {
            store(start + t, exp_upto88(load(high_ + t)));
            store(end + t, exp_upto88((high_[size - 1] - load(high_ + t)) + (low_[size - 1] - load(low_ + t))));
        }
        kept = start[size - 1];
    }

   private:
    float *high_, *low_;
};

// to (rows, width) = from * by[row].
static inline void scale_rows(const float* from, int ld, const float* by, float* to, int rows, int width) {
    for (int t = 0; t < rows; t++)
        for (int c = 0; c < width; c += kLanes) store(to + t * width + c, load(from + t * ld + c) * by[t]);
}

static inline float dot(const float* a, const float* b, int n) {
    vec total = vec{};
    for (int c = 0; c < n; c += kLanes) total += load(a + c) * load(b + c);
    return sum(total);
}

static inline void times(const float* a, const float* b, float* to, int rows, int n, int ld) {
    for (int t = 0; t < rows; t++)
        for (int c = 0; c < n; c += kLanes) store(to + t * ld + c, load(a + t * ld + c) * load(b + t * ld + c));
}

// The gated norm of `n` channels: out = y silu(z) / rms * weight.
static inline void gated_norm(const float* y, const float* z, const float* weight, float* out, int n, float eps) {
    vec squares = vec{};
    for (int c = 0; c < n; c += kLanes) {
        vec gated = load(y + c) * silu(load(z + c));
        squares += gated * gated;
        store(out + c, gated);
    }
    float scale = 1.0f / std::sqrt(sum(squares) / n + eps);
    for (int c = 0; c < n; c += kLanes) store(out + c, load(out + c) * scale * load(weight + c));
}

// Its gradients: dy, dz, and dweight, to which is added.
static inline void gated_norm_backward(const float* y, const float* z, const float* weight, const float* dout, float* dy,
                                       float* dz, float* dweight, int n, float eps) {
    vec squares = vec{}, products = vec{};
    for (int c = 0; c < n; c += kLanes) {
        vec gate = sigmoid(load(z + c)), gated = load(y + c) * load(z + c) * gate;
        squares += gated * gated;
        products += gated * load(weight + c) * load(dout + c);
        store(dz + c, gate);
    }
    float scale = 1.0f / std::sqrt(sum(squares) / n + eps), back = sum(products) * scale * scale * scale / n;
    for (int c = 0; c < n; c += kLanes) {
        vec x = load(z + c), gate = load(dz + c), open = x * gate, value = load(y + c), gated = value * open, g = load(dout + c);
        vec d = load(weight + c) * g * scale - gated * back;
        store(dweight + c, load(dweight + c) + g * gated * scale);
        store(dy + c, d * open);
        store(dz + c, d * value * gate * (1.0f + x * (1.0f - gate)));
    }
}

// Asks for the columns of a group in the rows of a chunk: neighbouring rows lie too far apart for the processor to see
// what comes next.
static inline void fetch_chunk(const Mixer& m, int group, const float* rows, int first, int length) {
    const int slice = m.shared() * m.width, last = std::min(first + m.chunk, length);
    for (int t = std::max(first, 0); t < last; t++) {
        const float* row = rows + (size_t)t * m.row();
        fetch<2>(row + group * slice, sizeof(float) * slice);
        fetch<2>(row + m.inner() + group * slice, sizeof(float) * slice);
        fetch<2>(row + 2 * m.inner() + group * m.state, sizeof(float) * m.state);
        fetch<2>(row + 2 * m.inner() + (m.groups + group) * m.state, sizeof(float) * m.state);
        fetch<2>(row + m.inner() + m.conv() + group * m.shared(), sizeof(float) * m.shared());
    }
}

static inline void fetch_columns(const float* from, int ld, int first, int rows, int width) {
    for (int t = std::max(first, 0); t < first + rows; t++) fetch<2>(from + (size_t)t * ld, sizeof(float) * width);
}

// One sequence of `length` rows, one group: y, the normed output, and the states (chunks, shared, state, width).
static inline void scan_forward(const Mixer& m, const Weights& w, int group, int length, const float* rows, float* y,
                                float* out, float* states) {
    const int Q = m.chunk, N = m.state, P = m.width, shared = m.shared(), slice = shared * P;
    Scratch scratch(2 * Part::floats(m, N) + shared * Part::floats(m, P) + Decays::floats(m) + (size_t)Q * (2 * Q + 3 * N + 3 * P) +
                    shared * m.kept() + 256);
    std::vector<Part> xs = heads_of(m, w, group, scratch);
    Part b(m, w, N, scratch), c(m, w, N, scratch);
    Decays decay(m, scratch);
    float *bt = scratch.take((size_t)N * Q), *scores = scratch.take((size_t)Q * Q), *mix = scratch.take((size_t)Q * Q);
    float *v = scratch.take((size_t)Q * P), *part = scratch.take((size_t)Q * P), *read = scratch.take((size_t)Q * N);
    float* now = scratch.take(shared * m.kept());
    std::memset(now, 0, sizeof(float) * shared * m.kept());
    b.start(m.inner() + group * N);
    c.start(m.inner() + (m.groups + group) * N);
    for (int chunk = 0, first = 0; first < length; chunk++, first += Q) {
        const int count = length - first < Q ? length - first : Q, size = round_up(count, kBlock);
        fetch_chunk(m, group, rows, first + Q, length);
        b.forward<false>(rows, first, count);
        c.forward<false>(rows, first, count);
        transpose(b.out, N, bt, Q, size, N);
        product({c.out, N, 1}, bt, Q, scores, Q, size, N, size, false);
        for (int i = 0; i < shared; i++) {
            const int head = group * shared + i;
            float* state = now + i * m.kept();
            Part& x = xs[i];
            x.forward<false>(rows, first, count);
            const float* raw = rows + (size_t)first * m.row() + m.inner() + m.conv() + head;
            decay.compute(raw, m.row(), w.dt_bias[head], -std::exp(w.a_log[head]), count, size, Q);
            times(scores, decay.gate, mix, size, size, Q);
            scale_rows(x.out, P, decay.dt, v, size, P);
            product({mix, Q, 1}, v, P, part, P, size, size, P, false, Shape::lower);
            scale_rows(c.out, N, decay.start, read, size, N);
            product({read, N, 1}, state, P, part, P, size, N, P, true);
            std::memcpy(states + ((size_t)chunk * shared + i) * m.kept(), state, sizeof(float) * m.kept());
            scale_rows(v, P, decay.end, v, size, P);
            for (size_t k = 0; k < m.kept(); k += kLanes) store(state + k, load(state + k) * decay.kept);
            product({b.out, 1, N}, v, P, state, P, N, size, P, true);
            for (int t = 0; t < count; t++)
                for (int k = 0; k < P; k += kLanes)
                    store(y + (size_t)(first + t) * m.inner() + head * P + k, load(part + t * P + k) + load(x.out + t * P + k) * w.d[head]);
        }
        for (int t = 0; t < count; t++) {
            const size_t at = (size_t)(first + t) * m.inner() + group * slice;
            gated_norm(y + at, rows + (size_t)(first + t) * m.row() + group * slice, w.norm + group * slice, out + at, slice, m.eps);
        }
    }
}

// The gradients of one sequence and group: those of its rows, and sums over its tokens.
static inline void scan_backward(const Mixer& m, const Weights& w, int group, int length, const float* rows, const float* y,
                                 const float* states, const float* dout, float* drows, Sums sums) {
    const int Q = m.chunk, N = m.state, P = m.width, shared = m.shared(), slice = shared * P;
    const size_t square = (size_t)Q * Q, tall = (size_t)Q * N, wide = (size_t)Q * P;
    Scratch scratch((size_t)shared * Part::floats(m, P) + 2 * Part::floats(m, N) + Decays::floats(m) + 6 * square + 6 * tall +
                    5 * wide + shared * wide + (shared + 2) * m.kept() + 8 * Q + 1024);
    std::vector<Part> xs = heads_of(m, w, group, scratch);
    Part b(m, w, N, scratch), c(m, w, N, scratch);
    Decays decay(m, scratch);
    float *bt = scratch.take(tall), *scores = scratch.take(square), *mix = scratch.take(square);
    float *dmix = scratch.take(square), *v = scratch.take(wide), *vt = scratch.take(wide), *dy = scratch.take(shared * wide);
    float *ge = scratch.take(wide), *dv = scratch.take(wide), *read = scratch.take(tall), *scaled = scratch.take(tall);
    float *turned = scratch.take(m.kept()), *later = scratch.take(shared * m.kept());
    float *columns = scratch.take(Q), *pairs = scratch.take(Q), *dread = scratch.take(Q), *dwrite = scratch.take(Q);
    std::memset(later, 0, sizeof(float) * shared * m.kept());
    std::memset(sums.norm + group * slice, 0, sizeof(float) * slice);
    for (int i = 0; i < shared; i++) {
        const int head = group * shared + i;
        sums.dt_bias[head] = sums.a_log[head] = sums.d[head] = 0;
    }
    b.start(m.inner() + group * N);
    c.start(m.inner() + (m.groups + group) * N);
    for (int chunk = m.chunks(length) - 1; chunk >= 0; chunk--) {
        const int first = chunk * Q, count = length - first < Q ? length - first : Q, size = round_up(count, kBlock);
        fetch_chunk(m, group, rows, first - Q, length);
        fetch_columns(y + group * slice, m.inner(), first - Q, Q, slice);
        fetch_columns(dout + group * slice, m.inner(), first - Q, Q, slice);
        b.forward<true>(rows, first, count);
        c.forward<true>(rows, first, count);
        transpose(b.out, N, bt, Q, size, N);
        product({c.out, N, 1}, bt, Q, scores, Q, size, N, size, false);
        for (int t = 0; t < count; t++) {
            const size_t at = (size_t)(first + t) * m.inner() + group * slice, row = (size_t)(first + t) * m.row() + group * slice;
            gated_norm_backward(y + at, rows + row, w.norm + group * slice, dout + at, dy + t * slice, drows + row,
                                sums.norm + group * slice, slice, m.eps);
        }
        std::memset(dy + count * slice, 0, sizeof(float) * (Q - count) * slice);
        for (int i = 0; i < shared; i++) {
            const int head = group * shared + i;
            const float *state = states + ((size_t)chunk * shared + i) * m.kept(), *g = dy + i * P, a = -std::exp(w.a_log[head]);
            float* after = later + i * m.kept();
            Part& x = xs[i];
            x.forward<true>(rows, first, count);
            const size_t raw = (size_t)first * m.row() + m.inner() + m.conv() + head;
            decay.compute(rows + raw, m.row(), w.dt_bias[head], a, count, size, Q);
            times(scores, decay.gate, mix, size, size, Q);
            scale_rows(x.out, P, decay.dt, v, size, P);
            transpose(v, P, vt, Q, size, P);
            product({g, slice, 1}, vt, Q, dmix, Q, size, P, size, false);

            // A pair (i, j) feels the decays at all t with i >= t > j: summed so that nothing has to cancel.
            std::memset(columns, 0, sizeof(float) * size);
            for (int t = size - 1; t >= 0; t--) {
                vec across = vec{};
                for (int s = 0; s <= t; s += kLanes) {
                    vec pair = load(columns + s) + load(dmix + t * Q + s) * load(mix + t * Q + s);
                    store(columns + s, pair);
                    across += count_from(s) < t ? pair : vec{};
                }
                pairs[t] = sum(across);
            }
            times(dmix, decay.gate, dmix, size, size, Q);

            // C: by pairs, and by what it reads from the state.
            product({dmix, Q, 1}, b.out, N, c.grad, N, size, size, N, i > 0, Shape::lower);
            scale_rows(g, slice, decay.start, ge, size, P);
            transpose(state, P, turned, N, N, P);
            product({ge, P, 1}, turned, N, read, N, size, P, N, false);
            for (int t = 0; t < size; t++) {
                dread[t] = dot(read + t * N, c.out + t * N, N);
                for (int k = 0; k < N; k += kLanes) store(c.grad + t * N + k, load(c.grad + t * N + k) + load(read + t * N + k));
            }
            // B and v: by pairs, and by what they write to the state.
            product({dmix, 1, Q}, c.out, N, b.grad, N, size, size, N, i > 0, Shape::upper);
            scale_rows(v, P, decay.end, x.grad, size, P);
            transpose(after, P, turned, N, N, P);
            product({x.grad, P, 1}, turned, N, b.grad, N, size, P, N, true);
            scale_rows(b.out, N, decay.end, scaled, size, N);
            product({scaled, N, 1}, after, P, dv, P, size, N, P, false);
            for (int t = 0; t < size; t++) dwrite[t] = dot(dv + t * P, v + t * P, P);
            product({mix, 1, Q}, g, slice, dv, P, size, size, P, true, Shape::upper);

            double through = (double)decay.kept * dot(after, state, (int)m.kept()), da = 0, dbias = 0;
            vec skipped = vec{};
            for (size_t k = 0; k < m.kept(); k += kLanes) store(after + k, load(after + k) * decay.kept);
            product({c.out, 1, N}, ge, P, after, P, N, size, P, true);

            // The gradient of the log decay at t: the pairs around t, what is read from the state at t or later, what is
            // written to it before t, and its way through.
            double tail = 0, before = 0;
            for (int t = 0; t < count; t++) before += dwrite[t];
            for (int t = count - 1; t >= 0; t--) {
                tail += dread[t];
                before -= dwrite[t];
                double dlog = pairs[t] + tail + before + through;
                float raw_gradient = (float)(dlog * a + dot(dv + t * P, x.out + t * P, P)) * decay.step[t];
                da += dlog * decay.dt[t];
                dbias += raw_gradient;
                drows[raw + (size_t)t * m.row()] = raw_gradient;
                for (int k = 0; k < P; k += kLanes) {
                    vec up = load(g + t * slice + k);
                    skipped += up * load(x.out + t * P + k);
                    store(x.grad + t * P + k, load(dv + t * P + k) * decay.dt[t] + up * w.d[head]);
                }
            }
            sums.dt_bias[head] += (float)dbias;
            sums.a_log[head] += (float)(da * a);
            sums.d[head] += sum(skipped);
            std::memset(x.grad + count * P, 0, sizeof(float) * (Q - count) * P);
            x.backward(rows, drows, first, count);
        }
        b.backward(rows, drows, first, count);
        c.backward(rows, drows, first, count);
    }
    for (const Part& x : xs) x.finish(sums);
    b.finish(sums);
    c.finish(sums);
}

}  // namespace tf
