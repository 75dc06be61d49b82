// Weights between their plain form, rows of N outputs, and panels. Every type is a transposition of dwords: a
// row's d-th dword becomes the panel's line d, in the row's column.
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

// A dword of the plain weight as the panels have it.
template <int TYPE>
KVP_INLINE I packed_dword(I x) {
    if constexpr (TYPE == KVP_I8) return bit_xor(x, splat_int((int32_t)0x80808080));  // w + 128
    if constexpr (TYPE == KVP_I4)
        return exchange(exchange(x, 4, 0x00f000f0), 8, 0x0000ff00);  // 0 2 4 6 1 3 5 7
    return x;
}

// 32 rows, `row_bytes` apart, of `dwords` dwords into a panel.
template <int TYPE>
void transpose_rows(const char* rows, int64_t row_bytes, int dwords, char* panel) {
    int dword = 0;
    for (; dword + LANES <= dwords; dword += LANES) {
        for (int column = 0; column < PANEL; column += LANES) {
            I square[LANES];
            KVP_UNROLL for (int i = 0; i < LANES; i++)
                square[i] =
                    packed_dword<TYPE>(load_bits(rows + (column + i) * row_bytes + (int64_t)dword * 4));
            transpose(square);
            KVP_UNROLL for (int i = 0; i < LANES; i++)
                store_bits(panel + (int64_t)(dword + i) * LINE + column * 4, square[i]);
        }
    }
    for (; dword < dwords; dword++) {  // int4 of an odd number of small groups
        for (int column = 0; column < PANEL; column++) {
            int32_t bits[LANES] = {};
            memcpy(bits, rows + column * row_bytes + (int64_t)dword * 4, 4);
            store_bits(bits, packed_dword<TYPE>(load_bits(bits)));
            memcpy(panel + (int64_t)dword * LINE + column * 4, bits, 4);
        }
    }
}

void transpose_rows(int type, const char* rows, int64_t row_bytes, int dwords, char* panel) {
    if (type == KVP_I8) return transpose_rows<KVP_I8>(rows, row_bytes, dwords, panel);
    if (type == KVP_I4) return transpose_rows<KVP_I4>(rows, row_bytes, dwords, panel);
    transpose_rows<KVP_F32>(rows, row_bytes, dwords, panel);
}

int bits_of(int type) { return type == KVP_F32 ? 32 : type == KVP_BF16 ? 16 : type == KVP_I8 ? 8 : 4; }

// Copies `rows` rows to `scratch` and fills it up to 32 rows of `padded` inputs with weights of zero.
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
        transpose_rows(linear.type, from, step, (int)(padded / 4), panel);
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

void read_row4(const KvpLinear& linear, int row, const char* dwords, float* out) {
    const int groups = linear.padded / linear.group;
    const int64_t first = (int64_t)(row / PANEL) * groups * PANEL + row % PANEL;
    for (int group = 0; group < groups; group++) {
        const int64_t at = first + group * PANEL;
        const float scale = from_bf16(((const uint16_t*)linear.scales)[at]);
        const float offset = linear.offsets ? from_bf16(((const uint16_t*)linear.offsets)[at]) : 0.0f;
        for (int column = group * linear.group; column < (group + 1) * linear.group; column += 8) {
            const uint32_t codes = dword_at(dwords, column / 8);
            for (int i = 0; i < 8 && column + i < linear.inputs; i++)
                out[column + i] = (float)((int)(codes >> 4 * (i / 2 + i % 2 * 4) & 15) - 8) * scale + offset;
        }
    }
}

}  // namespace

void read_row(const KvpLinear& linear, int row, float* out) {
    const char* const dwords = row_at(linear, row);
    if (linear.type == KVP_I4) return read_row4(linear, row, dwords, out);
    const int of_dword = 32 / bits_of(linear.type);
    const float scale = linear.type == KVP_I8 ? ((const float*)linear.scales)[row] : 1.0f;
    for (int column = 0; column < linear.inputs; column += of_dword) {
        const uint32_t dword = dword_at(dwords, column / of_dword);
        float values[4];
        if (linear.type == KVP_F32) memcpy(values, &dword, sizeof dword);
        if (linear.type == KVP_BF16)
            values[0] = from_bf16((uint16_t)dword), values[1] = from_bf16((uint16_t)(dword >> 16));
        if (linear.type == KVP_I8)
            for (int i = 0; i < 4; i++) values[i] = (float)((int)(dword >> 8 * i & 255) - 128) * scale;
        for (int i = 0; i < of_dword && column + i < linear.inputs; i++) out[column + i] = values[i];
    }
}

}  // namespace KVP_NS
