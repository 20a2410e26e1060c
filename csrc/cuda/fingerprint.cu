// A 64-bit fingerprint of the bits of a tensor: partial sums, and a launch that adds them up.
#include "cuda/launch.h"
#include "cuda/words.h"
#include "math/tiles.h"

namespace warpo::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

template <typename Bits>
__global__ __launch_bounds__(kThreads) void tiles_kernel(const Fingerprint a) {
    __shared__ uint64_t scratch[kWarps];
    const int64_t size = a.rows * a.columns;
    const Tiles tiles = tiles_of(1, size);
    const Bits* const elements = static_cast<const Bits*>(a.tensor.data);
    uint64_t sum = 0;
    for (int64_t t = blockIdx.x; t < tiles.count; t += tiles.partials) {
        const int64_t start = t * kTileSize;
#pragma unroll 8
        for (int i = static_cast<int>(threadIdx.x); i < kTileSize; i += kThreads) {
            const int64_t at = start + i;
            const bool inside = at < size;
            const uint32_t bits =
                inside ? elements[dense_offset(a.tensor, a.rows, a.columns, at)] : 0;
            sum += fingerprint_term<sizeof(Bits)>(at, bits, inside);
        }
    }
    sum = block_sum<kWarps>(sum, scratch);
    if (threadIdx.x == 0) a.partials[blockIdx.x] = static_cast<int64_t>(sum);
}

__global__ __launch_bounds__(kThreads) void sum_kernel(const Fingerprint a) {
    __shared__ uint64_t scratch[kWarps];
    const int64_t partials = tiles_of(1, a.rows * a.columns).partials;
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
    const Tiles tiles = tiles_of(1, a.rows * a.columns);
    if (tiles.count == 0) return;
    const auto kernel =
        a.tensor.dtype == kFloat32 ? tiles_kernel<uint32_t> : tiles_kernel<uint16_t>;
    launch("fingerprint", stream, tiles.partials, kThreads, kernel, a);
    launch("fingerprint", stream, 1, kThreads, sum_kernel, a);
}

}  // namespace warpo::cuda
