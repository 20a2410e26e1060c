// One component of a tanh-squashed Gaussian action: value and derivatives, one text for host and
// device. No library call, so that a loop over it vectorises.
#pragma once

#include "math/exp.h"

namespace warpo {

constexpr float kHalfLog2Pi = 0.918938533204672742f;

// e^x - 1 for x <= 0, given e = e^x.
WARPO_HD float expm1_of(float x, float e) {
    // sum of x^n / n!, n = 1 .. 9: the next term is below 1e-8 of the sum at |x| = 0.75
    float p = x * (1.0f / 362880.0f) + 1.0f / 40320.0f;
    p = p * x + 1.0f / 5040.0f;
    p = p * x + 1.0f / 720.0f;
    p = p * x + 1.0f / 120.0f;
    p = p * x + 1.0f / 24.0f;
    p = p * x + 1.0f / 6.0f;
    p = p * x + 0.5f;
    p = p * x + 1.0f;
    return x > -0.75f ? p * x : e - 1.0f;
}

// log(1 + e) for 0 <= e <= 1: 2 atanh(z), z = e / (2 + e) <= 1/3.
WARPO_HD float log1p_of_unit(float e) {
    const float z = e / (2.0f + e), square = z * z;
    // sum of z^2n / (2n + 1), n = 0 .. 7: the next term is below 2e-9 of the sum at z = 1/3
    float p = square * (1.0f / 15.0f) + 1.0f / 13.0f;
    p = p * square + 1.0f / 11.0f;
    p = p * square + 1.0f / 9.0f;
    p = p * square + 1.0f / 7.0f;
    p = p * square + 1.0f / 5.0f;
    p = p * square + 1.0f / 3.0f;
    p = p * square + 1.0f;
    return 2.0f * z * p;
}

// u = mean + exp(s) noise with s = clamp(log_std); the action is tanh(u).
struct SquashedSample {
    float s, spread;  // spread: exp(s) noise = du / ds
    float magnitude;  // |u|
    float e;          // exp(-2 |u|)
    float action;
    bool inside;  // of the clamp, its bounds included: the gradient of log_std passes
};

WARPO_HD SquashedSample squashed_sample(float mean, float log_std, float noise, float low,
                                        float high) {
    SquashedSample x;
    // by comparison, so that NaN stays
    x.s = log_std > high ? high : log_std < low ? low : log_std;
    x.inside = log_std >= low && log_std <= high;
    x.spread = exp_f32(x.s) * noise;
    const float u = mean + x.spread;
    x.magnitude = u < 0.0f ? -u : u;
    x.e = exp_f32(-2.0f * x.magnitude);
    const float tanh = -expm1_of(-2.0f * x.magnitude, x.e) / (1.0f + x.e);
    x.action = u < 0.0f ? -tanh : tanh;
    return x;
}

// -noise^2 / 2 - s - log(2 pi) / 2 - log(1 - tanh(u)^2), the last as
// 2 (log 2 - u - softplus(-2u)) = 2 (log 2 - |u| - log(1 + e^(-2|u|))), which no u makes -inf.
WARPO_HD float squashed_logprob(const SquashedSample& x, float noise) {
    const float log_slope = 2.0f * (kLn2 - x.magnitude - log1p_of_unit(x.e));
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
