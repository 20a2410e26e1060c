#pragma once
#include "view.h"

namespace warpo {

// One tensor of a step.
struct AdamwTensor {
    Matrix published;          // float
    View grad;                 // (0, i) float, dense, as the others
    float* master;             // optional: without it published is its own master
    View exp_avg, exp_avg_sq;  // (0, i) float32 or bfloat16, both alike
    float step_size;           // lr / (1 - beta1^step)
    float root_scale;          // 1 / sqrt(1 - beta2^step)
    int64_t seed, step;        // of the random numbers
};

using AdamwTensors = std::vector<AdamwTensor>;

struct AdamwPublish {
    AdamwTensors tensors;
    float decay;                 // 1 - lr * weight_decay
    float grad_weight;           // 1 - beta1
    float beta2, square_weight;  // square_weight: 1 - beta2
    float eps;
    float grad_scale;
    const float* grad_scale_factor;  // one float on the device, optional: multiplies grad_scale
    int stochastic;                  // bfloat16 moments, and published without a master, are
                                     // rounded stochastically, see math/stochastic_rounding.h
    int64_t* partial_counts;         // (tensors * kMaxPartials, 2) workspace, see math/tiles.h
    float* partial_updates;          // (tensors * kMaxPartials, 2) workspace
    int64_t* counts;  // (2, tensors): fingerprints of published, elements of it that changed
    float* updates;   // (2, tensors): sums of |new - old| over master and over published
};

}  // namespace warpo
