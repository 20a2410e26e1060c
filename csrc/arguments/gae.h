#pragma once
#include "view.h"

namespace warpo {

struct Gae {
    int64_t rows, steps;
    View rewards, values;  // float
    View last_values;      // (row, 0) float, optional: value after the last step; absent: 0
    View final_values;     // float, optional: value of the final observation; read where truncated
    View mask;             // uint8, optional
    View terminated, truncated;            // uint8, optional
    View last_terminated, last_truncated;  // (row, 0) uint8, optional; read when starts_at_t
    float gamma, gae_lambda;
    bool carry;        // masked steps: true passes value and trace through, false counts zeros
    bool starts_at_t;  // flag t: an episode starts at t, so that step t - 1 ended one
    View advantages, returns;  // float32 out
};

struct GaeBackward {
    Gae forward;  // flags and sizes; of final_values only whether it was there
    View grad_advantages, grad_returns;        // float32, optional, any stride
    View grad_rewards, grad_values;            // float32 out
    View grad_last_values, grad_final_values;  // float32 out, optional
};

}  // namespace warpo
