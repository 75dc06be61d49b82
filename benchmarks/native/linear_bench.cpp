// Checks and times the native linear layers of one instruction set (ISA: 0 portable .. 3 AVX-512 BF16 + VNNI).
//
//   cd src/kvpage_cpu/csrc
//   A="-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c -mprefer-vector-width=512"   # ISA 2
//   # ISA 0: nothing, 1: -mavx2 -mfma -mf16c, 3: $A -mavx512bf16 -mavx512vnni
//   g++ -std=c++17 -O3 -fno-math-errno -fno-trapping-math $A -mavx512bf16 -mavx512vnni -DKVP_ISA=3 -I.
//       ../../../benchmarks/native/linear_bench.cpp linear.cpp linear_rows.cpp linear_pack.cpp team.cpp
//       -o linear_bench -lpthread                                                       # one line
//
//   linear_bench check                          every kind against sums in double, bits over rows and threads, packing
//   linear_bench gemm KIND ROWS,ROWS.. [N,K ..] time of packing rows and multiplying, against what the machine gives
//   linear_bench pack                           speed of packing bf16 weights in place
// KIND: f32 bf16 int8 int8d int4 int4d (d: dynamic int8 rows). Environment: THREADS, GROUP, PEAK (Gop/s of the kind, all
// threads), BURST (ms), REPEATS, and for a machine that others use too PAUSE (ms before a burst; a process that slept is
// not interrupted at once), QUANTILE (percent; 50: medians, 0: the fastest) and MB of weights (1: from the cache).
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <functional>
#include <memory>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "linear.h"
#include "team.h"

using namespace KVP_NS;

namespace {

struct Kind {
    const char* name;
    int type, dynamic;
    double bits, tolerance;  // relative error over all outputs; of ISA 3, where rows are rounded to bf16
};
const Kind KINDS[] = {{"f32", KVP_F32, 0, 32, 1e-6},   {"bf16", KVP_BF16, 0, 16, 3e-3}, {"int8", KVP_I8, 0, 8, 3e-3},
                      {"int8d", KVP_I8, 1, 8, 8e-3},   {"int4", KVP_I4, 0, 4, 3e-3},    {"int4d", KVP_I4, 1, 4, 8e-3}};

int environment(const char* name, int fallback) {
    const char* value = getenv(name);
    return value ? atoi(value) : fallback;
}

double now() {  // of one thread the processor's time, which others on the machine disturb less
    timespec t;
    clock_gettime(environment("THREADS", 2) == 1 ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

char* allocate(size_t bytes) {  // in 2 MiB pages, never freed
    const size_t page = 2 << 20;
    bytes = (bytes + 2 * page - 1) / page * page;
    char* p = (char*)mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    p = (char*)(((size_t)p + page - 1) & ~(page - 1));
    madvise(p, bytes - page, MADV_HUGEPAGE);
    return p;
}

struct Buffer {  // aligned, with a margin that prefetches and canaries may use
    explicit Buffer(size_t bytes) : p((char*)aligned_alloc(64, (bytes + 4096 + 63) / 64 * 64)) { memset(p, 0, bytes + 4096); }
    ~Buffer() { free(p); }
    Buffer(const Buffer&) = delete;
    char* p;
};

uint32_t random_bits() {
    static uint32_t state = 1;
    return (state = state * 1664525 + 1013904223) >> 8;
}
float random_number() { return (float)(int)(random_bits() - 0x800000) / 0x800000; }

void run(Team& team, const std::function<void(int, int)>& job) {
    team.run([](void* f, int thread, int threads) { (*(std::function<void(int, int)>*)f)(thread, threads); }, (void*)&job);
}

int align_up(int n, int unit) { return (n + unit - 1) / unit * unit; }

// A random weight: plain, packed and as numbers.
struct Weight {
    Weight(const Kind& kind, int outputs, int inputs, int group, bool offsets, bool in_place, Team& team)
        : dense((size_t)outputs * inputs), row_bytes((int64_t)(inputs * kind.bits + 7) / 8),
          padded(align_up(inputs, kind.type == KVP_F32 ? 16 : kind.type == KVP_BF16 ? 32 : kind.type == KVP_I8 ? 64 : group)),
          plain(row_bytes * outputs), panels((size_t)(padded * kind.bits / 8) * (outputs / 32 * 32)),
          tail((size_t)(padded * kind.bits / 8) * 32), scales((size_t)align_up(outputs, 32) * (padded / 32) * 4),
          shifts((size_t)align_up(outputs, 32) * (padded / 32) * 2), bias(outputs * 4) {
        linear = {kind.type, kind.dynamic, outputs, inputs, padded, group, in_place ? plain.p : panels.p, tail.p,
                  kind.type >= KVP_I8 ? scales.p : nullptr, offsets ? shifts.p : nullptr, (float*)bias.p};
        for (int n = 0; n < outputs; n++) {
            ((float*)bias.p)[n] = random_number();
            for (int k = 0; k < inputs; k++) dense[(size_t)n * inputs + k] = set(n, k);
        }
        run(team, [&](int thread, int threads) {
            Buffer scratch((size_t)(padded * kind.bits / 8) * 32);
            pack_weight(linear, plain.p, row_bytes, scratch.p, thread, threads);
        });
    }

    float set(int n, int k) {  // one weight, and its scale where it is the first to have it
        char* row = plain.p + n * row_bytes;
        float value = random_number();
        if (linear.type == KVP_F32) ((float*)row)[k] = value;
        if (linear.type == KVP_BF16) value = from_bf16(((uint16_t*)row)[k] = to_bf16(value));
        if (linear.type == KVP_I8) {
            float& scale = ((float*)scales.p)[n];
            if (k == 0) scale = 0.01f + 0.005f * random_number();
            value = (float)(((int8_t*)row)[k] = (int8_t)(value * 127)) * scale;
        }
        if (linear.type == KVP_I4) {
            const size_t at = ((size_t)(n / 32) * (padded / linear.group) + k / linear.group) * 32 + n % 32;
            uint16_t &scale = ((uint16_t*)scales.p)[at], &shift = ((uint16_t*)shifts.p)[at];
            if (k % linear.group == 0) scale = to_bf16(0.1f + 0.05f * value), shift = to_bf16(0.3f * random_number());
            const int code = random_bits() & 15;
            row[k / 2] = (char)(k % 2 ? row[k / 2] | code << 4 : code);
            value = (float)(code - 8) * from_bf16(scale) + (linear.offsets ? from_bf16(shift) : 0.0f);
        }
        return value;
    }

    std::vector<float> dense;
    const int64_t row_bytes;
    const int padded;
    Buffer plain, panels, tail, scales, shifts, bias;
    KvpLinear linear;
};

std::vector<float> random_rows(size_t n) {
    std::vector<float> x(n);
    for (float& v : x) v = random_number() + 0.2f;
    return x;
}

void multiply_rows(Team& team, const KvpLinear& linear, const float* x, int count, const Target& target) {
    Buffer memory(rows_bytes(linear, count));
    const Rows rows = rows_at(linear, count, memory.p);
    for (int row = 0; row < count; row++) pack_row(rows, linear.inputs, row, x + (size_t)row * linear.inputs);
    run(team, [&](int thread, int threads) {
        Buffer scratch(multiply_scratch_bytes());
        multiply(linear, rows, target, scratch.p, thread, threads);
    });
}

std::vector<float> product(Team& team, const KvpLinear& linear, const float* x, int count, Target target = {}) {
    const int width = target.store == Store::gated ? linear.outputs / 2 : linear.outputs;
    const int stride = width + 3;  // unaligned, with a canary behind each row
    std::vector<float> y((size_t)count * stride, 7.0f), out;
    target.y = y.data();
    target.stride = stride;
    multiply_rows(team, linear, x, count, target);
    for (int row = 0; row < count; row++) {
        const float* p = y.data() + (size_t)row * stride;
        out.insert(out.end(), p, p + width);
        for (int i = width; i < stride; i++)
            if (p[i] != 7.0f) printf("FAIL: wrote beyond the outputs\n"), exit(1);
    }
    return out;
}

void fail_unless(bool ok, const char* what, const Kind& kind, int rows) {
    if (!ok) printf("FAIL: %s, %s, %d rows\n", what, kind.name, rows), exit(1);
}

double error_against_double(const Weight& w, const std::vector<float>& x, const std::vector<float>& y, int count) {
    double error = 0, total = 0;
    const int outputs = w.linear.outputs, inputs = w.linear.inputs;
    for (int m = 0; m < count; m++)
        for (int n = 0; n < outputs; n++) {
            double sum = w.linear.bias[n];
            for (int k = 0; k < inputs; k++) sum += (double)x[(size_t)m * inputs + k] * w.dense[(size_t)n * inputs + k];
            const double difference = y[(size_t)m * outputs + n] - sum;
            error += difference * difference, total += sum * sum;
        }
    return std::sqrt(error / total);
}

void check_values(const Kind& kind, Team& team) {
    const struct { int outputs, inputs, group; bool offsets; } shapes[] = {
        {192, 768, 128, false}, {103, 200, 32, true}, {64, 2112, 64, true}, {33, 96, 32, false}, {96, 640, 128, true}};
    double worst = 0;
    for (const auto& s : shapes) {
        Weight w(kind, s.outputs, s.inputs, s.group, s.offsets && kind.type == KVP_I4, false, team);
        std::vector<float> row(s.inputs);
        for (int n = 0; n < s.outputs; n++) {
            read_row(w.linear, n, row.data());
            for (int k = 0; k < s.inputs; k++)
                fail_unless(std::abs(row[k] - w.dense[(size_t)n * s.inputs + k]) < 1e-6f, "read_row", kind, n);
        }
        for (int count : {1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 14, 15, 16, 17, 25, 29, 32, 65}) {
            const std::vector<float> x = random_rows((size_t)count * s.inputs);
            const double error = error_against_double(w, x, product(team, w.linear, x.data(), count), count);
            fail_unless(error < (kind.dynamic || KVP_ISA == 3 ? kind.tolerance : 2e-6), "values", kind, count);
            worst = std::max(worst, error);
        }
    }
    printf("%-5s largest relative error %.1e", kind.name, worst);
}

void check_bits(const Kind& kind, Team& one, Team& two) {  // a row's bits: any number of rows and threads
    const int inputs = 1504;
    Weight w(kind, 103, inputs, 32, kind.type == KVP_I4, false, one);
    const std::vector<float> x = random_rows((size_t)MAX_ROWS * inputs);
    std::vector<float> alone;
    for (int row = 0; row < MAX_ROWS; row++) {
        const std::vector<float> y = product(one, w.linear, x.data() + (size_t)row * inputs, 1);
        alone.insert(alone.end(), y.begin(), y.end());
    }
    for (int count = 1; count <= MAX_ROWS; count++) {
        const std::vector<float> y = product(count % 2 ? two : one, w.linear, x.data(), count);
        fail_unless(!memcmp(y.data(), alone.data(), y.size() * 4), "bits over rows", kind, count);
    }
    fail_unless(product(two, w.linear, x.data(), MAX_ROWS) == alone, "bits over threads", kind, MAX_ROWS);
}

double activation_of(Activation activation, double x) {
    switch (activation) {
        case Activation::silu: return x / (1 + std::exp(-x));
        case Activation::gelu: return 0.5 * x * std::erfc(-x / std::sqrt(2.0));
        case Activation::gelu_tanh: return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
        case Activation::relu: return std::max(x, 0.0);
        case Activation::relu2: return std::max(x, 0.0) * std::max(x, 0.0);
        default: return x;
    }
}

void check_targets(const Kind& kind, Team& team) {
    const int inputs = 96, outputs = 192, count = 17;
    Weight w(kind, outputs, inputs, 32, false, false, team);
    Weight after(kind, 64, 96, 96 % 64 ? 32 : 64, false, false, team);
    const std::vector<float> x = random_rows((size_t)count * inputs);
    const std::vector<float> plain = product(team, w.linear, x.data(), count);
    for (int a = 0; a <= (int)Activation::none; a++) {
        Target target;
        target.activation = (Activation)a;
        const std::vector<float> set = product(team, w.linear, x.data(), count, target);
        target.store = Store::gated;
        const std::vector<float> gated = product(team, w.linear, x.data(), count, target);
        for (int m = 0; m < count; m++)
            for (int n = 0; n < outputs; n++) {
                const double value = activation_of(target.activation, plain[m * outputs + n]);
                fail_unless(std::abs(set[m * outputs + n] - value) < 3e-6 * (1 + std::abs(value)), "activation", kind, a);
                if (n >= outputs / 2) continue;
                const double h = (double)set[m * outputs + n] * plain[m * outputs + outputs / 2 + n];
                fail_unless(std::abs(gated[m * outputs / 2 + n] - h) < 1e-6 * (1 + std::abs(h)), "gated", kind, a);
            }
        if (after.linear.dynamic) continue;  // its rows need a whole row first
        Buffer memory(rows_bytes(after.linear, count)), expected(rows_bytes(after.linear, count));
        memset(memory.p, 1, rows_bytes(after.linear, count));
        const Rows next = rows_at(after.linear, count, memory.p), packed = rows_at(after.linear, count, expected.p);
        target.next = &next;
        multiply_rows(team, w.linear, x.data(), count, target);
        for (int m = 0; m < count; m++) pack_row(packed, outputs / 2, m, gated.data() + (size_t)m * outputs / 2);
        fail_unless(!memcmp(memory.p, expected.p, rows_bytes(after.linear, count)), "next", kind, a);
    }
    Target add;
    add.store = Store::add;
    add.multiplier = 0.5f;
    const std::vector<float> added = product(team, w.linear, x.data(), count, add);
    for (size_t i = 0; i < added.size(); i++) {
        const float value = 7.0f + 0.5f * plain[i];
        fail_unless(std::abs(added[i] - value) < 1e-6f * (8 + std::abs(value)), "add", kind, count);
    }
}

void check_in_place(const Kind& kind, Team& team) {
    Weight w(kind, 100, 256, 64, false, true, team), apart(kind, 100, 256, 64, false, false, team);
    const std::vector<float> x = random_rows(256 * 3);
    const double error = error_against_double(w, x, product(team, w.linear, x.data(), 3), 3);
    fail_unless(error < (kind.dynamic || KVP_ISA == 3 ? kind.tolerance : 2e-6), "packed in place", kind, 3);
}

// Seconds of a plain read by the team: what memory gives now.
double read_time(Team& team, const char* p, size_t bytes) {
    const double start = now();
    run(team, [&](int thread, int threads) {
        const size_t share = bytes / threads & ~(size_t)1023;
        const char* q = p + share * thread;
        I total = splat_int(0);
        for (size_t i = 0; i < share; i += W * 4) {
            if (i % 64 == 0) __builtin_prefetch(q + i + 2048);
            total = add(total, load_bits(q + i));
        }
        asm volatile("" : : "x"(total));
    });
    return now() - start;
}

double quantile(std::vector<double> v) {
    std::sort(v.begin(), v.end());
    return v[(v.size() - 1) * environment("QUANTILE", 50) / 100];
}

void time_product(const Kind& kind, int rows, int outputs, int inputs, Team& team, double peak) {
    const int group = environment("GROUP", 128);
    const size_t bytes = (size_t)(outputs * (double)inputs * kind.bits / 8);
    const size_t scale_bytes = kind.type == KVP_I4 ? (size_t)outputs * (inputs / group) * 2 : 0;
    const int copies = std::max(2, (int)(environment("MB", 160) * 1e6 / (double)(bytes + scale_bytes)));
    char* const weights = allocate(bytes * copies);
    for (size_t i = 0; i < bytes * copies; i++) weights[i] = (char)(kind.bits > 8 && i % 2 ? 0x3c : i * 37 & 63);
    char* const scales = allocate(std::max(scale_bytes * copies, (size_t)outputs * 4));
    std::vector<KvpLinear> layers;
    for (int i = 0; i < copies; i++)
        layers.push_back({kind.type, kind.dynamic, outputs, inputs, inputs, group, weights + i * bytes, nullptr,
                          scales + i * scale_bytes, nullptr, nullptr});
    const std::vector<float> x = random_rows((size_t)rows * inputs);
    char* const y = allocate((size_t)rows * outputs * 4);
    Buffer memory(rows_bytes(layers[0], std::min(rows, MAX_ROWS))), scratch(multiply_scratch_bytes() * team.size());
    const double arithmetic = 2.0 * rows * outputs * inputs / peak;
    const int calls = std::max(1, std::min(copies, (int)(environment("BURST", 30) * 1e-3 / (arithmetic + bytes / 34e9))));
    std::vector<double> times, reads;
    for (int repeat = 0, at = 0; repeat < environment("REPEATS", 7); repeat++, at += calls) {
        const int from = std::min((at + copies / 2) % copies, copies - calls);  // far from what was used last
        std::this_thread::sleep_for(std::chrono::milliseconds(environment("PAUSE", 0)));
        reads.push_back(read_time(team, weights + from * bytes, bytes * calls));
        const double start = now();
        run(team, [&](int thread, int threads) {
            for (int i = 0; i < calls; i++)
                for (int first = 0; first < rows; first += MAX_ROWS) {
                    const KvpLinear& linear = layers[(at + i) % copies];
                    const Rows packed = rows_at(linear, std::min(rows - first, MAX_ROWS), memory.p);
                    for (int row = thread; row < packed.count; row += threads)
                        pack_row(packed, inputs, row, x.data() + (size_t)(first + row) * inputs);
                    team.barrier();
                    Target target;
                    target.y = (float*)y + (size_t)first * outputs;
                    target.stride = outputs;
                    multiply(linear, packed, target, scratch.p + multiply_scratch_bytes() * thread, thread, threads);
                    team.barrier();
                }
        });
        times.push_back((now() - start) / calls);
    }
    const double time = quantile(times), speed = bytes * calls / quantile(reads);
    const double memory_time = (bytes + scale_bytes) / speed;
    printf("%-5s M=%-4d %5dx%-5d %9.1f us %6.1f GB/s %6.0f Gop/s  read now %5.1f GB/s  %3.0f%% of bound (%s)\n", kind.name,
           rows, outputs, inputs, time * 1e6, (bytes + scale_bytes) / time / 1e9, 2e-9 * rows * outputs * inputs / time,
           speed / 1e9, 100 * std::max(memory_time, arithmetic) / time, memory_time > arithmetic ? "memory" : "arithmetic");
    fflush(stdout);
    munmap(weights, bytes * copies);
    munmap(y, (size_t)rows * outputs * 4);
}

std::vector<int> numbers(const char* text) {
    std::vector<int> out;
    std::stringstream stream(text);
    for (std::string part; std::getline(stream, part, ',');) out.push_back(std::stoi(part));
    return out;
}

void time_packing(Team& team) {
    const int outputs = 5632, inputs = 2048, copies = 20;
    char* const weights = allocate((size_t)outputs * inputs * 2 * copies);
    memset(weights, 1, (size_t)outputs * inputs * 2 * copies);
    for (int repeat = 0; repeat < 3; repeat++) {
        const double start = now();
        run(team, [&](int thread, int threads) {
            Buffer scratch(inputs * 2 * 32);
            for (int i = 0; i < copies; i++) {
                char* p = weights + (size_t)outputs * inputs * 2 * i;
                const KvpLinear linear{KVP_BF16, 0, outputs, inputs, inputs, 0, p, nullptr, nullptr, nullptr, nullptr};
                pack_weight(linear, p, inputs * 2, scratch.p, thread, threads);
            }
        });
        printf("packed in place: %.1f GB/s of weights\n", (double)outputs * inputs * 2 * copies / (now() - start) / 1e9);
    }
}

}  // namespace

int main(int argc, char** argv) {
    const std::string command = argc > 1 ? argv[1] : "check";
    const std::unique_ptr<Team> made(Team::create(environment("THREADS", 2))), one(Team::create(1));
    Team& team = *made;
    if (command == "check") {
        for (const Kind& kind : KINDS) {
            check_values(kind, team);
            check_targets(kind, team);
            check_in_place(kind, team);
            check_bits(kind, *one, team);
            printf(", targets, in place, bits of a row over 1..%d rows and 1, %d threads: ok\n", MAX_ROWS, team.size());
        }
    } else if (command == "gemm" && argc > 3) {
        for (const Kind& kind : KINDS) {
            if (strcmp(kind.name, argv[2])) continue;
            std::vector<const char*> shapes(argv + 4, argv + argc);
            if (shapes.empty()) shapes = {"2048,768", "768,2048", "5632,2048", "2048,5632", "32000,768"};
            const double peak = environment("PEAK", kind.dynamic ? 868 : 435) * 1e9;
            for (const char* shape : shapes)
                for (int rows : numbers(argv[3])) time_product(kind, rows, numbers(shape)[0], numbers(shape)[1], team, peak);
        }
    } else if (command == "pack") {
        time_packing(team);
    } else {
        printf("linear_bench check | gemm KIND ROWS,ROWS.. [N,K ..] | pack\n");
        return 1;
    }
    return 0;
}
