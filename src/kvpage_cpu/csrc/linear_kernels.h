// Micro-kernels of linear layers: a block of up to 14 rows times one panel, sums kept in registers.
//
// A line of a panel is 32 dwords, one of each output. A Kind says what a line holds: it expands to STEPS
// vectors of weights, and each meets one dword of the rows (1 f32, 2 bf16, 2 s16 or 4 s8 values), which is
// broadcast. Every sum runs along K alone and in order, so that tiles of any height give the same bits;
// integers are exact anyway.
#pragma once
#include "linear.h"

namespace KVP_NS {

constexpr int LINE = PANEL * 4;           // bytes
constexpr int PANEL_VECTORS = PANEL / W;  // in a line
constexpr int PIECE = 64;                 // bytes of a row that lie together
constexpr int STEPS_AT_ONCE = 8;          // dwords of a row in the unrolled loop body: half a piece

// How an int4 weight's scales enter: not at all, at the end of each group's sum, or into each weight.
enum class Scaling { none, of_sums, of_weights };

KVP_INLINE I broadcast_bits(const char* x) {
    int32_t value;
    memcpy(&value, x, sizeof value);
    return splat_int(value);
}

// Not for the outer caches: weights pass once a step, and would drive out all that the host and the next layer need.
KVP_INLINE void prefetch(const char* address) { __builtin_prefetch(address, 0, 0); }

struct FloatProducts {
    using Sum = F;
    using Value = F;
    static constexpr Scaling SCALING = Scaling::none;
    KVP_INLINE F value(const char* x) { return as_float(broadcast_bits(x)); }
    KVP_INLINE F dot(F sum, F weights, F x) { return fma(weights, x, sum); }
};

struct Float32 : FloatProducts {
    static constexpr int STEPS = 1;
    KVP_INLINE F weights(I line, int) { return as_float(line); }
};

#if KVP_ISA < 3

struct Bfloat16 : FloatProducts {
    static constexpr int STEPS = 2;
    KVP_INLINE F weights(I line, int step) { return step == 0 ? low_bf16(line) : high_bf16(line); }
};

struct Int8 : FloatProducts {
    static constexpr int STEPS = 4;
    KVP_INLINE F weights(I line, int step) {
        const I codes = bit_xor(line, splat_int((int32_t)0x80808080));  // w + 128 to w
        return to_float(shift_right_signed(shift_left(codes, 24 - 8 * step), 24));
    }
};

struct Int4 : FloatProducts {
    static constexpr int STEPS = 8;
    static constexpr Scaling SCALING = Scaling::of_weights;
    KVP_INLINE F weights(I line, int step) {
        const int position = 4 * (step / 2 + step % 2 * 4);
#if KVP_ISA == 2
        const F codes = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
        return _mm512_permutexvar_ps(shift_right(line, position), codes);  // looks at the low 4 bits only
#else
        const I codes = bit_xor(line, splat_int((int32_t)0x88888888));  // q to q - 8
        return to_float(shift_right_signed(shift_left(codes, 28 - position), 28));
#endif
    }
};

// Without VNNI rows are 16-bit integers: unsigned bytes times signed ones would saturate in pmaddubsw.
struct ShortProducts {
    using Sum = I;
    using Value = I;
    static constexpr Scaling SCALING = Scaling::none;
    KVP_INLINE I value(const char* x) { return broadcast_bits(x); }
    KVP_INLINE I dot(I sum, I weights, I x) {
#if KVP_ISA == 2
        return add(sum, _mm512_madd_epi16(weights, x));
#elif KVP_ISA == 1
        return add(sum, _mm256_madd_epi16(weights, x));
#else
        return sum + (weights << 16 >> 16) * (x << 16 >> 16) + (weights >> 16) * (x >> 16);
#endif
    }
};

struct DynamicInt8 : ShortProducts {
    static constexpr int STEPS = 2;  // even bytes, odd bytes
    KVP_INLINE I weights(I line, int step) {
        return bit_and(shift_right(line, 8 * step), splat_int(0x00ff00ff));
    }
};

struct DynamicInt4 : ShortProducts {
    static constexpr int STEPS = 4;
    static constexpr Scaling SCALING = Scaling::of_sums;
    KVP_INLINE I weights(I line, int step) {
        return bit_and(shift_right(line, 4 * step), splat_int(0x000f000f));
    }
};

#else

struct PairProducts {
    using Sum = F;
    using Value = I;
    static constexpr Scaling SCALING = Scaling::none;
    KVP_INLINE I value(const char* x) { return broadcast_bits(x); }
    KVP_INLINE F dot(F sum, I weights, I x) { return _mm512_dpbf16_ps(sum, (__m512bh)weights, (__m512bh)x); }
};

struct Bfloat16 : PairProducts {
    static constexpr int STEPS = 1;
    KVP_INLINE I weights(I line, int) { return line; }
};

struct Int8 : PairProducts {
    static constexpr int STEPS = 2;
    KVP_INLINE I weights(I line, int step) {
        const I low = byte_as_float(line, 2 * step), high = byte_as_float(line, 2 * step + 1);
        // Floats of 8 bits end in 16 zeros: the upper half of `low` takes the lower half of `high`.
        return _mm512_mask_shuffle_epi8(high, 0x3333333333333333, low, bytes_of_dwords(2, 3));
    }
    KVP_INLINE I byte_as_float(I line, int index) {  // the mantissa of 2^23 + byte, less what is too much
        const I bits = _mm512_mask_shuffle_epi8(splat_int(0x4b000000), 0x1111111111111111, line,
                                                bytes_of_dwords(index, index));
        return as_int(as_float(bits) - splat(8388608.0f + 128.0f));
    }
    // A shuffle that takes these bytes to the low half of each dword.
    KVP_INLINE I bytes_of_dwords(int first, int second) {
        const int dword = first | second << 8;
        return _mm512_broadcast_i32x4(_mm_setr_epi32(dword, dword + 0x0404, dword + 0x0808, dword + 0x0c0c));
    }
};

struct Int4 : PairProducts {
    static constexpr int STEPS = 4;
    static constexpr Scaling SCALING = Scaling::of_sums;
    KVP_INLINE I weights(I line, int step) {
        // bf16 of q - 8 twice: the permutation looks at 5 bits, of which the upper belongs to the next code.
        const __m512i codes = _mm512_broadcast_i64x4(_mm256_setr_epi16(
            (short)0xc100, (short)0xc0e0, (short)0xc0c0, (short)0xc0a0, (short)0xc080, (short)0xc040,
            (short)0xc000, (short)0xbf80, 0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0));
        return _mm512_permutexvar_epi16(_mm512_srli_epi16(line, 4 * step), codes);
    }
};

struct ByteProducts {
    using Sum = I;
    using Value = I;
    static constexpr Scaling SCALING = Scaling::none;
    KVP_INLINE I value(const char* x) { return broadcast_bits(x); }
    KVP_INLINE I dot(I sum, I weights, I x) { return _mm512_dpbusd_epi32(sum, weights, x); }
};

struct DynamicInt8 : ByteProducts {
    static constexpr int STEPS = 1;
    KVP_INLINE I weights(I line, int) { return line; }
};

struct DynamicInt4 : ByteProducts {
    static constexpr int STEPS = 2;
    static constexpr Scaling SCALING = Scaling::of_sums;
    KVP_INLINE I weights(I line, int step) {
        return _mm512_and_si512(_mm512_srli_epi16(line, 4 * step), _mm512_set1_epi8(15));
    }
};

#endif

// Some lines of a panel times a block of rows. `sums` is [height][PANEL] floats or integers, and goes on
// where it stands unless `first`.
struct Work {
    const char* x;        // [piece][height][PIECE]
    const char* weights;  // [lines][LINE]
    int lines;            // a multiple of 16, or of STEPS_AT_ONCE dwords of x where Kind has a scaling
    bool first;
    char* sums;
    const char* ahead;  // prefetched: two cache lines every line,
    int stride;         // this many bytes further on each time
    // int4
    int group_lines, num_groups;       // num_groups: of a row, over the whole K
    const uint16_t *scales, *offsets;  // [group][PANEL], offsets may be null
    const float* row_scales;           // of integers, [height][num_groups]
    const int32_t* row_sums;           // likewise
    const float* piece_sums;           // of bf16 rows, [height][num_pieces], where there are offsets
    int num_pieces, group_pieces;
};

// What an int4 group's vectors of scales and offsets are.
template <int NV>
struct GroupScales {
    F scales[NV], offsets[NV];
};

template <int NV>
KVP_INLINE void load_scales(GroupScales<NV>& group, const Work& work, int index, int column) {
    const int at = index * PANEL + column;
    prefetch((const char*)(work.scales + at + 8 * PANEL));
    KVP_UNROLL for (int n = 0; n < NV; n++) group.scales[n] = load_bf16(work.scales + at + n * W);
    KVP_UNROLL for (int n = 0; n < NV; n++) {
        group.offsets[n] = work.offsets ? load_bf16(work.offsets + at + n * W) : zero();
    }
    if (work.offsets) prefetch((const char*)(work.offsets + at + 8 * PANEL));
}

// Where a tile stands along K.
struct Position {
    const char *x, *weights, *ahead;
    int x_step;  // to the next half of a piece of x: alternates between the second half and the next piece
};

// sums[height][NV] += x * weights over `lines`.
template <class Kind, int HEIGHT, int NV>
KVP_INLINE void add_lines(typename Kind::Sum (&sums)[HEIGHT][NV], Position& at, int lines, int stride,
                          const GroupScales<NV>* group) {
    constexpr int BODY_LINES = STEPS_AT_ONCE / Kind::STEPS;
    for (int line = 0; line < lines; line += BODY_LINES) {
        KVP_UNROLL for (int i = 0; i < BODY_LINES; i++) {
            I bits[NV];
            KVP_UNROLL for (int n = 0; n < NV; n++) bits[n] = load_bits(at.weights + i * LINE + n * W * 4);
            prefetch(at.ahead);
            prefetch(at.ahead + 64);
            at.ahead += stride;
            KVP_UNROLL for (int step = 0; step < Kind::STEPS; step++) {
                typename Kind::Value weights[NV];
                KVP_UNROLL for (int n = 0; n < NV; n++) {
                    weights[n] = Kind::weights(bits[n], step);
                    if constexpr (Kind::SCALING == Scaling::of_weights)
                        weights[n] = fma(weights[n], group->scales[n], group->offsets[n]);
                }
                KVP_UNROLL for (int m = 0; m < HEIGHT; m++) {
                    const auto x = Kind::value(at.x + m * PIECE + (i * Kind::STEPS + step) * 4);
                    KVP_UNROLL for (int n = 0; n < NV; n++) sums[m][n] = Kind::dot(sums[m][n], weights[n], x);
                }
            }
        }
        at.weights += BODY_LINES * LINE;
        at.x += at.x_step;
        at.x_step = HEIGHT * PIECE - at.x_step;
    }
}

KVP_INLINE void load_sum(F& sum, const char* p) { sum = load((const float*)p); }
KVP_INLINE void load_sum(I& sum, const char* p) { sum = load_bits(p); }
KVP_INLINE void store_sum(char* p, F sum) { store((float*)p, sum); }
KVP_INLINE void store_sum(char* p, I sum) { store_bits(p, sum); }

// A group's sums of (q - 8) * x, or of q * x - 8 * sum(x) in integers, scaled and added to the rows'.
template <bool OFFSETS, int HEIGHT, int NV>
KVP_INLINE void add_group(float* total, const F (&sums)[HEIGHT][NV], const GroupScales<NV>& group,
                          const Work& work, int index) {
    KVP_UNROLL for (int m = 0; m < HEIGHT; m++) {
        float x = 0.0f;
        if (OFFSETS)
            for (int i = 0; i < work.group_pieces; i++)
                x += work.piece_sums[m * work.num_pieces + index * work.group_pieces + i];
        KVP_UNROLL for (int n = 0; n < NV; n++) {
            F sum = fma(sums[m][n], group.scales[n], load(total + m * PANEL + n * W));
            if (OFFSETS) sum = fma(splat(x), group.offsets[n], sum);
            store(total + m * PANEL + n * W, sum);
        }
    }
}

template <bool OFFSETS, int HEIGHT, int NV>
KVP_INLINE void add_group(float* total, const I (&sums)[HEIGHT][NV], const GroupScales<NV>& group,
                          const Work& work, int index) {
    KVP_UNROLL for (int m = 0; m < HEIGHT; m++) {
        const F scale = splat(work.row_scales[m * work.num_groups + index]);
        const F x = to_float(splat_int(work.row_sums[m * work.num_groups + index]));
        KVP_UNROLL for (int n = 0; n < NV; n++) {
            F sum = to_float(sums[m][n]) * group.scales[n];
            if (OFFSETS) sum = fma(x, group.offsets[n], sum);
            store(total + m * PANEL + n * W, fma(sum, scale, load(total + m * PANEL + n * W)));
        }
    }
}

template <class Kind, int NV>
KVP_INLINE void begin_group(typename Kind::Sum (&sums)[NV], const Work& work, int row, int index) {
    KVP_UNROLL for (int n = 0; n < NV; n++) {
        if constexpr (__is_same(typename Kind::Sum, I))
            sums[n] = splat_int(-8 * work.row_sums[row * work.num_groups + index]);
        else sums[n] = zero();
    }
}

template <class Kind, int HEIGHT, int NV>
static void tile(const Work& work_of_all, int column, const char* ahead) {
    const Work work = work_of_all;  // a copy, which no store can change
    Position at{work.x, work.weights + column * 4, ahead, PIECE / 2};
    typename Kind::Sum sums[HEIGHT][NV];
    char* const total = work.sums + column * 4;
    if constexpr (Kind::SCALING == Scaling::of_sums) {
        if (work.first)
            for (int m = 0; m < HEIGHT; m++) memset(total + m * LINE, 0, NV * W * 4);
        for (int index = 0; index * work.group_lines < work.lines; index++) {
            KVP_UNROLL for (int m = 0; m < HEIGHT; m++) begin_group<Kind, NV>(sums[m], work, m, index);
            add_lines<Kind, HEIGHT, NV>(sums, at, work.group_lines, work.stride, nullptr);
            GroupScales<NV> group;
            load_scales<NV>(group, work, index, column);
            if (work.offsets) add_group<true, HEIGHT, NV>((float*)total, sums, group, work, index);
            else add_group<false, HEIGHT, NV>((float*)total, sums, group, work, index);
        }
        return;
    }
    KVP_UNROLL for (int m = 0; m < HEIGHT; m++) KVP_UNROLL for (int n = 0; n < NV; n++) {
        sums[m][n] = typename Kind::Sum{};
        if (!work.first) load_sum(sums[m][n], total + m * LINE + n * W * 4);
    }
    if constexpr (Kind::SCALING == Scaling::of_weights) {
        for (int index = 0; index * work.group_lines < work.lines; index++) {
            GroupScales<NV> group;
            load_scales<NV>(group, work, index, column);
            add_lines<Kind, HEIGHT, NV>(sums, at, work.group_lines, work.stride, &group);
        }
    } else {
        add_lines<Kind, HEIGHT, NV>(sums, at, work.lines, work.stride, nullptr);
    }
    KVP_UNROLL for (int m = 0; m < HEIGHT; m++) {
        KVP_UNROLL for (int n = 0; n < NV; n++) store_sum(total + m * LINE + n * W * 4, sums[m][n]);
    }
}

// Vectors of outputs that a tile of this height holds: 32 registers take 14 x 2, 16 registers 6 x 2 or 2 x 4.
KVP_INLINE constexpr int tile_vectors(int height) { return KVP_ISA >= 2 || height > 2 ? 2 : 4; }
KVP_INLINE constexpr int tiles_of_panel(int height) { return PANEL_VECTORS / tile_vectors(height); }

// A block of `height` <= TALLEST rows times the panel.
template <class Kind, int TALLEST>
static void add_block(int height, const Work& work) {
    if constexpr (TALLEST > 1) {
        if (height < TALLEST) return add_block<Kind, TALLEST - 1>(height, work);
    }
    constexpr int NV = tile_vectors(TALLEST);
    for (int part = 0; part < tiles_of_panel(TALLEST); part++)
        tile<Kind, TALLEST, NV>(work, part * NV * W, work.ahead + (size_t)part * work.lines * work.stride);
}

// Lines as `Plain` lines: [line][step][PANEL] values, for kinds whose weights are cheaper to expand once than
// in every block of rows.
template <class Kind>
static void expand_lines(const Work& work, char* out) {
    GroupScales<PANEL_VECTORS> group;
    for (int line = 0; line < work.lines; line++) {
        if constexpr (Kind::SCALING == Scaling::of_weights)
            if (line % work.group_lines == 0)
                load_scales<PANEL_VECTORS>(group, work, line / work.group_lines, 0);
        KVP_UNROLL for (int n = 0; n < PANEL_VECTORS; n++) {
            const I bits = load_bits(work.weights + line * LINE + n * W * 4);
            KVP_UNROLL for (int step = 0; step < Kind::STEPS; step++) {
                auto weights = Kind::weights(bits, step);
                if constexpr (Kind::SCALING == Scaling::of_weights)
                    weights = fma(weights, group.scales[n], group.offsets[n]);
                store_sum(out + (line * Kind::STEPS + step) * LINE + n * W * 4, weights);
            }
        }
    }
}

}  // namespace KVP_NS
