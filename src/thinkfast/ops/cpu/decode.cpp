// Decoding on a CPU: a tile of rows goes through all layers while its activations stay in cache. Plain C interface.
#include <algorithm>
#include <memory>
#include <string>

#include "model.h"
#include "sample.h"
#include "workers.h"

namespace tf {
namespace {

#ifndef TF_TILE
#define TF_TILE 64
#endif
constexpr int kTile = TF_TILE;  // rows, an even number

struct Row {
    int slot, token, position;
};

// Activations of one thread.
struct Scratch {
    std::vector<float> x, normed, wide, middle, conv, scores, logits;
    std::vector<double> weights;
    std::vector<int> ids;

    Scratch(const Model& m, int capacity)
        : x((size_t)kTile * m.hidden_padded()), normed((size_t)kTile * m.hidden_padded()), wide((size_t)kTile * m.wide() + kSpare),
          middle((size_t)kTile * m.middle() + kSpare), conv(m.mamba.channels_padded() + kSpare),
          scores((size_t)m.heads / m.kv_heads * (capacity + 16)) {}
};

struct Pool {
    const Model& model;
    Memory memory;
    Workers workers;
    std::vector<float> cos, sin;
    std::vector<std::unique_ptr<Scratch>> scratch;

    Pool(const Model& m, int slots, int capacity, bool half, int threads, const float* cosines, const float* sines)
        : model(m), memory(m, slots, capacity, half), workers(threads),
          cos(cosines, cosines + (size_t)capacity * (m.head_dim / 2)), sin(sines, sines + (size_t)capacity * (m.head_dim / 2)) {
        for (int i = 0; i < threads; i++) scratch.push_back(std::make_unique<Scratch>(m, memory.capacity()));
    }

    void rotate(float* x, int position, float scale) const {
        int half = model.head_dim / 2;
        const float *c = &cos[(size_t)position * half], *s = &sin[(size_t)position * half];
        for (int i = 0; i < half; i++) {
            float first = x[i], second = x[i + half];
            x[i] = (first * c[i] - second * s[i]) * scale;
            x[i + half] = (second * c[i] + first * s[i]) * scale;
        }
    }

    // q, k, v of one row (in place) -> y (heads, dim).
    template <class T>
    void attend(const Layer& layer, const Row& row, const Row& next, float* qkv, float* scores, float* y) const {
        const Model& m = model;
        float* keys = qkv + (size_t)m.heads * m.dim;
        float* values = keys + (size_t)m.kv_heads * m.dim;
        float scale = 1.0f / std::sqrt((float)m.head_dim);
        for (int h = 0; h < m.heads; h++) rotate(qkv + (size_t)h * m.dim, row.position, scale);
        int share = m.heads / m.kv_heads, tokens = row.position + 1, lds = memory.capacity() + 16;
        for (int head = 0; head < m.kv_heads; head++) {
            auto kv = memory.kv<T>(row.slot, layer.index, head);
            bool last = head + 1 == m.kv_heads;
            kv.next = memory.kv<T>(last ? next.slot : row.slot, layer.index, last ? 0 : head + 1).keys;
            rotate(keys + (size_t)head * m.dim, row.position, 1.0f);
            kv.append(row.position, keys + (size_t)head * m.dim, values + (size_t)head * m.dim);
            for (int done = 0; done < share;) {
                size_t at = ((size_t)head * share + done) * m.dim;
                int take = share - done >= 4 ? 4 : share - done;
                auto run = take == 4 ? attend_heads<4, T> : take == 3 ? attend_heads<3, T> : take == 2 ? attend_heads<2, T> : attend_heads<1, T>;
                run(kv, tokens, m.head_dim, qkv + at, scores, lds, y + at);
                done += take;
            }
        }
    }

    // Rows go in order, so a row sees what earlier rows of its slot have stored. With `logits`, leaves them in scratch.
    void tile(Scratch& s, const Row* rows, int n, bool logits) const {
        const Model& m = model;
        const int ld = m.hidden_padded();
        for (int r = 0; r < n; r++)
            std::memcpy(&s.x[(size_t)r * ld], &m.embed[(size_t)rows[r].token * m.hidden], sizeof(float) * m.hidden);
        auto norm = [&](const std::vector<float>& weight) {
            for (int r = 0; r < n; r++) rms_norm(&s.x[(size_t)r * ld], weight.data(), &s.normed[(size_t)r * ld], m.hidden, m.eps);
        };
        for (const Layer& layer : m.layers) {
            norm(layer.input_norm);
            if (layer.attention) {
                int width = layer.qkv.n, out = m.heads * m.dim;
                gemm<false>(s.normed.data(), ld, n, layer.qkv, s.wide.data(), width);
                for (int r = 0; r < n; r++) {
                    float *qkv = &s.wide[(size_t)r * width], *y = &s.middle[(size_t)r * out];
                    const Row& next = rows[std::min(r + 1, n - 1)];
                    if (memory.half()) attend<Bf16>(layer, rows[r], next, qkv, s.scores.data(), y);
                    else attend<float>(layer, rows[r], next, qkv, s.scores.data(), y);
                }
                gemm<true>(s.middle.data(), out, n, layer.o, s.x.data(), ld);
            } else {
                const MambaShape& shape = m.mamba;
                int width = layer.mamba.in_proj.n, out = shape.inner() + kSpare;
                gemm<false>(s.normed.data(), ld, n, layer.mamba.in_proj, s.wide.data(), width);
                for (int r = 0; r < n; r++) {
                    float *in = &s.wide[(size_t)r * width], *y = &s.middle[(size_t)r * out];
                    float* ring = memory.mamba(rows[r].slot, layer.index);
                    const float* next = memory.mamba(rows[std::min(r + 1, n - 1)].slot, layer.index);
                    if (rows[r].position == 0) std::fill(ring, ring + shape.slot_size(), 0.0f);
                    auto mix = shape.taps == 4 ? convolve<4> : convolve<0>;
                    mix(shape, layer.mamba, ring, in + shape.inner(), rows[r].position, s.conv.data());
                    update_state(shape, layer.mamba, ring + shape.ring_size(), next, s.conv.data(), in + shape.inner() + shape.channels(), y);
                    gated_norm(shape, layer.mamba, in, y, m.eps);
                }
                gemm<true>(s.middle.data(), out, n, layer.mamba.out_proj, s.x.data(), ld);
            }
            norm(layer.post_norm);
            gemm_swiglu(s.normed.data(), ld, n, layer.gate, layer.up, s.middle.data(), layer.gate.n);
            gemm<true>(s.middle.data(), layer.gate.n, n, layer.down, s.x.data(), ld);
        }
        if (!logits) return;
        norm(m.norm);
        s.logits.resize((size_t)kTile * m.head.n);
        gemm<false>(s.normed.data(), ld, n, m.head, s.logits.data(), m.head.n);
    }
};

// Cuts the rows into tiles of about equal cost, an even number of at most kTile rows each, whole rounds of threads.
std::vector<int> cut(const Pool& pool, const int32_t* positions, int n) {
    const Model& m = pool.model;
    int threads = pool.workers.count();
    // In multiply-adds; a token of context costs a little more than its 2 * dim products a head.
    double fixed = 2.0 * m.hidden * (2.0 * m.inter + m.hidden) * m.layers.size(), each = 3.0 * m.heads * m.dim * m.attention_layers;
    int tiles = std::min(round_up((n + kTile - 1) / kTile, threads), (n + 1) / 2);
    double total = 0.0, reached = 0.0;
    for (int i = 0; i < n; i++) total += fixed + each * positions[i];
    std::vector<int> starts{0};
    for (int i = 0; i < n; i++) {
        reached += fixed + each * positions[i];
        int held = i + 1 - starts.back();
        bool enough = held == kTile || reached * tiles >= total * starts.size();
        if (i + 1 < n && held % 2 == 0 && enough) starts.push_back(i + 1);
    }
    starts.push_back(n);
    return starts;
}

}  // namespace
}  // namespace tf

extern "C" {

// shape: vocab, hidden, intermediate, heads, kv heads, head_dim, layers, then the Mamba heads, head_dim, state, groups, taps.
// kinds: 1 for attention, 0 for Mamba. weights: embedding, final norm, head, then the tensors of each layer.
// Returns null where memory runs out.
void* tf_model_new(const int64_t* shape, double eps, const int32_t* kinds, const float* const* weights) {
    try {
        auto m = std::make_unique<tf::Model>();
        m->vocab = (int)shape[0];
        m->hidden = (int)shape[1];
        m->inter = (int)shape[2];
        m->heads = (int)shape[3];
        m->kv_heads = (int)shape[4];
        m->head_dim = (int)shape[5];
        m->dim = tf::round_up(m->head_dim, 16);
        m->eps = (float)eps;
        m->mamba = {(int)shape[7], (int)shape[8], (int)shape[9], (int)shape[10], (int)shape[11]};
        m->embed.assign(weights[0], weights[0] + (size_t)m->vocab * m->hidden);
        m->norm = tf::copied(weights[1], m->hidden);
        m->head = tf::pack({weights[2]}, {m->vocab}, m->hidden);
        const float* const* next = weights + 3;
        for (int i = 0; i < shape[6]; i++) {
            m->layers.push_back(tf::read_layer(*m, kinds[i] == 1, next));
            m->layers.back().index = kinds[i] == 1 ? m->attention_layers++ : m->mamba_layers++;
            next += kinds[i] == 1 ? 9 : 13;
        }
        m->settle();
        return m.release();
    } catch (const std::exception&) {
        return nullptr;
    }
}

void tf_model_free(void* model) { delete static_cast<tf::Model*>(model); }

// cosines, sines: (capacity, head_dim / 2). Returns null where memory or threads run out.
void* tf_pool_new(const void* model, int32_t slots, int32_t capacity, int32_t half, int32_t threads, const float* cosines, const float* sines) {
    try {
        return new tf::Pool(*static_cast<const tf::Model*>(model), slots, capacity, half != 0, threads, cosines, sines);
    } catch (const std::exception&) {
        return nullptr;
    }
}

void tf_pool_free(void* pool) { delete static_cast<tf::Pool*>(pool); }

// Feeds one token to each of n distinct slots and draws the next. out: token, or -1 where the logits are not finite.
// logits: null or room for (n, vocab).
void tf_step(void* handle, int32_t n, const int32_t* slots, const int32_t* tokens, const int32_t* positions, const uint64_t* keys,
             const int64_t* counters, double temperature, int32_t top_k, double top_p, int32_t* out, double* logprobs, float* logits) {
    auto& pool = *static_cast<tf::Pool*>(handle);
    const tf::Model& m = pool.model;
    tf::Draw how{temperature, top_p, top_k};
    std::vector<int> starts = tf::cut(pool, positions, n);
    pool.workers.run((int)starts.size() - 1, [&](int thread, int index) {
        tf::Scratch& s = *pool.scratch[thread];
        int begin = starts[index], count = starts[index + 1] - begin;
        tf::Row rows[tf::kTile] = {};
        for (int i = 0; i < count; i++) rows[i] = {slots[begin + i], tokens[begin + i], positions[begin + i]};
        pool.tile(s, rows, count, true);
        for (int i = 0; i < count; i++) {
            float* row = &s.logits[(size_t)i * m.head.n];
            int at = begin + i;
            out[at] = tf::draw(row, m.vocab, how, keys[at], (uint64_t)counters[at], s.weights, s.ids, &logprobs[at]);
            if (logits) std::memcpy(logits + (size_t)at * m.vocab, row, sizeof(float) * m.vocab);
        }
    });
}

// Feeds ids[offsets[i] .. offsets[i + 1]) to slots[i] from position starts[i], every slot on its own.
void tf_prefill(void* handle, int32_t n, const int32_t* slots, const int32_t* starts, const int64_t* offsets, const int32_t* ids) {
    auto& pool = *static_cast<tf::Pool*>(handle);
    pool.workers.run(n, [&](int thread, int index) {
        tf::Row rows[tf::kTile] = {};
        for (int64_t at = offsets[index]; at < offsets[index + 1]; at += tf::kTile) {
            int count = (int)std::min<int64_t>(tf::kTile, offsets[index + 1] - at);
            for (int i = 0; i < count; i++) rows[i] = {slots[index], ids[at + i], (int)(starts[index] + at + i - offsets[index])};
            pool.tile(*pool.scratch[thread], rows, count, false);
        }
    });
}

// What a slot remembers after `length` tokens: its size, and copies out of and into a slot.
int64_t tf_state_bytes(const void* pool, int32_t length) { return (int64_t)static_cast<const tf::Pool*>(pool)->memory.bytes(length); }

void tf_state_save(const void* pool, int32_t slot, int32_t length, char* to) {
    static_cast<const tf::Pool*>(pool)->memory.each_part(slot, length, [&](char* part, size_t bytes) {
        std::memcpy(to, part, bytes);
        to += bytes;
    });
}

void tf_state_load(void* pool, int32_t slot, int32_t length, const char* from) {
    static_cast<tf::Pool*>(pool)->memory.each_part(slot, length, [&](char* part, size_t bytes) {
        std::memcpy(part, from, bytes);
        from += bytes;
    });
}

}  // extern "C"
