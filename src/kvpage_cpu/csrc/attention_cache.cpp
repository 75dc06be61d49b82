// Writing K and V of one token into the cache.
#include "attention_cache.h"

#include "attention.h"

namespace KVP_NS {

namespace {

// The largest magnitude of x [n], as a scale of int8 codes; 0 where all are 0.
KVP_INLINE float code_scale(const float* x, int n) {
    float most = 0.0f;
    for (int i = 0; i < n; i++) most = __builtin_fabsf(x[i]) > most ? __builtin_fabsf(x[i]) : most;
    return most / 127.0f;
}

KVP_INLINE int8_t code_of(float x, float inverse) {
    const float scaled = x * inverse;
    const float limited = scaled < 127.0f ? (scaled > -127.0f ? scaled : -127.0f) : 127.0f;  // 127 for NaN too
    return (int8_t)(limited + (limited < 0.0f ? -0.5f : 0.5f));
}

}  // namespace

size_t block_bytes(int kv_type, int kv_heads, int head_dim, int v_head_dim, int block_size) {
    return (size_t)CacheShape(kv_type, kv_heads, head_dim, v_head_dim, block_size).block;
}

void write_head(const KvpAttention& layer, int64_t slot, int head, const float* k, const float* v) {
    const CacheShape shape(layer);
    const int64_t bs = layer.block_size, within = slot % bs, dim = layer.v_head_dim;
    char* const block = (char*)layer.kv + slot / bs * shape.block + head * shape.head;
    if (layer.kv_type == KVP_F32) {
        float *const keys = (float*)block + within, *const values = (float*)(block + shape.k) + within * dim;
        for (int d = 0; d < layer.head_dim; d++) keys[d * bs] = k[d];
        memcpy(values, v, sizeof(float) * (size_t)dim);
        return;
    }
    const int64_t pair = within / 2 * dim * 2 + within % 2;
    if (layer.kv_type == KVP_BF16) {
        uint16_t *const keys = (uint16_t*)block + within * 2, *const values = (uint16_t*)(block + shape.k) + pair;
        for (int d = 0; d < layer.head_dim; d += 2) {
            keys[d * bs] = to_bf16(k[d]);
            keys[d * bs + 1] = to_bf16(k[d + 1]);
        }
        for (int d = 0; d < dim; d++) values[2 * d] = to_bf16(v[d]);
        return;
    }
    int8_t *const keys = (int8_t*)block + within * 2, *const values = (int8_t*)(block + shape.k) + pair;
    float* const scales = (float*)(block + shape.k + shape.v) + within;
    const float k_scale = code_scale(k, layer.head_dim), v_scale = code_scale(v, (int)dim);
    const float k_inverse = k_scale > 0.0f ? 1.0f / k_scale : 0.0f, v_inverse = v_scale > 0.0f ? 1.0f / v_scale : 0.0f;
    for (int d = 0; d < layer.head_dim; d += 2) {
        keys[d * bs] = code_of(k[d], k_inverse);
        keys[d * bs + 1] = code_of(k[d + 1], k_inverse);
    }
    for (int d = 0; d < dim; d++) values[2 * d] = code_of(v[d], v_inverse);
    scales[0] = k_scale;
    scales[bs] = v_scale;
}

}  // namespace KVP_NS
