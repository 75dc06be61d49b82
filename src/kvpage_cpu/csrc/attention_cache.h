// Where K and V of a token lie in the cache, and pieces of them made ready for the micro-kernels.
#pragma once
#include "attention_kernels.h"

namespace KVP_NS {

namespace {

// Sizes in bytes of what a block holds; see KvpAttention.
struct CacheShape {
    int64_t k, v, head, block;
    int64_t step;  // bytes of one step of K: a 32-bit piece of each token (int8: 16 bits)

    explicit CacheShape(const KvpAttention& layer)
        : CacheShape(layer.kv_type, layer.kv_heads, layer.head_dim, layer.v_head_dim, layer.block_size) {}

    CacheShape(int kv_type, int kv_heads, int head_dim, int v_head_dim, int block_size) {
        const int64_t size = kv_type == KVP_F32 ? 4 : kv_type == KVP_BF16 ? 2 : 1;
        k = size * head_dim * block_size;
        v = size * v_head_dim * block_size;
        head = k + v + (kv_type == KVP_I8 ? 2 * (int64_t)sizeof(float) * block_size : 0);
        block = head * kv_heads;
        step = (kv_type == KVP_I8 ? 2 : 4) * (int64_t)block_size;
    }
};

KVP_INLINE int padded(int elements) { return (elements + W - 1) / W * W; }

// One sequence's blocks of one KV head.
struct Sequence {
    const char* kv;  // block 0 of the head
    const int32_t* table;
    int64_t block_bytes;
    int block_size;

    const char* block(int token) const { return kv + (int64_t)table[token / block_size] * block_bytes; }
};

// bf16 of int8 codes, in their order: exact, as 8 bits fit its significand. `count` is a multiple of 16.
KVP_INLINE void widen_codes(const int8_t* codes, uint16_t* out, int count) {
    int i = 0;
#if KVP_ISA >= 2
    const __m512i odd_words = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33,
                                               31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    for (; i + 32 <= count; i += 32) {
        const __m128i* const p = (const __m128i*)(codes + i);
        const __m512i low = (__m512i)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p)));
        const __m512i high = (__m512i)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p + 1)));
        _mm512_storeu_si512(out + i, _mm512_permutex2var_epi16(low, odd_words, high));
    }
#endif
    for (; i < count; i += 16) {
        for (int lane = 0; lane < 16; lane++) {
            const float value = (float)codes[i + lane];
            uint32_t bits;
            memcpy(&bits, &value, sizeof bits);
            out[i + lane] = (uint16_t)(bits >> 16);
        }
    }
}

// Codes of 16 tokens from K of an int8 block: [D / 2][bs][2] -> bf16 [D / 2][PIECE][2]; `ahead` is read after it.
KVP_INLINE void widen_key_piece(const char* codes, const char* ahead, int64_t step, int head_dim, uint16_t* out) {
    for (int pair = 0; pair < head_dim / 2; pair++) {
        __builtin_prefetch(ahead + pair * step);
        widen_codes((const int8_t*)codes + pair * step, out + pair * 2 * PIECE, 2 * PIECE);
    }
}

// V of 16 tokens -> the same, wide, with rows of `padded` elements, zero where they lack and from token `count` on.
template <int KV_TYPE>
void stage_value_piece(const char* value, const char* ahead, int dim, int padded, int count, char* out) {
    constexpr int TOKENS = KV_TYPE == KVP_F32 ? 1 : 2;  // in a row
    constexpr int SIZE = 4;                             // bytes of a row's element in `out`
    for (int row = 0; row < PIECE / TOKENS; row++, out += (int64_t)padded * SIZE) {
        const int left = count - row * TOKENS;
        int64_t filled = 0;
        if (left > 0) {
            filled = (int64_t)dim * SIZE;
            if constexpr (KV_TYPE == KVP_I8) {
                const int64_t at = (int64_t)row * 2 * dim;
                for (int line = 0; line < 2 * dim; line += 64) __builtin_prefetch(ahead + at + line);
                widen_codes((const int8_t*)value + at, (uint16_t*)out, 2 * dim);
            }
            else memcpy(out, value + (int64_t)row * dim * SIZE, (size_t)filled);
        }
        if (TOKENS == 2 && left == 1)
            for (int i = 0; i < dim; i++) ((uint16_t*)out)[2 * i + 1] = 0;
        memset(out + filled, 0, (size_t)((int64_t)padded * SIZE - filled));
    }
}

}  // namespace

}  // namespace KVP_NS
