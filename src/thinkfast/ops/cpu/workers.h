// A few persistent threads, and barriers between the steps of what they do together. The caller works too.
#pragma once
#include <sched.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "vec.h"

namespace tf {

TF_INLINE void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
}

// Steps of a small model last microseconds, waking a thread takes tens of them: whoever waits looks often before it
// gives up its processor.
template <class Done>
static inline bool look(int times, Done done) {
    for (int i = 0; i < times; i++) {
        if (done()) return true;
        pause();
    }
    return done();
}

constexpr int kLooks = 4000;  // a tenth of a millisecond or so

class Barrier {
   public:
    void wait(int size) {
        int round = round_.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
            arrived_.store(0, std::memory_order_relaxed);
            round_.store(round + 1, std::memory_order_release);
            return;
        }
        auto over = [&] { return round_.load(std::memory_order_acquire) != round; };
        while (!look(kLooks, over)) sched_yield();
    }

   private:
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<int> round_{0};
};

// A thread's place among those that work on the same rows.
struct Team {
    int rank = 0, size = 1;
    Barrier* barrier = nullptr;

    void meet() const {
        if (size > 1) barrier->wait(size);
    }
    int begin(int n) const { return (int)((long)n * rank / size); }
    int end(int n) const { return (int)((long)n * (rank + 1) / size); }
};

class Workers {
   public:
    // Makes do with fewer threads where the system refuses more.
    explicit Workers(int threads) : owner_(getpid()) {
        try {
            for (int i = 1; i < threads; i++) threads_.emplace_back([this, i] { work(i); });
        } catch (const std::system_error&) {
        }
    }

    ~Workers() {
        if (getpid() != owner_) {  // after a fork the threads exist in the parent only
            for (auto& t : threads_) t.detach();
            return;
        }
        {
            std::lock_guard<std::mutex> hold(mutex_);
            stopping_ = true;
            round_++;
        }
        wake_.notify_all();
        for (auto& t : threads_) t.join();
    }

    int count() const { return getpid() == owner_ ? (int)threads_.size() + 1 : 1; }

    // Calls task(thread) in every thread at the same time.
    void all(const std::function<void(int)>& task) {
        if (count() == 1) return task(0);
        task_ = &task;
        busy_ = (int)threads_.size();
        {
            std::lock_guard<std::mutex> hold(mutex_);
            round_++;
        }
        wake_.notify_all();
        task(0);
        auto over = [this] { return busy_.load(std::memory_order_acquire) == 0; };
        while (!look(kLooks, over)) sched_yield();
    }

    // Calls task(thread, index) for every index below `tasks`, in ascending order of start.
    void share(int tasks, const std::function<void(int, int)>& task) {
        std::atomic<int> next{0};
        auto take = [&](int thread) {
            for (int i = next.fetch_add(1); i < tasks; i = next.fetch_add(1)) task(thread, i);
        };
        if (tasks <= 1) take(0);
        else all(take);
    }

   private:
    void work(int thread) {
        uint64_t seen = 0;
        while (true) {
            auto called = [&] { return round_.load(std::memory_order_acquire) != seen; };
            if (!look(kLooks, called)) {
                std::unique_lock<std::mutex> hold(mutex_);
                wake_.wait(hold, called);
            }
            seen = round_.load(std::memory_order_acquire);
            if (stopping_) return;
            (*task_)(thread);
            busy_.fetch_sub(1, std::memory_order_acq_rel);
        }
    }

    const pid_t owner_;
    std::vector<std::thread> threads_;
    std::mutex mutex_;
    std::condition_variable wake_;
    const std::function<void(int)>* task_ = nullptr;
    std::atomic<uint64_t> round_{0};
    std::atomic<int> busy_{0};
    std::atomic<bool> stopping_{false};
};

}  // namespace tf
