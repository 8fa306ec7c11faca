// Products and transposes of small matrices that lie in a cache, and torch's own threads.
#pragma once
#include <dlfcn.h>

#include <atomic>
#include <cstdlib>
#include <new>

#include "vec.h"

namespace tf {

// A matrix whose neighbours in a column lie `row` floats apart and those in a row `col`.
struct Strided {
    const float* at;
    int row, col;
};

enum class Shape { full, lower, upper };  // what of the left matrix is not zero

constexpr int kStripe = kLanes == 16 ? 8 : 4;  // rows of a product that are summed in registers together
constexpr int kBlock = 16;                     // sizes of matrices here are multiples of this

// C (M, V vectors) = A (M, k) B (k, V vectors), or C += A B.
template <int M, int V>
TF_INLINE void stripe(Strided a, const float* b, int ldb, float* c, int ldc, int k, bool add) {
    vec acc[M][V];
#pragma GCC unroll 12
    for (int r = 0; r < M; r++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) acc[r][v] = add ? load(c + r * ldc + v * kLanes) : vec{};
    for (int i = 0; i < k; i++) {
        vec right[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) right[v] = load(b + i * ldb + v * kLanes);
        const float* left = a.at + i * a.col;
#pragma GCC unroll 12
        for (int r = 0; r < M; r++) {
            vec one = splat<vec>(left[r * a.row]);
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) acc[r][v] += one * right[v];
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < M; r++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) store(c + r * ldc + v * kLanes, acc[r][v]);
}

// C (m, n) = A (m, k) B (k, n), or C += A B; m, k and n multiples of kBlock.
static inline void product(Strided a, const float* b, int ldb, float* c, int ldc, int m, int k, int n, bool add,
                           Shape shape = Shape::full) {
    for (int r = 0; r < m; r += kStripe) {
        int first = shape == Shape::upper ? r : 0, last = shape == Shape::lower ? r + kStripe : k;
        Strided rows{a.at + r * a.row + first * a.col, a.row, a.col};
        const float* from = b + first * ldb;
        int v = 0;
        for (; v + 2 * kLanes <= n; v += 2 * kLanes) stripe<kStripe, 2>(rows, from + v, ldb, c + r * ldc + v, ldc, last - first, add);
        if (v < n) stripe<kStripe, 1>(rows, from + v, ldb, c + r * ldc + v, ldc, last - first, add);
    }
}

typedef decltype(vec{} < vec{}) lanes;

// begin, begin + 1, ...
TF_INLINE lanes count_from(int begin) {
    lanes x;
    for (int i = 0; i < kLanes; i++) x[i] = i;
    return x + begin;
}

// The sum of all lanes, in the order of `sum`, in registers alone.
TF_INLINE float lanes_sum(vec x) {
#if defined(__AVX512F__)
    __m256 eight = _mm256_add_ps(_mm512_castps512_ps256((__m512)x), _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd((__m512)x), 1)));
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_add_ps(four, _mm_permute_ps(four, 0x4e));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_permute_ps(four, 0xb1)));
#else
    return sum(x);
#endif
}

TF_INLINE vec sigmoid(vec x) {
    const vec lowest = splat<vec>(-80.0f);
    return reciprocal(exp_upto88(-(x < lowest ? lowest : x)) + 1.0f);
}

// Lanes of the lower or upper halves of a and b in turn.
TF_INLINE vec lower_halves(vec a, vec b) {
#if defined(__AVX512F__)
    return (vec)_mm512_permutex2var_ps((__m512)a, _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23), (__m512)b);
#elif defined(__clang__)
    return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
#else
    return __builtin_shuffle(a, b, lanes{0, 8, 1, 9, 2, 10, 3, 11});
#endif
}

TF_INLINE vec upper_halves(vec a, vec b) {
#if defined(__AVX512F__)
    return (vec)_mm512_permutex2var_ps((__m512)a, _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31), (__m512)b);
#elif defined(__clang__)
    return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
    return __builtin_shuffle(a, b, lanes{4, 12, 5, 13, 6, 14, 7, 15});
#endif
}

// to (n, m) = the transpose of from (m, n), both multiples of kBlock: perfect shuffles of as many rows as lanes.
static inline void transpose(const float* from, int ld, float* to, int ldt, int m, int n) {
    for (int r = 0; r < m; r += kLanes)
        for (int c = 0; c < n; c += kLanes) {
            vec x[kLanes], y[kLanes];
#pragma GCC unroll 16
            for (int i = 0; i < kLanes; i++) x[i] = load(from + (r + i) * ld + c);
#pragma GCC unroll 4
            for (int turn = 1; turn < kLanes; turn *= 2) {
#pragma GCC unroll 8
                for (int i = 0; i < kLanes / 2; i++) {
                    y[2 * i] = lower_halves(x[i], x[i + kLanes / 2]);
                    y[2 * i + 1] = upper_halves(x[i], x[i + kLanes / 2]);
                }
#pragma GCC unroll 16
                for (int i = 0; i < kLanes; i++) x[i] = y[i];
            }
#pragma GCC unroll 16
            for (int i = 0; i < kLanes; i++) store(to + (c + i) * ldt + r, x[i]);
        }
}

// Calls task(index) for every index below `tasks` on the threads that torch keeps for OpenMP: a pool of our own would
// fight with them for the cores, because they go on looking for work for a while. Without OpenMP there is one thread.
template <class Task>
static void share(int tasks, int threads, const Task& task) {
    struct Work {
        const Task* task;
        int tasks;
        std::atomic<int> next;
    } work{&task, tasks, {0}};
    auto take = [](void* given) {
        Work& all = *static_cast<Work*>(given);
        for (int i = all.next.fetch_add(1); i < all.tasks; i = all.next.fetch_add(1)) (*all.task)(i);
    };
    typedef void (*Fork)(void (*)(void*), void*, unsigned, unsigned);
    static const Fork fork = reinterpret_cast<Fork>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    int useful = threads < tasks ? threads : tasks;
    if (fork && useful > 1) fork(take, &work, (unsigned)useful, 0);
    else take(&work);
}

// Floats that begin at a cache line.
class Floats {
   public:
    explicit Floats(size_t count) : at_(static_cast<float*>(std::aligned_alloc(64, (count * 4 + 63) / 64 * 64))) {
        if (!at_) throw std::bad_alloc();
    }
    ~Floats() { std::free(at_); }
    Floats(const Floats&) = delete;
    Floats& operator=(const Floats&) = delete;

    float* get() const { return at_; }

   private:
    float* at_;
};

// Memory for the intermediate results of one task.
class Scratch {
   public:
    explicit Scratch(size_t floats) : data_(floats), next_(data_.get()), left_(floats) {}

    float* take(size_t floats) {
        floats = (floats + 15) / 16 * 16;
        if (floats > left_) std::abort();
        left_ -= floats;
        next_ += floats;
        return next_ - floats;
    }

   private:
    Floats data_;
    float* next_;
    size_t left_;
};

}  // namespace tf
