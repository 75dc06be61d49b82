// A team of threads that runs one job at a time; the caller is its thread 0.
#pragma once
#include <stdint.h>

#include <atomic>

class Team {
  public:
    using Job = void (*)(void* argument, int thread, int threads);

    static Team* create(int threads);  // null: the system gives no thread
    ~Team();

    int size() const { return threads_; }

    // Runs job(argument, t, size()) on every thread t and returns when all are done. Callers take turns.
    // False, and nothing ran: the process was forked after the team was made.
    bool run(Job job, void* argument);

    // Every thread of the job waits here for the others.
    void barrier() {
        if (threads_ == 1) return;
        const uint32_t round = round_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads_ - 1) {
            arrived_.store(0, std::memory_order_relaxed);
            round_.store(round + 1, std::memory_order_release);
        } else {
            wait_for_round(round);
        }
    }

  private:
    struct Waiting;
    explicit Team(int threads);
    void wait_for_round(uint32_t round);
    void work(int thread);

    const int threads_;
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<uint32_t> round_{0};
    alignas(64) std::atomic<uint32_t> job_number_{0};
    Job job_ = nullptr;
    void* argument_ = nullptr;
    Waiting* waiting_;
};
