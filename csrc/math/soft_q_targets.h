// The target of a soft Q-function for one transition that does not end its episode.
#pragma once

#include "math/exp.h"

namespace warpo {

// r + gamma (min(q1, q2) - alpha log pi), https://arxiv.org/abs/1812.05905 eq. 2 and 3.
WARPO_HD float soft_q_target(float reward, float q1, float q2, float logprob, float alpha,
                             float gamma) {
    // NaN where either is
    const float smaller = q1 <= q2 ? q1 : q2 < q1 ? q2 : q1 + q2;
    return reward + gamma * (smaller - alpha * logprob);
}

}  // namespace warpo
