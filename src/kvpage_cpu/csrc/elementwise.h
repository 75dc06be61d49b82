// What happens to one row between products: norms, rotary positions, joining the residual stream.
#pragma once
#include "simd.h"

namespace KVP_NS {

static inline float sum_of_squares(const float* x, int n) {
    F total = zero();
    int i = 0;
    for (; i + W <= n; i += W) {
        const F v = load(x + i);
        total = fma(v, v, total);
    }
    float rest = sum(total);
    for (; i < n; i++) rest += x[i] * x[i];
    return rest;
}

static inline float sum_of(const float* x, int n) {
    F total = zero();
    int i = 0;
    for (; i + W <= n; i += W) total = total + load(x + i);
    float rest = sum(total);
    for (; i < n; i++) rest += x[i];
    return rest;
}

// out[i] = (x[i] - mean) * factor * weight[i] + bias[i]; out may be x. weight and bias may be null.
static inline void scale_row(const float* x, int n, float mean, float factor, const float* weight, const float* bias,
                             float* out) {
    const F middle = splat(mean), by = splat(factor);
    int i = 0;
    for (; i + W <= n; i += W) {
        F v = (load(x + i) - middle) * by;
        if (weight) v = v * load(weight + i);
        if (bias) v = v + load(bias + i);
        store(out + i, v);
    }
    for (; i < n; i++) {
        float v = (x[i] - mean) * factor;
        if (weight) v *= weight[i];
        if (bias) v += bias[i];
        out[i] = v;
    }
}

// The norm of x [n], in f32; out may be x.
static inline void normalise(const KvpNorm& norm, const float* weight, const float* x, int n, float* out) {
    float mean = 0.0f, squares;
    if (norm.kind == KVP_LAYER) {
        mean = sum_of(x, n) / (float)n;
        F total = zero();
        int i = 0;
        for (; i + W <= n; i += W) {
            const F v = load(x + i) - splat(mean);
            total = fma(v, v, total);
        }
        squares = sum(total);
        for (; i < n; i++) squares += (x[i] - mean) * (x[i] - mean);
    } else {
        squares = sum_of_squares(x, n);
    }
    const float factor = 1.0f / __builtin_sqrtf(squares / (float)n + norm.eps);
    scale_row(x, n, mean, factor, weight, norm.bias, out);
}

// q_norm or k_norm of one token's heads [heads, dim].
static inline void normalise_heads(const KvpNorm& norm, int over, float* x, int heads, int dim) {
    if (over == KVP_NORM_ALL) {
        normalise(norm, norm.weight, x, heads * dim, x);
        return;
    }
    for (int head = 0; head < heads; head++) {
        const float* weight = over == KVP_NORM_EACH_HEAD ? norm.weight + (int64_t)head * dim : norm.weight;
        normalise(norm, weight, x + (int64_t)head * dim, dim, x + (int64_t)head * dim);
    }
}

// Turns the first `rotary_dim` elements of one head by a row of the tables (kvpage.api.attention.Rope), in place.
static inline void rotate(float* x, const float* cos, const float* sin, int rotary_dim, int interleaved) {
    const int half = rotary_dim / 2;
    if (interleaved) {
        for (int i = 0; i < half; i++) {
            const float a = x[2 * i], b = x[2 * i + 1];
            x[2 * i] = a * cos[i] - b * sin[i];
            x[2 * i + 1] = b * cos[i] + a * sin[i];
        }
        return;
    }
    int i = 0;
    for (; i + W <= half; i += W) {
        const F a = load(x + i), b = load(x + half + i), c = load(cos + i), s = load(sin + i);
        store(x + i, a * c - b * s);
        store(x + half + i, b * c + a * s);
    }
    for (; i < half; i++) {
        const float a = x[i], b = x[half + i];
        x[i] = a * cos[i] - b * sin[i];
        x[half + i] = b * cos[i] + a * sin[i];
    }
}

// x += multiplier * y
static inline void join(float* x, const float* y, int n, float multiplier) {
    const F by = splat(multiplier);
    int i = 0;
    for (; i + W <= n; i += W) store(x + i, fma(by, load(y + i), load(x + i)));
    for (; i < n; i++) x[i] += multiplier * y[i];
}

// x becomes cap * tanh(x / cap).
static inline void soft_cap(float* x, int n, float cap) {
    const auto capped = [cap](F v) {
        const F e = exp(splat(-2.0f / cap) * abs(v));  // tanh |y| = (1 - e^-2|y|) / (1 + e^-2|y|)
        const F size = splat(cap) * (splat(1.0f) - e) / (splat(1.0f) + e);
        const I sign = bit_and(as_int(v), splat_int((int32_t)0x80000000));
        return as_float(add(as_int(size), sign));
    };
    int i = 0;
    for (; i + W <= n; i += W) store(x + i, capped(load(x + i)));
    if (i < n) {
        float rest[W] = {};
        memcpy(rest, x + i, sizeof(float) * (size_t)(n - i));
        store(rest, capped(load(rest)));
        memcpy(x + i, rest, sizeof(float) * (size_t)(n - i));
    }
}

static inline void read_plain(const void* table, int type, int64_t row, int n, float* out) {
    if (type == KVP_F32) {
        memcpy(out, (const float*)table + row * n, sizeof(float) * (size_t)n);
        return;
    }
    const uint16_t* p = (const uint16_t*)table + row * n;
    int i = 0;
    for (; i + W <= n; i += W) store(out + i, load_bf16(p + i));
    for (; i < n; i++) out[i] = from_bf16(p[i]);
}

}  // namespace KVP_NS
