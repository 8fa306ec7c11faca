// A few persistent threads that share out numbered tasks. The caller works too.
#pragma once
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace tf {

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
        }
        wake_.notify_all();
        for (auto& t : threads_) t.join();
    }

    int count() const { return getpid() == owner_ ? (int)threads_.size() + 1 : 1; }

    // Calls task(thread, index) for every index below `tasks`, in ascending order of start.
    void run(int tasks, const std::function<void(int, int)>& task) {
        if (tasks <= 1 || count() == 1) {
            for (int i = 0; i < tasks; i++) task(0, i);
            return;
        }
        {
            std::lock_guard<std::mutex> hold(mutex_);
            task_ = &task;
            tasks_ = tasks;
            next_ = 0;
            busy_ = (int)threads_.size();
            round_++;
        }
        wake_.notify_all();
        take(0);
        std::unique_lock<std::mutex> hold(mutex_);
        done_.wait(hold, [this] { return busy_ == 0; });
    }

   private:
    void take(int thread) {
        for (int i = next_.fetch_add(1); i < tasks_; i = next_.fetch_add(1)) (*task_)(thread, i);
    }

    void work(int thread) {
        uint64_t seen = 0;
        std::unique_lock<std::mutex> hold(mutex_);
        while (true) {
            wake_.wait(hold, [&] { return stopping_ || round_ != seen; });
            if (stopping_) return;
            seen = round_;
            hold.unlock();
            take(thread);
            hold.lock();
            if (--busy_ == 0) done_.notify_one();
        }
    }

    const pid_t owner_;
    std::vector<std::thread> threads_;
    std::mutex mutex_;
    std::condition_variable wake_, done_;
    const std::function<void(int, int)>* task_ = nullptr;
    int tasks_ = 0, busy_ = 0;
    uint64_t round_ = 0;
    bool stopping_ = false;
    std::atomic<int> next_{0};
};

}  // namespace tf
