// Decoding on a CPU: a tile of rows goes through all layers while its activations stay in cache. Plain C interface.
#include <algorithm>
#include <memory>
#include <string>

#include "model.h"
#include "sample.h"
#include "workers.h"

namespace tf {
namespace {

// Weights beyond this many bytes no longer fit a core's cache: then all threads work on the same rows, each with its
// columns of every matrix, so that a step reads the weights once. Below, every thread has rows of its own.
constexpr size_t kSmall = 8 << 20;

constexpr size_t kNear = 3 << 19;  // bytes fetched ahead at most

struct Row {
    int slot, token, position;
};

// Activations of a tile; `mine` are those of one thread.
struct Scratch {
    std::vector<float> x, normed, wide, middle, logits;
    std::vector<Query> queries;
    struct Mine {
        std::vector<float> steps, decays, scores;
        std::vector<double> weights;
        std::vector<Query*> list;
        std::vector<const char*> table;
        std::vector<int> ids;
    } mine;

    explicit Scratch(const Model& m)
        : x((size_t)kTile * m.hidden_padded()), normed((size_t)kTile * m.hidden_padded()), wide((size_t)kTile * m.wide() + kSpare),
          middle((size_t)kTile * m.middle() + kSpare), queries((size_t)kTile * m.heads) {
        mine.steps.resize(m.mamba.heads + kSpare);
        mine.decays.resize(m.mamba.heads + kSpare);
        mine.scores.resize((size_t)kBatch * kScores);
        mine.list.resize((size_t)kTile * m.heads);
        mine.table.resize((size_t)kTile * kChunk);
    }
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
        for (int i = 0; i < half; i++) {
            float first = x[i], second = x[i + half];
            x[i] = (first * c[i] - second * s[i]) * scale;
            x[i + half] = (second * c[i] + first * s[i]) * scale;
        }
    }

    // Turns a row's queries and keys, and stores its keys and values.
    template <class T>
    void remember(const Layer& layer, const Row& row, float* qkv, float* y, Query* queries) const {
        const Model& m = model;
        float scale = 1.0f / std::sqrt((float)m.head_dim);
        for (int h = 0; h < m.heads; h++) {
            float* q = qkv + (size_t)h * m.dim;
            rotate(q, row.position, scale);
            queries[h] = {q, y + (size_t)h * m.dim, row.position + 1, nullptr, -INFINITY, 0.0f};
        }
        float* keys = qkv + (size_t)m.heads * m.dim;
        float* values = keys + (size_t)m.kv_heads * m.dim;
        int page = memory.pages(row.slot)[row.position / kPage];
        for (int head = 0; head < m.kv_heads; head++) {
            rotate(keys + (size_t)head * m.dim, row.position, 1.0f);
            append(memory.page<T>(page, layer.index, head), row.position % kPage, m.dim, keys + (size_t)head * m.dim, values + (size_t)head * m.dim);
        }
    }

    // Attention of rows [first, last) to one kv head. Neighbours that begin with the same pages read them together.
    template <class T>
    void attend(const Layer& layer, int head, const Row* rows, int first, int last, Query* queries, Scratch::Mine& mine) const {
        const Model& m = model;
        int share = m.heads / m.kv_heads;
        auto pages = [&](int r) -> const std::vector<int>& { return memory.pages(rows[r].slot); };
        auto keys = [&](int r, int p) {
            const std::vector<int>& held = pages(r);
            return reinterpret_cast<const char*>(memory.page<T>(held[std::min(p, (int)held.size() - 1)], layer.index, head));
        };
        auto chunk = [&](int begin, int end, int c, int after) {
            int n = 0, from = c * kScores;
            for (int r = begin; r < end; r++) {
                const char** table = &mine.table[(size_t)(r - begin) * kChunk];
                if (rows[r].position < from) continue;
                // Places behind the row's end are read along with its neighbours' and masked: any page of its own will do.
                for (int p = 0; p < kChunk; p++) table[p] = keys(r, c * kChunk + p);
                for (int h = 0; h < share; h++) {
                    Query& q = queries[(size_t)r * m.heads + head * share + h];
                    q.pages = table;
                    mine.list[n++] = &q;
                }
            }
            bool more = end - begin > 1 || rows[begin].position >= from + kScores;
            int r = more ? begin : after, p = more ? (c + 1) * kChunk : 0;
            const char* next[2] = {keys(r, p), keys(r, p + 1)};
            if (n) attend_chunk<T>(mine.list.data(), n, from, next, m.dim, m.head_dim, mine.scores.data());
        };
        for (int begin = first; begin < last;) {
            int end = begin + 1, common = 0, longest = rows[begin].position;
            for (; end < last && pages(end)[0] == pages(begin)[0]; end++) {
                auto &a = pages(begin), &b = pages(end);
                int equal = (int)(std::mismatch(a.begin(), a.begin() + std::min(a.size(), b.size()), b.begin()).first - a.begin());
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
                Query& q = queries[(size_t)r * m.heads + head * share + h];
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
            if (first < last) attend<T>(layer, head, rows, first, last, s.queries.data(), mine);
        }
    }

    void mamba(Scratch& s, Scratch::Mine& mine, const Layer& layer, const Row* rows, int n, Team team) const {
        const Model& m = model;
        const MambaShape& shape = m.mamba;
        const MambaWeights& w = layer.mamba;
        const int width = w.in_proj.n, out = shape.inner() + kSpare;
        auto memory_of = [&](int r) { return memory.mamba(rows[r].slot, layer.index); };
        auto channels_of = [&](int r) { return &s.wide[(size_t)r * width + shape.inner()]; };
        // Rows of one slot go in order: channels and heads are shared out, not rows.
        int blocks = shape.channels_padded() / kSpare;
        for (int r = 0; r < n; r++) {
            auto mix = shape.taps == 4 ? convolve<4> : convolve<0>;
            mix(shape, w, memory_of(r), channels_of(r), rows[r].position, team.begin(blocks) * kSpare, team.end(blocks) * kSpare);
        }
        team.meet();
        int first = team.begin(shape.heads), last = team.end(shape.heads);
        for (int r = 0; r < n; r++) {
            float *state = memory_of(r) + shape.ring_size(), *next = memory_of(std::min(r + 1, n - 1)) + shape.ring_size();
            float* channels = channels_of(r);
            pace(shape, w, channels + shape.channels(), mine.steps.data(), mine.decays.data());
            update_state(shape, w, state, next, rows[r].position == 0, channels, mine.steps.data(), mine.decays.data(), &s.middle[(size_t)r * out], first, last);
        }
        team.meet();
        for (int r = team.begin(n); r < team.end(n); r++) gated_norm(shape, w, &s.wide[(size_t)r * width], &s.middle[(size_t)r * out], m.eps);
    }

    // The memory of neighbouring slots in a Mamba layer, where it fits into the second level of cache.
    Ahead states(const Layer* layer, const Row* rows, int n, Team team) const {
        size_t bytes = sizeof(float) * model.mamba.slot_size() * n;
        if (!layer || layer->attention || team.size > 1 || bytes > kNear) return {};
        const char* at = reinterpret_cast<const char*>(memory.mamba(rows[0].slot, layer->index));
        return {at, at + bytes};
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
        Ahead later = states(m.layers.empty() ? nullptr : &m.layers[0], rows, n, team);
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
            later = states(&layer == &m.layers.back() ? nullptr : &layer + 1, rows, n, team);
            gemm_swiglu(s.normed.data(), ld, n, layer.gate, layer.up, s.middle.data(), layer.gate.n, team.begin(layer.gate.panels()), team.end(layer.gate.panels()), later);
            team.meet();
            product(s.middle, layer.gate.n, layer.down, s.x, ld, true);
        }
        if (!logits) return;
        norm(m.norm);
        product(s.normed, ld, m.head, s.logits, m.head.n, false);
    }
};

// Cuts the rows into tiles of about equal cost, an even number of at most kTile rows each, whole rounds of threads.
std::vector<int> cut(const Pool& pool, const int32_t* positions, int n, int threads) {
    const Model& m = pool.model;
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
// kinds: 1 for attention, 0 for Mamba. half: matrices as bfloat16. weights: embedding, final norm, head, then the tensors of
// each layer. Returns null where memory runs out.
void* tf_model_new(const int64_t* shape, double eps, int32_t half, const int32_t* kinds, const float* const* weights) {
    try {
        auto m = std::make_unique<tf::Model>();
        m->vocab = (int)shape[0];
        m->hidden = (int)shape[1];
        m->inter = (int)shape[2];
        m->heads = (int)shape[3];
        m->kv_heads = (int)shape[4];
        m->head_dim = (int)shape[5];
        m->dim = tf::round_up(m->head_dim, tf::kPage);
        m->eps = (float)eps;
        m->half = half != 0;
        m->mamba = {(int)shape[7], (int)shape[8], (int)shape[9], (int)shape[10], (int)shape[11]};
        m->read_embedding(weights[0]);
        m->norm = tf::copied(weights[1], m->hidden);
        m->head = tf::pack({weights[2]}, {m->vocab}, m->hidden, m->half);
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

// cosines, sines: (capacity, head_dim / 2). limit: pages at most, 0 for as many as needed. Returns null where memory or
// threads run out.
void* tf_pool_new(const void* model, int32_t slots, int32_t capacity, int32_t half, int32_t threads, int64_t limit, const float* cosines, const float* sines) {
    try {
        return new tf::Pool(*static_cast<const tf::Model*>(model), slots, capacity, half != 0, threads, (size_t)limit, cosines, sines);
    } catch (const std::exception&) {
        return nullptr;
    }
}

void tf_pool_free(void* pool) { delete static_cast<tf::Pool*>(pool); }

// Feeds one token to each of n distinct slots and draws the next. out: token, or -1 where the logits are not finite.
// logits: null or room for (n, vocab). Returns 1 where no page is left; then nothing has been fed.
int32_t tf_step(void* handle, int32_t n, const int32_t* slots, const int32_t* tokens, const int32_t* positions, const uint64_t* keys,
                const int64_t* counters, double temperature, int32_t top_k, double top_p, int32_t* out, double* logprobs, float* logits) {
    auto& pool = *static_cast<tf::Pool*>(handle);
    const tf::Model& m = pool.model;
    tf::Draw how{temperature, top_p, top_k};
    try {
        for (int i = 0; i < n; i++) {
            if (positions[i] == 0) pool.memory.clear(slots[i]);
            pool.memory.reserve(slots[i], positions[i] + 1);
        }
    } catch (const std::bad_alloc&) {
        return 1;
    }
    auto run = [&](tf::Scratch& s, tf::Scratch::Mine& mine, int begin, int count, tf::Team team) {
        tf::Row rows[tf::kTile] = {};
        for (int i = 0; i < count; i++) rows[i] = {slots[begin + i], tokens[begin + i], positions[begin + i]};
        pool.tile(s, mine, rows, count, true, team);
        for (int i = team.begin(count); i < team.end(count); i++) {
            float* row = &s.logits[(size_t)i * m.head.n];
            int at = begin + i;
            out[at] = tf::draw(row, m.vocab, how, keys[at], (uint64_t)counters[at], mine.weights, mine.ids, &logprobs[at]);
            if (logits) std::memcpy(logits + (size_t)at * m.vocab, row, sizeof(float) * m.vocab);
        }
        team.meet();
    };
    bool together = pool.together((n + 1) / 2);
    std::vector<int> starts = tf::cut(pool, positions, n, together ? 1 : pool.workers.count());
    int tiles = (int)starts.size() - 1;
    for (size_t i = 0; i < (together ? 1 : pool.scratch.size()); i++) pool.scratch[i]->logits.resize((size_t)tf::kTile * m.head.n);
    if (!together)
        pool.workers.share(tiles, [&](int thread, int index) {
            tf::Scratch& s = *pool.scratch[thread];
            run(s, s.mine, starts[index], starts[index + 1] - starts[index], {});
        });
    else
        pool.workers.all([&](int thread) {
            for (int i = 0; i < tiles; i++)
                run(*pool.scratch[0], pool.scratch[thread]->mine, starts[i], starts[i + 1] - starts[i], {thread, pool.workers.count(), &pool.barrier});
        });
    return 0;
}

// Feeds ids[offsets[i] .. offsets[i + 1]) to slots[i] from position starts[i] on, every slot on its own. Returns 1 where no
// page is left; then nothing has been fed.
int32_t tf_prefill(void* handle, int32_t n, const int32_t* slots, const int32_t* starts, const int64_t* offsets, const int32_t* ids) {
    auto& pool = *static_cast<tf::Pool*>(handle);
    try {
        for (int i = 0; i < n; i++) {
            if (starts[i] == 0) pool.memory.clear(slots[i]);
            pool.memory.reserve(slots[i], starts[i] + (int)(offsets[i + 1] - offsets[i]));
        }
    } catch (const std::bad_alloc&) {
        return 1;
    }
    auto feed = [&](tf::Scratch& s, tf::Scratch::Mine& mine, int index, tf::Team team) {
        tf::Row rows[tf::kTile] = {};
        for (int64_t at = offsets[index]; at < offsets[index + 1]; at += tf::kTile) {
            int count = (int)std::min<int64_t>(tf::kTile, offsets[index + 1] - at);
            for (int i = 0; i < count; i++) rows[i] = {slots[index], ids[at + i], (int)(starts[index] + at + i - offsets[index])};
            pool.tile(s, mine, rows, count, false, team);
        }
    };
    if (!pool.together(n))
        pool.workers.share(n, [&](int thread, int index) { feed(*pool.scratch[thread], pool.scratch[thread]->mine, index, {}); });
    else
        pool.workers.all([&](int thread) {
            for (int i = 0; i < n; i++) feed(*pool.scratch[0], pool.scratch[thread]->mine, i, {thread, pool.workers.count(), &pool.barrier});
        });
    return 0;
}

// Keeps what a slot remembers after `length` tokens; null where memory runs out.
void* tf_keep(void* pool, int32_t slot, int32_t length) {
    try {
        return static_cast<tf::Pool*>(pool)->memory.keep(slot, length).release();
    } catch (const std::bad_alloc&) {
        return nullptr;
    }
}

// Makes a slot go on from a kept state, on the same pages for the first `shared` tokens. Returns 1 where no page is left.
int32_t tf_resume(void* pool, int32_t slot, const void* kept, int32_t shared) {
    try {
        static_cast<tf::Pool*>(pool)->memory.resume(slot, *static_cast<const tf::Kept*>(kept), shared);
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}

// The bytes of a kept state, pages first: how many, and where `to` is not null what they are.
int64_t tf_kept_bytes(void* pool, const void* handle, char* to) {
    auto& store = static_cast<tf::Pool*>(pool)->memory.store();
    auto& kept = *static_cast<const tf::Kept*>(handle);
    size_t states = sizeof(float) * kept.states.size();
    if (to) {
        for (int page : kept.pages) to = static_cast<char*>(std::memcpy(to, store.at(page), store.bytes())) + store.bytes();
        std::memcpy(to, kept.states.data(), states);
    }
    return (int64_t)(store.bytes() * kept.pages.size() + states);
}

void tf_kept_free(void* pool, void* kept) {
    static_cast<tf::Pool*>(pool)->memory.store().drop(static_cast<tf::Kept*>(kept)->pages);
    delete static_cast<tf::Kept*>(kept);
}

// Gives a slot's pages back.
void tf_clear(void* pool, int32_t slot) { static_cast<tf::Pool*>(pool)->memory.clear(slot); }

// Bytes of a page, bytes of a slot beside its pages, pages in use.
void tf_sizes(void* handle, int64_t* sizes) {
    auto& pool = *static_cast<tf::Pool*>(handle);
    sizes[0] = (int64_t)pool.memory.page_bytes();
    sizes[1] = (int64_t)(sizeof(float) * pool.model.mamba_layers * pool.model.mamba.slot_size());
    sizes[2] = (int64_t)pool.memory.store().used();
}

}  // extern "C"
