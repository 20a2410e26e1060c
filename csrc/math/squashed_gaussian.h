// One component of a tanh-squashed Gaussian action: value and derivatives, one text for host and
// device. No library call, so that a loop over it vectorises.
#pragma once

#include "math/logistic.h"

namespace warpo {

constexpr float kHalfLog2Pi = 0.918938533204672742f;

// e^x - 1 for x <= 0, given e = e^x.
WARPO_HD float expm1_of(float x, float e) {
    // (e^x - 1) / x, minimax for the relative error on [-0.75, 0]: 1.8e-8
    float p = 1.01259e-3f;
    p = p * x + 8.03434e-3f;
    p = p * x + 4.155385e-2f;
    p = p * x + 1.6664719e-1f;
    p = p * x + 4.9999876e-1f;
    p = p * x + 1.0f;
    return x > -0.75f ? p * x : e - 1.0f;
}

// u = mean + exp(s) noise with s = clamp(log_std); the action is tanh(u).
struct SquashedSample {
    float s, spread;  // spread: exp(s) noise = du / ds
    float magnitude;  // |u|
    float e;          // exp(-2 |u|)
    float action;
    bool inside;  // of the clamp, its bounds included: the gradient of log_std passes
};

// By comparison, so that NaN stays.
WARPO_HD float clamp_log_std(float log_std, float low, float high) {
    return log_std > high ? high : log_std < low ? low : log_std;
}

// Apart from the rest: a loop over it and one over the rest are faster than one over both, whose
// chain of operations is too long for a processor to look past.
WARPO_HD float squashed_spread(float log_std, float noise, float low, float high) {
    return exp_f32(clamp_log_std(log_std, low, high)) * noise;
}

WARPO_HD SquashedSample squashed_sample(float mean, float log_std, float spread, float low,
                                        float high) {
    SquashedSample x;
    x.s = clamp_log_std(log_std, low, high);
    x.inside = log_std >= low && log_std <= high;
    x.spread = spread;
    const float u = mean + spread;
    x.magnitude = u < 0.0f ? -u : u;
    // at 42 and beyond it is nothing beside 1
    x.e = exp_bounded(x.magnitude > 42.0f ? -84.0f : -2.0f * x.magnitude);
    const float tanh = -expm1_of(-2.0f * x.magnitude, x.e) / (1.0f + x.e);
    x.action = u < 0.0f ? -tanh : tanh;
    return x;
}

// -noise^2 / 2 - s - log(2 pi) / 2 - log(1 - tanh(u)^2), the last as
// 2 (log 2 - u - softplus(-2u)) = 2 (log 2 - |u| - log(1 + e^(-2|u|))), which no u makes -inf.
WARPO_HD float squashed_logprob(const SquashedSample& x, float noise) {
    const float log_slope = 2.0f * (kLn2 - x.magnitude - log1p_unit(x.e));
    return -0.5f * noise * noise - x.s - kHalfLog2Pi - log_slope;
}

struct SquashedGradient {
    float mean, log_std;
};

// da / du = 1 - tanh(u)^2 = 4 e / (1 + e)^2, d logp / du = 2 tanh(u); s has another -1 of its own.
WARPO_HD SquashedGradient squashed_gradient(const SquashedSample& x, float grad_action,
                                            float grad_logprob) {
    const float half = 1.0f / (1.0f + x.e);
    const float slope = 4.0f * x.e * half * half;
    const float grad_u = grad_action * slope + grad_logprob * 2.0f * x.action;
    return {grad_u, x.inside ? grad_u * x.spread - grad_logprob : 0.0f};
}

}  // namespace warpo
