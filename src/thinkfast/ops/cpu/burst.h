// Several tokens in a row of the same tile, so that its states stay in cache and nobody waits in between.
#pragma once
#include <algorithm>
#include <atomic>
#include <chrono>
#include <mutex>
#include <vector>

#include "pool.h"

namespace tf {

using Clock = std::chrono::steady_clock;

constexpr int32_t kNone = -2;  // where no token was drawn

// What `tf_step` is asked for, by row.
struct Burst {
    const Draw* how;
    int n, steps;
    const int32_t *slots, *tokens, *positions;
    const uint64_t* keys;
    const int64_t* counters;
    const int32_t* rooms;
    const uint8_t *ends, *eos;
    const volatile uint8_t* interrupted;
    int32_t* out;
    double* logprobs;
    float* logits;
    Clock::time_point until;

    bool over() const { return (interrupted && *interrupted) || Clock::now() >= until; }

    // Whether row i, with what it has drawn in `step`, goes on.
    bool goes_on(int i, int step) const {
        int token = out[(size_t)step * n + i];
        return step + 1 < std::min(steps, rooms[i]) && token >= 0 && !(ends[i] && eos[token]);
    }
};

// Rows of a burst that go on together, each with its place in the burst; `step` is the one they take.
struct Tile {
    Row rows[kTile];
    int places[kTile];
    int count = 0, step = 0;

    void add(const Row& row, int place) {
        rows[count] = row;
        places[count++] = place;
    }
};

static inline Tile tile_of(const Burst& b, int begin, int end) {
    Tile t;
    for (int i = begin; i < end; i++) t.add({b.slots[i], b.tokens[i], b.positions[i]}, i);
    return t;
}

// Tiles that wait for a thread. Threads do not get on alike, since others want their processors too and rows end early:
// whoever has nothing left gets half of another's rows.
class Board {
   public:
    explicit Board(std::vector<Tile> tiles) : waiting_(std::move(tiles)), left_((int)waiting_.size()) {
        std::reverse(waiting_.begin(), waiting_.end());  // the first is taken first
    }

    // The next tile, once there is one; false when the last is done.
    bool take(Tile& tile) {
        idle_.fetch_add(1, std::memory_order_acq_rel);
        bool found = false;
        auto over = [&] {
            if (left_.load(std::memory_order_acquire) == 0) return true;
            if (!offered_.load(std::memory_order_acquire)) return false;
            std::lock_guard<std::mutex> hold(mutex_);
            if (waiting_.empty()) return false;
            tile = waiting_.back();
            waiting_.pop_back();
            offered_.store(!waiting_.empty(), std::memory_order_release);
            return found = true;
        };
        while (!look(kLooks, over)) sched_yield();
        idle_.fetch_sub(1, std::memory_order_acq_rel);
        return found;
    }

    void done() { left_.fetch_sub(1, std::memory_order_acq_rel); }

    // Whether a thread waits that no tile is left for.
    bool wanted() const { return idle_.load(std::memory_order_acquire) > 0 && !offered_.load(std::memory_order_acquire); }

    // Leaves the second half of a tile, which has just taken a step, to others.
    void split(Tile& tile) {
        Tile half;
        half.step = tile.step + 1;
        int kept = (tile.count / 2 + 1) / 2 * 2;
        for (int i = kept; i < tile.count; i++) half.add(tile.rows[i], tile.places[i]);
        tile.count = kept;
        left_.fetch_add(1, std::memory_order_acq_rel);
        std::lock_guard<std::mutex> hold(mutex_);
        waiting_.push_back(half);
        offered_.store(true, std::memory_order_release);
    }

   private:
    std::mutex mutex_;
    std::vector<Tile> waiting_;
    std::atomic<bool> offered_{true};
    std::atomic<int> left_, idle_{0};
};

constexpr int kHalves = 8;  // rows that are worth halving

// A tile to the end of a burst. late: whether to stop, by parity of the step, seen by the whole team: its first member
// writes what the others read behind the next meeting. board: null where the team is everybody.
static inline void run_burst(const Pool& pool, Scratch& s, Scratch::Mine& mine, const Burst& b, Tile& t, bool* late, Team team, Board* board) {
    const Model& m = pool.model;
    for (; t.count; t.step++) {
        pool.tile(s, mine, t.rows, t.count, true, team);
        for (int i = team.begin(t.count); i < team.end(t.count); i++) {
            float* row = &s.logits[(size_t)i * m.head.n];
            int place = t.places[i];
            size_t at = (size_t)t.step * b.n + place;
            b.out[at] = draw(row, m.vocab, b.how[place], b.keys[place], (uint64_t)b.counters[place] + t.step, mine.weights, mine.ids, &b.logprobs[at]);
            if (b.logits) std::memcpy(b.logits + (size_t)place * m.vocab, row, sizeof(float) * m.vocab);
        }
        if (team.rank == 0) late[t.step % 2] = b.over();
        team.meet();
        if (late[t.step % 2]) return;
        int held = t.count;
        t.count = 0;
        for (int i = 0; i < held; i++) {
            if (!b.goes_on(t.places[i], t.step)) continue;
            Row next = {t.rows[i].slot, b.out[(size_t)t.step * b.n + t.places[i]], t.rows[i].position + 1};
            t.add(next, t.places[i]);
        }
        if (board && t.count >= kHalves && board->wanted()) board->split(t);
    }
}

}  // namespace tf
