// The exported functions: contexts, teams, workspaces. Compiled once, for every processor.
#include <stdlib.h>
#include <sys/mman.h>

#include <atomic>
#include <chrono>
#include <map>
#include <mutex>

#include "kernels.h"

#ifdef KVP_ONLY_PORTABLE
const Kernels* const KVP_KERNELS[KVP_NUM_ISAS] = {&kvp_portable::kernels, nullptr, nullptr, nullptr};
#else
const Kernels* const KVP_KERNELS[KVP_NUM_ISAS] = {&kvp_portable::kernels, &kvp_avx2::kernels, &kvp_avx512::kernels,
                                                  &kvp_avx512_bf16::kernels};
#endif

namespace {

constexpr int ABI_VERSION = 3;

// Teams by their size, with how many contexts use each: two engines on the same cores take turns instead of spinning
// against each other.
struct SharedTeam {
    Team* team = nullptr;
    int users = 0;
};
std::mutex teams_lock;
std::map<int, SharedTeam>& teams() {
    static std::map<int, SharedTeam> all;
    return all;
}

// Anonymous memory that grows and goes back to the system with its context.
class Workspace {
  public:
    ~Workspace() { release(); }

    char* at_least(size_t bytes) {
        if (bytes <= size_) return memory_;
        release();
        void* const mapped = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (mapped == MAP_FAILED) return nullptr;
        memory_ = (char*)mapped;
        size_ = bytes;
        return memory_;
    }

  private:
    void release() {
        if (memory_) munmap(memory_, size_);
        memory_ = nullptr;
        size_ = 0;
    }

    char* memory_ = nullptr;
    size_t size_ = 0;
};

}  // namespace

struct KvpContext {
    const Kernels* kernels;
    Team* team;
    Workspace workspace;
};

namespace {

int run(KvpContext* context, Team::Job job, void* argument) {
    return context->team->run(job, argument) ? 0 : KVP_FORKED;
}

// Work of some microseconds stays with the caller: to wake the others takes longer.
int run_small(KvpContext* context, Team::Job job, void* argument, bool small) {
    if (!small) return run(context, job, argument);
    job(argument, 0, 1);
    return 0;
}

constexpr int64_t SMALL_ATTENTION = 4000000;  // products, about 40 us
constexpr int64_t SMALL_WRITE = 65536;        // numbers, about 10 us

bool is_small(const KvpAttention& layer) {
    const int64_t width = (int64_t)layer.heads * (layer.head_dim + layer.v_head_dim);
    int64_t products = 0;
    for (int row = 0; row < layer.num_rows && products < SMALL_ATTENTION; row++)
        products += width * layer.seq_lens[row] * (layer.cu_seqlens[row + 1] - layer.cu_seqlens[row]);
    return products < SMALL_ATTENTION;
}

bool is_small(const WriteJob& job) {
    const KvpAttention& layer = *job.layer;
    return job.tokens * (layer.heads + 2 * layer.kv_heads) * layer.head_dim < SMALL_WRITE;
}

}  // namespace

int kvp_abi_version(void) { return ABI_VERSION; }

int kvp_best_isa(void) {
#ifndef KVP_ONLY_PORTABLE
    __builtin_cpu_init();
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni"))
        return KVP_AVX512_BF16;
    if (avx512) return KVP_AVX512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
        return KVP_AVX2;
#endif
    return KVP_PORTABLE;
}

const char* kvp_isa_name(int isa) {
    return isa < 0 || isa >= KVP_NUM_ISAS || !KVP_KERNELS[isa] ? nullptr : KVP_KERNELS[isa]->name;
}

KvpContext* kvp_open(int isa, int threads) {
    if (!kvp_isa_name(isa) || isa > kvp_best_isa() || threads < 1) return nullptr;
    std::lock_guard<std::mutex> lock(teams_lock);
    SharedTeam& shared = teams()[threads];
    if (shared.users == 0) shared.team = Team::create(threads);
    if (!shared.team) return nullptr;
    shared.users++;
    return new KvpContext{KVP_KERNELS[isa], shared.team, {}};
}

void kvp_close(KvpContext* context) {
    std::lock_guard<std::mutex> lock(teams_lock);
    for (auto& entry : teams()) {
        SharedTeam& shared = entry.second;
        if (shared.team != context->team || --shared.users > 0) continue;
        delete shared.team;
        shared.team = nullptr;
    }
    delete context;
}

int kvp_pack(KvpContext* context, const KvpLinear* linear, const void* source, int64_t row_bytes) {
    // 32 rows of the padded K, of the widest type; offsets keep every thread's part aligned.
    const size_t bytes = (size_t)linear->padded * 32 * 4 + 64;
    const int threads = context->team->size();
    char* const memory = context->workspace.at_least(bytes * threads);
    if (!memory) return KVP_NO_MEMORY;
    PackJob job = {linear, (const char*)source, row_bytes, memory, bytes};
    return run(context, context->kernels->pack, &job);
}

int kvp_linear(KvpContext* context, const KvpLinear* linear, int64_t rows, const void* x, int32_t x_type,
               int64_t x_stride, void* y, int32_t y_type, int64_t y_stride) {
    char* const memory =
        context->workspace.at_least(context->kernels->linear_bytes(*linear, rows, context->team->size()));
    if (!memory) return KVP_NO_MEMORY;
    LinearJob job = {context->team, linear, rows, x, x_type, x_stride, y, y_type, y_stride, memory};
    return run(context, context->kernels->linear, &job);
}

int kvp_read_rows(KvpContext* context, const KvpLinear* linear, int64_t rows, const int64_t* ids, float* out) {
    ReadJob job = {linear, rows, ids, out};
    return run(context, context->kernels->read_rows, &job);
}

int kvp_attend(KvpContext* context, const KvpAttention* layer) {
    const size_t bytes = (context->kernels->attend_scratch(*layer) + 4095) / 4096 * 4096;
    const int threads = context->team->size();
    char* const memory = context->workspace.at_least(bytes * threads + context->kernels->attend_shared(threads));
    if (!memory) return KVP_NO_MEMORY;
    std::atomic<int> next{0};
    AttendJob job = {layer, memory, bytes, memory + bytes * threads, &next};
    return run_small(context, context->kernels->attend, &job, is_small(*layer));
}

int kvp_write_kv(KvpContext* context, const KvpAttention* layer, const void* k, int64_t k_token, int64_t k_head,
                 const void* v, int64_t v_token, int64_t v_head, const int64_t* slots, int64_t tokens) {
    WriteJob job = {layer, nullptr, k, k_token, k_head, v, v_token, v_head, slots, tokens};
    return run_small(context, context->kernels->write_kv, &job, is_small(job));
}

int kvp_rope_write(KvpContext* context, const KvpAttention* layer, const KvpRope* rope, void* k, int64_t k_token,
                   int64_t k_head, const void* v, int64_t v_token, int64_t v_head, const int64_t* slots,
                   int64_t tokens) {
    WriteJob job = {layer, rope, k, k_token, k_head, v, v_token, v_head, slots, tokens};
    return run_small(context, context->kernels->write_kv, &job, is_small(job));
}

int64_t kvp_block_bytes(int32_t kv_type, int32_t kv_heads, int32_t head_dim, int32_t v_head_dim, int32_t block_size) {
    return (int64_t)KVP_KERNELS[KVP_PORTABLE]->block_bytes(kv_type, kv_heads, head_dim, v_head_dim, block_size);
}

int kvp_step(KvpContext* context, const KvpModel* model, const KvpStep* step) {
    char* const memory =
        context->workspace.at_least(context->kernels->step_bytes(*model, *step, context->team->size()));
    if (!memory) return KVP_NO_MEMORY;
    StepJob job = {context->team, model, step, memory};
    return run(context, context->kernels->step, &job);
}

int kvp_logits(KvpContext* context, const KvpModel* model, int64_t rows, const float* hidden, float* logits) {
    char* const memory =
        context->workspace.at_least(context->kernels->logits_bytes(*model, rows, context->team->size()));
    if (!memory) return KVP_NO_MEMORY;
    LogitsJob job = {context->team, model, rows, hidden, logits, memory};
    return run(context, context->kernels->logits, &job);
}

int kvp_sample(KvpContext* context, const KvpSampling* sampling) {
    // So little that the caller is done before the team is awake.
    const bool few = (int64_t)sampling->num_rows * sampling->vocab_size <= 1 << 18;
    const bool alone = sampling->num_rows <= 1 || (few && !sampling->temperature);
    const size_t bytes = (context->kernels->sample_scratch(sampling->vocab_size) + 4095) / 4096 * 4096;
    char* const memory = context->workspace.at_least(bytes * (alone ? 1 : context->team->size()));
    if (!memory) return KVP_NO_MEMORY;
    SampleJob job = {sampling, memory, bytes};
    if (!alone) return run(context, context->kernels->sample, &job);
    context->kernels->sample(&job, 0, 1);
    return 0;
}

namespace {
struct BandwidthJob {
    const char* memory;
    int64_t bytes;
    std::atomic<uint64_t> sink;
};

void read_everything(void* argument, int thread, int threads) {
    BandwidthJob& job = *(BandwidthJob*)argument;
    const int64_t part = job.bytes / threads / 512 * 512;
    const uint64_t* p = (const uint64_t*)(job.memory + part * thread);
    uint64_t sums[8] = {};
    for (int64_t i = 0; i < part / 8; i += 64) {
        for (int line = 0; line < 64; line += 8) __builtin_prefetch(p + i + line + 256);
        for (int word = 0; word < 64; word += 8)
            for (int lane = 0; lane < 8; lane++) sums[lane] ^= p[i + word + lane];
    }
    for (uint64_t value : sums) job.sink.fetch_xor(value, std::memory_order_relaxed);
}
}  // namespace

double kvp_read_bandwidth(KvpContext* context, const void* memory, int64_t bytes) {
    BandwidthJob job = {(const char*)memory, bytes, {0}};
    const auto start = std::chrono::steady_clock::now();
    if (run(context, read_everything, &job) != 0) return 0.0;
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
    const int threads = context->team->size();
    return (double)(bytes / threads / 512 * 512 * threads) / taken.count();
}
