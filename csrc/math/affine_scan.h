// A linear recurrence as affine maps, which compose associatively, and a step of GAE as such a map.
// Source: Blelloch, "Prefix sums and their applications", section 1.4.
#pragma once

#include <cmath>

#include "math/exp.h"

namespace warpo {

struct AffineMap {  // x -> offset + slope x
    float slope, offset;
};

WARPO_HD AffineMap affine_identity() { return {1.0f, 0.0f}; }

// A slope of 0 cuts the recurrence: what lies behind it may be inf or NaN.
WARPO_HD float affine_apply(const AffineMap& map, float x) {
    return map.slope == 0.0f ? map.offset : fmaf(map.slope, x, map.offset);
}

WARPO_HD AffineMap affine_compose(const AffineMap& outer, const AffineMap& inner) {
    return {outer.slope * inner.slope, affine_apply(outer, inner.offset)};
}

enum GaeFlag : unsigned { kGaeInside = 1, kGaeKeep = 2, kGaeTerminated = 4, kGaeTruncated = 8 };

// True if the step passes next value and advantage through: past the end, or masked with carry.
WARPO_HD bool gae_is_transparent(unsigned flags, bool carry) {
    return carry ? (flags & kGaeKeep) == 0 : (flags & kGaeInside) == 0;
}

// The map from the advantage after a step to the advantage at it. Rewards and values of masked
// steps must be 0; bootstrap is the next value, or the value of the final observation where the
// step is truncated.
WARPO_HD AffineMap gae_step(unsigned flags, bool carry, float gamma, float gamma_lambda,
                            float reward, float value, float bootstrap) {
    if (gae_is_transparent(flags, carry)) return affine_identity();
    const bool keep = flags & kGaeKeep;
    const bool terminated = keep && (flags & kGaeTerminated),
               truncated = keep && (flags & kGaeTruncated);
    const float next = terminated ? 0.0f : bootstrap;
    return {terminated || truncated ? 0.0f : gamma_lambda, fmaf(gamma, next, reward) - value};
}

}  // namespace warpo
