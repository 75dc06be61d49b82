#include "sampling.h"

namespace KVP_NS {
namespace {

constexpr int64_t NO_TOKEN = -1;
constexpr int BLOCK = 256;       // tokens whose weights have a sum of their own
constexpr int SEARCH = 1024;     // tokens whose largest logit is compared with the largest before them
constexpr int LEVEL_BITS = 10;   // weights are in [0, 1]: three levels are all of a float's pattern below 2^30
constexpr int BUCKETS = 1 << LEVEL_BITS;
constexpr float EVERYTHING = 2.0f;  // above all weights
constexpr float NOTHING = -__builtin_inff();

#if KVP_ISA >= 2
using Mask = __mmask16;
using D = __m512d;
KVP_INLINE Mask more(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
KVP_INLINE Mask equal(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
KVP_INLINE Mask not_number(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q); }  // either is NaN
KVP_INLINE bool any(Mask m) { return m != 0; }
KVP_INLINE F at_least(F x, F least) { return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, least, _CMP_GE_OQ), x); }
KVP_INLINE D low_doubles(F x) { return _mm512_cvtps_pd(_mm512_castps512_ps256(x)); }
KVP_INLINE D high_doubles(F x) { return _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)); }

// Writes the lanes of x in [least, limit) to `out` in their order, rubbish behind them up to W, and returns how many.
KVP_INLINE int keep(float* out, F x, F least, F limit) {
    const Mask kept = _mm512_cmp_ps_mask(x, least, _CMP_GE_OQ) & _mm512_cmp_ps_mask(x, limit, _CMP_LT_OQ);
    if (kept == 0) return 0;
    store(out, _mm512_maskz_compress_ps(kept, x));
    return __builtin_popcount(kept);
}
#else
typedef int32_t Mask __attribute__((vector_size(sizeof(F))));
typedef double D __attribute__((vector_size(sizeof(F))));
KVP_INLINE Mask more(F a, F b) { return a > b; }
KVP_INLINE Mask equal(F a, F b) { return a == b; }
KVP_INLINE Mask not_number(F a, F b) { return (a != a) | (b != b); }
KVP_INLINE F at_least(F x, F least) { return (F)((Mask)x & (x >= least)); }
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
    if (!any((x >= least) & (x < limit))) return 0;
    float values[W];
    store(values, x);
    int count = 0;
    for (int i = 0; i < W; i++) {
        out[count] = values[i];
        count += values[i] >= x_bound(least) && values[i] < x_bound(limit);
    }
    return count;
}
#endif

KVP_INLINE F load_logits(const float* p) { return load(p); }
KVP_INLINE F load_logits(const uint16_t* p) { return load_bf16(p); }

// The first `count` <= W of them, then -inf.
template <class T>
KVP_INLINE F load_logits(const T* p, int count) {
    if (count >= W) return load_logits(p);
    float values[W];
    for (int i = 0; i < W; i++) values[i] = NOTHING;
    for (int i = 0; i < count; i++) values[i] = number(p[i]);
    return load(values);
}
}  // namespace
}  // namespace KVP_NS
