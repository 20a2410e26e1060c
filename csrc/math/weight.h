// The weight of a token, a pair or a completion in a loss, for host and device.
#pragma once

#include <math.h>

#include "arguments/denominator.h"
#include "math/exp.h"

namespace warpo {

WARPO_HD float value_of(const Denominator& d) { return d.tensor ? *d.tensor : d.number; }

// Of a count or a denominator: 0 where it is 0, NaN where it is negative or NaN.
WARPO_HD float inverse_or_zero(float x) { return x == 0.0f ? 0.0f : x > 0.0f ? 1.0f / x : NAN; }

// A weight of 0 leaves nothing, also of what is not finite.
template <class Real>
WARPO_HD Real weighted(float weight, Real x) {
    return weight == 0.0f ? Real(0) : weight * x;
}

}  // namespace warpo
