// Rounding of a float to bfloat16 up or down, at random: up with the probability that makes the
// expectation the float. The random numbers depend on seed, step and position only.
// Source: Gupta et al., "Deep learning with limited numerical precision",
// https://arxiv.org/abs/1502.02551 section 3; the numbers are SplitMix64's, see math/fingerprint.h.
#pragma once

#include "math/fingerprint.h"

namespace warpo {

// The start of a sequence of random numbers, one for each step of each seed.
WARPO_HD uint64_t random_key(int64_t seed, int64_t step) {
    const uint64_t mixed = splitmix64(((uint64_t)seed + 1) * kSplitMixStep);
    return splitmix64(mixed + (uint64_t)step * kSplitMixStep);
}

// 64 random bits for an element: 16 each for the weight, exp_avg and exp_avg_sq.
WARPO_HD uint64_t random_bits(uint64_t key, int64_t index) {
    return splitmix64(key + ((uint64_t)index + 1) * kSplitMixStep);
}

// random: uniform in [0, 2^16). An infinity stays, a NaN becomes the canonical one.
WARPO_HD uint32_t bfloat16_bits_at_random(float value, uint32_t random) {
    const uint32_t bits = bits_from_float(value);
    return (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : (bits + random) >> 16;
}

}  // namespace warpo
