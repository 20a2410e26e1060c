// The term of one element in the fingerprint of a tensor, which is the sum of all modulo 2^64: any
// order gives the same number, and to change one element always changes it.
// Source of the mixer: SplitMix64, Steele, Lea, Flood, "Fast splittable pseudorandom number
// generators", figure 16, with the increment of its section 3 as the weight of the position.
#pragma once

#include "math/exp.h"

namespace warpo {

constexpr uint64_t kFingerprintStep = 0x9e3779b97f4a7c15u;

// z: the bits of the element, zero-extended, plus its position in row-major order, counted from 1,
// times kFingerprintStep.
WARPO_HD uint64_t fingerprint_mix(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

WARPO_HD uint64_t fingerprint_term(int64_t index, uint32_t bits) {
    return fingerprint_mix(((uint64_t)index + 1) * kFingerprintStep + bits);
}

}  // namespace warpo
