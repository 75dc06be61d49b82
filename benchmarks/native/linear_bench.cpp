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
//   linear_bench ratio KIND,KIND.. ROWS,ROWS.. [N,K ..]  how many times as fast as BASE (bf16), bursts by turns
//   linear_bench pack                           speed of packing weights in place
// KIND: see linear_bench_weight.h (int8d, int4d: dynamic int8 rows). Environment: THREADS, PEAK (Gop/s of the kind, all
// threads), BURST (ms), REPEATS, BASE, and for a machine that others use too PAUSE (ms before a burst; a process that
// slept is not interrupted at once), QUANTILE (percent; 50: medians, 0: the fastest) and MB of weights (1: from the
// cache).
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <memory>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "linear_bench_weight.h"

namespace {

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
    const int shapes[][2] = {{192, 768}, {103, 512}, {64, 2304}, {33, 256}, {96, 1280}, {70, 200}};
    double worst = 0;
    for (const auto& s : shapes) {
        if (kind.group && s[1] % (kind.per_shared ? kind.per_shared * kind.group : kind.group)) continue;
        Weight w(kind, s[0], s[1], false, team);
        std::vector<float> row(s[1]);
        for (int n = 0; n < s[0]; n++) {
            read_row(w.linear, n, row.data());
            for (int k = 0; k < s[1]; k++) {
                const float expected = w.dense[(size_t)n * s[1] + k];
                fail_unless(std::abs(row[k] - expected) <= 1e-6f * std::abs(expected), "read_row", kind, n);
            }
        }
        for (int count : {1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 14, 15, 16, 17, 25, 29, 32, 65}) {
            const std::vector<float> x = random_rows((size_t)count * s[1]);
            const double error = error_against_double(w, x, product(team, w.linear, x.data(), count), count);
            fail_unless(error < (kind.dynamic || KVP_ISA == 3 ? kind.tolerance : 2e-6), "values", kind, count);
            worst = std::max(worst, error);
        }
    }
    printf("%-12s largest relative error %.1e", kind.name, worst);
}

void check_bits(const Kind& kind, Team& one, Team& two) {  // a row's bits: any number of rows and threads
    const int inputs = kind.group ? 1536 : 1504;
    Weight w(kind, 103, inputs, false, one);
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
    const int outputs = 2 * 256, inputs = 256, count = 17;
    Weight w(kind, outputs, inputs, false, team), after(kind, 64, outputs / 2, false, team);
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
        if (after.linear.dynamic || after.linear.permutation) continue;  // its rows need a whole row first
        Buffer memory(rows_bytes(after.linear, count)), expected(rows_bytes(after.linear, count));
        memset(memory.p, 1, rows_bytes(after.linear, count));
        memset(expected.p, 1, rows_bytes(after.linear, count));
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
    Weight w(kind, 100, 256, true, team);
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

// Copies of a weight of one kind, of any numbers, that are multiplied one after another.
class Weights {
  public:
    Weights(const Kind& kind, int outputs, int inputs) : kind_(kind), outputs_(outputs), inputs_(inputs) {
        bytes_ = (size_t)(outputs * (double)inputs * kind.bits / 8);
        const size_t groups = kind.group ? (size_t)outputs * (inputs / kind.group) : 0;
        const size_t scales = groups * bytes_of(kind.scale_type), zeros = kind.zeros ? groups : 0;
        const size_t offsets = kind.offsets ? scales : 0;
        const size_t shared = kind.per_shared ? groups / kind.per_shared * 2 : 0;
        beside_ = scales + offsets + zeros + (kind.offsets ? 2 : 1) * shared;
        copies_ = std::max(2, (int)(environment("MB", 160) * 1e6 / (double)(bytes_ + beside_)));
        memory_ = allocate(bytes_ * copies_);
        for (size_t i = 0; i < bytes_ * copies_; i++) memory_[i] = (char)(kind.bits > 8 && i % 2 ? 0x3c : i * 37 & 63);
        numbers_ = allocate(std::max((scales + offsets + zeros + 2 * shared) * copies_, (size_t)outputs * 4));
        permutation_.resize(inputs);
        for (int k = 0; k < inputs; k++) permutation_[k] = (int)((k * 797LL + 3) % inputs);
        char* at = numbers_;
        const auto take = [&](size_t bytes) { return (at += bytes) - bytes; };
        for (int i = 0; i < copies_; i++) {
            KvpLinear linear{};
            linear.type = kind.type, linear.dynamic = kind.dynamic, linear.group = kind.group;
            linear.outputs = outputs, linear.inputs = linear.padded = inputs;
            linear.zero = kind.zero();
            linear.panels = memory_ + i * bytes_;
            linear.table = TABLE;
            if (kind.permuted) linear.permutation = permutation_.data();
            if (!kind.group && (kind.type == KVP_I8 || kind.type == KVP_F8)) linear.output_scales = (float*)numbers_;
            const auto with = [&](size_t size, int type) {
                const void* values = take(size);
                return KvpGroupNumbers{values, shared ? take(shared) : nullptr, type, KVP_F16, kind.per_shared};
            };
            if (kind.group) linear.scales = with(scales, kind.scale_type);
            if (kind.zeros) linear.zeros = {take(zeros), nullptr, KVP_U8, 0, 0};
            if (kind.offsets) linear.offsets = with(offsets, kind.scale_type);
            layers_.push_back(linear);
        }
    }
    Weights(const Weights&) = delete;
    ~Weights() { munmap(memory_, bytes_ * copies_); }

    size_t bytes() const { return bytes_ + beside_; }

    struct Times {
        double product, read;  // seconds of one product, and of reading what it reads
    };

    Times burst(Team& team, int rows, double peak) {
        const double arithmetic = 2.0 * rows * outputs_ * inputs_ / peak;
        const int most = (int)(environment("BURST", 30) * 1e-3 / (arithmetic + (double)bytes_ / 34e9));
        const int calls = std::max(1, std::min(copies_, most));
        const std::vector<float> x = random_rows((size_t)rows * inputs_);
        std::vector<float> y((size_t)rows * outputs_);
        Buffer memory(rows_bytes(layers_[0], std::min(rows, MAX_ROWS))), scratch(multiply_scratch_bytes() * team.size());
        const int from = std::min((at_ + copies_ / 2) % copies_, copies_ - calls);  // far from what was used last
        std::this_thread::sleep_for(std::chrono::milliseconds(environment("PAUSE", 0)));
        const double read = read_time(team, memory_ + from * bytes_, bytes_ * calls);
        const double start = now();
        run(team, [&](int thread, int threads) {
            for (int i = 0; i < calls; i++)
                for (int first = 0; first < rows; first += MAX_ROWS) {
                    const KvpLinear& linear = layers_[(at_ + i) % copies_];
                    const Rows packed = rows_at(linear, std::min(rows - first, MAX_ROWS), memory.p);
                    for (int row = thread; row < packed.count; row += threads)
                        pack_row(packed, inputs_, row, x.data() + (size_t)(first + row) * inputs_);
                    team.barrier();
                    Target target;
                    target.y = y.data() + (size_t)first * outputs_;
                    target.stride = outputs_;
                    multiply(linear, packed, target, scratch.p + multiply_scratch_bytes() * thread, thread, threads);
                    team.barrier();
                }
        });
        at_ += calls;
        return {(now() - start) / calls, read / calls * (double)(bytes_ + beside_) / (double)bytes_};
    }

  private:
    const Kind& kind_;
    const int outputs_, inputs_;
    size_t bytes_, beside_;
    int copies_, at_ = 0;
    char *memory_, *numbers_;
    std::vector<int32_t> permutation_;
    std::vector<KvpLinear> layers_;
};

double peak_of(const Kind& kind) { return environment("PEAK", kind.dynamic ? 868 : 435) * 1e9; }

void time_product(const Kind& kind, int rows, int outputs, int inputs, Team& team) {
    Weights weights(kind, outputs, inputs);
    const double arithmetic = 2.0 * rows * outputs * inputs / peak_of(kind);
    std::vector<double> times, reads;
    for (int repeat = 0; repeat < environment("REPEATS", 7); repeat++) {
        const Weights::Times taken = weights.burst(team, rows, peak_of(kind));
        times.push_back(taken.product), reads.push_back(taken.read);
    }
    const double time = quantile(times), memory_time = quantile(reads), bytes = (double)weights.bytes();
    printf("%-12s M=%-4d %5dx%-5d %9.1f us %6.1f GB/s %6.0f Gop/s  read now %5.1f GB/s  %3.0f%% of bound (%s)\n", kind.name,
           rows, outputs, inputs, time * 1e6, bytes / time / 1e9, 2e-9 * rows * outputs * inputs / time,
           bytes / memory_time / 1e9, 100 * std::max(memory_time, arithmetic) / time,
           memory_time > arithmetic ? "memory" : "arithmetic");
    fflush(stdout);
}

const Kind& kind_of(const std::string& name) {
    for (const Kind& kind : KINDS)
        if (name == kind.name) return kind;
    printf("no kind %s\n", name.c_str());
    exit(1);
}

void time_ratio(const Kind& kind, int rows, int outputs, int inputs, Team& team) {
    const char* const name = getenv("BASE");
    const Kind& base = kind_of(name ? name : "bf16");
    Weights mine(kind, outputs, inputs), others(base, outputs, inputs);
    std::vector<double> ratios, times;
    for (int repeat = 0; repeat < environment("REPEATS", 7); repeat++) {
        const double before = others.burst(team, rows, peak_of(base)).product;
        const double own = mine.burst(team, rows, peak_of(kind)).product;
        const double after = others.burst(team, rows, peak_of(base)).product;
        ratios.push_back((before + after) / 2 / own), times.push_back(own);
    }
    std::sort(ratios.begin(), ratios.end());
    printf("%-12s M=%-4d %5dx%-5d %9.1f us  %.2f times as fast as %s (%.2f to %.2f)\n", kind.name, rows, outputs, inputs,
           quantile(times) * 1e6, ratios[ratios.size() / 2], base.name, ratios[ratios.size() / 4],
           ratios[ratios.size() * 3 / 4]);
    fflush(stdout);
}

std::vector<std::string> words(const char* text) {
    std::vector<std::string> out;
    std::stringstream stream(text);
    for (std::string part; std::getline(stream, part, ',');) out.push_back(part);
    return out;
}

std::vector<int> numbers(const char* text) {
    std::vector<int> out;
    for (const std::string& part : words(text)) out.push_back(std::stoi(part));
    return out;
}

void time_packing(const Kind& kind, Team& team) {
    const int outputs = 5632, inputs = 2048, copies = 20;
    const int64_t row = (int64_t)(inputs * kind.bits / 8);
    char* const weights = allocate((size_t)(outputs * row * copies));
    memset(weights, 1, (size_t)(outputs * row * copies));
    for (int repeat = 0; repeat < 3; repeat++) {
        const double start = now();
        run(team, [&](int thread, int threads) {
            Buffer scratch(row * 32);
            for (int i = 0; i < copies; i++) {
                KvpLinear linear{};
                linear.type = kind.type, linear.group = kind.group;
                linear.outputs = outputs, linear.inputs = linear.padded = inputs;
                linear.panels = weights + outputs * row * i;
                pack_weight(linear, (char*)linear.panels, row, scratch.p, thread, threads);
            }
        });
        const double taken = now() - start;
        printf("%s packed in place: %.1f GB/s, %.1f G weights/s\n", kind.name, (double)outputs * row * copies / taken / 1e9,
               (double)outputs * inputs * copies / taken / 1e9);
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
    } else if ((command == "gemm" || command == "ratio") && argc > 3) {
        std::vector<const char*> shapes(argv + 4, argv + argc);
        if (shapes.empty()) shapes = {"2048,768", "768,2048", "5632,2048", "2048,5632", "32000,768"};
        for (const std::string& kind : words(argv[2]))
            for (const char* shape : shapes)
                for (int rows : numbers(argv[3]))
                    (command == "gemm" ? time_product : time_ratio)(kind_of(kind), rows, numbers(shape)[0],
                                                                    numbers(shape)[1], team);
    } else if (command == "pack") {
        for (const char* kind : {"bf16", "int4", "q8", "fp8"}) time_packing(kind_of(kind), team);
    } else {
        printf("linear_bench check | gemm KIND ROWS,ROWS.. [N,K ..] | ratio KIND,KIND.. ROWS,ROWS.. [N,K ..] | pack\n");
        return 1;
    }
    return 0;
}
