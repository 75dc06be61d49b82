// What a line of a panel holds: 32 dwords, one of each output, that expand to STEPS vectors of weights, each of which
// meets one dword of the rows (1 f32, 2 bf16, 2 s16 or 4 s8 values).
#pragma once
#include "linear.h"

namespace KVP_NS {

// How the scales of groups enter: not at all, at the end of each group's sum, or into each weight.
enum class Scaling { none, of_sums, of_weights };

KVP_INLINE I broadcast_bits(const char* x) {
    int32_t value;
    memcpy(&value, x, sizeof value);
    return splat_int(value);
}

// What codes of integers and of tables stand for, before scales.
struct CodeNumbers {
    float of_nibbles[16];
    float zero;  // of bytes
};

struct NoTable {};

// Where the nibble of column i of a dword's eight begins.
KVP_INLINE constexpr int nibble(int i) { return 4 * (i / 2 + i % 2 * 4); }

struct FloatProducts {
    using Sum = F;
    using Value = F;
    using Table = NoTable;
    static constexpr Scaling SCALING = Scaling::none;
    KVP_INLINE Table table(const CodeNumbers&) { return {}; }
    KVP_INLINE F value(const char* x) { return as_float(broadcast_bits(x)); }
    KVP_INLINE F dot(F sum, F weights, F x) { return fma(weights, x, sum); }
};

struct Float32 : FloatProducts {
    static constexpr int STEPS = 1;
    KVP_INLINE F weights(I line, int, NoTable) { return as_float(line); }
};

#if KVP_ISA < 3

// Sixteen floats to look up in, by the low 4 bits of each lane.
#if KVP_ISA == 2
struct Table16 {
    F values;
    explicit Table16(const float* table) : values(load(table)) {}
    KVP_INLINE F at(const Table16& table, I codes) { return _mm512_permutexvar_ps(codes, table.values); }
};
#elif KVP_ISA == 1
struct Table16 {
    F low, high;
    explicit Table16(const float* table) : low(load(table)), high(load(table + 8)) {}
    KVP_INLINE F at(const Table16& table, I codes) {
        return _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.low, codes),
                                _mm256_permutevar8x32_ps(table.high, codes), as_float(shift_left(codes, 28)));
    }
};
#else
struct Table16 {
    float values[16];
    explicit Table16(const float* table) { memcpy(values, table, sizeof values); }
    KVP_INLINE F at(const Table16& table, I codes) {
        const I i = codes & 15;
        return F{table.values[i[0]], table.values[i[1]], table.values[i[2]], table.values[i[3]]};
    }
};
#endif

// Codes of a line as floats, columns 0 to COUNT - 1.
struct NibbleCodes {
    static constexpr int COUNT = 8;
    using Table = Table16;
    KVP_INLINE Table table(const CodeNumbers& numbers) { return Table(numbers.of_nibbles); }
    KVP_INLINE F number(I line, int i, const Table& table) {
        return Table16::at(table, shift_right(line, nibble(i)));
    }
};

struct ByteCodes {  // q - zero
    static constexpr int COUNT = 4;
    using Table = F;
    KVP_INLINE Table table(const CodeNumbers& numbers) { return splat(numbers.zero); }
    KVP_INLINE F number(I line, int i, F zero) {
        return to_float(bit_and(shift_right(line, 8 * i), splat_int(255))) - zero;
    }
};

struct Float8Codes {
    static constexpr int COUNT = 4;
    using Table = NoTable;
    KVP_INLINE Table table(const CodeNumbers&) { return {}; }
    KVP_INLINE F number(I line, int i, NoTable) {
        const I top = shift_left(line, 24 - 8 * i);  // sign, 4 bits of exponent, 3 of mantissa
        const I size = bit_and(shift_right(top, 4), splat_int(0x07f00000));
        const F normal = as_float(add(size, splat_int(120 << 23)));
        const F value = where_less(size, splat_int(1 << 23), to_float(size) * splat(0x1p-29f), normal);
        return as_float(bit_xor(as_int(value), bit_and(top, splat_int((int32_t)0x80000000))));
    }
};

struct Bfloat16 : FloatProducts {
    static constexpr int STEPS = 2;
    KVP_INLINE F weights(I line, int step, NoTable) { return step == 0 ? low_bf16(line) : high_bf16(line); }
};

template <class Codes>
struct Unscaled : FloatProducts {
    static constexpr int STEPS = Codes::COUNT;
    using Table = typename Codes::Table;
    KVP_INLINE Table table(const CodeNumbers& numbers) { return Codes::table(numbers); }
    KVP_INLINE F weights(I line, int step, const Table& table) { return Codes::number(line, step, table); }
};
using Int8 = Unscaled<ByteCodes>;
using Float8 = Unscaled<Float8Codes>;

template <class Codes>
struct Scaled : FloatProducts {
    using Table = typename Codes::Table;
    static constexpr int STEPS = Codes::COUNT;
    static constexpr Scaling SCALING = Scaling::of_weights;
    KVP_INLINE Table table(const CodeNumbers& numbers) { return Codes::table(numbers); }
    KVP_INLINE F weights(I line, int step, const Table& table, F scale, F offset) {
        return fma(Codes::number(line, step, table), scale, offset);
    }
};

// Without VNNI rows are 16-bit integers: unsigned bytes times signed ones would saturate in pmaddubsw.
struct ShortProducts {
    using Sum = I;
    using Value = I;
    using Table = NoTable;
    static constexpr Scaling SCALING = Scaling::none;
    KVP_INLINE Table table(const CodeNumbers&) { return {}; }
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
    KVP_INLINE I weights(I line, int step, NoTable) {
        return bit_and(shift_right(line, 8 * step), splat_int(0x00ff00ff));
    }
};

struct DynamicInt4 : ShortProducts {
    static constexpr int STEPS = 4;
    static constexpr Scaling SCALING = Scaling::of_sums;
    KVP_INLINE I weights(I line, int step, NoTable) {
        return bit_and(shift_right(line, 4 * step), splat_int(0x000f000f));
    }
};

#else

struct PairProducts {
    using Sum = F;
    using Value = I;
    using Table = NoTable;
    static constexpr Scaling SCALING = Scaling::none;
    KVP_INLINE Table table(const CodeNumbers&) { return {}; }
    KVP_INLINE I value(const char* x) { return broadcast_bits(x); }
    KVP_INLINE F dot(F sum, I weights, I x) { return _mm512_dpbf16_ps(sum, (__m512bh)weights, (__m512bh)x); }
};

struct Bfloat16 : PairProducts {
    static constexpr int STEPS = 1;
    KVP_INLINE I weights(I line, int, NoTable) { return line; }
};

struct Int8 : PairProducts {
    using Table = F;
    static constexpr int STEPS = 2;
    KVP_INLINE Table table(const CodeNumbers& numbers) { return splat(8388608.0f + numbers.zero); }
    KVP_INLINE I weights(I line, int step, F excess) {
        const I low = byte_as_float(line, 2 * step, excess), high = byte_as_float(line, 2 * step + 1, excess);
        // Floats of 8 bits end in 16 zeros: the upper half of `low` takes the lower half of `high`.
        const I upper = _mm512_broadcast_i32x4(_mm_setr_epi32(0x0302, 0x0706, 0x0b0a, 0x0f0e));
        return _mm512_mask_shuffle_epi8(high, 0x3333333333333333, low, upper);
    }
    KVP_INLINE I byte_as_float(I line, int index, F excess) {  // the mantissa of 2^23 + byte, less what is too much
        const I bytes = _mm512_broadcast_i32x4(_mm_setr_epi32(index, index + 4, index + 8, index + 12));
        const I bits = _mm512_mask_shuffle_epi8(splat_int(0x4b000000), 0x1111111111111111, line, bytes);
        return as_int(as_float(bits) - excess);
    }
};

// Every number of 8 bits is one of 16, none of them subnormal there: dpbf16 would take such for 0.
struct Float8 : PairProducts {
    static constexpr int STEPS = 2;
    KVP_INLINE I weights(I line, int step, NoTable) {
        const int first = step * 0x0202, each = 0x0404;  // both bytes of a word are the code
        const int dword = first | (first + 0x0101) << 16;
        const I doubled = _mm512_broadcast_i32x4(_mm_setr_epi32(
            dword, dword + (each | each << 16), dword + 2 * (each | each << 16), dword + 3 * (each | each << 16)));
        const I words = _mm512_shuffle_epi8(line, doubled);
        const I small = _mm512_broadcast_i64x4(_mm256_setr_epi16(  // 0, 1 .. 7 times 2^-9
            0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60, 0, 0, 0, 0, 0, 0, 0, 0));
        I size = bit_and(_mm512_srli_epi16(words, 4), _mm512_set1_epi16(0x07f0));
        size = _mm512_add_epi16(size, _mm512_set1_epi16(120 << 7));
        size = _mm512_mask_permutexvar_epi16(size, _mm512_testn_epi16_mask(words, _mm512_set1_epi16(0x7800)),
                                             words, small);  // looks at 5 bits, of which the exponent's are 0
        return _mm512_ternarylogic_epi32(size, words, _mm512_set1_epi16((short)0x8000), 0xf8);  // a | (b & c)
    }
};

struct Codes4 : PairProducts {
    using Table = I;
    static constexpr int STEPS = 4;
    static constexpr Scaling SCALING = Scaling::of_sums;
    KVP_INLINE Table table(const CodeNumbers& numbers) {  // in bf16, twice
        return _mm512_broadcast_i64x4((__m256i)_mm512_cvtneps_pbh(load(numbers.of_nibbles)));
    }
    KVP_INLINE I weights(I line, int step, I table) {
        // The permutation looks at 5 bits, of which the upper belongs to the next code.
        return _mm512_permutexvar_epi16(_mm512_srli_epi16(line, 4 * step), table);
    }
};

// Kinds of unscaled weights, in groups.
template <class Kind>
struct Groups : Kind {
    static constexpr Scaling SCALING = Scaling::of_sums;
};

struct ByteProducts {
    using Sum = I;
    using Value = I;
    using Table = NoTable;
    static constexpr Scaling SCALING = Scaling::none;
    KVP_INLINE Table table(const CodeNumbers&) { return {}; }
    KVP_INLINE I value(const char* x) { return broadcast_bits(x); }
    KVP_INLINE I dot(I sum, I weights, I x) { return _mm512_dpbusd_epi32(sum, weights, x); }
};

struct DynamicInt8 : ByteProducts {
    static constexpr int STEPS = 1;
    KVP_INLINE I weights(I line, int, NoTable) { return line; }
};

struct DynamicInt4 : ByteProducts {
    static constexpr int STEPS = 2;
    static constexpr Scaling SCALING = Scaling::of_sums;
    KVP_INLINE I weights(I line, int step, NoTable) {
        return _mm512_and_si512(_mm512_srli_epi16(line, 4 * step), _mm512_set1_epi8(15));
    }
};

#endif

}  // namespace KVP_NS
