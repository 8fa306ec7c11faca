// Float vectors on GCC/Clang vector extensions: the compiler lowers them to AVX2, NEON or scalars. Eight lanes, or, as
// `vec`, sixteen where the processor has them.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace tf {

typedef float v8 __attribute__((vector_size(32)));
#ifdef __AVX512F__
typedef float vec __attribute__((vector_size(64)));
typedef uint32_t word_any __attribute__((vector_size(64), aligned(2), may_alias));
#else
typedef v8 vec;
typedef uint32_t word_any __attribute__((vector_size(32), aligned(2), may_alias));
#endif
typedef double v8d __attribute__((vector_size(64)));

#define TF_INLINE static inline __attribute__((always_inline))

// Asks for the cache lines of `bytes` bytes from p on, which may lie outside of what is allocated. Locality 3 brings them
// into the first level of cache, 2 into the second.
template <int Locality = 3>
TF_INLINE void fetch(const void* p, size_t bytes) {
    for (size_t line = 0; line < bytes; line += 64) __builtin_prefetch(static_cast<const char*>(p) + line, 0, Locality);
}

constexpr int kLanes = sizeof(vec) / sizeof(float);
constexpr int kSpare = 16;  // floats that loops over whole vectors may touch behind the end of a row

template <class V = vec>
TF_INLINE V load(const float* p) {
    V x;
    std::memcpy(&x, p, sizeof x);
    return x;
}

template <class V>
TF_INLINE void store(float* p, V x) {
    std::memcpy(p, &x, sizeof x);
}

template <class V = vec>
TF_INLINE V splat(float x) {
    return x - V{};
}

template <class V>
TF_INLINE V larger(V a, V b) {
    return a > b ? a : b;
}

TF_INLINE v8 half(vec x, [[maybe_unused]] int which) {
#ifdef __AVX512F__
    return which ? (v8)_mm512_extractf64x4_pd((__m512d)x, 1) : (v8)_mm512_castps512_ps256((__m512)x);
#else
    v8 part;
    std::memcpy(&part, reinterpret_cast<const char*>(&x) + which * (sizeof x - sizeof part), sizeof part);
    return part;
#endif
}

TF_INLINE float sum(vec full) {
    v8 x = kLanes == 8 ? half(full, 0) : half(full, 0) + half(full, 1);
    return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
}

TF_INLINE float largest(vec full) {
    v8 x = larger(half(full, 0), half(full, 1));
    float m = x[0];
    for (int i = 1; i < 8; i++) m = x[i] > m ? x[i] : m;
    return m;
}

constexpr int round_up(int n, int to) { return (n + to - 1) / to * to; }

// Adding and subtracting 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits.
constexpr float kRound = 12582912.0f;

// exp(x) for x <= 88, relative error about 2e-7 (range reduction and polynomial of the Cephes library).
// Zero below -87; NaN stays NaN.
template <class V>
TF_INLINE V exp_upto88(V x) {
    const V lowest = splat<V>(-87.0f);
    V shifted = x * 1.44269504f + kRound;
    V n = shifted - kRound;
    V r = x - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    V y = r * 1.9875691500e-4f + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * (r * r) + (r + 1.0f);
    auto power = ((decltype(x < x))shifted << 23) + 0x3f800000;
    return x < lowest ? V{} : y * (V)power;
}

// 2^x for x <= 0, relative error about 1.5e-7 (a polynomial fitted to 2^r on [0, 1)). Zero below -126; NaN stays NaN.
TF_INLINE vec exp2_upto0(vec x) {
    const vec lowest = splat<vec>(-126.0f);
#ifdef __AVX512DQ__
    vec r = (vec)_mm512_reduce_ps((__m512)x, 9);  // what is above the next integer below
#else
    vec shifted = (x - 0.5f) + kRound;
    vec r = x - (shifted - kRound);
#endif
    vec y = r * 1.87757665e-3f + 8.98934016e-3f;
    y = y * r + 5.58263180e-2f;
    y = y * r + 2.40153617e-1f;
    y = y * r + 6.93153073e-1f;
    y = y * r + 9.99999925e-1f;
#ifdef __AVX512DQ__
    return (vec)_mm512_mask_scalef_ps((__m512)vec{}, _mm512_cmp_ps_mask((__m512)x, (__m512)lowest, _CMP_NLT_UQ), (__m512)y, (__m512)x);
#else
    auto power = ((decltype(x < x))shifted << 23) + 0x3f800000;
    return x < lowest ? vec{} : y * (vec)power;
#endif
}

// exp(x) for x <= 0 in double precision, about 1 ulp: the series to r^13 on |r| <= log(2) / 2. Zero below -700.
TF_INLINE v8d exp_negative(v8d x) {
    typedef decltype(x < x) ints;
    const v8d lowest = -700.0 - v8d{}, round = 6755399441055744.0 - v8d{};
    v8d near = x < lowest ? lowest : x;
    v8d shifted = near * 1.4426950408889634 + round;
    v8d n = shifted - round;
    v8d r = near - n * 6.93145751953125e-1 - n * 1.42860682030941723212e-6;
    v8d y = r * (1.0 / 6227020800.0) + 1.0 / 479001600.0;
    y = y * r + 1.0 / 39916800.0;
    y = y * r + 1.0 / 3628800.0;
    y = y * r + 1.0 / 362880.0;
    y = y * r + 1.0 / 40320.0;
    y = y * r + 1.0 / 5040.0;
    y = y * r + 1.0 / 720.0;
    y = y * r + 1.0 / 120.0;
    y = y * r + 1.0 / 24.0;
    y = y * r + 1.0 / 6.0;
    y = y * r + 0.5;
    y = y * r + 1.0;
    y = y * r + 1.0;
    ints power = ((ints)shifted << 52) + 0x3ff0000000000000LL;
    return x < lowest ? v8d{} : y * (v8d)power;
}

// 1 / x for finite x far from the ends of the range; about one unit in the last place.
TF_INLINE vec reciprocal(vec x) {
#ifdef __AVX512F__
    vec y = (vec)_mm512_rcp14_ps((__m512)x);
    return y + y * (1.0f - x * y);
#else
    return 1.0f / x;
#endif
}

TF_INLINE vec silu(vec x) {
    const vec lowest = splat<vec>(-80.0f);
    return x * reciprocal(exp_upto88(-(x < lowest ? lowest : x)) + 1.0f);
}

// log(x) for normal x > 0 (Cephes library).
TF_INLINE vec log_of(vec x) {
    typedef decltype(x < x) ints;
    ints bits = (ints)x;
    ints exponent = ((bits >> 23) & 255) - 126;
    vec m = (vec)((bits & 0x007fffff) | 0x3f000000);  // in [.5, 1)
    auto low = m < 0.707106781186547524f;
    exponent += low;
    m = (low ? m + m : m) - 1.0f;
    vec e = __builtin_convertvector(exponent, vec), square = m * m;
    vec y = m * 7.0376836292e-2f - 1.1514610310e-1f;
    y = y * m + 1.1676998740e-1f;
    y = y * m - 1.2420140846e-1f;
    y = y * m + 1.4249322787e-1f;
    y = y * m - 1.6668057665e-1f;
    y = y * m + 2.0000714765e-1f;
    y = y * m - 2.4999993993e-1f;
    y = y * m + 3.3333331174e-1f;
    y = y * m * square + e * -2.12194440e-4f - square * 0.5f;
    return (m + y) + e * 0.693359375f;
}

// log(1 + exp(x)), exact to a few units in the last place also where it is tiny.
TF_INLINE vec softplus(vec x) {
    const vec highest = splat<vec>(20.0f);
    vec small = exp_upto88(x < highest ? x : highest), one = small + 1.0f;
    // What the sum has lost of `small` comes back as the first term of the series.
    vec y = log_of(one) + (small - (one - 1.0f)) / one;
    return x > highest ? x : y;
}

// y = x / rms(x) * weight over n values.
static inline void rms_norm(const float* x, const float* weight, float* y, int n, float eps) {
    vec even = vec{}, odd = vec{};
    int i = 0;
    for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
        vec a = load(x + i), b = load(x + i + kLanes);
        even += a * a;
        odd += b * b;
    }
    float total = sum(even + odd);
    for (int j = i; j < n; j++) total += x[j] * x[j];
    float scale = 1.0f / std::sqrt(total / n + eps);
    for (i = 0; i + kLanes <= n; i += kLanes) store(y + i, load(x + i) * scale * load(weight + i));
    for (; i < n; i++) y[i] = x[i] * scale * weight[i];
}

}  // namespace tf
