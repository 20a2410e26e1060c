// Rows of partial sums of the policy loss, and loss and metrics from them.
#pragma once

#include "cuda/device.h"
#include "math/policy_loss.h"

namespace warpo::cuda {

__device__ __forceinline__ float first_of(int metric) {
    return metric == kRatioMin ? INFINITY : metric == kRatioMax ? -INFINITY : 0.0f;
}

__device__ __forceinline__ float reduce_pair(int metric, float a, float b) {
    // fminf and fmaxf would drop a NaN
    if (metric == kRatioMin) return b < a || b != b ? b : a;
    if (metric == kRatioMax) return b > a || b != b ? b : a;
    return a + b;
}

__device__ __forceinline__ float reduce_warp(int metric, float value) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes >>= 1) {
        value = reduce_pair(metric, value, __shfl_down_sync(kAllLanes, value, lanes));
    }
    return value;
}

// By one block, rows of partial sums as one: four threads a row, then a warp a metric.
template <int kWarps>
__device__ __forceinline__ void add_rows(const PolicyLoss& a, unsigned rows) {
    constexpr int kLanes = 32, kQuarters = kNumMetrics / 4, kRowsAtOnce = 8;
    static_assert(kNumMetrics % 4 == 0 && kLanes * kQuarters <= 32 * kWarps, "");
    __shared__ float of_lanes[kLanes][kNumMetrics + 1], totals[kNumMetrics];
    const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
    const int first = static_cast<int>(threadIdx.x) / kQuarters;
    const int quarter = static_cast<int>(threadIdx.x) % kQuarters;
    if (first < kLanes) {
        const float4* const data = reinterpret_cast<const float4*>(a.partials) + quarter;
        float sums[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[i] = first_of(4 * quarter + i);
        const float4 none = {sums[0], sums[1], sums[2], sums[3]};
        for (int64_t start = first; start < rows; start += kLanes * kRowsAtOnce) {
            float4 values[kRowsAtOnce];
#pragma unroll
            for (int r = 0; r < kRowsAtOnce; ++r) {
                const int64_t row = start + kLanes * r;
                values[r] = row < rows ? data[row * kQuarters] : none;
            }
#pragma unroll
            for (int r = 0; r < kRowsAtOnce; ++r) {
                sums[0] = reduce_pair(4 * quarter, sums[0], values[r].x);
                sums[1] = reduce_pair(4 * quarter + 1, sums[1], values[r].y);
                sums[2] = reduce_pair(4 * quarter + 2, sums[2], values[r].z);
                sums[3] = reduce_pair(4 * quarter + 3, sums[3], values[r].w);
            }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) of_lanes[first][4 * quarter + i] = sums[i];
    }
    __syncthreads();
    for (int m = warp; m < kNumMetrics; m += kWarps) {
        const float total = reduce_warp(m, of_lanes[lane][m]);
        if (lane == 0) a.metrics[m] = totals[m] = total;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        const float kl_coef = a.adaptive_kl_coef ? *a.adaptive_kl_coef : a.kl_coef;
        float loss = totals[kPolicyLoss];
        if (a.kl != kNoKl) loss = fmaf(kl_coef, totals[kKlLoss], loss);
        if (a.entropy.data && a.entropy_coef != 0.0f)
            loss = fmaf(-a.entropy_coef, totals[kEntropyLoss], loss);
        *a.loss = loss;
    }
}

}  // namespace warpo::cuda
