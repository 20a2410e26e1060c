// A 64-bit fingerprint of the bits of a tensor: partial sums, and a launch that adds them up.
#include "cuda/device.h"
#include "cuda/launch.h"
#include "math/fingerprint.h"
#include "math/tiles.h"

namespace warpo::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

template <typename Bits>
__global__ __launch_bounds__(kThreads) void tiles_kernel(const Fingerprint a) {
    __shared__ uint64_t scratch[kWarps];
    const Tiles tiles = tiles_of(a.rows, a.columns);
    uint64_t sum = 0;
    for (int64_t t = blockIdx.x; t < tiles.count; t += tiles.partials) {
        const Tile tile = tile_at(tiles, a.columns, t);
        const Bits* const elements =
            static_cast<const Bits*>(a.tensor.data) + offset_of(a.tensor, tile.row, tile.first);
        const int64_t index = tile.row * a.columns + tile.first;
#pragma unroll 8
        for (int i = static_cast<int>(threadIdx.x); i < tile.count; i += kThreads) {
            sum += fingerprint_term(index + i, elements[i]);
        }
    }
    sum = block_sum<kWarps>(sum, scratch);
    if (threadIdx.x == 0) a.partials[blockIdx.x] = static_cast<int64_t>(sum);
}

__global__ __launch_bounds__(kThreads) void sum_kernel(const Fingerprint a) {
    __shared__ uint64_t scratch[kWarps];
    const int64_t partials = tiles_of(a.rows, a.columns).partials;
    uint64_t sum = 0;
    for (int64_t p = threadIdx.x; p < partials; p += kThreads) {
        sum += static_cast<uint64_t>(a.partials[p]);
    }
    sum = block_sum<kWarps>(sum, scratch);
    if (threadIdx.x == 0) *a.fingerprint = static_cast<int64_t>(sum);
}

}  // namespace

void fingerprint(const Fingerprint& a, Stream stream) {
    DeviceGuard guard(stream.device, "fingerprint");
    const Tiles tiles = tiles_of(a.rows, a.columns);
    if (tiles.count == 0) return;
    const auto kernel =
        a.tensor.dtype == kFloat32 ? tiles_kernel<uint32_t> : tiles_kernel<uint16_t>;
    launch("fingerprint", stream, tiles.partials, kThreads, kernel, a);
    launch("fingerprint", stream, 1, kThreads, sum_kernel, a);
}

}  // namespace warpo::cuda
