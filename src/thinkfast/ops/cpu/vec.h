// Float vectors on GCC/Clang vector extensions: the compiler lowers them to AVX2, NEON or scalars. Eight lanes, or, as
// `vec`, sixteen where the processor has them.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace tf {

typedef float v8 __attribute__((vector_size(32)));
#ifdef __AVX512F__
typedef float vec __attribute__((vector_size(64)));
#else
typedef v8 vec;
#endif
typedef int32_t v8i __attribute__((vector_size(32)));
typedef uint32_t v8w __attribute__((vector_size(32)));
typedef float v4 __attribute__((vector_size(16)));
typedef double v4d __attribute__((vector_size(32)));
typedef int64_t v4l __attribute__((vector_size(32)));
typedef uint32_t v8w_any __attribute__((vector_size(32), aligned(2), may_alias));

#define TF_INLINE static inline __attribute__((always_inline))

// Asks for the cache lines of `bytes` bytes from p on, which may lie outside of what is allocated. Locality 3 brings them
// into the first level of cache, 2 into the second.
template <int Locality = 3>
TF_INLINE void fetch(const void* p, size_t bytes) {
    for (size_t line = 0; line < bytes; line += 64) __builtin_prefetch(static_cast<const char*>(p) + line, 0, Locality);
}

constexpr int kLanes = sizeof(vec) / sizeof(float);
constexpr int kSpare = 16;  // floats that loops over whole vectors may touch behind the end of a row

template <class V = v8>
TF_INLINE V load(const float* p) {
    V x;
    std::memcpy(&x, p, sizeof x);
    return x;
}

template <class V>
TF_INLINE void store(float* p, V x) {
    std::memcpy(p, &x, sizeof x);
}

template <class V = v8>
TF_INLINE V splat(float x) {
    return x - V{};
}

TF_INLINE v4d splat(double x) { return v4d{x, x, x, x}; }

TF_INLINE v8 larger(v8 a, v8 b) { return a > b ? a : b; }

TF_INLINE float sum(v8 x) { return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7])); }

TF_INLINE float largest(v8 x) {
    float m = x[0];
    for (int i = 1; i < 8; i++) m = x[i] > m ? x[i] : m;
    return m;
}

constexpr int round_up(int n, int to) { return (n + to - 1) / to * to; }

// Adding and subtracting 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits.
constexpr float kRound = 12582912.0f;

// exp(x) for x <= 88, relative error about 2e-7 (range reduction and polynomial of the Cephes library).
// Below -87 it gives about 1e-38 instead of going on to zero; NaN stays NaN.
template <class V>
TF_INLINE V exp_upto88(V x) {
    const V lowest = splat<V>(-87.0f);
    x = x < lowest ? lowest : x;
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
    return y * (V)power;
}

template <class V>
TF_INLINE V silu(V x) {
    const V lowest = splat<V>(-88.0f);
    return x / (exp_upto88(-(x < lowest ? lowest : x)) + 1.0f);
}

// exp(x) for x <= 0 in double precision, about 1 ulp (rational form of the Cephes library); 1e-304 below -700.
TF_INLINE v4d exp_negative(v4d x) {
    x = x < splat(-700.0) ? splat(-700.0) : x;
    const v4d round = splat(6755399441055744.0);
    v4d shifted = x * splat(1.4426950408889634) + round;
    v4d n = shifted - round;
    v4d r = x - n * splat(6.93145751953125e-1);
    r = r - n * splat(1.42860682030941723212e-6);
    v4d s = r * r;
    v4d p = (splat(1.26177193074810590878e-4) * s + splat(3.02994407707441961300e-2)) * s + splat(9.99999999999999999910e-1);
    p = p * r;
    v4d q = (splat(3.00198505138664455042e-6) * s + splat(2.52448340349684104192e-3)) * s;
    q = (q + splat(2.27265548208155028766e-1)) * s + splat(2.00000000000000000009e0);
    v4d y = splat(1.0) + splat(2.0) * p / (q - p);
    v4l power = ((v4l)shifted << 52) + 0x3ff0000000000000LL;
    return y * (v4d)power;
}

// log(1 + exp(x)), exact to float rounding also where it is tiny.
static inline float softplus(float x) { return x > 20.0f ? x : std::log1p(std::exp(x)); }

// y = x / rms(x) * weight over n values.
static inline void rms_norm(const float* x, const float* weight, float* y, int n, float eps) {
    v8 even = splat(0.0f), odd = splat(0.0f);
    int i = 0;
    for (; i + 16 <= n; i += 16) {
        v8 a = load(x + i), b = load(x + i + 8);
        even += a * a;
        odd += b * b;
    }
    float total = sum(even + odd);
    for (int j = i; j < n; j++) total += x[j] * x[j];
    float scale = 1.0f / std::sqrt(total / n + eps);
    for (i = 0; i + 8 <= n; i += 8) store(y + i, load(x + i) * splat(scale) * load(weight + i));
    for (; i < n; i++) y[i] = x[i] * scale * weight[i];
}

}  // namespace tf
