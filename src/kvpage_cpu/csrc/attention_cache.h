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

// bf16 pairs of int8 codes, in their order; `count` is a multiple of 16.
KVP_INLINE void widen_codes(const int8_t* codes, uint16_t* out, int count) {
    for (int i = 0; i < count; i += 16) {
#if KVP_ISA == 3
        const __m512 values = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(codes + i))));
        _mm256_storeu_si256((__m256i*)(out + i), (__m256i)_mm512_cvtneps_pbh(values));
#else
        for (int lane = 0; lane < 16; lane++) {  // exact: 8 bits fit bf16's significand
            const float value = (float)codes[i + lane];
            uint32_t bits;
            memcpy(&bits, &value, sizeof bits);
            out[i + lane] = (uint16_t)(bits >> 16);
        }
#endif
    }
}

// Codes of 16 tokens from K of an int8 block: [D / 2][bs][2] -> bf16 [D / 2][PIECE][2].
KVP_INLINE void widen_key_piece(const char* codes, int64_t step, int head_dim, uint16_t* out) {
    for (int pair = 0; pair < head_dim / 2; pair++) {
        widen_codes((const int8_t*)codes + pair * step, out + pair * 2 * PIECE, 2 * PIECE);
        __builtin_prefetch(codes + pair * step + 4 * step);
    }
}

// V of 16 tokens -> the same with rows of `padded` elements, zero where they lack; tokens from `count` on are zero.
template <int KV_TYPE>
void stage_value_piece(const char* value, int dim, int padded, int count, char* out) {
    constexpr int TOKENS = KV_TYPE == KVP_F32 ? 1 : 2;  // in a row
    constexpr int SIZE = 4;                             // bytes of a row's element in `out`
    for (int row = 0; row < PIECE / TOKENS; row++, out += (int64_t)padded * SIZE) {
        const int left = count - row * TOKENS;
        int64_t filled = 0;
        if (left > 0) {
            filled = (int64_t)dim * SIZE;
            if constexpr (KV_TYPE == KVP_I8) widen_codes((const int8_t*)value + (int64_t)row * 2 * dim, (uint16_t*)out, 2 * dim);
            else memcpy(out, value + (int64_t)row * dim * SIZE, (size_t)filled);
        }
        if (TOKENS == 2 && left == 1)
            for (int i = 0; i < dim; i++) ((uint16_t*)out)[2 * i + 1] = 0;
        memset(out + filled, 0, (size_t)((int64_t)padded * SIZE - filled));
    }
}

}  // namespace

}  // namespace KVP_NS
