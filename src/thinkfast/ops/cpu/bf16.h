// Bfloat16 in pairs: of a group of n numbers, word i holds number i in its low and number i + n / 2 in its high half, so
// that a shift and a mask turn one load into two vectors.
#pragma once
#include "vec.h"

namespace tf {

struct Bf16 {
    uint16_t bits;
};

typedef uint32_t words __attribute__((vector_size(sizeof(vec))));

TF_INLINE words splat_word(uint32_t x) { return x - words{}; }

constexpr int place(int i, int n) { return i % (n / 2) * 2 + i / (n / 2); }

// Round to nearest even; a NaN must not be rounded into an infinity.
TF_INLINE Bf16 rounded(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    uint32_t up = x != x ? 0x7fc00000u : bits + 0x7fffu + ((bits >> 16) & 1u);
    return {(uint16_t)(up >> 16)};
}

// The bits of `rounded`, in the low halves of the words.
TF_INLINE words rounded_bits(vec x) {
    words bits = (words)x;
    words up = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return x != x ? splat_word(0x7fc0u) : up;
}

TF_INLINE float widened(Bf16 x) {
    uint32_t bits = (uint32_t)x.bits << 16;
    float wide;
    std::memcpy(&wide, &bits, 4);
    return wide;
}

TF_INLINE void load_pair(const Bf16* p, vec& low, vec& high) {
    word_any pair = *reinterpret_cast<const word_any*>(p);
    low = (vec)(pair << 16);
    high = (vec)(pair & 0xffff0000u);
}

TF_INLINE void store_pair(Bf16* p, vec low, vec high) { *reinterpret_cast<word_any*>(p) = rounded_bits(low) | (rounded_bits(high) << 16); }

}  // namespace tf
