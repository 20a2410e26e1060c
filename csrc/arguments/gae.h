#pragma once
#include "view.h"

namespace warpo {

enum MaskMode : int {
    kCarry = 0,    // a masked step passes value and trace through
    kZero = 1,     // a masked step counts as reward 0 and value 0
    kCompact = 2,  // as kCarry; rewards behind the last valid step are added to its reward
};

// Which steps count, and where episodes end.
struct Scan {
    View mask;                             // uint8, optional
    View terminated, truncated;            // uint8, optional
    View last_terminated, last_truncated;  // (row, 0) uint8, optional; read when starts_at_t
    const int32_t* cu_seqlens;             // (rows + 1), or nullptr
    float gamma, gae_lambda;
    int mask_mode;
    bool starts_at_t;  // flag t: an episode starts at t, so that step t - 1 ended one
};

// Reverse scans of one family: GAE, discounted returns (no values, lambda 1), lambda returns, and
// with rho V-trace. With cu_seqlens row b is sequence b.
struct Gae : Scan {
    int64_t rows, steps;    // steps: length of a row; with cu_seqlens: total tokens
    View rewards;           // float, optional: absent rewards are 0
    View terminal_rewards;  // (row, 0) float, optional: added to the last valid step
    View values;            // float, optional: absent values are 0
    View last_values;       // (row, 0) float, optional: value after the last step; absent: 0
    View final_values;      // float, optional: value of the final observation; read where truncated
    View advantages, returns;  // float32 out, each optional
};

struct GaeBackward {
    Gae forward;  // flags and sizes; of final_values only whether it was there
    View grad_advantages, grad_returns;        // float32, optional, any stride
    View grad_rewards, grad_values;            // float32 out, each optional
    View grad_last_values, grad_final_values;  // float32 out, optional
};

// GAE on the reward reward_t - kl_coef KL_t - entropy_coef logprobs_t, with k1, k2 or k3 of logprobs
// against ref_logprobs.
struct ShapedGae {
    Gae gae;
    View logprobs, ref_logprobs;  // float
    int kl;                       // Kl of policy_loss.h
    float kl_coef;
    const float* adaptive_kl_coef;  // (), optional: in place of kl_coef
    float entropy_coef;
    float log_ratio_limit;
    View shaped_rewards;  // float32 out, optional: what the scan saw
};

// With ratio_t = exp(logprobs_t - old_logprobs_t), rho_t = min(rho_max, ratio_t) and
// c_t = gae_lambda min(c_max, ratio_t):
//     x_t = rho_t (r_t + gamma V_t+1 - V_t) + gamma c_t x_t+1,  returns_t = V_t + x_t,
//     advantages_t = min(pg_rho_max, ratio_t) (r_t + gamma returns_t+1 - V_t)
// and the last of them without its ratio unless weighs_advantages.
struct Vtrace {
    Gae gae;
    View logprobs, old_logprobs;  // float
    float rho_max, c_max, pg_rho_max;
    float log_ratio_limit;
    bool weighs_advantages;
};

}  // namespace warpo
