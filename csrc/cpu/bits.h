// The bits of an element, zero-extended, and the fingerprint of a run of elements.
#pragma once

#include "cpu/load.h"
#include "math/fingerprint.h"

namespace warpo::cpu::WARPO_ISA {

WARPO_HD uint32_t bits_of(float x) { return bits_from_float(x); }
WARPO_HD uint32_t bits_of(BFloat16 x) { return x.bits; }
WARPO_HD uint32_t bits_of(Float16 x) { return x.bits; }

// `index` is the position of the first of them in the tensor.
template <class T>
inline uint64_t fingerprint_of(const T* elements, int count, int64_t index) {
    uint64_t sum = 0, position = ((uint64_t)index + 1) * kFingerprintStep;
#pragma omp simd reduction(+ : sum) linear(position : kFingerprintStep)
    for (int i = 0; i < count; ++i) {
        sum += fingerprint_mix(position + bits_of(elements[i]));
        position += kFingerprintStep;
    }
    return sum;
}

}  // namespace warpo::cpu::WARPO_ISA
