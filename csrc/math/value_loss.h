// The clipped value loss of one token: value and derivative, one text for host and device.
#pragma once

#include "math/exp.h"

namespace warpo {

struct HuberTerm {
    float value, derivative;
};

// x^2 / 2 for |x| <= delta, then linear with the same slope,
// https://doi.org/10.1214/aoms/1177703732. delta = inf: x^2 / 2.
WARPO_HD HuberTerm huber(float x, float delta) {
    float bounded = x > delta ? delta : x;
    bounded = bounded < -delta ? -delta : bounded;
    return {bounded * (x - 0.5f * bounded), bounded};
}

struct ValueTerm {
    float loss, derivative;
    float clipped;  // 1 where the clipped branch is larger
};

// max(f(v - R), f(clip(v, old - c, old + c) - R)), PPO2's clipped value loss
// (https://arxiv.org/abs/2005.12729 section 3). Ties as torch.max and torch.clamp have them: at a
// bound the clamp lets the gradient through; equal branches outside share it, and the clipped one
// has none.
WARPO_HD ValueTerm clipped_value_loss(float value, float old, float target, float clip_range,
                                      float delta) {
    const float low = old - clip_range, high = old + clip_range;
    // the bound where either is NaN, which is then NaN in old or in value - target
    const float below = value < high ? value : high;
    const float bounded = low < below ? below : low;
    const HuberTerm direct = huber(value - target, delta);
    const HuberTerm clipped = huber(bounded - target, delta);
    const float sum = direct.value + clipped.value;  // NaN where either is
    const float larger = direct.value > clipped.value ? direct.value : clipped.value;
    const float tied = bounded == value ? direct.derivative : 0.5f * direct.derivative;
    const float unless_smaller = direct.value > clipped.value ? direct.derivative : tied;
    const bool smaller = direct.value < clipped.value;
    const float derivative = smaller ? 0.0f : unless_smaller;
    ValueTerm term;
    term.loss = sum != sum ? sum : larger;
    term.derivative = sum != sum ? sum : derivative;
    term.clipped = smaller ? 1.0f : 0.0f;
    return term;
}

}  // namespace warpo
