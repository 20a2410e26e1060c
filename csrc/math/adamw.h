// One element of an AdamW step. Source: https://arxiv.org/abs/1711.05101 algorithm 2.
#pragma once

#include <cmath>

#include "arguments/adamw_publish.h"
#include "math/exp.h"

namespace warpo {

struct AdamwState {
    float weight, exp_avg, exp_avg_sq;
};

struct AdamwNumbers {
    float decay, grad_weight, beta2, square_weight, eps, step_size, root_scale;
};

inline AdamwNumbers adamw_numbers(const AdamwPublish& a, const AdamwTensor& tensor) {
    return {a.decay, a.grad_weight,    a.beta2,          a.square_weight,
            a.eps,   tensor.step_size, tensor.root_scale};
}

WARPO_HD AdamwState adamw_step(const AdamwNumbers& a, const AdamwState& old, float grad) {
    AdamwState next;
    next.exp_avg = old.exp_avg + a.grad_weight * (grad - old.exp_avg);
    next.exp_avg_sq = a.beta2 * old.exp_avg_sq + a.square_weight * (grad * grad);
    const float root = sqrtf(next.exp_avg_sq) * a.root_scale + a.eps;
    next.weight = a.decay * old.weight - a.step_size * (next.exp_avg / root);
    return next;
}

}  // namespace warpo
