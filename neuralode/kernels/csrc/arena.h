// Memory that a solve keeps for its backward pass: taken piece by piece, given back at once. Chunks outlive the solve
// and serve the next one, for fresh pages cost more than what is written to them.
#pragma once
#include <sys/mman.h>

#include <cstdint>
#include <mutex>
#include <new>
#include <vector>

namespace neuralode {

class Chunks {
  public:
    static constexpr int64_t SIZE = 4 << 20;
    static constexpr size_t MOST_IDLE = 128;  // chunks kept for later: half a gibibyte

    static char* take() {
        {
            std::lock_guard<std::mutex> hold(lock());
            if (!idle().empty()) {
                char* chunk = idle().back();
                idle().pop_back();
                return chunk;
            }
        }
        return fresh(SIZE);
    }
    static void give(char* chunk) {
        {
            std::lock_guard<std::mutex> hold(lock());
            if (idle().size() < MOST_IDLE) return idle().push_back(chunk);
        }
        munmap(chunk, SIZE);
    }
    static char* fresh(int64_t bytes) {
        void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
        madvise(memory, bytes, MADV_HUGEPAGE);
#endif
        return (char*)memory;
    }

  private:
    static std::mutex& lock() {
        static std::mutex mutex;
        return mutex;
    }
    static std::vector<char*>& idle() {
        static std::vector<char*> chunks;
        return chunks;
    }
};

class Arena {
  public:
    Arena() = default;
    Arena(const Arena&) = delete;
    ~Arena() {
        for (char* chunk : chunks_) Chunks::give(chunk);
        for (auto& [memory, bytes] : large_) munmap(memory, bytes);
    }

    // Room that begins at a multiple of 64 bytes.
    template <typename X> X* take(int64_t count) {
        const int64_t bytes = (count * (int64_t)sizeof(X) + 63) / 64 * 64;
        taken += bytes;
        if (bytes > Chunks::SIZE) {
            large_.push_back({Chunks::fresh(bytes), bytes});
            return (X*)large_.back().first;
        }
        if (chunks_.empty() || used_ + bytes > Chunks::SIZE) {
            chunks_.push_back(Chunks::take());
            used_ = 0;
        }
        char* room = chunks_.back() + used_;
        used_ += bytes;
        return (X*)room;
    }

    int64_t taken = 0;  // bytes

  private:
    std::vector<char*> chunks_;
    std::vector<std::pair<char*, int64_t>> large_;
    int64_t used_ = 0;
};

}  // namespace neuralode
