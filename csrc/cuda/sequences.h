// Sequences of padded or packed tokens on the device: where they lie, several of their tokens
// loaded at once, and the results of blocks merged in the order of the blocks.
#pragma once

#include "cuda/device.h"
#include "cuda/launch.h"
#include "math/offsets.h"
#include "math/weight.h"

namespace warpo::cuda {

// Steps [first, first + count) of a row of the views; `offset` of the first in a dense output.
struct Span {
    int64_t row, first, count, offset;
    bool malformed;
};

__device__ __forceinline__ Span find_span(const int32_t* cu_seqlens, int64_t sequences,
                                          int64_t steps, int64_t sequence) {
    if (!cu_seqlens) return {sequence, 0, steps, sequence * steps, false};
    const Extent e = extent_of(cu_seqlens, sequences, sequence, steps);
    return {sequence, e.first, e.end - e.first, e.first, e.malformed};
}

// The weight of the tokens of a sequence: NaN, and with it loss and gradients, if it is malformed.
__device__ __forceinline__ float poison_if(bool malformed, float weight) {
    return malformed ? NAN : weight;
}

// Tokens t, t + kApart, ... before `end` as they lie in memory, so that no load waits for the
// conversion of another; 0 past the end. Masked ones too, so that no load waits for the mask: what
// they hold must not count. Index: of 32 bits where that saves registers.
template <int kApart, int kItems, typename Index>
__device__ __forceinline__ void load_tokens(uint32_t (&bits)[kItems], const View& view,
                                            const Span& s, Index t, Index end) {
    const int64_t offset = offset_of(view, s.row, s.first + t), apart = kApart * view.stride1;
    if (view.dtype == kFloat32) {
        const uint32_t* data = static_cast<const uint32_t*>(view.data) + offset;
#pragma unroll
        for (int i = 0; i < kItems; ++i) bits[i] = t + i * kApart < end ? data[i * apart] : 0;
    } else {
        const uint16_t* data = static_cast<const uint16_t*>(view.data) + offset;
#pragma unroll
        for (int i = 0; i < kItems; ++i) bits[i] = t + i * kApart < end ? data[i * apart] : 0;
    }
}

__device__ __forceinline__ float to_float(const View& view, uint32_t bits) {
    if (view.dtype == kFloat16) return unpack_f16x2(bits).x;
    return float_from_bits(view.dtype == kFloat32 ? bits : bits << 16);
}

// Which of the tokens are before `end` and valid. After other loads: this one waits.
template <int kApart, int kItems, typename Index>
__device__ __forceinline__ void load_valid(bool (&valid)[kItems], const View& mask, const Span& s,
                                           Index t, Index end) {
    uint32_t flags[kItems];
    if (mask.data) {
        const uint8_t* data =
            static_cast<const uint8_t*>(mask.data) + offset_of(mask, s.row, s.first + t);
        const int64_t apart = kApart * mask.stride1;
#pragma unroll
        for (int i = 0; i < kItems; ++i) flags[i] = t + i * kApart < end ? data[i * apart] : 0;
    } else {
#pragma unroll
        for (int i = 0; i < kItems; ++i) flags[i] = t + i * kApart < end ? 1 : 0;
    }
#pragma unroll
    for (int i = 0; i < kItems; ++i) valid[i] = flags[i] != 0;
}

constexpr int kRowsAtOnce = 8;  // that a thread has on their way

template <int kMetrics>
__device__ __forceinline__ void load_rows(float (&values)[kRowsAtOnce], const float* partials,
                                          int64_t first, int64_t rows, int column) {
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i) {
        const int64_t row = first + 32 * i;
        values[i] = row < rows ? partials[row * kMetrics + column] : 0.0f;
    }
}

// The sum of a column, in every lane.
template <int kMetrics>
__device__ __forceinline__ float sum_column(const float* partials, int64_t rows, int column) {
    float sum = 0.0f;
    for (int64_t first = threadIdx.x % 32; first < rows; first += 32 * kRowsAtOnce) {
        float values[kRowsAtOnce];
        load_rows<kMetrics>(values, partials, first, rows, column);
#pragma unroll
        for (int i = 0; i < kRowsAtOnce; ++i) sum += values[i];
    }
    return warp_sum(sum);
}

// The mean that rows of means and counts make.
template <int kMetrics, int kCount>
__device__ __forceinline__ float merge_means(const float* partials, int64_t rows, int column) {
    float total = 0.0f, weighted = 0.0f;
    for (int64_t first = threadIdx.x % 32; first < rows; first += 32 * kRowsAtOnce) {
        float counts[kRowsAtOnce], means[kRowsAtOnce];
        load_rows<kMetrics>(counts, partials, first, rows, kCount);
        load_rows<kMetrics>(means, partials, first, rows, column);
#pragma unroll
        for (int i = 0; i < kRowsAtOnce; ++i) {
            total += counts[i];
            weighted = fmaf(counts[i], means[i], weighted);
        }
    }
    total = warp_sum(total);
    return warp_sum(weighted) * inverse_or_zero(total);
}

// Squared differences of the means of rows from the mean of all, each as often as it counts.
template <int kMetrics, int kCount>
__device__ __forceinline__ float spread_of(const float* partials, int64_t rows, int column,
                                           float mean) {
    float spread = 0.0f;
    for (int64_t first = threadIdx.x % 32; first < rows; first += 32 * kRowsAtOnce) {
        float counts[kRowsAtOnce], means[kRowsAtOnce];
        load_rows<kMetrics>(counts, partials, first, rows, kCount);
        load_rows<kMetrics>(means, partials, first, rows, column);
#pragma unroll
        for (int i = 0; i < kRowsAtOnce; ++i) {
            const float difference = counts[i] == 0.0f ? 0.0f : means[i] - mean;
            spread = fmaf(counts[i] * difference, difference, spread);
        }
    }
    return warp_sum(spread);
}

// By one block, a warp a metric: rows of partials as one. Sums, and from column kFirstMoment on
// pairs of mean and m2 (sum of squared differences) over the count in column kCount. Column 0 is
// the loss.
template <int kWarps, int kMetrics, int kCount, int kFirstMoment>
__device__ __forceinline__ void merge_rows(const float* partials, int64_t rows, float* loss,
                                           float* metrics) {
    for (int m = static_cast<int>(threadIdx.x / 32); m < kMetrics; m += kWarps) {
        const bool is_moment = m >= kFirstMoment,
                   is_mean = is_moment && (m - kFirstMoment) % 2 == 0;
        float value = 0.0f;
        if (!is_mean) value = sum_column<kMetrics>(partials, rows, m);
        if (is_moment) {
            const int column = is_mean ? m : m - 1;
            const float mean = merge_means<kMetrics, kCount>(partials, rows, column);
            value =
                is_mean ? mean : value + spread_of<kMetrics, kCount>(partials, rows, column, mean);
        }
        if (threadIdx.x % 32 != 0) continue;
        metrics[m] = value;
        if (m == 0) *loss = value;
    }
}

}  // namespace warpo::cuda
