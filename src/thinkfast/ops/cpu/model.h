// A decoder's weights, packed, and what its slots remember.
#pragma once
#include <sys/mman.h>

#include <memory>
#include <new>
#include <stdexcept>
#include <vector>

#include "attention.h"
#include "gemm.h"
#include "mamba.h"

namespace tf {

// Zeroed pages that take memory only once touched.
class Pages {
   public:
    explicit Pages(size_t bytes) : bytes_(bytes) {
        if (!bytes) return;
        data_ = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (data_ == MAP_FAILED) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
        madvise(data_, bytes, MADV_HUGEPAGE);
#endif
    }
    Pages(const Pages&) = delete;
    Pages& operator=(const Pages&) = delete;
    ~Pages() {
        if (bytes_) munmap(data_, bytes_);
    }
    char* data() const { return static_cast<char*>(data_); }

   private:
    size_t bytes_;
    void* data_ = nullptr;
};

struct Layer {
    bool attention = true;
    int index = 0;  // among the layers of its kind
    std::vector<float> input_norm, post_norm;
    Packed qkv, o;
    MambaWeights mamba;
    Packed gate, up, down;
};

struct Model {
    int vocab, hidden, inter, heads, kv_heads, head_dim, dim;  // dim: head_dim padded to 16
    float eps;
    MambaShape mamba;
    int attention_layers = 0, mamba_layers = 0;
    std::vector<Layer> layers;
    std::vector<float> embed, norm;
    Packed head;
    std::unique_ptr<Pages> pages;

    // Puts the packed weights in the order of their use behind each other: aligned, on few pages, easy to fetch ahead.
    void settle() {
        std::vector<Packed*> order;
        for (Layer& l : layers) {
            if (l.attention) order.insert(order.end(), {&l.qkv, &l.o});
            else order.insert(order.end(), {&l.mamba.in_proj, &l.mamba.out_proj});
            order.insert(order.end(), {&l.gate, &l.up, &l.down});
        }
        order.push_back(&head);
        size_t total = 0;
        for (Packed* p : order) total += p->size();
        pages = std::make_unique<Pages>(sizeof(float) * total);
        float* next = reinterpret_cast<float*>(pages->data());
        for (Packed* p : order) next = p->settle(next);
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

// The tensors of a layer in the order of `attention_tensors` and `mamba_tensors` in native.py.
static inline Layer read_layer(const Model& m, bool attention, const float* const* w) {
    Layer layer;
    layer.attention = attention;
    layer.input_norm = copied(*w++, m.hidden);
    if (attention) {
        auto q = pad_heads(*w++, m.heads, m.head_dim, m.dim, m.hidden);
        auto k = pad_heads(*w++, m.kv_heads, m.head_dim, m.dim, m.hidden);
        auto v = pad_heads(*w++, m.kv_heads, m.head_dim, m.dim, m.hidden);
        layer.qkv = pack({q.data(), k.data(), v.data()}, {m.heads * m.dim, m.kv_heads * m.dim, m.kv_heads * m.dim}, m.hidden);
        const float* o = *w++;
        std::vector<float> padded((size_t)m.hidden * m.heads * m.dim, 0.0f);
        for (int row = 0; row < m.hidden * m.heads; row++)
            std::memcpy(&padded[(size_t)row * m.dim], o + (size_t)row * m.head_dim, sizeof(float) * m.head_dim);
        layer.o = pack({padded.data()}, {m.hidden}, m.heads * m.dim);
    } else {
        const MambaShape& s = m.mamba;
        MambaWeights& to = layer.mamba;
        to.in_proj = pack({*w++}, {s.inner() + s.channels() + s.heads}, m.hidden);
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
        to.out_proj = pack({*w++}, {m.hidden}, s.inner());
    }
    layer.post_norm = copied(*w++, m.hidden);
    layer.gate = pack({*w++}, {m.inter}, m.hidden);
    layer.up = pack({*w++}, {m.inter}, m.hidden);
    layer.down = pack({*w++}, {m.hidden}, m.inter);
    return layer;
}

// Keys and values lie as [slot][attention layer][kv head][keys | values], Mamba memory as [mamba layer][slot].
class Memory {
   public:
    Memory(const Model& model, int slots, int capacity, bool half)
        : m_(model), slots_(slots), capacity_(round_up(capacity, 16)), element_(half ? 2 : 4),
          kv_(slots * kv_slot()), state_(sizeof(float) * slots * model.mamba_layers * model.mamba.slot_size()) {}

    bool half() const { return element_ == 2; }
    int capacity() const { return capacity_; }

    template <class T>
    KeyValues<T> kv(int slot, int layer, int head) const {
        T* keys = reinterpret_cast<T*>(kv_.data() + slot * kv_slot() + ((size_t)layer * m_.kv_heads + head) * kv_head());
        return {keys, keys + (size_t)capacity_ * m_.dim, keys, m_.dim};
    }

    float* mamba(int slot, int layer) const {
        return reinterpret_cast<float*>(state_.data()) + ((size_t)layer * slots_ + slot) * m_.mamba.slot_size();
    }

    // Size and copy of what a slot remembers after `length` tokens.
    size_t bytes(int length) const {
        return 2 * kv_part(length) * m_.attention_layers * m_.kv_heads + sizeof(float) * m_.mamba_layers * m_.mamba.slot_size();
    }

    template <class Copy>
    void each_part(int slot, int length, Copy copy) const {
        for (int layer = 0; layer < m_.attention_layers; layer++)
            for (int head = 0; head < m_.kv_heads; head++) {
                char* keys = kv_.data() + slot * kv_slot() + ((size_t)layer * m_.kv_heads + head) * kv_head();
                copy(keys, kv_part(length));
                copy(keys + kv_head() / 2, kv_part(length));
            }
        for (int layer = 0; layer < m_.mamba_layers; layer++)
            copy(reinterpret_cast<char*>(mamba(slot, layer)), sizeof(float) * m_.mamba.slot_size());
    }

   private:
    size_t kv_part(int length) const { return (size_t)round_up(length, 16) * m_.dim * element_; }
    size_t kv_head() const { return 2 * kv_part(capacity_); }
    size_t kv_slot() const { return kv_head() * m_.attention_layers * m_.kv_heads; }

    const Model& m_;
    const int slots_, capacity_;
    const size_t element_;
    Pages kv_, state_;
};

}  // namespace tf
