// Elements of a View as float32, and back. Integer arithmetic only, so that the loops vectorise
// everywhere. Every source that includes this is compiled once for each instruction set: WARPO_ISA
// names its namespace.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "math/exp.h"

#ifndef WARPO_ISA
#define WARPO_ISA portable
#endif

namespace warpo::cpu::WARPO_ISA {

struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

WARPO_HD float to_float(float x) { return x; }

WARPO_HD float to_float(BFloat16 x) { return float_from_bits((uint32_t)x.bits << 16); }

WARPO_HD float to_float(Float16 x) {
    const uint32_t magnitude = x.bits & 0x7fffu;
    // The float with these bits is the value * 2^-112, also where the half is subnormal.
    const float scaled = float_from_bits(magnitude << 13) * 5.192296858534828e33f;
    const uint32_t special = magnitude >= 0x7c00u ? 0x7f800000u : 0u;  // inf, NaN
    return float_from_bits(bits_from_float(scaled) | special | (uint32_t)(x.bits & 0x8000u) << 16);
}

WARPO_HD void from_float(float x, float& out) { out = x; }

// Round to nearest, ties to even.
WARPO_HD void from_float(float x, BFloat16& out) {
    const uint32_t bits = bits_from_float(x);
    const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    out.bits = (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

WARPO_HD void from_float(float x, Float16& out) {
    const uint32_t bits = bits_from_float(x);
    const uint32_t magnitude = bits & 0x7fffffffu;
    const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
    // Adding 1/2 shifts the bits of a subnormal half into place and rounds them.
    const uint32_t subnormal = bits_from_float(float_from_bits(magnitude) + 0.5f) - 0x3f000000u;
    uint32_t half = magnitude < (113u << 23) ? subnormal : normal;
    half = magnitude >= (143u << 23) ? 0x7c00u : half;
    half = magnitude > 0x7f800000u ? 0x7e00u : half;
    out.bits = (uint16_t)(half | (bits >> 16 & 0x8000u));
}

// Work below this many elements is done by the calling thread: waking the others costs more.
constexpr int64_t kParallelWork = 32768;

template <class T>
WARPO_HD T* address(const View& view, int64_t row, int64_t step) {
    return (T*)view.data + row * view.stride0 + step * view.stride1;
}

template <class T>
WARPO_HD T element(const View& view, int64_t row, int64_t step, T absent) {
    return view.data ? *address<T>(view, row, step) : absent;
}

template <class T>
inline void load_strided(const T* source, int64_t stride, int count, float* out) {
    if (stride == 1) {
#pragma omp simd
        for (int i = 0; i < count; ++i) out[i] = to_float(source[i]);
    } else if (stride == 0) {
        const float all = to_float(*source);
#pragma omp simd
        for (int i = 0; i < count; ++i) out[i] = all;
    } else {
        for (int i = 0; i < count; ++i) out[i] = to_float(source[i * stride]);
    }
}

// `count` elements of a float view from (row, step) on, the step advancing.
inline void load_steps(const View& view, int64_t row, int64_t step, int count, float* out) {
    switch (view.dtype) {
        case kFloat32:
            return load_strided(address<float>(view, row, step), view.stride1, count, out);
        case kBFloat16:
            return load_strided(address<BFloat16>(view, row, step), view.stride1, count, out);
        default: return load_strided(address<Float16>(view, row, step), view.stride1, count, out);
    }
}

template <class T>
inline void store_dense(const float* values, int count, T* out) {
#pragma omp simd
    for (int i = 0; i < count; ++i) from_float(values[i], out[i]);
}

// `count` floats into a contiguous float view from element `offset` on.
inline void store_steps(const View& view, int64_t offset, int count, const float* values) {
    switch (view.dtype) {
        case kFloat32: return store_dense(values, count, (float*)view.data + offset);
        case kBFloat16: return store_dense(values, count, (BFloat16*)view.data + offset);
        default: return store_dense(values, count, (Float16*)view.data + offset);
    }
}

WARPO_HD float load_one(const View& view, int64_t row, int64_t step) {
    switch (view.dtype) {
        case kFloat32: return *address<float>(view, row, step);
        case kBFloat16: return to_float(*address<BFloat16>(view, row, step));
        default: return to_float(*address<Float16>(view, row, step));
    }
}

}  // namespace warpo::cpu::WARPO_ISA
