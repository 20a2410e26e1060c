#pragma once
#include "view.h"

namespace warpo {

struct SoftQTargets {
    int64_t transitions;
    View rewards;                          // (0, i) float
    View terminated;                       // (0, i) uint8
    View next_q1, next_q2, next_logprobs;  // (0, i) float; not used where terminated
    const float* alpha;                    // one float on the device
    float gamma;
    float* targets;  // (transitions)
};

}  // namespace warpo
