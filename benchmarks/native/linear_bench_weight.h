// Random weights of every kind that the native kernels compute: plain, packed and as numbers.
#pragma once
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#include "linear.h"
#include "team.h"

using namespace KVP_NS;

namespace {

struct Kind {
    const char* name;
    int type, dynamic;
    double bits, tolerance;     // relative error over all outputs; of ISA 3, where rows are rounded to bf16
    int group = 0;              // 0: no groups
    int scale_type = KVP_BF16;  // of groups
    int per_shared = 0;         // groups to a super-scale (f16), 0: none
    bool zeros = false, offsets = false, permuted = false;

    int zero() const { return type == KVP_I4 ? 8 : type != KVP_I8 ? 0 : per_shared ? 32 : 128; }  // Q6_K: 32
};

// As checkpoints hold them: int4 is what kvpage makes on the fly, gptq* have groups of 128 with float16 scales.
const Kind KINDS[] = {
    {"f32", KVP_F32, 0, 32, 1e-6},
    {"bf16", KVP_BF16, 0, 16, 3e-3},
    {"int8", KVP_I8, 0, 8, 3e-3},
    {"int8d", KVP_I8, 1, 8, 8e-3},
    {"int4", KVP_I4, 0, 4, 3e-3, 128},
    {"int4d", KVP_I4, 1, 4, 8e-3, 128},
    {"int4o", KVP_I4, 0, 4, 3e-3, 128, KVP_BF16, 0, false, true},
    {"gptq", KVP_I4, 1, 4, 8e-3, 128, KVP_F16},
    {"gptq-32", KVP_I4, 1, 4, 8e-3, 32, KVP_F16},
    {"gptq-asym", KVP_I4, 1, 4, 8e-3, 128, KVP_F16, 0, true},
    {"gptq-asym-32", KVP_I4, 1, 4, 8e-3, 32, KVP_F16, 0, true},
    {"gptq-act", KVP_I4, 1, 4, 8e-3, 128, KVP_F16, 0, true, false, true},
    {"asym-none", KVP_I4, 0, 4, 3e-3, 32, KVP_F16, 0, true},
    {"q4k", KVP_I4, 1, 4, 8e-3, 32, KVP_U8, 8, false, true},
    {"q2k", KVP_I4, 0, 4, 4e-3, 16, KVP_U8, 16, false, true},
    {"nf4", KVP_C4, 0, 4, 1e-2, 64, KVP_F32},
    {"q8", KVP_I8, 0, 8, 4e-3, 32, KVP_F16},
    {"q6k", KVP_I8, 0, 8, 4e-3, 16, KVP_I8, 16},
    {"int8-zeros", KVP_I8, 0, 8, 4e-3, 128, KVP_F16, 0, true},
    {"fp8", KVP_F8, 0, 8, 3e-3},
    {"fp8-blocks", KVP_F8, 0, 8, 4e-3, 128, KVP_F32},
};

struct Buffer {  // aligned, with a margin that prefetches and canaries may use
    explicit Buffer(size_t bytes) : p((char*)aligned_alloc(64, (bytes + 4096 + 63) / 64 * 64)) { memset(p, 0, bytes + 4096); }
    ~Buffer() { free(p); }
    Buffer(const Buffer&) = delete;
    char* p;
};

uint32_t random_bits() {
    static uint32_t state = 1;
    return (state = state * 1664525 + 1013904223) >> 8;
}
float random_number() { return (float)(int)(random_bits() - 0x800000) / 0x800000; }

void run(Team& team, const std::function<void(int, int)>& job) {
    team.run([](void* f, int thread, int threads) { (*(std::function<void(int, int)>*)f)(thread, threads); }, (void*)&job);
}

int align_up(int n, int unit) { return (n + unit - 1) / unit * unit; }

int bytes_of(int type) { return type == KVP_F32 ? 4 : type == KVP_U8 || type == KVP_I8 ? 1 : 2; }

// One random number of `type` in memory, about `size` large, and what it is.
float put(int type, char* p, float size) {
    float value = size * (1.0f + 0.5f * random_number());
    if (type == KVP_U8 || type == KVP_I8) return *(uint8_t*)p = (uint8_t)(20 + random_bits() % 100);
    uint32_t bits;
    memcpy(&bits, &value, 4);
    bits &= 0xffffe000;  // what float16 holds too
    if (type == KVP_BF16) bits &= 0xffff0000;
    memcpy(&value, &bits, 4);
    if (type == KVP_F32) memcpy(p, &bits, 4);
    if (type == KVP_BF16) *(uint16_t*)p = (uint16_t)(bits >> 16);
    if (type == KVP_F16) *(uint16_t*)p = (uint16_t)((bits >> 16 & 0x8000) | ((bits >> 13 & 0x3ffff) - (112 << 10)));
    return value;
}

// Numbers of groups, with what they are.
struct GroupValues {
    GroupValues(int number_type, int outputs, int groups_of_row, int each, float number_size)
        : type(number_type), groups(groups_of_row), per_shared(each), size(number_size),
          values((size_t)align_up(outputs, 32) * groups * 4), shared((size_t)align_up(outputs, 32) * groups * 4),
          numbers((size_t)align_up(outputs, 32) * groups) {}

    KvpGroupNumbers fill(int outputs) {
        std::vector<float> supers(numbers.size(), 1.0f);
        for (int n = 0; n < outputs; n++)
            for (int group = 0; group < groups; group++) {
                const size_t at = ((size_t)(n / 32) * groups + group) * 32 + n % 32;
                numbers[at] = put(type, values.p + at * bytes_of(type), size);
                if (!per_shared) continue;
                const size_t super = ((size_t)(n / 32) * (groups / per_shared) + group / per_shared) * 32 + n % 32;
                if (group % per_shared == 0) supers[super] = put(KVP_F16, shared.p + super * 2, size / 64);
                numbers[at] *= supers[super];
            }
        return {values.p, per_shared ? shared.p : nullptr, type, KVP_F16, per_shared};
    }

    float at(int n, int group) const { return numbers[((size_t)(n / 32) * groups + group) * 32 + n % 32]; }

    const int type, groups, per_shared;
    const float size;
    Buffer values, shared;
    std::vector<float> numbers;
};

float from_float8(int code) {
    const int exponent = code >> 3 & 15, mantissa = code & 7;
    const double value = exponent ? (8 + mantissa) * __builtin_ldexp(1, exponent - 10) : mantissa * __builtin_ldexp(1, -9);
    return (float)(code & 128 ? -value : value);
}

const float TABLE[16] = {-1.0f, -0.7f, -0.525f, -0.395f, -0.284f, -0.185f, -0.091f, 0.0f,
                         0.08f, 0.161f, 0.246f, 0.338f, 0.441f, 0.563f, 0.723f, 1.0f};

struct Weight {
    Weight(const Kind& weight_kind, int outputs, int inputs, bool in_place, Team& team)
        : kind(weight_kind), dense((size_t)outputs * inputs), row_bytes((int64_t)(inputs * kind.bits + 7) / 8),
          padded(align_up(inputs, kind.type == KVP_F32 ? 16 : kind.type == KVP_BF16 ? 32 : kind.group ? kind.group : 64)),
          plain(row_bytes * outputs), panels((size_t)(padded * kind.bits / 8) * (outputs / 32 * 32)),
          tail((size_t)(padded * kind.bits / 8) * 32), output_scales((size_t)align_up(outputs, 32) * 4), bias(outputs * 4),
          permutation((size_t)inputs * 4), scales(kind.scale_type, outputs, groups(), kind.per_shared, 0.1f),
          zeros(KVP_U8, outputs, groups(), 0, 0), offsets(kind.scale_type, outputs, groups(), kind.per_shared, 0.3f) {
        linear = {};
        linear.type = kind.type, linear.dynamic = kind.dynamic, linear.group = kind.group;
        linear.outputs = outputs, linear.inputs = inputs, linear.padded = padded;
        linear.panels = in_place ? plain.p : panels.p, linear.tail = tail.p, linear.bias = (float*)bias.p;
        linear.zero = kind.zero();
        if (kind.group) linear.scales = scales.fill(outputs);
        if (kind.zeros) linear.zeros = zeros.fill(outputs);
        if (kind.offsets) linear.offsets = offsets.fill(outputs);
        if (!kind.group && (kind.type == KVP_I8 || kind.type == KVP_F8)) linear.output_scales = (float*)output_scales.p;
        if (kind.type == KVP_C4) linear.table = TABLE;
        for (int k = 0; k < inputs; k++) ((int32_t*)permutation.p)[k] = kind.permuted ? (k * 7 + 3) % inputs : k;
        if (kind.permuted) linear.permutation = (int32_t*)permutation.p;
        for (int n = 0; n < outputs; n++) {
            ((float*)bias.p)[n] = random_number();
            ((float*)output_scales.p)[n] = 0.01f + 0.005f * random_number();
            for (int k = 0; k < inputs; k++) dense[(size_t)n * inputs + ((int32_t*)permutation.p)[k]] = set(n, k);
        }
        run(team, [&](int thread, int threads) {
            Buffer scratch((size_t)(padded * kind.bits / 8) * 32);
            pack_weight(linear, plain.p, row_bytes, scratch.p, thread, threads);
        });
    }

    int groups() const { return kind.group ? padded / kind.group : 1; }

    float set(int n, int k) {  // the code of one weight; what it stands for
        char* row = plain.p + n * row_bytes;
        const float value = random_number();
        if (kind.type == KVP_F32) return ((float*)row)[k] = value;
        if (kind.type == KVP_BF16) return from_bf16(((uint16_t*)row)[k] = to_bf16(value));
        if (kind.type == KVP_I8 && !kind.group)
            return (float)(((int8_t*)row)[k] = (int8_t)(value * 127)) * linear.output_scales[n];
        float number;
        if (kind.bits == 4) {
            const int code = random_bits() & 15;
            row[k / 2] = (char)(k % 2 ? row[k / 2] | code << 4 : code);
            number = kind.type == KVP_C4 ? TABLE[code] : (float)code;
        } else {
            int code = random_bits() & 255;
            if (kind.type == KVP_F8 && (code & 127) == 127) code--;  // NaN
            ((uint8_t*)row)[k] = (uint8_t)code;
            number = kind.type == KVP_F8 ? from_float8(code) : (float)code;
        }
        if (!kind.group) return number * linear.output_scales[n];
        const int group = k / kind.group;
        const float zero = kind.zeros ? zeros.at(n, group) : (float)linear.zero;
        return (number - zero) * scales.at(n, group) + (kind.offsets ? offsets.at(n, group) : 0.0f);
    }

    const Kind kind;
    std::vector<float> dense;
    const int64_t row_bytes;
    const int padded;
    Buffer plain, panels, tail, output_scales, bias, permutation;
    GroupValues scales, zeros, offsets;
    KvpLinear linear;
};

}  // namespace
