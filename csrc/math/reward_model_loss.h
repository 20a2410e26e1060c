// The Bradley-Terry loss of one pair of scores: value and derivatives, one text for host and
// device.
#pragma once

#include "math/logistic.h"

namespace warpo {

struct PairTerm {
    float loss, grad_better, grad_worse;
};

// -log sigmoid(better - worse - margin) + c (better + worse)^2
WARPO_HD PairTerm bradley_terry(float better, float worse, float margin, float centering_coef) {
    const LogSigmoid preference = log_sigmoid(better - worse - margin);
    const float sum = better + worse;
    const float pull = 2.0f * centering_coef * sum;
    return {centering_coef * sum * sum - preference.value, pull - preference.derivative,
            pull + preference.derivative};
}

}  // namespace warpo
