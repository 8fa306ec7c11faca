// What slots remember: pages of keys and values, counted by how many slots and kept prompts use them, and Mamba states.
#pragma once
#include <sys/mman.h>

#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include "attention.h"

namespace tf {

// Zeroed memory that is taken only once touched.
class Region {
   public:
    explicit Region(size_t bytes) : bytes_(bytes) {
        if (!bytes) return;
        data_ = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (data_ == MAP_FAILED) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
        madvise(data_, bytes, MADV_HUGEPAGE);
#endif
    }
    Region(const Region&) = delete;
    Region& operator=(const Region&) = delete;
    ~Region() {
        if (bytes_) munmap(data_, bytes_);
    }
    char* data() const { return static_cast<char*>(data_); }

   private:
    size_t bytes_;
    void* data_ = nullptr;
};

// Pages of `bytes` bytes: `planned` of them at once, more as needed up to `limit` in all (0: no limit).
// Kept prompts may be dropped by another thread while a step runs, so counting is locked; only `take` adds memory.
class PageStore {
   public:
    PageStore(size_t bytes, size_t planned, size_t limit) : bytes_(bytes), planned_(planned), limit_(limit), first_(bytes * planned) {}

    char* at(int page) const {
        size_t i = (size_t)page;
        return i < planned_ ? first_.data() + i * bytes_ : more_[(i - planned_) / kMore]->data() + (i - planned_) % kMore * bytes_;
    }

    // A zeroed page with one user. Throws std::bad_alloc at the limit.
    int take() {
        int page;
        {
            std::lock_guard<std::mutex> hold(mutex_);
            if (free_.empty()) {
                if (limit_ && users_.size() >= limit_) throw std::bad_alloc();
                if (users_.size() >= planned_ + more_.size() * kMore) more_.push_back(std::make_unique<Region>(bytes_ * kMore));
                users_.push_back(1);
                return (int)users_.size() - 1;
            }
            page = free_.back();
            free_.pop_back();
            users_[page] = 1;
        }
        // A NaN left by an earlier sample would reach this one through a mask: 0 * NaN is NaN.
        std::memset(at(page), 0, bytes_);
        return page;
    }

    void share(int page) {
        std::lock_guard<std::mutex> hold(mutex_);
        users_[page]++;
    }

    void drop(const std::vector<int>& pages) {
        std::lock_guard<std::mutex> hold(mutex_);
        for (int page : pages)
            if (--users_[page] == 0) free_.push_back(page);
    }

    size_t used() const {
        std::lock_guard<std::mutex> hold(mutex_);
        return users_.size() - free_.size();
    }

    size_t bytes() const { return bytes_; }

   private:
    static constexpr size_t kMore = 64;
    const size_t bytes_, planned_, limit_;
    Region first_;
    std::vector<std::unique_ptr<Region>> more_;
    std::vector<int> users_, free_;
    mutable std::mutex mutex_;
};

// The state behind a prompt: whole pages shared with its samples, a page of its own for the rest, Mamba states.
struct Kept {
    int length = 0;
    std::vector<int> pages;
    std::vector<float> states;
};

}  // namespace tf
