// Logarithms of logistic functions without overflow or cancellation, for host and device.
#pragma once

#include <math.h>

#include "math/exp.h"

namespace warpo {

// log(1 + x) for 0 <= x <= 1, relative error below 1.8e-7; NaN stays NaN. No branch and no library
// call, so that a loop over it vectorises.
WARPO_HD float log1p_unit(float x) {
#ifdef __CUDA_ARCH__
    return log1pf(x);
#else
    const float s = x / (2.0f + x), square = s * s;  // log(1 + x) = 2 artanh(s)
    // (2 artanh(s) - 2 s) / s^3, minimax on [0, 1/3] for the error of the sum: 1.6e-8
    float p = 0.26867553f;
    p = p * square + 0.28233955f;
    p = p * square + 0.40007671f;
    p = p * square + 0.66666640f;
    return p * square * s + 2.0f * s;
#endif
}

struct LogSigmoid {
    float value;       // log(1 / (1 + e^-x)) = min(x, 0) - log(1 + e^-|x|)
    float derivative;  // 1 / (1 + e^x)
};

WARPO_HD LogSigmoid log_sigmoid(float x) {
    const float e = exp_f32(x > 0.0f ? -x : x);
    const float numerator = x > 0.0f ? e : 1.0f;
    return {(x < 0.0f ? x : 0.0f) - log1p_unit(e), numerator / (1.0f + e)};
}

// log(1 - e^x) for x < 0, https://cran.r-project.org/package=Rmpfr/vignettes/log1mexp-note.pdf eq.
// 7
WARPO_HD float log1mexp(float x) { return x > -kLn2 ? logf(-expm1f(x)) : log1pf(-exp_f32(x)); }

}  // namespace warpo
