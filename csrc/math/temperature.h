// The temperature of a token, for host and device.
#pragma once

#include <math.h>

#include "math/exp.h"

namespace warpo {

// One that has no distribution, 0, negative, infinite or NaN, poisons its token.
WARPO_HD float temperature_or_nan(float x) { return x > 0.0f && x < INFINITY ? x : NAN; }

}  // namespace warpo
