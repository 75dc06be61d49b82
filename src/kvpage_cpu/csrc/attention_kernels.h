// Micro-kernels of attention: queries x keys, and probabilities x values.
//
// A product's left side (queries, probabilities) is broadcast piece by piece against vectors of its right side (16 or
// so tokens of K, elements of V), so that no sum runs across lanes. Both sides of a 32-bit piece are one f32 or a pair
// of bf16. Without bf16 instructions the left side is f32 and pairs of the right side are split in registers.
#pragma once
#include "simd.h"

namespace KVP_NS {

constexpr int TILE = 128;   // keys of one step of the online softmax; tiles begin at multiples of it
constexpr int PIECE = 16;   // keys that lie in one block, whatever its size
constexpr int PIECES = TILE / PIECE;
constexpr int LINE = 16;    // 32-bit pieces in 64 bytes

#if KVP_ISA >= 2            // what the registers hold: rows x 2 vectors of sums, few rows x 4
constexpr int TALLEST = 14, FEW = 6;
#elif KVP_ISA == 1
constexpr int TALLEST = 5, FEW = 1;
#else
constexpr int TALLEST = 4, FEW = 1;
#endif

// The left side of products with pairs (of bf16), and of products in f32.
template <bool PAIRS>
struct Left {
    using Type = float;
    using Value = float;
    static constexpr int STEP = PAIRS ? 2 : 1;     // elements of Type a step takes
    static constexpr int PIECE_SIZE = PIECE;       // elements of Type that hold the probabilities of a piece
    static constexpr int LINE_VALUES = LINE;       // numbers in a line
};
#if KVP_ISA == 3
template <>
struct Left<true> {
    using Type = uint32_t;   // a pair of
    using Value = uint16_t;
    static constexpr int STEP = 1;
    static constexpr int PIECE_SIZE = PIECE / 2;
    static constexpr int LINE_VALUES = 2 * LINE;
};
#endif

constexpr int keys_at_once(int rows) { return W * (rows <= FEW ? 4 : 2); }

// One step of sums[m][n] += left[m] . right[n]; rows of `left` are ROW elements apart.
template <bool PAIRS, int M, int N, int ROW>
KVP_INLINE void multiply_step(F (&sums)[M][N], const I (&right)[N], const typename Left<PAIRS>::Type* left) {
#if KVP_ISA == 3
    if constexpr (PAIRS) {
        KVP_UNROLL for (int m = 0; m < M; m++) {
            const __m512bh pair = (__m512bh)_mm512_set1_epi32((int)left[m * ROW]);
            KVP_UNROLL for (int n = 0; n < N; n++) sums[m][n] = _mm512_dpbf16_ps(sums[m][n], (__m512bh)right[n], pair);
        }
        return;
    }
#else
    if constexpr (PAIRS) {
        F low[N], high[N];
        KVP_UNROLL for (int n = 0; n < N; n++) {
            low[n] = low_bf16(right[n]);
            high[n] = high_bf16(right[n]);
        }
        KVP_UNROLL for (int m = 0; m < M; m++) {
            const F first = splat((float)left[m * ROW]), second = splat((float)left[m * ROW + 1]);
            KVP_UNROLL for (int n = 0; n < N; n++) sums[m][n] = fma(low[n], first, sums[m][n]);
            KVP_UNROLL for (int n = 0; n < N; n++) sums[m][n] = fma(high[n], second, sums[m][n]);
        }
        return;
    }
#endif
    if constexpr (!PAIRS) {
        KVP_UNROLL for (int m = 0; m < M; m++) {
            const F value = splat(left[m * ROW]);
            KVP_UNROLL for (int n = 0; n < N; n++) sums[m][n] = fma(as_float(right[n]), value, sums[m][n]);
        }
    }
}

// scores [M][TILE], N vectors of them = queries [M, D] x K.
// queries: [elements / LINE][M][LINE]; keys[n]: vector n of the first step, the next step `stride` bytes on;
// ahead[n]: what is read after this, of which as many lines are prefetched.
template <bool PAIRS, int M, int N>
static void score_keys(const void* queries, const char* const* keys, int64_t stride, int elements,
                       const char* const* ahead, float* scores) {
    using Type = typename Left<PAIRS>::Type;
    const Type* left = (const Type*)queries;
    F sums[M][N];
    KVP_UNROLL for (int m = 0; m < M; m++) KVP_UNROLL for (int n = 0; n < N; n++) sums[m][n] = zero();
    const char *key[N], *next[N];
    KVP_UNROLL for (int n = 0; n < N; n++) {
        key[n] = keys[n];
        next[n] = ahead[n];
    }
    int64_t at = 0, at_ahead = 0;
    for (; elements > 0; elements -= LINE, left += M * LINE) {
        const int count = elements < LINE ? elements : LINE;
        for (int i = 0; i < count; i += Left<PAIRS>::STEP) {
            I right[N];
            KVP_UNROLL for (int n = 0; n < N; n++) {
                right[n] = load_bits(key[n] + at);
                __builtin_prefetch(next[n] + at_ahead);
            }
            multiply_step<PAIRS, M, N, LINE>(sums, right, left + i);
            at += stride;
            at_ahead += W * 4;
        }
    }
    KVP_UNROLL for (int m = 0; m < M; m++)
        KVP_UNROLL for (int n = 0; n < N; n++) store(scores + m * TILE + n * W, sums[m][n]);
}

// The values that a block of queries sees in one tile.
struct Values {
    const void* weights;       // probabilities [PIECES][M][PIECE]
    const char* const* pieces; // V of each piece [PIECE][padded] (pairs: [PIECE / 2][padded][2])
    const char* const* ahead;  // K of each piece of the next tile
    int64_t ahead_stride;      // bytes from line to line of it
    int first, last;           // pieces [first, last) are seen
    int padded;                // elements of a head of V, a multiple of W
};

// sums [M][padded] at `column`, N vectors: sums * factors [M] + weights x V.
template <bool PAIRS, int M, int N>
static void add_values(const Values& values, int column, const float* factors, float* sums_memory) {
    using Type = typename Left<PAIRS>::Type;
    constexpr int SIZE = Left<PAIRS>::PIECE_SIZE;
    const int64_t row = values.padded, step_bytes = 4 * row, ahead_stride = values.ahead_stride;
    F sums[M][N];
    KVP_UNROLL for (int m = 0; m < M; m++) {
        const F factor = splat(factors[m]);
        KVP_UNROLL for (int n = 0; n < N; n++) sums[m][n] = load(sums_memory + m * row + column + n * W) * factor;
    }
    for (int piece = values.first; piece < values.last; piece++) {
        const char* value = values.pieces[piece] + 4 * column;
        const char* next = values.ahead[piece] + column / W * ahead_stride;
        const Type* left = (const Type*)values.weights + piece * (M * SIZE);
        for (int i = 0; i < SIZE; i += Left<PAIRS>::STEP) {
            I right[N];
            KVP_UNROLL for (int n = 0; n < N; n++) {
                right[n] = load_bits(value + n * (W * 4));
                __builtin_prefetch(next + n * ahead_stride);
            }
            multiply_step<PAIRS, M, N, SIZE>(sums, right, left + i);
            value += step_bytes;
            next += row / W * ahead_stride;
        }
    }
    KVP_UNROLL for (int m = 0; m < M; m++)
        KVP_UNROLL for (int n = 0; n < N; n++) store(sums_memory + m * row + column + n * W, sums[m][n]);
}

}  // namespace KVP_NS
