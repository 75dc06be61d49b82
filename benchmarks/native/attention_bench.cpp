// Paged attention of one instruction set, without Python: held to double, bits under other chunks, speed.
//
//   g++ -std=c++17 -O3 -fno-math-errno -fno-trapping-math -pthread -DKVP_ISA=3 -mavx512f -mavx512bw -mavx512vl
//       -mavx512dq -mavx512bf16 -mavx512vnni -mfma -mf16c -mprefer-vector-width=512 -I src/kvpage_cpu/csrc
//       benchmarks/native/attention_bench.cpp src/kvpage_cpu/csrc/attention*.cpp -o attention_bench
//   ./attention_bench [check | speed | prefill | decode] [threads] [kv type]
// (KVP_ISA=2: without the bf16 and vnni options; 1: -mavx2 -mfma -mf16c; 0: none.)
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include <string>
#include <thread>
#include <vector>

#include "attention.h"

using namespace KVP_NS;

static uint64_t state = 88172645463325252ull;
static float uniform() {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return (float)(state >> 40) / (1 << 23) - 1.0f;
}
static int below(int n) { return (int)((uniform() + 1.0f) * 0.5f * (float)n) % n; }
static float rounded(float x, int type) { return type == KVP_F32 ? x : from_bf16(to_bf16(x)); }

struct Shape {
    int kv_type, io_type, heads, kv_heads, dim, v_dim, block, window;
    float softcap;
    bool sinks;
};

// Rows with all their K and V (what the cache was given), in blocks in random order among blocks of NaN.
struct Case {
    Shape s;
    std::vector<int> lengths, queries, starts{0}, tables;
    std::vector<std::vector<float>> k, v;
    std::vector<char> kv;
    std::vector<float> q, sinks;
    std::vector<uint16_t> q_bf16;
    int max_blocks = 0;

    Case(const Shape& shape, std::vector<int> lens, std::vector<int> news) : s(shape), lengths(lens), queries(news) {
        int blocks = 1;
        for (size_t i = 0; i < lengths.size(); i++) {
            const int used = (lengths[i] + s.block - 1) / s.block;
            max_blocks = used > max_blocks ? used : max_blocks;
            blocks += used;
            starts.push_back(starts.back() + queries[i]);
        }
        std::vector<int> order(blocks - 1);
        for (int i = 0; i < blocks - 1; i++) order[i] = i + 1;
        for (int i = blocks - 2; i > 0; i--) std::swap(order[i], order[below(i + 1)]);
        kv.assign(blocks * block_bytes(s.kv_type, s.kv_heads, s.dim, s.v_dim, s.block), (char)0xff);
        tables.assign(lengths.size() * max_blocks, 0);
        KvpAttention layer = call(nullptr);
        for (size_t i = 0, taken = 0; i < lengths.size(); i++) {
            k.emplace_back((size_t)lengths[i] * s.kv_heads * s.dim);
            v.emplace_back((size_t)lengths[i] * s.kv_heads * s.v_dim);
            for (float& x : k[i]) x = rounded(uniform(), s.io_type);
            for (float& x : v[i]) x = rounded(uniform(), s.io_type);
            for (int t = 0; t < lengths[i]; t++) {
                if (t % s.block == 0) tables[i * max_blocks + t / s.block] = order[taken++];
                const int64_t slot = (int64_t)tables[i * max_blocks + t / s.block] * s.block + t % s.block;
                for (int h = 0; h < s.kv_heads; h++)
                    write_head(layer, slot, h, &k[i][((size_t)t * s.kv_heads + h) * s.dim],
                               &v[i][((size_t)t * s.kv_heads + h) * s.v_dim]);
            }
        }
        q.resize((size_t)starts.back() * s.heads * s.dim);
        for (float& x : q) x = rounded(4.0f * uniform(), s.io_type);
        for (float x : q) q_bf16.push_back(to_bf16(x));
        for (int h = 0; h < s.heads; h++) sinks.push_back(uniform());
    }

    KvpAttention call(void* out) const {
        KvpAttention c = {};
        c.kv_type = s.kv_type, c.io_type = s.io_type, c.heads = s.heads, c.kv_heads = s.kv_heads;
        c.head_dim = s.dim, c.v_head_dim = s.v_dim, c.block_size = s.block, c.window = s.window;
        c.scale = 1.0f / sqrtf((float)s.dim), c.softcap = s.softcap, c.sinks = s.sinks ? sinks.data() : nullptr;
        c.num_rows = (int)lengths.size(), c.cu_seqlens = starts.data(), c.seq_lens = lengths.data();
        c.tables = tables.data(), c.table_stride = max_blocks, c.kv = (void*)kv.data(), c.out = out;
        c.q = s.io_type == KVP_F32 ? (const void*)q.data() : (const void*)q_bf16.data();
        c.q_head = s.dim, c.q_token = (int64_t)s.heads * s.dim;
        c.out_head = s.v_dim, c.out_token = (int64_t)s.heads * s.v_dim;
        return c;
    }
    size_t results() const { return (size_t)starts.back() * s.heads * s.v_dim; }
};

static void run(const KvpAttention& call, int threads) {
    static std::vector<std::vector<char>> scratch;
    const size_t bytes = attend_scratch_bytes(call) + 64;
    scratch.resize(threads);
    static std::vector<char> memory;
    memory.resize(attend_shared_bytes(threads) + 64);
    char* const shared = (char*)(((uintptr_t)memory.data() + 63) / 64 * 64);
    std::atomic<int> next{0};
    const auto job = [&](int thread) {
        if (scratch[thread].size() < bytes) scratch[thread].resize(bytes);
        char* const aligned = (char*)(((uintptr_t)scratch[thread].data() + 63) / 64 * 64);
        attend(call, aligned, shared, next, threads);
    };
    std::vector<std::thread> others;
    for (int t = 1; t < threads; t++) others.emplace_back(job, t);
    job(0);
    for (auto& t : others) t.join();
}

static double worst_error(const Case& c, const std::vector<float>& out) {
    const Shape& s = c.s;
    double worst = 0.0;
    for (size_t i = 0; i < c.lengths.size(); i++)
        for (int n = 0; n < c.queries[i]; n++)
            for (int h = 0; h < s.heads; h++) {
                const int at = c.lengths[i] - c.queries[i] + n, kv = h / (s.heads / s.kv_heads);
                const int first = s.window && at >= s.window ? at - s.window + 1 : 0;
                const float* q = &c.q[((size_t)(c.starts[i] + n) * s.heads + h) * s.dim];
                std::vector<double> p, sum(s.v_dim, 0.0);
                double most = s.sinks ? c.sinks[h] : -1e300, weights = 0.0;
                for (int t = first; t <= at; t++) {
                    const float* k = &c.k[i][((size_t)t * s.kv_heads + kv) * s.dim];
                    double x = 0.0;
                    for (int d = 0; d < s.dim; d++) x += (double)q[d] * k[d];
                    x /= sqrt((double)s.dim);
                    p.push_back(s.softcap > 0.0f ? s.softcap * tanh(x / s.softcap) : x);
                    most = p.back() > most ? p.back() : most;
                }
                if (s.sinks) weights = exp(c.sinks[h] - most);
                for (int t = first; t <= at; t++) {
                    const double w = exp(p[t - first] - most);
                    weights += w;
                    for (int d = 0; d < s.v_dim; d++) sum[d] += w * c.v[i][((size_t)t * s.kv_heads + kv) * s.v_dim + d];
                }
                for (int d = 0; d < s.v_dim; d++) {
                    const double got = out[((size_t)(c.starts[i] + n) * s.heads + h) * s.v_dim + d];
                    const double error = fabs(got - sum[d] / weights);
                    worst = error > worst || error != error ? error : worst;
                    if (worst != worst) return worst;
                }
            }
    return worst;
}

static std::vector<float> results(const Case& c, int threads) {
    std::vector<float> out(c.results(), NAN);
    if (c.s.io_type == KVP_F32) {
        run(c.call(out.data()), threads);
        return out;
    }
    std::vector<uint16_t> narrow(c.results(), 0x7fc0);
    run(c.call(narrow.data()), threads);
    for (size_t i = 0; i < out.size(); i++) out[i] = from_bf16(narrow[i]);
    return out;
}

// The last `news` queries of one row of a case, as a case of its own.
static Case part(const Case& c, int row, int first, int count) {
    Case p = c;
    const int start = c.starts[row] + first;
    p.lengths = {c.lengths[row] - c.queries[row] + first + count};
    p.queries = {count};
    p.starts = {0, count};
    p.tables.assign(c.tables.begin() + row * c.max_blocks, c.tables.begin() + (row + 1) * c.max_blocks);
    const size_t width = (size_t)c.s.heads * c.s.dim;
    p.q.assign(c.q.begin() + start * width, c.q.begin() + (start + count) * width);
    p.q_bf16.assign(c.q_bf16.begin() + start * width, c.q_bf16.begin() + (start + count) * width);
    return p;
}

static int check() {
    int faults = 0;
    const int dims[] = {64, 128, 8, 40, 96, 256}, blocks[] = {16, 32, 64, 128, 256}, groups[] = {1, 2, 3, 8, 5};
    for (int n = 0; n < 60; n++) {
        Shape s = {n % 3, n / 3 % 2, 0, 1 + n % 2, dims[below(6)], 0, blocks[below(5)], 0, 0.0f, false};
        s.heads = s.kv_heads * groups[below(5)];
        s.v_dim = below(3) ? s.dim : dims[below(5)];
        if (below(3) == 0) s.window = 1 + below(300);
        if (below(4) == 0) s.softcap = 3.0f;
        s.sinks = below(4) == 0;
        const int base = below(2) ? 1500 : 100;
        const std::vector<int> lengths = {1 + below(base), 200 + below(base), 0, 1 + below(40), 90 + below(60)};
        const Case c(s, lengths, {1, 1 + below(180), 0, 1, 90});
        const std::vector<float> out = results(c, 2);
        const double error = worst_error(c, out);
        const double limit = s.kv_type == KVP_I8 ? 3e-2 : s.kv_type == KVP_F32 && s.io_type == KVP_F32 ? 3e-6 : 1.2e-2;
        bool same = true;
        for (int row : {1, 4})
            for (int first = 0; first < c.queries[row];) {
                int count = 1 + below(first % 2 ? 4 : 60);
                if (count > c.queries[row] - first) count = c.queries[row] - first;
                const std::vector<float> again = results(part(c, row, first, count), 1);
                const size_t width = (size_t)s.heads * s.v_dim;
                same &= !memcmp(again.data(), &out[(c.starts[row] + first) * width], 4 * again.size());
                first += count;
            }
        const bool fine = error < limit && same;
        faults += !fine;
        printf("kv %d io %d heads %d/%d dim %d/%d block %d window %d cap %g sinks %d: error %.2g%s%s\n", s.kv_type,
               s.io_type, s.heads, s.kv_heads, s.dim, s.v_dim, s.block, s.window, s.softcap, s.sinks, error,
               same ? "" : ", other bits in other chunks", fine ? "" : "  WRONG");
    }
    printf("%d faults\n", faults);
    return faults > 0;
}

// Of the calling thread where it works alone, so that others' load counts less; else of the clock on the wall.
static double now(int threads) {
    timespec t;
    clock_gettime(threads == 1 ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static double seconds(const Case& c, int threads) {
    std::vector<float> out(c.results());
    const KvpAttention call = c.call(out.data());
    double best = 1e9;
    run(call, threads);
    for (double spent = 0.0; spent < 0.4;) {
        const double start = now(threads);
        run(call, threads);
        const double taken = now(threads) - start;
        best = taken < best ? taken : best;
        spent += taken;
    }
    return best;
}

static void prefill(int type, int heads, int kv_heads, int dim, int count, int threads) {
    const Case c({type, KVP_F32, heads, kv_heads, dim, dim, 32, 0, 0.0f, false}, {count}, {count});
    const double taken = seconds(c, threads), flops = 2.0 * heads * dim * (double)count * (count + 1);
    printf("prefill kv %d, %d / %d heads of %d, %d tokens: %.2f ms, %.0f GFLOP/s a thread\n", type, heads, kv_heads, dim,
           count, taken * 1e3, flops / taken / threads * 1e-9);
}

static void decode(int type, int heads, int kv_heads, int dim, int rows, int length, int threads) {
    const Case c({type, KVP_F32, heads, kv_heads, dim, dim, 32, 0, 0.0f, false}, std::vector<int>(rows, length),
                 std::vector<int>(rows, 1));
    const double taken = seconds(c, threads);
    const double bytes = (double)c.kv.size() * length / ((length + 31) / 32 * 32);
    printf("decode kv %d, %d / %d heads of %d, %d x %d: %.1f us, %.1f GB/s\n", type, heads, kv_heads, dim, rows, length,
           taken * 1e6, bytes / taken * 1e-9);
}

int main(int count, char** arguments) {
    const std::string what = count > 1 ? arguments[1] : "check";
    const int threads = count > 2 ? atoi(arguments[2]) : 1;
    if (what == "check") return check();
    for (int type : {KVP_BF16, KVP_I8, KVP_F32}) {
        if (count > 3 && atoi(arguments[3]) != type) continue;
        if (what != "decode") {
            prefill(type, 12, 4, 64, 2048, threads);
            prefill(type, 32, 4, 64, 2048, threads);
            prefill(type, 32, 8, 128, 1024, threads);
        }
        if (what == "prefill") continue;
        for (int rows : {1, 8, 32})
            for (int length : {100, 1000, 4000}) decode(type, 12, 4, 64, rows, length, threads);
        decode(type, 32, 4, 64, 8, 1000, threads);
        decode(type, 32, 8, 128, 8, 1000, threads);
        decode(type, 8, 1, 128, 1, 8192, threads);
    }
}
