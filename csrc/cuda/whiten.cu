// (x - mean) / sqrt(variance + eps) over all valid elements, and the gradient: a launch for partial
// results of fixed parts, and one in which each block adds those up in the same order and writes.
#include "cuda/device.h"
#include "cuda/launch.h"
#include "math/moments.h"
#include "math/tiles.h"

namespace warpo::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32, kPerThread = kTileSize / kThreads;

__device__ __forceinline__ Moments<float> shuffle_xor(const Moments<float>& m, int lanes) {
    return {__shfl_xor_sync(kAllLanes, m.count, lanes), __shfl_xor_sync(kAllLanes, m.mean, lanes),
            __shfl_xor_sync(kAllLanes, m.squares, lanes)};
}

// The moments of a block, in every thread.
__device__ __forceinline__ Moments<float> merge_block(Moments<float> m,
                                                      float (&scratch)[kWarps][3]) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes >>= 1) {
        const Moments<float> other = shuffle_xor(m, lanes);
        // the lower lane is the first part for both, so that both get the same bits
        m = threadIdx.x & lanes ? merge(other, m) : merge(m, other);
    }
    if (threadIdx.x % 32 == 0) {
        float* const own = scratch[threadIdx.x / 32];
        own[0] = m.count, own[1] = m.mean, own[2] = m.squares;
    }
    __syncthreads();
    m = {0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
        m = merge(m, Moments<float>{scratch[warp][0], scratch[warp][1], scratch[warp][2]});
    }
    __syncthreads();
    return m;
}

__device__ __forceinline__ bool is_valid(const Whiten& a, const Tile& tile, int i) {
    return i < tile.count && (!a.mask.data || load_flag(a.mask, tile.row, tile.first + i));
}

// Moments of the elements that a thread has of a tile.
__device__ __forceinline__ Moments<float> moments_of(const Whiten& a, const Tile& tile) {
    float values[kPerThread], count = 0.0f, total = 0.0f;
    bool keep[kPerThread];
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) {
        const int i = k * kThreads + static_cast<int>(threadIdx.x);
        keep[k] = is_valid(a, tile, i);
        values[k] = keep[k] ? load_float(a.x, tile.row, tile.first + i) : 0.0f;
        count += keep[k] ? 1.0f : 0.0f;
        total += values[k];
    }
    const float pivot = total / fmaxf(count, 1.0f);
    float sum = 0.0f, squares = 0.0f;
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) {
        const float difference = keep[k] ? values[k] - pivot : 0.0f;
        sum += difference;
        squares = fmaf(difference, difference, squares);
    }
    return moments_about(pivot, count, sum, squares);
}

__global__ __launch_bounds__(kThreads) void moments_kernel(const Whiten a) {
    __shared__ float scratch[kWarps][3];
    const Tiles tiles = tiles_of(a.rows, a.columns);
    Moments<float> m = {0.0f, 0.0f, 0.0f};
    for (int64_t t = blockIdx.x; t < tiles.count; t += tiles.partials) {
        m = merge(m, moments_of(a, tile_at(tiles, a.columns, t)));
    }
    m = merge_block(m, scratch);
    if (threadIdx.x == 0) {
        float* const partial = a.partials + 3 * static_cast<int64_t>(blockIdx.x);
        partial[0] = m.count, partial[1] = m.mean, partial[2] = m.squares;
    }
}

__global__ __launch_bounds__(kThreads) void whiten_kernel(const Whiten a) {
    __shared__ float scratch[kWarps][3];
    const Tiles tiles = tiles_of(a.rows, a.columns);
    Moments<float> m = {0.0f, 0.0f, 0.0f};
    for (int64_t p = threadIdx.x; p < tiles.partials; p += kThreads) {
        const float* const partial = a.partials + 3 * p;
        m = merge(m, Moments<float>{partial[0], partial[1], partial[2]});
    }
    m = merge_block(m, scratch);
    const float scale = inverse_std(m, a.eps), offset = a.shift_mean ? 0.0f : m.mean;
    if (blockIdx.x == 0 && threadIdx.x == 0) {
        a.stats[kWhitenMean] = m.mean;
        a.stats[kWhitenScale] = scale;
        a.stats[kWhitenCount] = m.count;
    }
    for (int64_t t = blockIdx.x; t < tiles.count; t += tiles.partials) {
        const Tile tile = tile_at(tiles, a.columns, t);
        float* const out = a.whitened + tile.row * a.columns + tile.first;
#pragma unroll 4
        for (int i = static_cast<int>(threadIdx.x); i < tile.count; i += kThreads) {
            float value = 0.0f;
            if (is_valid(a, tile, i)) {
                value = load_float(a.x, tile.row, tile.first + i) - m.mean;
                value = fmaf(value, scale, offset);
            }
            out[i] = value;
        }
    }
}

__global__ __launch_bounds__(kThreads) void grad_sums_kernel(const WhitenBackward b) {
    __shared__ float scratch[kWarps];
    const Whiten& a = b.forward;
    const Tiles tiles = tiles_of(a.rows, a.columns);
    const float mean = a.stats[kWhitenMean], scale = a.stats[kWhitenScale];
    float grad_sum = 0.0f, moment = 0.0f;
    for (int64_t t = blockIdx.x; t < tiles.count; t += tiles.partials) {
        const Tile tile = tile_at(tiles, a.columns, t);
#pragma unroll 4
        for (int i = static_cast<int>(threadIdx.x); i < tile.count; i += kThreads) {
            if (!is_valid(a, tile, i)) continue;
            const float grad = load_float32(b.grad_whitened, tile.row, tile.first + i);
            const float centred = load_float(a.x, tile.row, tile.first + i) - mean;
            grad_sum += grad;
            moment = fmaf(grad, centred * scale, moment);
        }
    }
    grad_sum = block_sum<kWarps>(grad_sum, scratch);
    moment = block_sum<kWarps>(moment, scratch);
    if (threadIdx.x == 0) {
        float* const partial = a.partials + 3 * static_cast<int64_t>(blockIdx.x);
        partial[0] = grad_sum, partial[1] = moment;
    }
}

// grad_j = s (G_j - mean G - x_j sum_i G_i x_i / (n - 1)) with the standardised x and s = scale;
// without a shift of the mean, plus mean G.
__global__ __launch_bounds__(kThreads) void grad_kernel(const WhitenBackward b) {
    __shared__ float scratch[kWarps];
    const Whiten& a = b.forward;
    const Tiles tiles = tiles_of(a.rows, a.columns);
    const float mean = a.stats[kWhitenMean], scale = a.stats[kWhitenScale],
                count = a.stats[kWhitenCount];
    float grad_sum = 0.0f, moment = 0.0f;
    for (int64_t p = threadIdx.x; p < tiles.partials; p += kThreads) {
        grad_sum += a.partials[3 * p];
        moment += a.partials[3 * p + 1];
    }
    const float mean_grad = block_sum<kWarps>(grad_sum, scratch) / fmaxf(count, 1.0f);
    const float slope = block_sum<kWarps>(moment, scratch) / fmaxf(count - 1.0f, 1.0f);
    const float offset = a.shift_mean ? 0.0f : mean_grad;
    for (int64_t t = blockIdx.x; t < tiles.count; t += tiles.partials) {
        const Tile tile = tile_at(tiles, a.columns, t);
        float* const out = b.grad_x + tile.row * a.columns + tile.first;
#pragma unroll 4
        for (int i = static_cast<int>(threadIdx.x); i < tile.count; i += kThreads) {
            float value = 0.0f;
            if (is_valid(a, tile, i)) {
                const float grad = load_float32(b.grad_whitened, tile.row, tile.first + i);
                const float centred = load_float(a.x, tile.row, tile.first + i) - mean;
                value = fmaf(scale, grad - mean_grad - slope * (centred * scale), offset);
            }
            out[i] = value;
        }
    }
}

}  // namespace

void whiten_forward(const Whiten& a, Stream stream) {
    DeviceGuard guard(stream.device, "whiten");
    const Tiles tiles = tiles_of(a.rows, a.columns);
    if (tiles.count == 0) return;
    launch("whiten", stream, tiles.partials, kThreads, moments_kernel, a);
    launch("whiten", stream, tiles.partials, kThreads, whiten_kernel, a);
}

void whiten_backward(const WhitenBackward& b, Stream stream) {
    DeviceGuard guard(stream.device, "whiten_backward");
    const Tiles tiles = tiles_of(b.forward.rows, b.forward.columns);
    if (tiles.count == 0) return;
    launch("whiten_backward", stream, tiles.partials, kThreads, grad_sums_kernel, b);
    launch("whiten_backward", stream, tiles.partials, kThreads, grad_kernel, b);
}

}  // namespace warpo::cuda
