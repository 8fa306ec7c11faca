// Several tokens in a row of the same tile, so that its states stay in cache and nobody waits in between.
#pragma once
#include <chrono>

#include "pool.h"

namespace tf {

using Clock = std::chrono::steady_clock;

constexpr int32_t kNone = -2;  // where no token was drawn

// What `tf_step` is asked for, by row.
struct Burst {
    Draw how;
    int n, steps;
    const int32_t *tokens, *positions;
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

// Rows [begin, end) of a burst, one tile. late: whether to stop, by parity of the step, seen by the whole team: its
// first member writes what the others read behind the next meeting.
static inline void run_burst(const Pool& pool, Scratch& s, Scratch::Mine& mine, const Burst& b, const int32_t* slots, int begin, int end, bool* late, Team team) {
    const Model& m = pool.model;
    Row rows[kTile] = {};
    int places[kTile], count = end - begin;
    for (int i = 0; i < count; i++) {
        places[i] = begin + i;
        rows[i] = {slots[begin + i], b.tokens[begin + i], b.positions[begin + i]};
    }
    for (int step = 0; count; step++) {
        pool.tile(s, mine, rows, count, true, team);
        for (int i = team.begin(count); i < team.end(count); i++) {
            float* row = &s.logits[(size_t)i * m.head.n];
            int place = places[i];
            size_t at = (size_t)step * b.n + place;
            b.out[at] = draw(row, m.vocab, b.how, b.keys[place], (uint64_t)b.counters[place] + step, mine.weights, mine.ids, &b.logprobs[at]);
            if (b.logits) std::memcpy(b.logits + (size_t)place * m.vocab, row, sizeof(float) * m.vocab);
        }
        if (team.rank == 0) late[step % 2] = b.over();
        team.meet();
        if (late[step % 2]) return;
        int kept = 0;
        for (int i = 0; i < count; i++) {
            if (!b.goes_on(places[i], step)) continue;
            places[kept] = places[i];
            rows[kept++] = {rows[i].slot, b.out[(size_t)step * b.n + places[i]], rows[i].position + 1};
        }
        count = kept;
    }
}

}  // namespace tf
