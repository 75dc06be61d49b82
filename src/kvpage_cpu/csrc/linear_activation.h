// Activation functions of a vector.
#pragma once
#include "linear.h"

namespace KVP_NS {

KVP_INLINE F silu(F x) { return x / (splat(1.0f) + exp(zero() - x)); }

// x * normal_cdf(x), to 2e-7 * |x|: erfc by Abramowitz & Stegun 7.1.26, without cancellation for negative x.
KVP_INLINE F gelu(F x) {
    const F z = abs(x) * splat(0.70710678f);
    const F t = splat(1.0f) / fma(z, splat(0.3275911f), splat(1.0f));
    F tail = splat(0.5f * 1.061405429f);
    tail = fma(tail, t, splat(0.5f * -1.453152027f));
    tail = fma(tail, t, splat(0.5f * 1.421413741f));
    tail = fma(tail, t, splat(0.5f * -0.284496736f));
    tail = fma(tail, t, splat(0.5f * 0.254829592f));
    tail = tail * t * exp(zero() - z * z);
    return max(x, zero()) - abs(x) * tail;
}

// 0.5 * (1 + tanh(u)) is the logistic function of 2 * u; u = sqrt(2 / pi) * (x + 0.044715 * x^3).
KVP_INLINE F gelu_tanh(F x) {
    const F u = x * fma(x * x, splat(2.0f * 0.79788456f * 0.044715f), splat(2.0f * 0.79788456f));
    return x / (splat(1.0f) + exp(zero() - u));
}

KVP_INLINE F activated(Activation activation, F x) {
    switch (activation) {
        case Activation::silu: return silu(x);
        case Activation::gelu: return gelu(x);
        case Activation::gelu_tanh: return gelu_tanh(x);
        case Activation::relu: return max(zero(), x);  // NaN stays NaN
        case Activation::relu2: return max(zero(), x) * max(zero(), x);
        case Activation::none: break;
    }
    return x;
}

}  // namespace KVP_NS
