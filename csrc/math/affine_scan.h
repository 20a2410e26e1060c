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

// Ends hold on kept steps only.
enum GaeFlag : unsigned { kGaeInside = 1, kGaeKeep = 2, kGaeTerminated = 4, kGaeTruncated = 8 };
constexpr unsigned kGaeCut = kGaeTerminated | kGaeTruncated;

// True if the step passes next value and advantage through: past the end, or masked with carry.
WARPO_HD bool gae_is_transparent(unsigned flags, bool carry) {
    return (flags & (carry ? kGaeKeep : kGaeInside)) == 0;
}

// Rewards and values of masked steps must be 0; bootstrap is the next value, or the value of the
// final observation where the step is truncated.
WARPO_HD float gae_delta(unsigned flags, float gamma, float reward, float value, float bootstrap) {
    return fmaf(gamma, flags & kGaeTerminated ? 0.0f : bootstrap, reward) - value;
}

}  // namespace warpo
