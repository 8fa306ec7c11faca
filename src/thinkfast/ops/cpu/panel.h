// Products of many rows with weights that stay in a cache. Rows come a tile at a time, so that what is computed from
// them between two products stays there as well; gradients of weights are summed part by part of the rows, in an order
// that does not depend on the number of threads.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "tile.h"

namespace tf {

constexpr int kTall = 6;                     // rows of a product that are summed in registers together,
constexpr int kWide = kLanes == 16 ? 4 : 2;  // and vectors of its columns
constexpr int kPanel = kWide * kLanes;
constexpr int kTile = 96;      // rows that go through several products before the next ones
constexpr int kPart = 4;       // tiles whose gradients are summed before those of other parts are added
constexpr int kSpread = 16;    // floats that keep rows of a power of two from falling on the same lines of a cache

// Some rows of a weight, in runs of one behind another.
struct Run {
    int first, count;
};

// A matrix (k, n) in panels of kPanel columns, each in one piece; the last is narrower. n grows to a multiple of kBlock
// with zeros.
class Panels {
   public:
    // The rows `runs` of the weight (..., columns), or the transpose of that. All runs but the last are multiples of kBlock.
    Panels(const float* weight, const std::vector<Run>& runs, int columns, bool turned)
        : k(turned ? columns : rows_of(runs)), n(turned ? round_up(rows_of(runs), kBlock) : columns), data_((size_t)k * n) {
        int i = 0;
        for (const Run& run : runs)
            for (int first = 0; first < run.count; first += kBlock, i += kBlock) {
                const int count = std::min(kBlock, run.count - first);
                const float* from = weight + (size_t)(run.first + first) * columns;
                if (turned) turn(from, columns, count, i);
                else spread(from, columns, count, i);
            }
    }

    Panels(const float* weight, int rows, int columns, bool turned) : Panels(weight, {{0, rows}}, columns, turned) {}

    int width(int column) const { return std::min(kPanel, n - column); }
    const float* at(int column) const { return data_.get() + (size_t)column * k; }

    const int k, n;

   private:
    static int rows_of(const std::vector<Run>& runs) {
        int rows = 0;
        for (const Run& run : runs) rows += run.count;
        return rows;
    }

    float* place(int column) { return data_.get() + (size_t)column * k; }

    // `count` rows become the columns from `column` on, a block of them.
    void turn(const float* from, int ld, int count, int column) {
        const int panel = column / kPanel * kPanel, wide = width(panel);
        float* to = place(panel) + column - panel;
        if (count == kBlock) return transpose(from, ld, to, wide, kBlock, k);
        for (int i = 0; i < k; i++)
            for (int c = 0; c < kBlock; c++) to[i * wide + c] = c < count ? from[c * ld + i] : 0.0f;
    }

    // `count` rows become rows from `row` on.
    void spread(const float* from, int ld, int count, int row) {
        for (int c = 0; c < n; c += kPanel)
            for (int i = 0; i < count; i++) std::memcpy(place(c) + (row + i) * width(c), from + i * ld + c, sizeof(float) * width(c));
    }

    Floats data_;
};

// C (m, vectors) = A (m, k) B (k, vectors), or C += A B, for any m.
template <int V>
static inline void strips(Strided a, const float* b, int ldb, float* c, int ldc, int m, int k, bool add) {
    constexpr int tall = V == 1 ? 2 * kTall : kTall;  // so many sums at once that none has to wait for itself
    int r = 0;
    for (; r + tall <= m; r += tall) stripe<tall, V>({a.at + r * a.row, a.row, a.col}, b, ldb, c + (size_t)r * ldc, ldc, k, add);
    for (; r + 2 <= m; r += 2) stripe<2, V>({a.at + r * a.row, a.row, a.col}, b, ldb, c + (size_t)r * ldc, ldc, k, add);
    if (r < m) stripe<1, V>({a.at + r * a.row, a.row, a.col}, b, ldb, c + (size_t)r * ldc, ldc, k, add);
}

static inline void strips(int vectors, Strided a, const float* b, int ldb, float* c, int ldc, int m, int k, bool add) {
    if (vectors == kWide) return strips<kWide>(a, b, ldb, c, ldc, m, k, add);
    if (vectors == 3) return strips<3>(a, b, ldb, c, ldc, m, k, add);
    if (vectors == 2) return strips<2>(a, b, ldb, c, ldc, m, k, add);
    strips<1>(a, b, ldb, c, ldc, m, k, add);
}

// C (rows, b.n) = A (rows, b.k) B, or C += A B.
static inline void multiply(const float* a, int lda, const Panels& b, float* c, int ldc, int rows, bool add) {
    for (int j = 0; j < b.n; j += kPanel)
        strips(b.width(j) / kLanes, {a, lda, 1}, b.at(j), b.width(j), c + j, ldc, rows, b.k, add);
}

// C (n, m) = the transpose of G (rows, n) times X (rows, m), or C += that; m is a multiple of kBlock.
static inline void outer(const float* g, int ldg, int n, const float* x, int ldx, int m, int rows, float* c, bool add) {
    for (int j = 0; j < m; j += kPanel) strips(std::min(kPanel, m - j) / kLanes, {g, 1, ldg}, x + j, ldx, c + j, m, n, rows, add);
}

// Calls task(first row, count) for every tile.
template <class Task>
static void tiles(int64_t rows, int threads, const Task& task) {
    share((int)((rows + kTile - 1) / kTile), threads, [&](int index) {
        const int64_t first = (int64_t)index * kTile;
        task(first, (int)std::min<int64_t>(kTile, rows - first));
    });
}

static inline int parts_of(int64_t rows) { return (int)((rows + kPart * kTile - 1) / (kPart * kTile)); }

// Calls task(part, first row, count, whether it is the part's first tile) for every tile; those of a part in turn.
template <class Task>
static void parts(int64_t rows, int threads, const Task& task) {
    share(parts_of(rows), threads, [&](int part) {
        for (int tile = 0; tile < kPart; tile++) {
            const int64_t first = ((int64_t)part * kPart + tile) * kTile;
            if (first < rows) task(part, first, (int)std::min<int64_t>(kTile, rows - first), tile == 0);
        }
    });
}

// out (size) = the sum of `count` rows that begin `stride` floats apart.
static inline void add_up(const float* rows, int count, size_t stride, size_t size, float* out, int threads) {
    constexpr size_t kSome = 4096;
    share((int)((size + kSome - 1) / kSome), threads, [&](int block) {
        const size_t first = block * kSome, last = std::min(size, first + kSome);
        std::memcpy(out + first, rows + first, sizeof(float) * (last - first));
        for (int r = 1; r < count; r++)
            for (size_t i = first; i < last; i++) out[i] += rows[r * stride + i];
    });
}

}  // namespace tf
