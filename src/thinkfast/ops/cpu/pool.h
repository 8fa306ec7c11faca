// The pool of slots: a tile of rows goes through all layers while its activations stay in cache.
#pragma once
#include <algorithm>
#include <memory>
#include <string>

#include "model.h"
#include "sample.h"
#include "workers.h"

namespace tf {

// Weights beyond this many bytes no longer fit a core's cache: then all threads work on the same rows, each with its
// columns of every matrix, so that a step reads the weights once. Below, every thread has rows of its own.
constexpr size_t kSmall = 8 << 20;

// Rows of a tile where every thread has its own: with several steps in a row their states, or what is left of the keys of
// short prompts, stay in the second level of cache, and there are tiles to share out.
constexpr int kOwn = 32;

constexpr size_t kNear = 3 << 19;  // bytes fetched ahead at most

struct Row {
    int slot, token, position;
};

// Activations of a tile; `mine` are those of one thread.
struct Scratch {
    std::vector<float> x, normed, wide, middle, logits;
    std::vector<Query> queries;
    std::vector<const char*> pages, tails;  // of every row: all its pages and some more entries, the last one
    size_t stride = 0;                      // entries of a row in `pages`
    struct Mine {
        std::vector<float> steps, decays, scores;
        std::vector<double> weights;
        std::vector<Query*> list;
        std::vector<int> ids;
    } mine;

    explicit Scratch(const Model& m)
        : x((size_t)kTile * m.hidden_padded()), normed((size_t)kTile * m.hidden_padded()), wide((size_t)kTile * m.wide() + kSpare),
          middle((size_t)kTile * m.middle() + kSpare), queries((size_t)kTile * m.heads) {
        mine.steps.resize(m.mamba.heads + kSpare);
        mine.decays.resize(m.mamba.heads + kSpare);
        mine.scores.resize((size_t)kBatch * kScores);
        mine.list.resize((size_t)kTile * m.heads);
        tails.resize(kTile);
    }

    const char* const* pages_of(int row) const { return &pages[row * stride]; }
};

struct Pool {
    const Model& model;
    Memory memory;
    Workers workers;
    Barrier barrier;
    std::vector<float> cos, sin;
    std::vector<std::unique_ptr<Scratch>> scratch;

    Pool(const Model& m, int slots, int capacity, bool half, int threads, size_t limit, const float* cosines, const float* sines)
        : model(m), memory(m, slots, capacity, half, limit), workers(threads),
          cos(cosines, cosines + (size_t)capacity * (m.head_dim / 2)), sin(sines, sines + (size_t)capacity * (m.head_dim / 2)) {
        for (int i = 0; i < threads; i++) scratch.push_back(std::make_unique<Scratch>(m));
    }

    bool together(int pieces) const { return workers.count() > 1 && (model.bytes > kSmall || pieces < workers.count()); }

    void rotate(float* x, int position, float scale) const {
        int half = model.head_dim / 2;
        const float *c = &cos[(size_t)position * half], *s = &sin[(size_t)position * half];
        int i = 0;
        for (; i + kLanes <= half; i += kLanes) {
            vec first = load(x + i), second = load(x + i + half), cosine = load(c + i), sine = load(s + i);
            store(x + i, (first * cosine - second * sine) * scale);
            store(x + i + half, (second * cosine + first * sine) * scale);
        }
        for (; i < half; i++) {
            float first = x[i], second = x[i + half];
            x[i] = (first * c[i] - second * s[i]) * scale;
            x[i + half] = (second * c[i] + first * s[i]) * scale;
        }
    }

    // Turns a row's queries and keys, and stores its keys and values.
    template <class T>
    void remember(const Layer& layer, const Row& row, float* qkv, float* y, Query* queries) const {
        const Model& m = model;
        float scale = 1.44269504f / std::sqrt((float)m.head_dim);  // scores are powers of two
        for (int h = 0; h < m.heads; h++) {
            float* q = qkv + (size_t)h * m.dim;
            rotate(q, row.position, scale);
            queries[h] = {q, y + (size_t)h * m.dim, row.position + 1, nullptr, -INFINITY, 0.0f};
        }
        float* keys = qkv + (size_t)m.heads * m.dim;
        float* values = keys + (size_t)m.kv_heads * m.dim;
        char* page = memory.page(memory.pages(row.slot)[row.position / kPage]);
        for (int head = 0; head < m.kv_heads; head++) {
            rotate(keys + (size_t)head * m.dim, row.position, 1.0f);
            append(reinterpret_cast<T*>(page + memory.within_page(layer.index, head)), row.position % kPage, m.dim, keys + (size_t)head * m.dim, values + (size_t)head * m.dim);
        }
    }

    // Writes down where the rows' pages are.
    void find_pages(Scratch& s, const Row* rows, int n) const {
        if (!model.attention_layers) return;
        int most = 0;
        for (int r = 0; r < n; r++) most = std::max(most, rows[r].position / kPage + 1);
        s.stride = round_up(most, kChunk) + kChunk;
        if (s.pages.size() < n * s.stride) s.pages.resize(n * s.stride);
        for (int r = 0; r < n; r++) {
            const std::vector<int>& held = memory.pages(rows[r].slot);
            const char** to = &s.pages[r * s.stride];
            int used = rows[r].position / kPage + 1;
            for (int p = 0; p < used; p++) to[p] = memory.page(held[p]);
            // Places behind the row's end are read along with its neighbours' and masked: any page of its own will do.
            s.tails[r] = to[used - 1];
            std::fill(to + used, to + s.stride, s.tails[r]);
        }
    }

    // Attention of rows [first, last) to one kv head. Neighbours that begin with the same pages read them together.
    template <class T>
    void attend(const Layer& layer, int head, const Row* rows, int first, int last, Scratch& s, Scratch::Mine& mine) const {
        const Model& m = model;
        const int share = m.heads / m.kv_heads;
        const size_t offset = memory.within_page(layer.index, head);
        auto queries = [&](int r) { return &s.queries[(size_t)r * m.heads + head * share]; };
        auto chunk = [&](int begin, int end, int c, int after) {
            int n = 0, from = c * kScores;
            for (int r = begin; r < end; r++) {
                if (rows[r].position < from) continue;
                Query* asked = queries(r);
                for (int h = 0; h < share; h++) {
                    asked[h].pages = s.pages_of(r) + c * kChunk;
                    mine.list[n++] = asked + h;
                }
            }
            bool more = end - begin > 1 || rows[begin].position >= from + kScores;
            const char* const* next = more ? s.pages_of(begin) + (c + 1) * kChunk : s.pages_of(after);
            if (n) attend_chunk<T>(mine.list.data(), n, from, next, offset, m.dim, m.head_dim, mine.scores.data());
        };
        for (int begin = first; begin < last;) {
            int end = begin + 1, common = 0, longest = rows[begin].position;
            for (; end < last && s.pages_of(end)[0] == s.pages_of(begin)[0]; end++) {
                auto a = s.pages_of(begin), b = s.pages_of(end);
                int both = std::min(rows[begin].position, rows[end].position) / kPage + 1;
                int equal = (int)(std::mismatch(a, a + both, b).first - a);
                common = end == begin + 1 ? equal : std::min(common, equal);
                longest = std::max(longest, rows[end].position);
            }
            int shared = std::min((common + kChunk - 1) / kChunk, longest / kScores + 1);
            for (int c = 0; c < shared; c++) chunk(begin, end, c, begin);
            for (int r = begin; r < end; r++)
                for (int c = shared; c * kScores <= rows[r].position; c++) chunk(r, r + 1, c, std::min(r + 1, last - 1));
            begin = end;
        }
        for (int r = first; r < last; r++)
            for (int h = 0; h < share; h++) {
                Query& q = queries(r)[h];
                for (int d = 0; d < m.dim; d += kLanes) store(q.y + d, load(q.y + d) * (1.0f / q.total));
            }
    }

    template <class T>
    void attention(Scratch& s, Scratch::Mine& mine, const Layer& layer, const Row* rows, int n, Team team) const {
        const Model& m = model;
        int width = layer.qkv.n, out = m.heads * m.dim;
        for (int r = team.begin(n); r < team.end(n); r++)
            remember<T>(layer, rows[r], &s.wide[(size_t)r * width], &s.middle[(size_t)r * out], &s.queries[(size_t)r * m.heads]);
        team.meet();
        int begin = team.begin(m.kv_heads * n), end = team.end(m.kv_heads * n);
        for (int head = 0; head < m.kv_heads; head++) {
            int first = std::max(begin - head * n, 0), last = std::min(end - head * n, n);
            if (first < last) attend<T>(layer, head, rows, first, last, s, mine);
        }
    }

    void mamba(Scratch& s, Scratch::Mine& mine, const Layer& layer, const Row* rows, int n, Team team) const {
        const Model& m = model;
        const MambaShape& shape = m.mamba;
        const MambaWeights& w = layer.mamba;
        const int width = w.in_proj.n, out = shape.inner() + kSpare;
        auto memory_of = [&](int r) { return memory.mamba(rows[r].slot, layer.index); };
        auto channels_of = [&](int r) { return &s.wide[(size_t)r * width + shape.inner()]; };
        auto after = [&](int r) { return memory_of(std::min(r + 1, n - 1)); };
        auto mix = [&](int r, int begin, int end) {
            auto run = shape.taps == 4 ? convolve<4> : convolve<0>;
            run(shape, w, memory_of(r), after(r), channels_of(r), rows[r].position, begin, end);
        };
        auto update = [&](int r, int begin, int end) {
            float *state = memory_of(r) + shape.ring_size(), *next = after(r) + shape.ring_size(), *channels = channels_of(r);
            pace(shape, w, channels + shape.channels(), mine.steps.data(), mine.decays.data());
            update_state(shape, w, state, next, rows[r].position == 0, channels, mine.steps.data(), mine.decays.data(), &s.middle[(size_t)r * out], begin, end);
        };
        auto close = [&](int r) { gated_norm(shape, w, &s.wide[(size_t)r * width], &s.middle[(size_t)r * out], m.eps); };
        if (team.size == 1) {
            for (int r = 0; r < n; r++) mix(r, 0, shape.channels_padded()), update(r, 0, shape.heads), close(r);
            return;
        }
        // Rows of one slot go in order: channels and heads are shared out, not rows.
        int blocks = shape.channels_padded() / kSpare;
        for (int r = 0; r < n; r++) mix(r, team.begin(blocks) * kSpare, team.end(blocks) * kSpare);
        team.meet();
        for (int r = 0; r < n; r++) update(r, team.begin(shape.heads), team.end(shape.heads));
        team.meet();
        for (int r = team.begin(n); r < team.end(n); r++) close(r);
    }

    // What a layer reads that is not weights, where it fits into the second level of cache: the memory of neighbouring
    // slots, or the pages that are written to.
    Ahead memory_of(const Layer* layer, const Scratch& s, const Row* rows, int n, Team team) const {
        Ahead ahead;
        if (!layer || team.size > 1) return ahead;
        size_t bytes = layer->attention ? memory.within_page(1, 0) : sizeof(float) * model.mamba.slot_size();
        if (bytes * n > kNear) return ahead;
        if (layer->attention) {
            ahead.next = s.tails.data();
            ahead.last = ahead.next + n;
            ahead.offset = memory.within_page(layer->index, 0);
            ahead.bytes = bytes;
        } else {
            ahead.at = reinterpret_cast<const char*>(memory.mamba(rows[0].slot, layer->index));
            ahead.end = ahead.at + bytes * n;
        }
        return ahead;
    }

    // A tile of rows through all layers. Rows of one slot stand in the order of their positions. With `logits`, leaves them in scratch.
    void tile(Scratch& s, Scratch::Mine& mine, const Row* rows, int n, bool logits, Team team) const {
        const Model& m = model;
        const int ld = m.hidden_padded();
        const int begin = team.begin(n), end = team.end(n);
        for (int r = begin; r < end; r++) m.embedding(rows[r].token, &s.x[(size_t)r * ld]);
        auto norm = [&](const std::vector<float>& weight) {
            for (int r = begin; r < end; r++) rms_norm(&s.x[(size_t)r * ld], weight.data(), &s.normed[(size_t)r * ld], m.hidden, m.eps);
            team.meet();
        };
        if (team.rank == 0) find_pages(s, rows, n);
        Ahead later = memory_of(m.layers.empty() ? nullptr : &m.layers[0], s, rows, n, team);
        auto product = [&](const std::vector<float>& x, int ldx, const Packed& w, std::vector<float>& y, int ldy, bool add) {
            gemm(x.data(), ldx, n, w, y.data(), ldy, add, team.begin(w.panels()), team.end(w.panels()), later);
            team.meet();
        };
        for (const Layer& layer : m.layers) {
            norm(layer.input_norm);
            const Packed& in = layer.attention ? layer.qkv : layer.mamba.in_proj;
            product(s.normed, ld, in, s.wide, in.n, false);
            if (!layer.attention) mamba(s, mine, layer, rows, n, team);
            else if (memory.half()) attention<Bf16>(s, mine, layer, rows, n, team);
            else attention<float>(s, mine, layer, rows, n, team);
            team.meet();
            if (layer.attention) product(s.middle, m.heads * m.dim, layer.o, s.x, ld, true);
            else product(s.middle, m.mamba.inner() + kSpare, layer.mamba.out_proj, s.x, ld, true);
            norm(layer.post_norm);
            later = memory_of(&layer == &m.layers.back() ? nullptr : &layer + 1, s, rows, n, team);
            gemm_swiglu(s.normed.data(), ld, n, layer.gate, layer.up, s.middle.data(), layer.gate.n, team.begin(layer.gate.panels()), team.end(layer.gate.panels()), later);
            team.meet();
            product(s.middle, layer.gate.n, layer.down, s.x, ld, true);
        }
        if (!logits) return;
        norm(m.norm);
        product(s.normed, ld, m.head, s.logits, m.head.n, false);
    }
};

// Cuts the rows into tiles of about equal cost, an even number of at most `most` rows each, whole rounds of threads.
static inline std::vector<int> cut(const Pool& pool, const int32_t* positions, int n, int threads, int most) {
    const Model& m = pool.model;
    // In multiply-adds; a token of context costs a little more than its 2 * dim products a head.
    double fixed = 2.0 * m.hidden * (2.0 * m.inter + m.hidden) * m.layers.size(), each = 3.0 * m.heads * m.dim * m.attention_layers;
    int tiles = std::min(round_up((n + most - 1) / most, threads), (n + 1) / 2);
    double total = 0.0, reached = 0.0;
    for (int i = 0; i < n; i++) total += fixed + each * positions[i];
    std::vector<int> starts{0};
    for (int i = 0; i < n; i++) {
        reached += fixed + each * positions[i];
        int held = i + 1 - starts.back();
        bool enough = held >= most || reached * tiles >= total * starts.size();
        if (i + 1 < n && held % 2 == 0 && enough) starts.push_back(i + 1);
    }
    starts.push_back(n);
    return starts;
}

}  // namespace tf
