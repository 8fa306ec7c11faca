// A decoder's weights, packed, and what its slots remember.
#pragma once
#include <memory>
#include <vector>

#include "attention.h"
#include "gemm.h"
#include "mamba.h"
#include "pages.h"

namespace tf {

struct Layer {
    bool attention = true;
    int index = 0;  // among the layers of its kind
    std::vector<float> input_norm, post_norm;
    Packed qkv, o;
    MambaWeights mamba;
    Packed gate, up, down;
};

struct Model {
    int vocab, hidden, inter, heads, kv_heads, head_dim, dim;  // dim: head_dim padded to 32
    float eps;
    bool half;  // weights in bfloat16
    MambaShape mamba;
    int attention_layers = 0, mamba_layers = 0;
    std::vector<Layer> layers;
    std::vector<float> norm;
    std::vector<float> embed;      // one of the two holds the embedding
    std::vector<Bf16> embed_half;
    Packed head;
    std::unique_ptr<Region> region;
    size_t bytes = 0;  // of the packed weights

    // Puts the packed weights in the order of their use behind each other: aligned, on few pages, easy to fetch ahead.
    void settle() {
        std::vector<Packed*> order;
        for (Layer& l : layers) {
            if (l.attention) order.insert(order.end(), {&l.qkv, &l.o});
            else order.insert(order.end(), {&l.mamba.in_proj, &l.mamba.out_proj});
            order.insert(order.end(), {&l.gate, &l.up, &l.down});
        }
        order.push_back(&head);
        for (Packed* p : order) bytes += p->bytes();
        region = std::make_unique<Region>(bytes);
        char* next = region->data();
        for (Packed* p : order) next = p->settle(next);
    }

    void read_embedding(const float* from) {
        size_t n = (size_t)vocab * hidden;
        if (!half) {
            embed.assign(from, from + n);
            return;
        }
        embed_half.resize(n);
        for (size_t i = 0; i < n; i++) embed_half[i] = rounded(from[i]);
    }

    void embedding(int token, float* to) const {
        size_t at = (size_t)token * hidden;
        if (!half) std::memcpy(to, &embed[at], sizeof(float) * hidden);
        else
            for (int i = 0; i < hidden; i++) to[i] = widened(embed_half[at + i]);
    }

    int hidden_padded() const { return round_up(hidden, kPanel); }
    // Widest output of a product besides the logits, and widest input of a product that leads back to `hidden`.
    int wide() const { return round_up(std::max((heads + 2 * kv_heads) * dim, mamba.inner() + mamba.channels() + mamba.heads), kPanel) + kSpare; }
    int middle() const { return std::max(std::max(heads * dim, round_up(inter, kPanel)), mamba.inner() + kSpare); }
};

static inline std::vector<float> copied(const float* from, int n) {
    std::vector<float> to(round_up(n, kSpare), 0.0f);
    std::memcpy(to.data(), from, sizeof(float) * n);
    return to;
}

// (heads * head_dim, k) rows -> (heads * dim, k) with zero rows behind each head.
static inline std::vector<float> pad_heads(const float* from, int heads, int head_dim, int dim, int k) {
    std::vector<float> to((size_t)heads * dim * k, 0.0f);
    for (int h = 0; h < heads; h++)
        std::memcpy(&to[(size_t)h * dim * k], from + (size_t)h * head_dim * k, sizeof(float) * head_dim * k);
    return to;
}

// The tensors of a layer in the order of `ATTENTION_TENSORS` and `MAMBA_TENSORS` in native.py.
static inline Layer read_layer(const Model& m, bool attention, const float* const* w) {
    Layer layer;
    layer.attention = attention;
    layer.input_norm = copied(*w++, m.hidden);
    if (attention) {
        auto q = pad_heads(*w++, m.heads, m.head_dim, m.dim, m.hidden);
        auto k = pad_heads(*w++, m.kv_heads, m.head_dim, m.dim, m.hidden);
        auto v = pad_heads(*w++, m.kv_heads, m.head_dim, m.dim, m.hidden);
        layer.qkv = pack({q.data(), k.data(), v.data()}, {m.heads * m.dim, m.kv_heads * m.dim, m.kv_heads * m.dim}, m.hidden, m.half);
        const float* o = *w++;
        std::vector<float> padded((size_t)m.hidden * m.heads * m.dim, 0.0f);
        for (int row = 0; row < m.hidden * m.heads; row++)
            std::memcpy(&padded[(size_t)row * m.dim], o + (size_t)row * m.head_dim, sizeof(float) * m.head_dim);
        layer.o = pack({padded.data()}, {m.hidden}, m.heads * m.dim, m.half);
    } else {
        const MambaShape& s = m.mamba;
        MambaWeights& to = layer.mamba;
        to.in_proj = pack({*w++}, {s.inner() + s.channels() + s.heads}, m.hidden, m.half);
        const float* conv = *w++;
        to.conv.assign((size_t)s.taps * s.channels_padded(), 0.0f);
        for (int c = 0; c < s.channels(); c++)
            for (int j = 0; j < s.taps; j++) to.conv[(size_t)j * s.channels_padded() + c] = conv[(size_t)c * s.taps + j];
        to.conv_bias = copied(*w++, s.channels());
        to.a = copied(*w++, s.heads);
        for (float& a : to.a) a = -std::exp(a);
        to.d = copied(*w++, s.heads);
        to.dt_bias = copied(*w++, s.heads);
        to.norm = copied(*w++, s.inner());
        to.out_proj = pack({*w++}, {m.hidden}, s.inner(), m.half);
    }
    layer.post_norm = copied(*w++, m.hidden);
    layer.gate = pack({*w++}, {m.inter}, m.hidden, m.half);
    layer.up = pack({*w++}, {m.inter}, m.hidden, m.half);
    layer.down = pack({*w++}, {m.hidden}, m.inter, m.half);
    return layer;
}

// The pages of every slot, and Mamba memory as [mamba layer][slot].
class Memory {
   public:
    Memory(const Model& model, int slots, int capacity, bool half, size_t limit)
        : m_(model), slots_(slots), capacity_(capacity), half_(half),
          store_(page_bytes(), model.attention_layers ? (size_t)slots * ((capacity + kPage - 1) / kPage) : 0, limit),
          state_(sizeof(float) * slots * model.mamba_layers * model.mamba.slot_size()), pages_(slots) {}

    bool half() const { return half_; }
    int capacity() const { return capacity_; }
    PageStore& store() { return store_; }

    const std::vector<int>& pages(int slot) const { return pages_[slot]; }

    char* page(int page) const { return store_.at(page); }

    // Where in a page the keys of a kv head lie, in bytes; its values lie kPage * dim elements behind.
    size_t within_page(int layer, int head) const { return (size_t)(layer * m_.kv_heads + head) * 2 * kPage * m_.dim * (half_ ? 2 : 4); }

    float* mamba(int slot, int layer) const {
        return reinterpret_cast<float*>(state_.data()) + ((size_t)layer * slots_ + slot) * m_.mamba.slot_size();
    }

    // Makes room for `length` tokens.
    void reserve(int slot, int length) {
        if (!m_.attention_layers) return;
        while ((int)pages_[slot].size() * kPage < length) pages_[slot].push_back(store_.take());
    }

    void clear(int slot) {
        store_.drop(pages_[slot]);
        pages_[slot].clear();
    }

    // Keeps what a slot holds after `length` tokens.
    std::unique_ptr<Kept> keep(int slot, int length) {
        auto kept = std::make_unique<Kept>();
        kept->length = length;
        kept->states.resize((size_t)m_.mamba_layers * m_.mamba.slot_size());
        for (int layer = 0; layer < m_.mamba_layers; layer++)
            std::memcpy(&kept->states[(size_t)layer * m_.mamba.slot_size()], mamba(slot, layer), sizeof(float) * m_.mamba.slot_size());
        if (m_.attention_layers) kept->pages = same(pages_[slot], length, length);
        return kept;
    }

    // Makes a slot go on from a kept state, on the same pages for the first `shared` tokens.
    void resume(int slot, const Kept& kept, int shared) {
        clear(slot);
        if (m_.attention_layers) pages_[slot] = same(kept.pages, kept.length, shared);
        for (int layer = 0; layer < m_.mamba_layers; layer++)
            std::memcpy(mamba(slot, layer), &kept.states[(size_t)layer * m_.mamba.slot_size()], sizeof(float) * m_.mamba.slot_size());
    }

    size_t page_bytes() const { return (size_t)m_.attention_layers * m_.kv_heads * 2 * kPage * m_.dim * (half_ ? 2 : 4); }

   private:
    // The same tokens: the first `shared` on the same pages as far as they fill them, the rest on copies.
    std::vector<int> same(const std::vector<int>& pages, int length, int shared) {
        int whole = std::min(shared, length) / kPage, all = (length + kPage - 1) / kPage;
        std::vector<int> to(pages.begin(), pages.begin() + whole);
        to.reserve(all);
        for (int page : to) store_.share(page);
        try {
            for (int i = whole; i < all; i++) {
                to.push_back(store_.take());
                std::memcpy(store_.at(to.back()), store_.at(pages[i]), store_.bytes());
            }
        } catch (const std::bad_alloc&) {
            store_.drop(to);
            throw;
        }
        return to;
    }

    const Model& m_;
    const int slots_, capacity_;
    const bool half_;
    PageStore store_;
    Region state_;
    std::vector<std::vector<int>> pages_;
};

}  // namespace tf
