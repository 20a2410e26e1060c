// Softmax statistics of a row in one pass, and the gradient of its log-probability and entropy.
// Source: online softmax, https://arxiv.org/abs/1805.02867 algorithm 3, here with powers of two.
#pragma once

#include <cmath>

#include "math/exp.h"

namespace warpo {

// Below every exponent whose power of two is not 0: a finite stand-in for -inf in products with
// that 0.
constexpr float kLowestExponent = -1024.0f;

WARPO_HD float exp2_f32(float x) {
#ifdef __CUDA_ARCH__
    float value;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
    return value;
#else
    return exp2f(x);
#endif
}

// With scale = log2(e) / temperature, z_j = (x_j - softmax_origin(max)) scale and the x_j seen so
// far. The difference comes first: an offset that all x share and that float32 holds exactly
// changes no bit of the result.
struct SoftmaxState {
    float max;       // of the x_j; a NaN does not show here, but in sum
    float sum;       // of 2^z_j
    float weighted;  // of 2^z_j z_j
};

WARPO_HD SoftmaxState softmax_empty() { return {-INFINITY, 0.0f, 0.0f}; }

// -inf less -inf would be NaN.
WARPO_HD float softmax_origin(float max) { return max == -INFINITY ? 0.0f : max; }

template <bool kEntropy>
WARPO_HD void softmax_add(SoftmaxState& state, float x, float scale, float origin) {
    const float z = (x - origin) * scale;
    const float e = exp2_f32(z);
    state.sum += e;
    if (kEntropy) state.weighted = fmaf(e, fmaxf(z, kLowestExponent), state.weighted);
}

// The same sums relative to a maximum that is at least as large.
template <bool kEntropy>
WARPO_HD SoftmaxState softmax_raise(const SoftmaxState& state, float max, float scale) {
    SoftmaxState raised = state;
    raised.max = max;
    if (state.max == -INFINITY) return raised;  // sums are 0, or NaN where a NaN was seen
    const float change = fmaxf((state.max - max) * scale, kLowestExponent);
    const float factor = exp2_f32(change);
    raised.sum = state.sum * factor;
    if (kEntropy) raised.weighted = fmaf(change, state.sum, state.weighted) * factor;
    return raised;
}

template <bool kEntropy>
WARPO_HD SoftmaxState softmax_merge(const SoftmaxState& a, const SoftmaxState& b, float scale) {
    const float max = fmaxf(a.max, b.max);
    SoftmaxState merged = softmax_raise<kEntropy>(a, max, scale);
    const SoftmaxState other = softmax_raise<kEntropy>(b, max, scale);
    merged.sum += other.sum;
    merged.weighted += other.weighted;
    return merged;
}

struct SoftmaxRow {
    float log_sum;  // log sum_j exp((x_j - max) / temperature)
    float entropy;
};

WARPO_HD SoftmaxRow softmax_finish(const SoftmaxState& state) {
    if (state.max == -INFINITY) return {NAN, NAN};
    const float log_sum = logf(state.sum);
    return {log_sum, log_sum - kLn2 * (state.weighted / state.sum)};
}

// With z = log2 p_j = (x_j - max) scale - log2_sum:
// d loss / d x_j = p_j (constant + linear z) + (j is the target ? at_target : 0)
struct SoftmaxGradient {
    float max, scale, log2_sum, constant, linear, at_target;
};

WARPO_HD SoftmaxGradient softmax_gradient(float max, float log_sum, float temperature,
                                          float grad_logp, float entropy, float grad_entropy) {
    const float logp_weight = grad_logp / temperature, entropy_weight = grad_entropy / temperature;
    SoftmaxGradient result;
    result.max = max;
    result.scale = kLog2e / temperature;
    result.log2_sum = log_sum * kLog2e;
    result.constant = -(logp_weight + entropy_weight * entropy);
    result.linear = -entropy_weight * kLn2;
    result.at_target = logp_weight;
    return result;
}

template <bool kEntropy>
WARPO_HD float softmax_gradient_at(const SoftmaxGradient& g, float x) {
    const float z = fmaf(x - g.max, g.scale, -g.log2_sum);
    const float p = exp2_f32(z);
    return kEntropy ? p * fmaf(g.linear, fmaxf(z, kLowestExponent), g.constant) : p * g.constant;
}

}  // namespace warpo
