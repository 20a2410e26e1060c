// Logarithms of logistic functions without overflow or cancellation, for host and device.
#pragma once

#include <math.h>

#include "math/exp.h"

namespace warpo {

struct LogSigmoid {
    float value;       // log(1 / (1 + e^-x)) = min(x, 0) - log(1 + e^-|x|)
    float derivative;  // 1 / (1 + e^x)
};

WARPO_HD LogSigmoid log_sigmoid(float x) {
    const float e = exp_f32(x > 0.0f ? -x : x);
    const float small = e / (1.0f + e), large = 1.0f / (1.0f + e);
    return {(x < 0.0f ? x : 0.0f) - log1pf(e), x > 0.0f ? small : large};
}

// log(1 - e^x) for x < 0, https://cran.r-project.org/package=Rmpfr/vignettes/log1mexp-note.pdf eq.
// 7
WARPO_HD float log1mexp(float x) { return x > -kLn2 ? logf(-expm1f(x)) : log1pf(-exp_f32(x)); }

}  // namespace warpo
