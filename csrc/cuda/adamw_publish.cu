// AdamW on float32 master weights, rounded into the published ones, in one pass over memory; a
// second launch adds up what the blocks have counted.
#include "cuda/launch.h"
#include "cuda/words.h"
#include "math/adamw.h"
#include "math/stochastic_rounding.h"
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

__device__ __forceinline__ void store_moment(const View& view, int64_t at, float value,
                                             uint32_t random, bool stochastic) {
    if (view.dtype == kFloat32)
        static_cast<float*>(view.data)[at] = value;
    else
        static_cast<uint16_t*>(view.data)[at] = static_cast<uint16_t>(
            stochastic ? bfloat16_bits_at_random(value, random) : round_to_bits<kBFloat16>(value));
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
    const uint64_t key = random_key(a.seed, a.step);
    const bool at_random = kDType == kBFloat16 && a.stochastic && !a.master;
    const int64_t size = a.rows * a.columns;
    const Tiles tiles = tiles_of(1, size);
    Bits* const published = static_cast<Bits*>(a.published.data);
    Sums sums = {0, 0, 0.0f, 0.0f};
    for (int64_t t = blockIdx.x; t < tiles.count; t += tiles.partials) {
        for (int first = 0; first < kTileSize; first += kThreads * kAtOnce) {
            const int64_t start = t * kTileSize + first + threadIdx.x;
            // All loads before the first store, which might be to the same address.
            AdamwState old[kAtOnce];
            uint32_t before[kAtOnce];
            float grad[kAtOnce];
#pragma unroll
            for (int k = 0; k < kAtOnce; ++k) {
                const int64_t at = start + k * kThreads;
                if (at >= size) continue;
                before[k] = published[dense_offset(a.published, a.rows, a.columns, at)];
                old[k] = {a.master ? a.master[at] : value_of<kDType>(before[k]),
                          load_float(a.exp_avg, at), load_float(a.exp_avg_sq, at)};
                grad[k] = load_float(a.grad, at) * grad_scale;
            }
#pragma unroll
            for (int k = 0; k < kAtOnce; ++k) {
                const int64_t at = start + k * kThreads;
                const bool inside = at < size;
                uint32_t bits = 0;
                if (inside) {
                    const AdamwState next = adamw_step(a, old[k], grad[k]);
                    const uint64_t random = a.stochastic ? random_bits(key, at) : 0;
                    bits = at_random ? bfloat16_bits_at_random(next.weight, random & 0xffffu)
                                     : round_to_bits<kDType>(next.weight);
                    if (a.master) a.master[at] = next.weight;
                    store_moment(a.exp_avg, at, next.exp_avg, random >> 16 & 0xffffu,
                                 a.stochastic);
                    store_moment(a.exp_avg_sq, at, next.exp_avg_sq, random >> 32 & 0xffffu,
                                 a.stochastic);
                    published[dense_offset(a.published, a.rows, a.columns, at)] =
                        static_cast<Bits>(bits);
                    sums.changed += bits != before[k];
                    sums.master_update += fabsf(next.weight - old[k].weight);
                    sums.published_update +=
                        fabsf(value_of<kDType>(bits) - value_of<kDType>(before[k]));
                }
                sums.fingerprint += fingerprint_term<sizeof(Bits)>(at, bits, inside);
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
    const int64_t partials = tiles_of(1, a.rows * a.columns).partials;
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
    const Tiles tiles = tiles_of(1, a.rows * a.columns);
    if (tiles.count == 0) return;
    const auto kernel = a.published.dtype == kFloat32    ? update_kernel<kFloat32>
                        : a.published.dtype == kBFloat16 ? update_kernel<kBFloat16>
                                                         : update_kernel<kFloat16>;
    launch("adamw_publish", stream, tiles.partials, kThreads, kernel, a);
    launch("adamw_publish", stream, 1, kThreads, sum_kernel, a);
}

}  // namespace warpo::cuda
