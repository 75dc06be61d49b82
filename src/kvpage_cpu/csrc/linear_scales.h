// Scales and offsets of a weight's groups as floats, from whatever the weight holds.
#pragma once
#include "linear_decode.h"

namespace KVP_NS {

KVP_INLINE constexpr int size_of(int type) {
    return type == KVP_F32 ? 4 : type == KVP_BF16 || type == KVP_F16 || type == KVP_I16 ? 2 : 1;
}

// W numbers from element `index` on.
KVP_INLINE F numbers_at(int type, const void* p, size_t index) {
    const char* const at = (const char*)p + index * size_of(type);
    switch (type) {
        case KVP_F32: return load((const float*)at);
        case KVP_BF16: return load_bf16((const uint16_t*)at);
        case KVP_F16: return load_f16(at);
        case KVP_U8: return to_float(load_u8(at));
        case KVP_I8: return to_float(load_i8(at));
        default: return to_float(load_i16(at));
    }
}

// Those of one group of a panel, outputs from `column` on.
KVP_INLINE F group_numbers(const KvpGroupNumbers& of, int panel, int groups, int group, int column) {
    const F values = numbers_at(of.type, of.values, ((size_t)panel * groups + group) * PANEL + column);
    if (!of.shared) return values;
    const size_t at = (size_t)panel * (groups / of.per_shared) + group / of.per_shared;
    return numbers_at(of.shared_type, of.shared, at * PANEL + column) * values;
}

KVP_INLINE bool has_offsets(const KvpLinear& linear) { return linear.zeros.values || linear.offsets.values; }

// Columns whose sum a row of bf16 keeps where there are offsets.
KVP_INLINE constexpr int summed_columns(int group) { return group < 32 ? group : 32; }

// Scales that the kernels read as they lie.
KVP_INLINE bool has_plain_scales(const KvpLinear& linear) {
    return linear.scales.type == KVP_BF16 && !linear.scales.shared && !has_offsets(linear);
}

}  // namespace KVP_NS
