// The term of one word in the fingerprint of a tensor, which is the sum of all modulo 2^64: any
// order gives the same number, and to change one word always changes it.
// A word holds 64 bits of the elements in row-major order: 2 of float32 or 4 of 16 bits, the first
// in the lowest bits, with zeros after the last element.
// Source of the mixer: SplitMix64, Steele, Lea, Flood, "Fast splittable pseudorandom number
// generators", figure 16, with the increment of its section 3 as the weight of the position.
#pragma once

#include "math/exp.h"

namespace warpo {

constexpr uint64_t kSplitMixStep = 0x9e3779b97f4a7c15u;

// Word: uint64_t, or a vector of them.
template <class Word>
WARPO_HD Word splitmix64(Word z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

WARPO_HD uint64_t fingerprint_term(int64_t index, uint64_t word) {
    return splitmix64(((uint64_t)index + 1) * kSplitMixStep + word);
}

}  // namespace warpo
