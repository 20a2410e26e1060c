#pragma once

namespace warpo {

// What a loss is divided by. 0 gives loss 0 and gradients 0.
struct Denominator {
    float number;
    const float* tensor;  // optional: one float on the device, in place of the number
};

}  // namespace warpo
