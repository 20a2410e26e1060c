// AdamW on float32 master weights, rounded into the published ones, in one pass over memory; a
// second launch adds up what the blocks have counted.
#include "cuda/device.h"
#include "cuda/launch.h"
#include "math/adamw.h"
#include "math/fingerprint.h"
#include "math/tiles.h"

namespace warpo::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32, kAtOnce = 4;

struct Sums {
    uint64_t fingerprint, changed;
    float master_update, published_update;
};

template <int kDType>
__device__ __forceinline__ uint32_t round_to_bits(float value) {
    const float pair[2] = {value, 0.0f};
    const uint32_t word = Element<kDType>::pack(pair);
    return Element<kDType>::kPerWord == 2 ? word & 0xffffu : word;
}

template <int kDType>
__device__ __forceinline__ float value_of(uint32_t bits) {
    float pair[2];
    Element<kDType>::unpack(bits, pair);
    return pair[0];
}

// The sums of a block, in every thread.
__device__ __forceinline__ Sums add_block(const Sums& own) {
    __shared__ uint64_t integers[kWarps];
    __shared__ float floats[kWarps];
    Sums sums;
    sums.fingerprint = block_sum<kWarps>(own.fingerprint, integers);
    sums.changed = block_sum<kWarps>(own.changed, integers);
    sums.master_update = block_sum<kWarps>(own.master_update, floats);
    sums.published_update = block_sum<kWarps>(own.published_update, floats);
    return sums;
}

template <int kDType>
__global__ __launch_bounds__(kThreads) void update_kernel(const AdamwPublish a) {
    using Bits = typename Element<kDType>::Bits;
    const float grad_scale = a.grad_scale * (a.grad_scale_factor ? *a.grad_scale_factor : 1.0f);
    const Tiles tiles = tiles_of(a.rows, a.columns);
    Sums sums = {0, 0, 0.0f, 0.0f};
    for (int64_t t = blockIdx.x; t < tiles.count; t += tiles.partials) {
        const Tile tile = tile_at(tiles, a.columns, t);
        const int64_t start = tile.row * a.columns + tile.first;
        Bits* const published =
            static_cast<Bits*>(a.published.data) + offset_of(a.published, tile.row, tile.first);
        for (int first = static_cast<int>(threadIdx.x); first < tile.count;
             first += kThreads * kAtOnce) {
            // All loads before the first store, which might be to the same address.
            AdamwState old[kAtOnce];
            uint32_t before[kAtOnce];
            float grad[kAtOnce];
#pragma unroll
            for (int k = 0; k < kAtOnce; ++k) {
                const int i = first + k * kThreads;
                if (i >= tile.count) continue;
                before[k] = published[i];
                old[k] = {a.master ? a.master[start + i] : value_of<kDType>(before[k]),
                          a.exp_avg[start + i], a.exp_avg_sq[start + i]};
                grad[k] = load_float(a.grad, (start + i) * a.grad.stride1) * grad_scale;
            }
#pragma unroll
            for (int k = 0; k < kAtOnce; ++k) {
                const int i = first + k * kThreads;
                if (i >= tile.count) continue;
                const AdamwState next = adamw_step(a, old[k], grad[k]);
                const uint32_t bits = round_to_bits<kDType>(next.weight);
                if (a.master) a.master[start + i] = next.weight;
                a.exp_avg[start + i] = next.exp_avg;
                a.exp_avg_sq[start + i] = next.exp_avg_sq;
                published[i] = static_cast<Bits>(bits);
                sums.fingerprint += fingerprint_term(start + i, bits);
                sums.changed += bits != before[k];
                sums.master_update += fabsf(next.weight - old[k].weight);
                sums.published_update +=
                    fabsf(value_of<kDType>(bits) - value_of<kDType>(before[k]));
            }
        }
    }
    sums = add_block(sums);
    if (threadIdx.x == 0) {
        const int64_t p = 2 * static_cast<int64_t>(blockIdx.x);
        a.partial_counts[p] = static_cast<int64_t>(sums.fingerprint);
        a.partial_counts[p + 1] = static_cast<int64_t>(sums.changed);
        a.partial_updates[p] = sums.master_update;
        a.partial_updates[p + 1] = sums.published_update;
    }
}

__global__ __launch_bounds__(kThreads) void sum_kernel(const AdamwPublish a) {
    const int64_t partials = tiles_of(a.rows, a.columns).partials;
    Sums sums = {0, 0, 0.0f, 0.0f};
    for (int64_t p = threadIdx.x; p < partials; p += kThreads) {
        sums.fingerprint += static_cast<uint64_t>(a.partial_counts[2 * p]);
        sums.changed += static_cast<uint64_t>(a.partial_counts[2 * p + 1]);
        sums.master_update += a.partial_updates[2 * p];
        sums.published_update += a.partial_updates[2 * p + 1];
    }
    sums = add_block(sums);
    if (threadIdx.x == 0) {
        a.counts[0] = static_cast<int64_t>(sums.fingerprint);
        a.counts[1] = static_cast<int64_t>(sums.changed);
        a.updates[0] = sums.master_update;
        a.updates[1] = sums.published_update;
    }
}

}  // namespace

void adamw_publish(const AdamwPublish& a, Stream stream) {
    DeviceGuard guard(stream.device, "adamw_publish");
    const Tiles tiles = tiles_of(a.rows, a.columns);
    if (tiles.count == 0) return;
    const auto kernel = a.published.dtype == kFloat32    ? update_kernel<kFloat32>
                        : a.published.dtype == kBFloat16 ? update_kernel<kBFloat16>
                                                         : update_kernel<kFloat16>;
    launch("adamw_publish", stream, tiles.partials, kThreads, kernel, a);
    launch("adamw_publish", stream, 1, kThreads, sum_kernel, a);
}

}  // namespace warpo::cuda
