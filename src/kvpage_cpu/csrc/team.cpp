#include "team.h"

#include <sched.h>
#include <unistd.h>

#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace {

constexpr int SPINS = 2000;   // pauses before a waiting thread lets others run, about 20 us
constexpr int YIELDS = 4000;  // then, before an idle worker sleeps: some milliseconds, longer than the host between steps

inline void pause_briefly() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

}  // namespace

struct Team::Waiting {
    std::mutex turn;   // held by the caller whose job runs
    std::mutex sleep;  // of idle workers
    std::condition_variable wake;
    std::vector<std::thread> workers;
    std::atomic<int> sleepers{0};
    std::atomic<bool> quit{false};
    const pid_t process = getpid();
};

Team::Team(int threads) : threads_(threads), waiting_(new Waiting) {}

Team* Team::create(int threads) {
    Team* team = new Team(threads);
    try {
        for (int thread = 1; thread < threads; thread++)
            team->waiting_->workers.emplace_back([team, thread] { team->work(thread); });
    } catch (const std::system_error&) {
        delete team;
        return nullptr;
    }
    return team;
}

Team::~Team() {
    if (waiting_->process != getpid()) return;  // a forked child has the memory but not the threads: it leaks the little there is
    {
        std::lock_guard<std::mutex> lock(waiting_->sleep);
        waiting_->quit = true;
    }
    job_number_.fetch_add(1, std::memory_order_acq_rel);
    waiting_->wake.notify_all();
    for (std::thread& worker : waiting_->workers) worker.join();
    delete waiting_;
}

bool Team::run(Job job, void* argument) {
    if (waiting_->process != getpid()) return false;
    std::lock_guard<std::mutex> turn(waiting_->turn);
    if (threads_ == 1) {
        job(argument, 0, 1);
        return true;
    }
    job_ = job;
    argument_ = argument;
    job_number_.fetch_add(1, std::memory_order_seq_cst);
    if (waiting_->sleepers.load(std::memory_order_seq_cst) > 0) {
        std::lock_guard<std::mutex> lock(waiting_->sleep);
        waiting_->wake.notify_all();
    }
    job(argument, 0, threads_);
    barrier();
    return true;
}

void Team::work(int thread) {
    uint32_t done = 0;
    for (;;) {
        int waited = 0;
        while (job_number_.load(std::memory_order_acquire) == done) {
            waited++;
            if (waited < SPINS) {
                pause_briefly();
            } else if (waited < SPINS + YIELDS) {
                sched_yield();
            } else {
                std::unique_lock<std::mutex> lock(waiting_->sleep);
                waiting_->sleepers.fetch_add(1, std::memory_order_seq_cst);
                waiting_->wake.wait(lock, [&] {
                    return waiting_->quit || job_number_.load(std::memory_order_seq_cst) != done;
                });
                waiting_->sleepers.fetch_sub(1, std::memory_order_seq_cst);
            }
        }
        done++;
        if (waiting_->quit.load(std::memory_order_acquire)) return;
        job_(argument_, thread, threads_);
        barrier();
    }
}

void Team::wait_for_round(uint32_t round) {
    for (int waited = 0; round_.load(std::memory_order_acquire) == round; waited++) {
        if (waited < SPINS) pause_briefly();
        else sched_yield();
    }
}
