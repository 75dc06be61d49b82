// The softmax between the two products, row by row: scores of one tile of keys become weights.
#pragma once
#include "attention_kernels.h"

namespace KVP_NS {

constexpr float NOTHING = -__builtin_inff();  // the score of a key that is not seen, the largest of a row of these
constexpr float LOG2_E = 1.44269504f;

typedef int32_t Lanes __attribute__((vector_size(sizeof(F))));

KVP_INLINE F choose(Lanes mask, F yes, F no) { return (F)(((Lanes)yes & mask) | ((Lanes)no & ~mask)); }

// All bits of the lanes [first, last), counted from `start`.
KVP_INLINE Lanes lanes_between(int start, int first, int last) {
    static const int32_t BITS[3 * W] = {
#if KVP_ISA >= 2
        0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,
#elif KVP_ISA == 1
        0, 0, 0, 0, 0, 0, 0, 0, -1, -1, -1, -1, -1, -1, -1, -1,
#else
        0, 0, 0, 0, -1, -1, -1, -1,
#endif
    };
    first = first < start ? 0 : first - start < W ? first - start : W;
    last = last < start ? 0 : last - start < W ? last - start : W;
    return (Lanes)load_bits(BITS + W - first) & (Lanes)load_bits(BITS + 2 * W - last);
}

KVP_INLINE float largest_lane(F x) {
#if KVP_ISA >= 2
    return _mm512_reduce_max_ps(x);
#else
    return largest(x);
#endif
}

// A polynomial for 2^r with 1 at r = 0: |r| <= 1/2, or with AVX-512 0 <= r <= 1.
template <bool ROUGH>
KVP_INLINE F power_of_fraction(F r) {
#if KVP_ISA >= 2
    constexpr float FINE[] = {1.86713063e-3f, 9.01702885e-3f, 5.57999164e-2f, 2.40164444e-1f, 6.93151295e-1f};
    constexpr float FEWER[] = {1.34266885e-2f, 5.22424653e-2f, 2.41280213e-1f, 6.93044841e-1f};
#else
    constexpr float FINE[] = {1.3264731e-3f, 9.6715130e-3f, 5.5507336e-2f, 2.4022242e-1f, 6.9314700e-1f};
    constexpr float FEWER[] = {9.5828129e-3f, 5.5906426e-2f, 2.4024099e-1f, 6.9312418e-1f};
#endif
    F y = splat(ROUGH ? FEWER[0] : FINE[0]);
    KVP_UNROLL for (int i = 1; i < (ROUGH ? 4 : 5); i++) y = fma(y, r, splat(ROUGH ? FEWER[i] : FINE[i]));
    return fma(y, r, splat(1.0f));
}

// 2^x for x up to about 0; exactly 1 at 0, exactly 0 at -inf, to 1e-7 relative (rough: 3e-6, less than bf16 sees).
// Below 2^-126 it is some number below that.
template <bool ROUGH>
KVP_INLINE F power_of_two(F x) {
#if KVP_ISA >= 2
    return _mm512_scalef_ps(power_of_fraction<ROUGH>(_mm512_reduce_ps(x, 1)), x);  // x - floor(x); 0 where x is -inf
#else
    const F magic = splat(12582912.0f);  // 1.5 * 2^23: the sum's last bits are x rounded to a whole number
    x = max(x, splat(-127.0f));
    const F shifted = x + magic;
    const F y = power_of_fraction<ROUGH>(x - (shifted - magic));
    return as_float(add(as_int(y), shift_left(as_int(shifted), 23)));
#endif
}

// y = cap * tanh(x / cap), with tanh |z| = (1 - e^-2|z|) / (1 + e^-2|z|)
KVP_INLINE F soft_capped(F x, float cap) {
    const F e = exp(splat(-2.0f / cap) * abs(x));
    const F size = splat(cap) * (splat(1.0f) - e) / (splat(1.0f) + e);
    return (F)((Lanes)size | ((Lanes)x & (Lanes)splat_int((int32_t)0x80000000)));
}

// How products q.k become exponents of two.
struct Scoring {
    float scale, softcap;   // softcap 0 = off
    const float* k_scales;  // int8: [TILE], else null
    const float* v_scales;  // likewise; they multiply weights

    // Products are left as they are: one factor makes exponents of them, and keeps their order.
    bool direct() const { return !k_scales && softcap == 0.0f && scale > 0.0f; }
    float factor() const { return direct() ? scale * LOG2_E : 1.0f; }
};

// Products of one row with keys [from, to) of a tile, of which [oldest, end) are seen, become exponents but for
// factor(). Returns the largest.
KVP_INLINE float prepare_row(const Scoring& scoring, float* scores, int from, int to, int oldest, int end) {
    F most = splat(NOTHING);
    if (scoring.direct() && oldest <= from && end >= to) {
        for (int key = from; key < to; key += W) most = max(most, load(scores + key));
        return largest_lane(most);
    }
    const bool direct = scoring.direct(), capped = scoring.softcap != 0.0f;
    const F scale = splat(capped ? scoring.scale : scoring.scale * LOG2_E);
    const float *const k_scales = scoring.k_scales, softcap = scoring.softcap;
    for (int key = from; key < to; key += W) {
        F x = load(scores + key);
        if (k_scales) x = x * load(k_scales + key);
        if (!direct) x = x * scale;
        if (capped) x = soft_capped(x, softcap) * splat(LOG2_E);
        if (key < oldest || key + W > end) x = choose(lanes_between(key, oldest, end), x, splat(NOTHING));
        store(scores + key, x);
        most = max(most, x);
    }
    return largest_lane(most);
}

template <bool PAIRS>
KVP_INLINE void store_weight(float* out, F weight) { store(out, weight); }
#if KVP_ISA == 3
template <bool PAIRS>
KVP_INLINE void store_weight(uint16_t* out, F weight) { store_bf16(out, weight); }
#endif

// Weights 2^(scores * factor - most) of keys [from, to) into weights[key / PIECE * stride + key % PIECE]; returns
// their sum, lane by lane, before v_scales.
template <bool PAIRS, class Weight>
KVP_INLINE F weigh_row(const float* scores, int from, int to, float factor, float most, const float* v_scales,
                       Weight* weights, int64_t stride) {
    F sum = zero();
    const F by = splat(factor), less = splat(-most);
    for (int key = from; key < to; key += W) {
        F weight = power_of_two<PAIRS>(fma(load(scores + key), by, less));
        sum = sum + weight;
        if (v_scales) weight = weight * load(v_scales + key);
        store_weight<PAIRS>(weights + key / PIECE * stride + key % PIECE, weight);
    }
    return sum;
}

}  // namespace KVP_NS
