// Vectors of one instruction set. Every file that is compiled once a set includes this; KVP_ISA says which.
//
// All of it is always inlined and lives in KVP_NS: an inline function that the linker could share between sets might be
// the copy that an older processor cannot run. For the same reason these files use nothing of std but atomics.
#pragma once
#include <stdint.h>
#include <string.h>

#include "abi.h"

#ifndef KVP_ISA
#error "KVP_ISA is 0 (portable), 1 (AVX2), 2 (AVX-512) or 3 (AVX-512 with BF16 and VNNI)"
#endif
#if KVP_ISA == 3
#define KVP_NS kvp_avx512_bf16
#elif KVP_ISA == 2
#define KVP_NS kvp_avx512
#elif KVP_ISA == 1
#define KVP_NS kvp_avx2
#else
#define KVP_NS kvp_portable
#endif
#if KVP_ISA > 0
#include <immintrin.h>
#endif

#define KVP_INLINE static inline __attribute__((always_inline))
#define KVP_UNROLL _Pragma("GCC unroll 32")

namespace KVP_NS {

// F: floats, I: 32-bit integers, W lanes each. Loads and stores need no alignment.
#if KVP_ISA >= 2
constexpr int W = 16;
using F = __m512;
using I = __m512i;
KVP_INLINE F zero() { return _mm512_setzero_ps(); }
KVP_INLINE F splat(float x) { return _mm512_set1_ps(x); }
KVP_INLINE I splat_int(int32_t x) { return _mm512_set1_epi32(x); }
KVP_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
KVP_INLINE void store(float* p, F x) { _mm512_storeu_ps(p, x); }
KVP_INLINE I load_bits(const void* p) { return _mm512_loadu_si512(p); }
KVP_INLINE void store_bits(void* p, I x) { _mm512_storeu_si512(p, x); }
KVP_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
KVP_INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }
KVP_INLINE F min(F a, F b) { return _mm512_min_ps(a, b); }
KVP_INLINE F abs(F x) { return _mm512_abs_ps(x); }
KVP_INLINE F round_down(F x) { return _mm512_roundscale_ps(x, 9); }
KVP_INLINE I to_int(F x) { return _mm512_cvtps_epi32(x); }  // to nearest, ties to even
KVP_INLINE F to_float(I x) { return _mm512_cvtepi32_ps(x); }
KVP_INLINE F as_float(I x) { return _mm512_castsi512_ps(x); }
KVP_INLINE I as_int(F x) { return _mm512_castps_si512(x); }
KVP_INLINE I shift_left(I x, int n) { return _mm512_slli_epi32(x, n); }
KVP_INLINE I shift_right(I x, int n) { return _mm512_srli_epi32(x, n); }
KVP_INLINE I shift_right_signed(I x, int n) { return _mm512_srai_epi32(x, n); }
KVP_INLINE I bit_and(I a, I b) { return _mm512_and_si512(a, b); }
KVP_INLINE I bit_xor(I a, I b) { return _mm512_xor_si512(a, b); }
KVP_INLINE I add(I a, I b) { return _mm512_add_epi32(a, b); }
KVP_INLINE F load_bf16(const uint16_t* p) {
    return as_float(shift_left(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
KVP_INLINE F load_f16(const void* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
KVP_INLINE I load_u8(const void* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }
KVP_INLINE I load_i8(const void* p) { return _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)); }
KVP_INLINE I load_i16(const void* p) { return _mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i*)p)); }
KVP_INLINE F where_less(I a, I b, F yes, F no) {
    return _mm512_mask_blend_ps(_mm512_cmplt_epi32_mask(a, b), no, yes);
}
#elif KVP_ISA == 1
constexpr int W = 8;
using F = __m256;
using I = __m256i;
KVP_INLINE F zero() { return _mm256_setzero_ps(); }
KVP_INLINE F splat(float x) { return _mm256_set1_ps(x); }
KVP_INLINE I splat_int(int32_t x) { return _mm256_set1_epi32(x); }
KVP_INLINE F load(const float* p) { return _mm256_loadu_ps(p); }
KVP_INLINE void store(float* p, F x) { _mm256_storeu_ps(p, x); }
KVP_INLINE I load_bits(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
KVP_INLINE void store_bits(void* p, I x) { _mm256_storeu_si256((__m256i*)p, x); }
KVP_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
KVP_INLINE F max(F a, F b) { return _mm256_max_ps(a, b); }
KVP_INLINE F min(F a, F b) { return _mm256_min_ps(a, b); }
KVP_INLINE F abs(F x) { return _mm256_and_ps(x, _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff))); }
KVP_INLINE F round_down(F x) { return _mm256_floor_ps(x); }
KVP_INLINE I to_int(F x) { return _mm256_cvtps_epi32(x); }
KVP_INLINE F to_float(I x) { return _mm256_cvtepi32_ps(x); }
KVP_INLINE F as_float(I x) { return _mm256_castsi256_ps(x); }
KVP_INLINE I as_int(F x) { return _mm256_castps_si256(x); }
KVP_INLINE I shift_left(I x, int n) { return _mm256_slli_epi32(x, n); }
KVP_INLINE I shift_right(I x, int n) { return _mm256_srli_epi32(x, n); }
KVP_INLINE I shift_right_signed(I x, int n) { return _mm256_srai_epi32(x, n); }
KVP_INLINE I bit_and(I a, I b) { return _mm256_and_si256(a, b); }
KVP_INLINE I bit_xor(I a, I b) { return _mm256_xor_si256(a, b); }
KVP_INLINE I add(I a, I b) { return _mm256_add_epi32(a, b); }
KVP_INLINE F load_bf16(const uint16_t* p) {
    return as_float(shift_left(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
KVP_INLINE F load_f16(const void* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
KVP_INLINE I load_u8(const void* p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
KVP_INLINE I load_i8(const void* p) { return _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
KVP_INLINE I load_i16(const void* p) { return _mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i*)p)); }
KVP_INLINE F where_less(I a, I b, F yes, F no) {
    return _mm256_blendv_ps(no, yes, _mm256_castsi256_ps(_mm256_cmpgt_epi32(b, a)));
}
#else  // GCC's vector extension: SSE2, NEON, or whatever the compiler makes of it
constexpr int W = 4;
typedef float F __attribute__((vector_size(16)));
typedef int32_t I __attribute__((vector_size(16)));
typedef uint32_t U __attribute__((vector_size(16)));
KVP_INLINE F splat(float x) { return F{x, x, x, x}; }
KVP_INLINE I splat_int(int32_t x) { return I{x, x, x, x}; }
KVP_INLINE F zero() { return splat(0.0f); }
KVP_INLINE I load_bits(const void* p) { I x; memcpy(&x, p, sizeof x); return x; }
KVP_INLINE void store_bits(void* p, I x) { memcpy(p, &x, sizeof x); }
KVP_INLINE F load(const float* p) { F x; memcpy(&x, p, sizeof x); return x; }
KVP_INLINE void store(float* p, F x) { memcpy(p, &x, sizeof x); }
KVP_INLINE F fma(F a, F b, F c) { return a * b + c; }
KVP_INLINE F as_float(I x) { return (F)x; }
KVP_INLINE I as_int(F x) { return (I)x; }
KVP_INLINE F max(F a, F b) { const I more = a > b; return (F)(((I)a & more) | ((I)b & ~more)); }
KVP_INLINE F min(F a, F b) { const I less = a < b; return (F)(((I)a & less) | ((I)b & ~less)); }
KVP_INLINE F abs(F x) { return (F)((I)x & splat_int(0x7fffffff)); }
KVP_INLINE F to_float(I x) { return __builtin_convertvector(x, F); }
KVP_INLINE I to_int(F x) {  // adding 1.5 * 2^23 rounds |x| < 2^22 to nearest, ties to even
    const F magic = splat(12582912.0f);
    return (I)(x + magic) - (I)magic;
}
KVP_INLINE F round_down(F x) {  // |x| < 2^31
    const F whole = to_float(__builtin_convertvector(x, I));
    return whole - (F)((whole > x) & (I)splat(1.0f));
}
KVP_INLINE I shift_left(I x, int n) { return x << n; }
KVP_INLINE I shift_right(I x, int n) { return (I)((U)x >> n); }
KVP_INLINE I shift_right_signed(I x, int n) { return x >> n; }
KVP_INLINE I bit_and(I a, I b) { return a & b; }
KVP_INLINE I bit_xor(I a, I b) { return a ^ b; }
KVP_INLINE I add(I a, I b) { return a + b; }
KVP_INLINE F load_bf16(const uint16_t* p) {
    return (F)(I{p[0], p[1], p[2], p[3]} << 16);
}
template <class T> KVP_INLINE I load_integers(const void* p) {
    T x[W];
    memcpy(x, p, sizeof x);
    return I{x[0], x[1], x[2], x[3]};
}
KVP_INLINE I load_u8(const void* p) { return load_integers<uint8_t>(p); }
KVP_INLINE I load_i8(const void* p) { return load_integers<int8_t>(p); }
KVP_INLINE I load_i16(const void* p) { return load_integers<int16_t>(p); }
KVP_INLINE F where_less(I a, I b, F yes, F no) {
    const I less = a < b;
    return (F)(((I)yes & less) | ((I)no & ~less));
}
KVP_INLINE F load_f16(const void* p) {
    const I bits = load_integers<uint16_t>(p), size = bits & 0x7fff;
    const I endless = (size >= 0x7c00) & (112 << 23);  // exponents of inf and NaN
    const F normal = (F)((size << 13) + (112 << 23) + endless);
    const F value = where_less(size, splat_int(0x400), to_float(size) * splat(0x1p-24f), normal);
    return (F)((I)value | (bits & 0x8000) << 16);
}
#endif

// The low and the high bf16 of each 32-bit lane.
KVP_INLINE F low_bf16(I x) { return as_float(shift_left(x, 16)); }
KVP_INLINE F high_bf16(I x) { return as_float(bit_and(x, splat_int((int32_t)0xffff0000))); }

KVP_INLINE float from_bf16(uint16_t x) {
    const uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

KVP_INLINE uint16_t to_bf16(float x) {  // to nearest, ties to even; NaN stays NaN
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

KVP_INLINE void store_bf16(uint16_t* p, F x) {  // W values; subnormals become 0 where the processor has bf16
#if KVP_ISA == 3
    _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(x));
#else
    float values[W];
    store(values, x);
    for (int i = 0; i < W; i++) p[i] = to_bf16(values[i]);
#endif
}

// A fixed tree: the same order of additions for every caller.
KVP_INLINE float sum(F x) {
    float v[W];
    store(v, x);
    for (int step = W / 2; step > 0; step /= 2)
        for (int i = 0; i < step; i++) v[i] += v[i + step];
    return v[0];
}

KVP_INLINE float largest(F x) {
    float v[W];
    store(v, x);
    float most = v[0];
    for (int i = 1; i < W; i++) most = v[i] > most ? v[i] : most;
    return most;
}

// e^x to 2 units in the last place; 0 below -87.3, inf above 88.7 (Cody-Waite reduction, degree 6).
KVP_INLINE F exp(F x) {
    x = min(max(x, splat(-104.0f)), splat(88.8f));
    const F n = round_down(fma(x, splat(1.44269504f), splat(0.5f)));
    F r = fma(n, splat(-0.693359375f), x);
    r = fma(n, splat(2.12194440e-4f), r);
    F y = splat(1.9875691500e-4f);
    y = fma(y, r, splat(1.3981999507e-3f));
    y = fma(y, r, splat(8.3334519073e-3f));
    y = fma(y, r, splat(4.1665795894e-2f));
    y = fma(y, r, splat(1.6666665459e-1f));
    y = fma(y, r, splat(5.0000001201e-1f));
    y = fma(fma(y, r, splat(1.0f)), r, splat(1.0f));
    // 2^n in two factors, so that results below the normal range go to 0 and above it to inf.
    const I half = to_int(round_down(n * splat(0.5f)));
    const I rest = to_int(n - to_float(half));
    const F first = as_float(shift_left(add(half, splat_int(127)), 23));
    const F second = as_float(shift_left(add(rest, splat_int(127)), 23));
    return y * first * second;
}

}  // namespace KVP_NS
