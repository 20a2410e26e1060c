// Sequences of padded or packed tokens on the device: where they lie, and the results of blocks
// merged in the order of the blocks.
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

__device__ __forceinline__ bool is_valid(const View& mask, const Span& s, int64_t t) {
    return !mask.data || load_flag(mask, s.row, s.first + t);
}

__device__ __forceinline__ float load_token(const View& view, const Span& s, int64_t t) {
    return load_float(view, s.row, s.first + t);
}

// 1 / x, and 0 for 0; of what a sum is divided by.
// One block, warp m for metric m. Rows of partials as one: sums, and from column kFirstMoment on
// pairs of mean and m2 (sum of squared differences) over the count in column kCount. Column 0 is
// the loss.
template <int kMetrics, int kCount, int kFirstMoment>
__global__ __launch_bounds__(32 * kMetrics) void merge_kernel(const float* partials, int64_t rows,
                                                              float* loss, float* metrics) {
    const int metric = static_cast<int>(threadIdx.x / 32),
              lane = static_cast<int>(threadIdx.x % 32);
    const bool is_moment = metric >= kFirstMoment;
    const bool is_mean = is_moment && (metric - kFirstMoment) % 2 == 0;
    const int mean_column = is_mean ? metric : metric - 1;
    float sum = 0.0f, count = 0.0f, weighted = 0.0f;
    for (int64_t row = lane; row < rows; row += 32) {
        const float* partial = partials + row * kMetrics;
        sum += partial[metric];
        if (!is_moment) continue;
        count += partial[kCount];
        weighted = fmaf(partial[kCount], partial[mean_column], weighted);
    }
    sum = warp_sum(sum);
    if (is_moment) {
        count = warp_sum(count);
        const float mean = warp_sum(weighted) * inverse_or_zero(count);
        float spread = 0.0f;
        for (int64_t row = lane; row < rows; row += 32) {
            const float* partial = partials + row * kMetrics;
            const float difference = partial[mean_column] - mean;
            spread = fmaf(partial[kCount] * difference, difference, spread);
        }
        sum = is_mean ? mean : sum + warp_sum(spread);
    }
    if (lane != 0) return;
    metrics[metric] = sum;
    if (metric == 0) *loss = sum;
}

template <int kMetrics, int kCount, int kFirstMoment>
void launch_merge(const char* operation, Stream stream, const float* partials, int64_t rows,
                  float* loss, float* metrics) {
    launch(operation, stream, 1, 32 * kMetrics, merge_kernel<kMetrics, kCount, kFirstMoment>,
           partials, rows, loss, metrics);
}

}  // namespace warpo::cuda
