// exp in float32, one definition for host loops that the compiler vectorises and for device code.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define WARPO_HD __host__ __device__ __forceinline__
#else
#define WARPO_HD inline __attribute__((always_inline))
#endif

namespace warpo {

WARPO_HD float float_from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

WARPO_HD uint32_t bits_from_float(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

constexpr float kLog2e = 1.44269504088896341f, kLn2 = 0.693147180559945309f;
// Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits.
constexpr float kRound = 12582912.0f;

// Relative error below 1.2e-7 for normal results; 0 below log(2^-126); inf above log(2^128); NaN
// stays NaN. No branch and no library call, so that a loop over it vectorises on any instruction
// set.
WARPO_HD float exp_f32(float x) {
#ifdef __CUDA_ARCH__
    return expf(x);
#else
    const float ln2_high = 0.693359375f,
                ln2_low = -2.12194440e-4f;  // Cody-Waite: their sum is ln 2 to 2^-43
    float clamped = x > 89.0f ? 89.0f : x;
    clamped = clamped < -88.0f ? -88.0f : clamped;
    const float rounded = clamped * kLog2e + kRound;
    const float n = rounded - kRound;
    const float r = (clamped - n * ln2_high) - n * ln2_low;
    // (e^r - 1 - r) / r^2, minimax on [-ln2/2, ln2/2]
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    // 2^n in two factors: n reaches 128, one past the largest exponent.
    const int32_t exponent = (int32_t)(bits_from_float(rounded) - bits_from_float(kRound));
    const int32_t half = exponent >> 1;
    const uint32_t low = (uint32_t)(half + 127), high = (uint32_t)(exponent - half + 127);
    float value = p * float_from_bits(low << 23) * float_from_bits(high << 23);
    value = x < -87.3365f ? 0.0f : value;
    return x != x ? x : value;
#endif
}

// Arguments of exp2_softmax below this give its 2^x, 4.7e-38: nothing beside the 1 of the largest
// element.
constexpr float kExp2Floor = -124.0f;

// 2^x for kExp2Floor <= x <= 1, relative error below 1.9e-7; NaN stays NaN. Base 2 needs neither a
// split ln 2 nor a second power of two: half the multiplications of exp_f32.
WARPO_HD float exp2_bounded(float x) {
    const float biased = kRound + 127.0f;  // leaves the exponent field of 2^n in the low bits
    const float rounded = x + biased;
    const float r = x - (rounded - biased);
    // (2^r - 1) / r, minimax for the relative error of 2^r on [-1/2, 1/2]: 9.2e-8, rounding included
    // 1.9e-7
    float p = 1.32647273e-3f;
    p = p * r + 9.67151299e-3f;
    p = p * r + 5.55073358e-2f;
    p = p * r + 2.40222424e-1f;
    p = p * r + 6.93147004e-1f;
    const float scale = float_from_bits(bits_from_float(rounded) << 23);
    return scale * (p * r) + scale;
}

// 2^max(x, kExp2Floor) for the arguments of a softmax, x <= 1.
WARPO_HD float exp2_softmax(float x) { return exp2_bounded(x < kExp2Floor ? kExp2Floor : x); }

}  // namespace warpo
