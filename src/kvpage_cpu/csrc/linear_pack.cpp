// Weights between their plain form, rows of N outputs, and panels. Every type is a transposition of dwords: a
// row's d-th dword becomes the panel's line d, in the row's column.
#include "linear_scales.h"
#include "linear_kernels.h"

namespace KVP_NS {
namespace {

constexpr int LANES = W;  // dwords of a vector: squares of LANES x LANES are transposed in registers

#if KVP_ISA >= 2

KVP_INLINE void transpose(I (&r)[LANES]) {
    I t[LANES];
    KVP_UNROLL for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    KVP_UNROLL for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    KVP_UNROLL for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    KVP_UNROLL for (int i = 0; i < 8; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    }
}

#elif KVP_ISA == 1

KVP_INLINE void transpose(I (&r)[LANES]) {
    I t[LANES];
    KVP_UNROLL for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
    }
    KVP_UNROLL for (int i = 0; i < 8; i += 4) {
        r[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    KVP_UNROLL for (int i = 0; i < 4; i++) {
        t[i] = _mm256_permute2x128_si256(r[i], r[i + 4], 0x20);
        t[i + 4] = _mm256_permute2x128_si256(r[i], r[i + 4], 0x31);
    }
    KVP_UNROLL for (int i = 0; i < 8; i++) r[i] = t[i];
}

#else

KVP_INLINE void transpose(I (&r)[LANES]) {
    KVP_UNROLL for (int i = 0; i < LANES; i++) {
        KVP_UNROLL for (int j = 0; j < i; j++) {
            const int32_t upper = r[j][i];
            r[j][i] = r[i][j];
            r[i][j] = upper;
        }
    }
}

#endif

// Exchanges the bits of `mask` with those `shift` higher.
KVP_INLINE I exchange(I x, int shift, int32_t mask) {
    const I differing = bit_and(bit_xor(x, shift_right(x, shift)), splat_int(mask));
    return bit_xor(bit_xor(x, differing), shift_left(differing, shift));
}

// What becomes of a dword of the plain weight on its way into a panel.
enum class Change { none, to_unsigned, split_nibbles };

Change change_of(const KvpLinear& linear) {
    if (linear.type == KVP_I8 && linear.group == 0) return Change::to_unsigned;
    return linear.type == KVP_I4 || linear.type == KVP_C4 ? Change::split_nibbles : Change::none;
}

template <Change CHANGE>
KVP_INLINE I packed_dword(I x) {
    if constexpr (CHANGE == Change::to_unsigned) return bit_xor(x, splat_int((int32_t)0x80808080));  // w + 128
    if constexpr (CHANGE == Change::split_nibbles)
        return exchange(exchange(x, 4, 0x00f000f0), 8, 0x0000ff00);  // 0 2 4 6 1 3 5 7
    return x;
}

// 32 rows, `row_bytes` apart, of `dwords` dwords into a panel.
template <Change CHANGE>
void transpose_rows(const char* rows, int64_t row_bytes, int dwords, char* panel) {
    int dword = 0;
    for (; dword + LANES <= dwords; dword += LANES) {
        for (int column = 0; column < PANEL; column += LANES) {
            I square[LANES];
            KVP_UNROLL for (int i = 0; i < LANES; i++)
                square[i] =
                    packed_dword<CHANGE>(load_bits(rows + (column + i) * row_bytes + (int64_t)dword * 4));
            transpose(square);
            KVP_UNROLL for (int i = 0; i < LANES; i++)
                store_bits(panel + (int64_t)(dword + i) * LINE + column * 4, square[i]);
        }
    }
    for (; dword < dwords; dword++) {  // int4 of an odd number of small groups
        for (int column = 0; column < PANEL; column++) {
            int32_t bits[LANES] = {};
            memcpy(bits, rows + column * row_bytes + (int64_t)dword * 4, 4);
            store_bits(bits, packed_dword<CHANGE>(load_bits(bits)));
            memcpy(panel + (int64_t)dword * LINE + column * 4, bits, 4);
        }
    }
}

void transpose_rows(Change change, const char* rows, int64_t row_bytes, int dwords, char* panel) {
    if (change == Change::to_unsigned)
        return transpose_rows<Change::to_unsigned>(rows, row_bytes, dwords, panel);
    if (change == Change::split_nibbles)
        return transpose_rows<Change::split_nibbles>(rows, row_bytes, dwords, panel);
    transpose_rows<Change::none>(rows, row_bytes, dwords, panel);
}

int bits_of(int type) {
    return type == KVP_F32 ? 32 : type == KVP_BF16 ? 16 : type == KVP_I8 || type == KVP_F8 ? 8 : 4;
}

// Copies `rows` rows to `scratch` and fills it up to 32 rows of `padded` inputs with codes that meet zeros of x.
void copy_rows(const KvpLinear& linear, const char* source, int64_t row_bytes, int rows, char* scratch) {
    const int bits = bits_of(linear.type);
    const size_t bytes = ((size_t)linear.inputs * bits + 7) / 8;
    const size_t padded = (size_t)linear.padded * bits / 8;
    const int zeros = linear.type == KVP_I4 ? 0x88 : 0;  // q = 8
    for (int row = 0; row < PANEL; row++, scratch += padded) {
        if (row >= rows) {
            memset(scratch, zeros, padded);
            continue;
        }
        memcpy(scratch, source + row * row_bytes, bytes);
        memset(scratch + bytes, zeros, padded - bytes);
        if (linear.type == KVP_I4 && linear.inputs % 2)
            scratch[bytes - 1] = (char)((scratch[bytes - 1] & 0x0f) | 0x80);
    }
}

}  // namespace

void pack_weight(const KvpLinear& linear, const char* source, int64_t row_bytes, char* scratch, int thread,
                 int threads) {
    const int64_t padded = (int64_t)linear.padded * bits_of(linear.type) / 8;
    const int panels = (linear.outputs + PANEL - 1) / PANEL;
    const int end = (int)((int64_t)panels * (thread + 1) / threads);
    for (int index = (int)((int64_t)panels * thread / threads); index < end; index++) {
        const int row = index * PANEL;
        const int rows = linear.outputs - row < PANEL ? linear.outputs - row : PANEL;
        const char* from = source + row * row_bytes;
        char* const panel =
            rows == PANEL ? (char*)linear.panels + index * PANEL * padded : (char*)linear.tail;
        int64_t step = row_bytes;
        if (source == linear.panels || rows < PANEL || linear.inputs < linear.padded) {
            copy_rows(linear, from, row_bytes, rows, scratch);
            from = scratch;
            step = padded;
        }
        transpose_rows(change_of(linear), from, step, (int)(padded / 4), panel);
    }
}

namespace {

// Where a row's dwords lie: one in each line.
const char* row_at(const KvpLinear& linear, int row) {
    const int index = row / PANEL;
    const bool whole = index < linear.outputs / PANEL;
    const int64_t panel_bytes = (int64_t)linear.padded * bits_of(linear.type) / 8 * PANEL;
    return (const char*)(whole ? linear.panels : linear.tail) + (whole ? index * panel_bytes : 0) +
           row % PANEL * 4;
}

KVP_INLINE uint32_t dword_at(const char* row, int index) {
    uint32_t dword;
    memcpy(&dword, row + (int64_t)index * LINE, sizeof dword);
    return dword;
}

float from_float8(uint32_t code) {
    const uint32_t size = code & 127;
    uint32_t bits = (size << 20) + (120u << 23);
    float value;
    memcpy(&value, &bits, sizeof value);
    if (size < 8) value = (float)size * 0x1p-9f;
    return code & 128 ? -value : value;
}

// The number of a code, before zero and scale.
float number_of(const KvpLinear& linear, uint32_t dword, int index) {
    float value;
    switch (linear.type) {
        case KVP_F32: memcpy(&value, &dword, sizeof value); return value;
        case KVP_BF16: return from_bf16((uint16_t)(dword >> 16 * index));
        case KVP_F8: return from_float8(dword >> 8 * index & 255);
        case KVP_I8: return (float)(dword >> 8 * index & 255);
        case KVP_C4: return linear.table[dword >> nibble(index) & 15];
        default: return (float)(dword >> nibble(index) & 15);
    }
}

// What the numbers of a group become: (number - zero) * scale + offset.
struct Meaning {
    float zero, scale, offset;
};

Meaning meaning_of(const KvpLinear& linear, int row, int group) {
    Meaning meaning{(float)linear.zero, 1.0f, 0.0f};
    if (linear.output_scales) meaning.scale = linear.output_scales[row];
    const auto read = [&](const KvpGroupNumbers& of, float& into) {
        if (!of.values) return;
        float lanes[W];
        const int column = row % PANEL / W * W;
        store(lanes, group_numbers(of, row / PANEL, linear.padded / linear.group, group, column));
        into = lanes[row % W];
    };
    read(linear.zeros, meaning.zero);
    read(linear.scales, meaning.scale);
    read(linear.offsets, meaning.offset);
    return meaning;
}

}  // namespace

void read_row(const KvpLinear& linear, int row, float* out) {
    const char* const dwords = row_at(linear, row);
    const int of_dword = 32 / bits_of(linear.type);
    Meaning meaning = meaning_of(linear, row, 0);
    for (int column = 0; column < linear.inputs; column++) {
        if (linear.group && column && column % linear.group == 0)
            meaning = meaning_of(linear, row, column / linear.group);
        const float number = number_of(linear, dword_at(dwords, column / of_dword), column % of_dword);
        volatile float product = (number - meaning.zero) * meaning.scale;  // rounded before the sum, as it is meant
        out[linear.permutation ? linear.permutation[column] : column] = product + meaning.offset;
    }
}

}  // namespace KVP_NS
