// Training of Mamba-2 between its two projections: convolution and SiLU, softplus, chunked scan (arXiv 2405.21060),
// skip, gated norm. Forward keeps the recurrence's output and its states at the chunks' starts; backward computes the
// rest again, which costs less than reading it.
#pragma once
#include <vector>

#include "conv.h"

namespace tf {

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
    return lanes_sum(total);
}

static inline void times(const float* a, const float* b, float* to, int rows, int n, int ld) {
    for (int t = 0; t < rows; t++)
        for (int c = 0; c < n; c += kLanes) store(to + t * ld + c, load(a + t * ld + c) * load(b + t * ld + c));
}

// One sequence of `length` tokens, one group: y (length, slice) in steps of ldy, the normed output in rows of all groups, and
// the states (chunks, shared, state, width).
static inline void scan_forward(const Mixer& m, const Weights& w, int group, int length, const Columns<const float>& in, float* y,
                                size_t ldy, float* out, float* states) {
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
        Ahead ahead;
        add_columns(ahead, m, in, first + Q, std::min(first + 2 * Q, length));
        b.forward<false>(in.b, in.ld, first, count);
        c.forward<false>(in.c, in.ld, first, count);
        transpose(b.out, N, bt, Q, size, N);
        ahead.some();
        product({c.out, N, 1}, bt, Q, scores, Q, size, N, size, false);
        for (int i = 0; i < shared; i++) {
            const int head = group * shared + i;
            float* state = now + i * m.kept();
            Part& x = xs[i];
            x.forward<false>(in.x + i * P, in.ld, first, count);
            ahead.some();
            decay.compute(in.dt + first * in.ld_dt + i, in.ld_dt, w.dt_bias[head], -std::exp(w.a_log[head]), count, size, Q);
            times(scores, decay.gate, mix, size, size, Q);
            scale_rows(x.out, P, decay.dt, v, size, P);
            ahead.some();
            product({mix, Q, 1}, v, P, part, P, size, size, P, false, Shape::lower);
            scale_rows(c.out, N, decay.start, read, size, N);
            ahead.some();
            product({read, N, 1}, state, P, part, P, size, N, P, true);
            std::memcpy(states + ((size_t)chunk * shared + i) * m.kept(), state, sizeof(float) * m.kept());
            scale_rows(v, P, decay.end, v, size, P);
            for (size_t k = 0; k < m.kept(); k += kLanes) store(state + k, load(state + k) * decay.kept);
            ahead.some();
            product({b.out, 1, N}, v, P, state, P, N, size, P, true);
            for (int t = 0; t < count; t++)
                for (int k = 0; k < P; k += kLanes)
                    store(y + (first + t) * ldy + i * P + k, load(part + t * P + k) + load(x.out + t * P + k) * w.d[head]);
        }
        for (int t = 0; t < count; t++) {
            const size_t row = first + t;
            gated_norm(y + row * ldy, in.z + row * in.ld, w.norm + group * slice, out + row * m.inner() + group * slice, slice, m.eps);
        }
    }
}

// The gradients of one sequence and group: those of its rows, and sums over its tokens.
static inline void scan_backward(const Mixer& m, const Weights& w, int group, int length, const Columns<const float>& in, const float* y,
                                 size_t ldy, const float* states, const float* dout, const Columns<float>& to, Sums sums) {
    const int Q = m.chunk, N = m.state, P = m.width, shared = m.shared(), slice = shared * P;
    const size_t square = (size_t)Q * Q, tall = (size_t)Q * N, wide = (size_t)Q * P;
    Scratch scratch((size_t)shared * Part::floats(m, P) + 2 * Part::floats(m, N) + Decays::floats(m) + 6 * square + 6 * tall +
                    5 * wide + 2 * shared * wide + slice + (shared + 2) * m.kept() + 8 * Q + 1024);
    std::vector<Part> xs = heads_of(m, w, group, scratch);
    Part b(m, w, N, scratch), c(m, w, N, scratch);
    Decays decay(m, scratch);
    float *bt = scratch.take(tall), *scores = scratch.take(square), *mix = scratch.take(square);
    float *dmix = scratch.take(square), *v = scratch.take(wide), *vt = scratch.take(wide), *dy = scratch.take(shared * wide);
    float *gates = scratch.take(shared * wide), *dnorm = scratch.take(slice);
    float *ge = scratch.take(wide), *dv = scratch.take(wide), *read = scratch.take(tall), *scaled = scratch.take(tall);
    float *turned = scratch.take(m.kept()), *later = scratch.take(shared * m.kept());
    float *columns = scratch.take(Q), *pairs = scratch.take(Q), *dread = scratch.take(Q), *dwrite = scratch.take(Q);
    std::memset(later, 0, sizeof(float) * shared * m.kept());
    std::memset(dnorm, 0, sizeof(float) * slice);
    for (int i = 0; i < shared; i++) {
        const int head = group * shared + i;
        sums.dt_bias[head] = sums.a_log[head] = sums.d[head] = 0;
    }
    b.start(m.inner() + group * N);
    c.start(m.inner() + (m.groups + group) * N);
    for (int chunk = m.chunks(length) - 1; chunk >= 0; chunk--) {
        const int first = chunk * Q, count = length - first < Q ? length - first : Q, size = round_up(count, kBlock);
        Ahead ahead;
        if (chunk > 0) {
            add_columns(ahead, m, in, first - Q, first);
            ahead.add(y + (first - Q) * ldy, ldy, Q, slice);
            ahead.add(dout + (size_t)(first - Q) * m.inner() + group * slice, m.inner(), Q, slice);
            ahead.add(states + (size_t)(chunk - 1) * shared * m.kept(), m.kept(), shared, (int)m.kept());
            add_columns(ahead, m, to, first - Q, first);
        }
        b.forward<true>(in.b, in.ld, first, count);
        c.forward<true>(in.c, in.ld, first, count);
        transpose(b.out, N, bt, Q, size, N);
        ahead.some();
        product({c.out, N, 1}, bt, Q, scores, Q, size, N, size, false);
        gated_norm_backward(y + first * ldy, ldy, dout + (size_t)first * m.inner() + group * slice, m.inner(), in.z + first * in.ld,
                            to.z + first * to.ld, in.ld, w.norm + group * slice, dy, dnorm, gates, columns, pairs, count, slice, m.eps);
        std::memset(dy + count * slice, 0, sizeof(float) * (Q - count) * slice);
        for (int i = 0; i < shared; i++) {
            const int head = group * shared + i;
            const float *state = states + ((size_t)chunk * shared + i) * m.kept(), *g = dy + i * P, a = -std::exp(w.a_log[head]);
            float* after = later + i * m.kept();
            Part& x = xs[i];
            x.forward<true>(in.x + i * P, in.ld, first, count);
            ahead.some();
            decay.compute(in.dt + first * in.ld_dt + i, in.ld_dt, w.dt_bias[head], a, count, size, Q);
            times(scores, decay.gate, mix, size, size, Q);
            scale_rows(x.out, P, decay.dt, v, size, P);
            transpose(v, P, vt, Q, size, P);
            ahead.some();
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
                pairs[t] = lanes_sum(across);
            }
            times(dmix, decay.gate, dmix, size, size, Q);

            // C: by pairs, and by what it reads from the state.
            ahead.some();
            product({dmix, Q, 1}, b.out, N, c.grad, N, size, size, N, i > 0, Shape::lower);
            scale_rows(g, slice, decay.start, ge, size, P);
            transpose(state, P, turned, N, N, P);
            ahead.some();
            product({ge, P, 1}, turned, N, read, N, size, P, N, false);
            for (int t = 0; t < size; t++) {
                dread[t] = dot(read + t * N, c.out + t * N, N);
                for (int k = 0; k < N; k += kLanes) store(c.grad + t * N + k, load(c.grad + t * N + k) + load(read + t * N + k));
            }
            // B and v: by pairs, and by what they write to the state.
            ahead.some();
            product({dmix, 1, Q}, c.out, N, b.grad, N, size, size, N, i > 0, Shape::upper);
            scale_rows(v, P, decay.end, x.grad, size, P);
            transpose(after, P, turned, N, N, P);
            ahead.some();
            product({x.grad, P, 1}, turned, N, b.grad, N, size, P, N, true);
            scale_rows(b.out, N, decay.end, scaled, size, N);
            ahead.some();
            product({scaled, N, 1}, after, P, dv, P, size, N, P, false);
            for (int t = 0; t < size; t++) dwrite[t] = dot(dv + t * P, v + t * P, P);
            ahead.some();
            product({mix, 1, Q}, g, slice, dv, P, size, size, P, true, Shape::upper);

            double through = (double)decay.kept * dot(after, state, (int)m.kept()), da = 0, dbias = 0;
            vec skipped = vec{};
            for (size_t k = 0; k < m.kept(); k += kLanes) store(after + k, load(after + k) * decay.kept);
            ahead.some();
            product({c.out, 1, N}, ge, P, after, P, N, size, P, true);

            ahead.some();
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
                to.dt[(first + t) * to.ld_dt + i] = raw_gradient;
                for (int k = 0; k < P; k += kLanes) {
                    vec up = load(g + t * slice + k);
                    skipped += up * load(x.out + t * P + k);
                    store(x.grad + t * P + k, load(dv + t * P + k) * decay.dt[t] + up * w.d[head]);
                }
            }
            sums.dt_bias[head] += (float)dbias;
            sums.a_log[head] += (float)(da * a);
            sums.d[head] += lanes_sum(skipped);
            std::memset(x.grad + count * P, 0, sizeof(float) * (Q - count) * P);
            ahead.some();
            x.backward(in.x + i * P, to.x + i * P, in.ld, first, count);
        }
        ahead.some();
        b.backward(in.b, to.b, in.ld, first, count);
        ahead.some();
        c.backward(in.c, to.c, in.ld, first, count);
    }
    std::memcpy(sums.norm + group * slice, dnorm, sizeof(float) * slice);
    for (const Part& x : xs) x.finish(sums);
    b.finish(sums);
    c.finish(sums);
}

}  // namespace tf
