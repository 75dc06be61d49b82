#include "sampling.h"

namespace KVP_NS {
namespace {

constexpr int64_t NO_TOKEN = -1;
constexpr int BLOCK = 256;       // tokens whose weights have a sum of their own
constexpr int SEARCH = 1024;     // tokens whose largest logit is compared with the largest before them
constexpr int LEVEL_BITS = 10;   // weights are in [0, 1]: three levels are all of a float's pattern below 2^30
constexpr int BUCKETS = 1 << LEVEL_BITS;
constexpr float ALL = 2.0f;      // above every weight
constexpr float FORBIDDEN = -__builtin_inff();
constexpr float LEAST_EXPONENT = -87.0f;  // e^x is a normal float from here on; weights below are 0

#if KVP_ISA >= 2
using Mask = __mmask16;
using D = __m512d;
KVP_INLINE Mask more(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
KVP_INLINE Mask not_less(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
KVP_INLINE Mask equal(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
KVP_INLINE Mask not_number(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q); }  // either is NaN
KVP_INLINE bool any(Mask m) { return m != 0; }
KVP_INLINE F only(Mask m, F x) { return _mm512_maskz_mov_ps(m, x); }
KVP_INLINE D low_doubles(F x) { return _mm512_cvtps_pd(_mm512_castps512_ps256(x)); }
KVP_INLINE D high_doubles(F x) { return _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)); }

// Writes the lanes of x in [least, limit) to `out` in their order, rubbish behind them up to W, and returns how many.
KVP_INLINE int keep(float* out, F x, F least, F limit) {
    const Mask kept = not_less(x, least) & more(limit, x);
    if (kept == 0) return 0;
    store(out, _mm512_maskz_compress_ps(kept, x));
    return __builtin_popcount(kept);
}
#else
typedef int32_t Mask __attribute__((vector_size(sizeof(F))));
typedef double D __attribute__((vector_size(sizeof(F))));
KVP_INLINE Mask more(F a, F b) { return a > b; }
KVP_INLINE Mask not_less(F a, F b) { return a >= b; }
KVP_INLINE Mask equal(F a, F b) { return a == b; }
KVP_INLINE Mask not_number(F a, F b) { return (a != a) | (b != b); }
KVP_INLINE F only(Mask m, F x) { return (F)((Mask)x & m); }
#if KVP_ISA == 1
KVP_INLINE bool any(Mask m) { return _mm256_movemask_ps((F)m) != 0; }
KVP_INLINE D low_doubles(F x) { return _mm256_cvtps_pd(_mm256_castps256_ps128(x)); }
KVP_INLINE D high_doubles(F x) { return _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)); }
#else
KVP_INLINE bool any(Mask m) { return (m[0] | m[1] | m[2] | m[3]) != 0; }
KVP_INLINE D low_doubles(F x) { return D{x[0], x[1]}; }
KVP_INLINE D high_doubles(F x) { return D{x[2], x[3]}; }
#endif

KVP_INLINE int keep(float* out, F x, F least, F limit) {
    const Mask kept = not_less(x, least) & more(limit, x);
    if (!any(kept)) return 0;
    int count = 0;
    for (int i = 0; i < W; i++) {
        out[count] = x[i];
        count -= kept[i];
    }
    return count;
}
#endif

KVP_INLINE float number(float x) { return x; }
KVP_INLINE float number(uint16_t x) { return from_bf16(x); }
KVP_INLINE F load_logits(const float* p) { return load(p); }
KVP_INLINE F load_logits(const uint16_t* p) { return load_bf16(p); }

// The first `count` of them, -inf in the other lanes.
template <class T>
KVP_INLINE F load_logits(const T* p, int count) {
    if (count >= W) return load_logits(p);
    float values[W];
    for (int i = 0; i < W; i++) values[i] = i < count ? number(p[i]) : FORBIDDEN;
    return load(values);
}

// Sums of floats in double precision, lane by lane; in the end a fixed tree.
struct Sums {
    D low = {}, high = {};

    void add(F x) {
        low += low_doubles(x);
        high += high_doubles(x);
    }
    double total() const {
        const D both = low + high;
        double v[W / 2];
        memcpy(v, &both, sizeof v);
        for (int step = W / 4; step > 0; step /= 2)
            for (int i = 0; i < step; i++) v[i] += v[i + step];
        return v[0];
    }
};

struct Best {
    int64_t token;  // NO_TOKEN: a logit is NaN, or all are -inf
    float logit;
};

// The largest logit, and the lowest token that has it.
template <class T>
Best likeliest(const T* logits, int vocab_size) {
    float best = FORBIDDEN;
    int token = 0;  // the start of the part that holds it
    Mask nan = {};
    for (int start = 0; start < vocab_size; start += SEARCH) {
        const T* part = logits + start;
        const int count = vocab_size - start < SEARCH ? vocab_size - start : SEARCH;
        F most[4] = {splat(FORBIDDEN), splat(FORBIDDEN), splat(FORBIDDEN), splat(FORBIDDEN)};
        int i = 0;
        for (; i + 4 * W <= count; i += 4 * W) {
            F x[4];
            KVP_UNROLL for (int j = 0; j < 4; j++) x[j] = load_logits(part + i + j * W);
            KVP_UNROLL for (int j = 0; j < 4; j++) most[j] = max(most[j], x[j]);
            nan |= not_number(x[0], x[1]) | not_number(x[2], x[3]);
        }
        for (; i < count; i += W) {
            const F x = load_logits(part + i, count - i);
            most[0] = max(most[0], x);
            nan |= not_number(x, x);
        }
        const F lanes = max(max(most[0], most[1]), max(most[2], most[3]));
        if (any(more(lanes, splat(best)))) {
            best = largest(lanes);
            token = start;
        }
    }
    if (any(nan) || best == FORBIDDEN) return {NO_TOKEN, best};
    while (token + W <= vocab_size && !any(equal(load_logits(logits + token), splat(best)))) token += W;
    while (number(logits[token]) != best) token++;
    return {token, best};
}

// The weights of a row: e^(logit / temperature) over that of the likeliest token, so the largest is 1.
struct Row {
    int vocab_size;
    int padded;      // up to whole blocks
    double total;    // of all weights
    float* weights;  // [padded], 0 behind the vocabulary
    float* maxima;   // [padded / BLOCK * W]: of each lane of a block
    double* sums;    // [padded / BLOCK]: of the weights that are kept
    float* listed;   // [padded + 3 * W]: weights that are looked at closely
    struct Bucket* buckets;  // [BUCKETS]
};

// Some weights: how much they weigh, and how many they are.
struct Bucket {
    double mass;
    int64_t count;
};

// Weights, their maxima and sums from the logits; `top` is the largest of logit / temperature.
template <class T>
void weigh(Row& row, const T* logits, float temperature, float top) {
    row.total = 0.0;
    float* maxima = row.maxima;
    for (int start = 0; start < row.padded; start += BLOCK, maxima += W) {
        Sums sums;
        F most = zero();
        for (int i = start; i < start + BLOCK; i += W) {
            F x = load_logits(logits + i, row.vocab_size - i);
            if (temperature != 1.0f) x = x / splat(temperature);
            x = x - splat(top);
            const Mask counts = not_less(x, splat(LEAST_EXPONENT));
            const F weight = only(counts, exp(max(x, splat(LEAST_EXPONENT))));
            store(row.weights + i, weight);
            most = max(most, weight);
            sums.add(weight);
        }
        store(maxima, most);
        row.total += row.sums[start / BLOCK] = sums.total();
    }
}

// Writes the weights in [least, limit), least > 0, to `out`, W lanes of -1 behind them, and returns how many.
// `out` may be `weights`. Reads `count` up to whole vectors.
int list_between(const float* weights, int count, float least, float limit, float* out) {
    int listed = 0;
    for (int i = 0; i < count; i += W) listed += keep(out + listed, load(weights + i), splat(least), splat(limit));
    store(out + listed, splat(-1.0f));
    return listed;
}

struct Kept {
    float least;  // weight that is kept
    double mass;  // of all weights not below it
};

KVP_INLINE float of_pattern(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

// The largest weight so that those not below it number at least `rank` and weigh at least `mass`; the smallest weight
// where there is none. Radix selection: 10 bits of the pattern at a time, each time within one bucket of the last.
// `narrowed`: room for `count` up to whole vectors and W more.
Kept select(const float* weights, int count, int64_t rank, double mass, float* narrowed, Bucket* buckets) {
    uint32_t pattern = 0;
    Bucket above = {0.0, 0};
    for (int shift = 2 * LEVEL_BITS;; shift -= LEVEL_BITS) {
        memset(buckets, 0, BUCKETS * sizeof(Bucket));
        for (int i = 0; i < count; i++) {
            uint32_t bits;
            memcpy(&bits, weights + i, sizeof bits);
            Bucket& bucket = buckets[bits >> shift & (BUCKETS - 1)];
            bucket.mass += weights[i];
            bucket.count++;
        }
        Bucket with = above;
        int chosen = 0;
        for (int i = BUCKETS - 1; i >= 0; i--) {
            if (buckets[i].count == 0) continue;
            chosen = i;
            above = with;
            with.mass += buckets[i].mass;
            with.count += buckets[i].count;
            if (with.count >= rank && with.mass >= mass) break;
        }
        pattern |= (uint32_t)chosen << shift;
        if (shift == 0 || pattern == 0) return {of_pattern(pattern), with.mass};
        count = list_between(weights, count, of_pattern(pattern), of_pattern(pattern + (1u << shift)), narrowed);
        weights = narrowed;
    }
}

// The least weight that top-k and then top-p keep; ties with it are kept as well.
float top_threshold(const Row& row, int64_t top_k, double top_p) {
    // A weight that is surely not above the threshold: the k-th of the maxima of disjoint parts; or what weights may
    // have without being, all together, the part that top-p leaves out.
    const int parts = row.padded / BLOCK * W;
    float bound = 0.0f;
    if (top_k == 0) bound = (float)(0.999 * (1.0 - top_p) * row.total / row.vocab_size);
    else if (top_k <= parts) bound = select(row.maxima, parts, top_k, 0.0, row.listed, row.buckets).least;
    const float* weights = row.weights;
    float* narrowed = row.listed;
    int count = row.vocab_size;
    if (bound > 0.0f) {
        const int listed = list_between(row.weights, row.padded, bound, ALL, row.listed);
        if (listed <= row.padded / 2) {
            weights = row.listed;
            count = listed;
            narrowed = row.listed + listed + W;
        }
    }
    Kept kept = {0.0f, row.total};
    if (top_k > 0) kept = select(weights, count, top_k, 0.0, narrowed, row.buckets);
    if (top_p >= 1.0) return kept.least;
    const float least = select(weights, count, 1, top_p * kept.mass, narrowed, row.buckets).least;
    return least > kept.least ? least : kept.least;
}

// Sums of the weights that are kept, and their total.
void sum_kept(Row& row, float least) {
    row.total = 0.0;
    for (int start = 0; start < row.padded; start += BLOCK) {
        Sums sums;
        for (int i = start; i < start + BLOCK; i += W) {
            const F x = load(row.weights + i);
            sums.add(only(not_less(x, splat(least)), x));
        }
        row.total += row.sums[start / BLOCK] = sums.total();
    }
}

// The first token at which the kept weights so far exceed uniform * total; uniform < 1.
int64_t pick(const Row& row, float least, float uniform) {
    const double target = (double)uniform * row.total;
    double before = 0.0;
    int block = 0;
    while (before + row.sums[block] <= target) before += row.sums[block++];
    int64_t token = NO_TOKEN;
    for (int i = block * BLOCK; i < (block + 1) * BLOCK; i++) {
        const float weight = row.weights[i];
        if (weight == 0.0f || weight < least) continue;
        token = i;  // the block's last one catches rounding
        before += weight;
        if (before > target) break;
    }
    return token;
}

template <class T>
int64_t sample_row(const KvpSampling& call, int index, Row& row) {
    const T* logits = (const T*)call.logits + index * call.logits_stride;
    const Best best = likeliest(logits, row.vocab_size);
    const float temperature = call.temperature ? call.temperature[index] : 0.0f;
    if (best.token == NO_TOKEN || temperature == 0.0f) return best.token;
    const float top = best.logit / temperature;
    if (!(top - top == 0.0f)) return NO_TOKEN;  // not finite
    weigh(row, logits, temperature, top);
    int64_t top_k = call.top_k[index];
    if (top_k >= row.vocab_size) top_k = 0;
    float least = call.min_p[index];
    if (top_k > 0 || call.top_p[index] < 1.0) {
        const float threshold = top_threshold(row, top_k, call.top_p[index]);
        least = threshold > least ? threshold : least;
    }
    if (least > 0.0f) sum_kept(row, least);
    return pick(row, least, call.uniforms[index]);
}

// Lays a row's arrays out from `memory` on, each from a cache line's start; the bytes they take.
size_t lay_out(Row& row, int vocab_size, char* memory) {
    size_t end = 0;
    auto place = [&](size_t bytes) {
        char* start = (char*)((uintptr_t)memory + end);
        end += (bytes + 63) / 64 * 64;
        return start;
    };
    row.vocab_size = vocab_size;
    row.padded = (vocab_size + BLOCK - 1) / BLOCK * BLOCK;
    const size_t blocks = row.padded / BLOCK;
    row.weights = (float*)place(row.padded * sizeof(float));
    row.maxima = (float*)place(blocks * W * sizeof(float));
    row.sums = (double*)place(blocks * sizeof(double));
    row.listed = (float*)place((row.padded + 3 * W) * sizeof(float));
    row.buckets = (Bucket*)place(BUCKETS * sizeof(Bucket));
    return end;
}

}  // namespace

size_t sample_scratch_bytes(int vocab_size) {
    Row row;
    return lay_out(row, vocab_size, nullptr);
}

void sample(const KvpSampling& call, char* scratch, int thread, int threads) {
    Row row;
    lay_out(row, call.vocab_size, scratch);
    for (int index = thread; index < call.num_rows; index += threads)
        call.token_ids[index] =
            call.type == KVP_BF16 ? sample_row<uint16_t>(call, index, row) : sample_row<float>(call, index, row);
}

}  // namespace KVP_NS
