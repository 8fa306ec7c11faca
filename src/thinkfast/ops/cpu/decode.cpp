// Plain C interface of the kernels that decode on a CPU.
#include "burst.h"

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

// Feeds one token to each of n distinct slots and draws the next, `steps` times in a row. Row i draws in the way of `ways` (n:
// temperature, top p, top k) at most rooms[i] tokens and, where ends[i], none behind a token that `eos` (vocab) marks or
// behind logits that are not finite; no row begins a step but its first once `seconds` are over or *interrupted (which may
// be null) is set, by another thread perhaps.
// out, logprobs: (steps, n); a token is -1 where the logits are not finite and -2 where none was drawn. logits: null or room
// for (n, vocab), those of the last step. Returns 1 where no page is left; then nothing has been fed.
int32_t tf_step(void* handle, int32_t n, const int32_t* slots, const int32_t* tokens, const int32_t* positions, const uint64_t* keys,
                const int64_t* counters, const double* ways, int32_t steps, const int32_t* rooms, const uint8_t* ends, const uint8_t* eos,
                double seconds, const volatile uint8_t* interrupted, int32_t* out, double* logprobs, float* logits) {
    auto& pool = *static_cast<tf::Pool*>(handle);
    const tf::Model& m = pool.model;
    std::vector<tf::Draw> how(n);
    for (int i = 0; i < n; i++) how[i] = {ways[3 * i], ways[3 * i + 1], (int)ways[3 * i + 2]};
    tf::Burst burst{how.data(), n, steps, slots, tokens, positions, keys, counters, rooms, ends, eos, interrupted, out, logprobs, logits, {}};
    burst.until = tf::Clock::now() + std::chrono::duration_cast<tf::Clock::duration>(std::chrono::duration<double>(std::min(seconds, 1e6)));
    std::fill(out, out + (size_t)steps * n, tf::kNone);
    std::fill(logprobs, logprobs + (size_t)steps * n, NAN);
    try {
        for (int i = 0; i < n; i++) {
            if (positions[i] == 0) pool.memory.clear(slots[i]);
            pool.memory.reserve(slots[i], positions[i] + std::min(steps, rooms[i]));
        }
    } catch (const std::bad_alloc&) {
        return 1;
    }
    bool together = pool.together((n + 1) / 2);
    std::vector<int> starts = tf::cut(pool, positions, n, together ? 1 : pool.workers.count(), together ? tf::kTile : tf::kOwn);
    std::vector<tf::Tile> tiles;
    for (size_t i = 1; i < starts.size(); i++) tiles.push_back(tf::tile_of(burst, starts[i - 1], starts[i]));
    for (size_t i = 0; i < (together ? 1 : pool.scratch.size()); i++) pool.scratch[i]->logits.resize((size_t)tf::kTile * m.head.n);
    if (together) {
        bool late[2] = {};
        pool.workers.all([&](int thread) {
            for (tf::Tile tile : tiles)
                tf::run_burst(pool, *pool.scratch[0], pool.scratch[thread]->mine, burst, tile, late, {thread, pool.workers.count(), &pool.barrier}, nullptr);
        });
        return 0;
    }
    tf::Board board(std::move(tiles));
    pool.workers.all([&](int thread) {
        tf::Scratch& s = *pool.scratch[thread];
        for (tf::Tile tile; board.take(tile); board.done()) {
            bool late[2] = {};
            tf::run_burst(pool, s, s.mine, burst, tile, late, {}, &board);
        }
    });
    return 0;
}

// Puts down what a burst has drawn: tokens and logprobs (steps, n). By slot: limits, the tokens a sample may have; counts,
// last tokens, positions and sums of log-probabilities; histories of `width` each. A sample ends at a token that `eos` marks
// where ends[i], which is not counted, at logits that were not finite, or at its limit: reasons (n) is then 1, 2 or 3, else 0.
void tf_collect(int32_t n, int32_t steps, const int32_t* slots, const int32_t* tokens, const double* logprobs, const uint8_t* ends,
                const uint8_t* eos, const int64_t* limits, int32_t width, int64_t* counts, int32_t* last, int32_t* positions, double* sums,
                int32_t* history, double* scores, int8_t* reasons) {
    for (int i = 0; i < n; i++) {
        int slot = slots[i];
        reasons[i] = 0;
        for (int step = 0; step < steps && !reasons[i] && counts[slot] < limits[slot]; step++) {
            size_t at = (size_t)step * n + i;
            int token = tokens[at];
            if (token == tf::kNone) break;
            positions[slot]++;
            last[slot] = std::max(token, 0);
            if (token < 0) {
                reasons[i] = 2;
                continue;
            }
            sums[slot] += logprobs[at];
            if (ends[i] && eos[token]) {
                reasons[i] = 1;
                continue;
            }
            size_t place = (size_t)slot * width + counts[slot];
            history[place] = token;
            scores[place] = logprobs[at];
            if (++counts[slot] >= limits[slot]) reasons[i] = 3;
        }
    }
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
