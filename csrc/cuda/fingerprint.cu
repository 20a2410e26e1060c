// 64-bit fingerprints of the bits of tensors: each block adds its part to that of its tensor, in
// any order.
#include "cuda/entries.h"
#include "cuda/launch.h"
#include "math/fingerprint.h"

namespace warpo::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32, kAtOnce = 4;
constexpr int kVectors = kThreads * kAtOnce;  // of 16 bytes, in a tile
constexpr int kMaxBlocks = 1024;              // of a tensor

struct Entry {
    const void* data;
    Rows rows;  // in elements
    int64_t* sum;
    int first_block, blocks, element_bytes;
    bool aligned;
};

using Launch = Entries<Entry, (kParameterBytes - 16) / sizeof(Entry)>;
static_assert(sizeof(Launch) <= kParameterBytes);

// Elements [first, first + 16 / sizeof(Bits)) one by one, zeros after the last one.
template <typename Bits>
__device__ __forceinline__ uint4 gather(const Entry& e, int64_t first) {
    constexpr int kPerWord = 8 / sizeof(Bits);
    uint64_t low = 0, high = 0;
#pragma unroll 1
    for (int k = 0; k < 2 * kPerWord && first + k < e.rows.size; ++k) {
        const uint64_t bits = static_cast<const Bits*>(e.data)[e.rows.offset_of(first + k)];
        const uint64_t placed = bits << (k % kPerWord * 8 * sizeof(Bits));
        if (k < kPerWord)
            low |= placed;
        else
            high |= placed;
    }
    return {static_cast<uint32_t>(low), static_cast<uint32_t>(low >> 32),
            static_cast<uint32_t>(high), static_cast<uint32_t>(high >> 32)};
}

template <typename Bits>
__device__ __forceinline__ uint64_t sum_tiles(const Entry& e, int block) {
    constexpr int kPerVector = 16 / sizeof(Bits), kPerWord = 8 / sizeof(Bits);
    const int64_t size = e.rows.size, words = (size + kPerWord - 1) / kPerWord;
    const int64_t whole = e.aligned ? size / kPerVector : 0;
    const bool dense = e.rows.columns == size;
    uint64_t sum = 0;
    for (int64_t tile = static_cast<int64_t>(block) * kVectors; 2 * tile < words;
         tile += static_cast<int64_t>(e.blocks) * kVectors) {
        const int64_t start = tile + threadIdx.x;
        uint4 read[kAtOnce] = {};
        if (dense && tile + kVectors <= whole) {
            const uint4* const vectors = static_cast<const uint4*>(e.data) + start;
#pragma unroll
            for (int k = 0; k < kAtOnce; ++k) read[k] = load_read_only(vectors + k * kThreads);
        } else {
#pragma unroll
            for (int k = 0; k < kAtOnce; ++k) {
                const int64_t vector = start + k * kThreads, first = vector * kPerVector;
                if (vector < whole)
                    read[k] =
                        load_read_only(static_cast<const Bits*>(e.data) + e.rows.offset_of(first));
                else if (first < size)
                    read[k] = gather<Bits>(e, first);
            }
        }
        const uint64_t position = (2 * static_cast<uint64_t>(start) + 1) * kSplitMixStep;
        const int left = static_cast<int>(min(words - 2 * tile, int64_t{2 * kVectors}));
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) {
            const int word = 2 * (static_cast<int>(threadIdx.x) + k * kThreads);
            const uint64_t low = static_cast<uint64_t>(read[k].y) << 32 | read[k].x;
            const uint64_t high = static_cast<uint64_t>(read[k].w) << 32 | read[k].z;
            const uint64_t own = position + 2 * k * kThreads * kSplitMixStep;
            if (word < left) sum += splitmix64(own + low);
            if (word + 1 < left) sum += splitmix64(own + kSplitMixStep + high);
        }
    }
    return sum;
}

__global__ __launch_bounds__(kThreads) void tiles_kernel(const Launch launch) {
    __shared__ uint64_t scratch[kWarps];
    const Entry& e = launch.of_block(static_cast<int>(blockIdx.x));
    const int block = static_cast<int>(blockIdx.x) - e.first_block;
    const uint64_t own = e.element_bytes == 4 ? sum_tiles<uint32_t>(e, block)
                                              : sum_tiles<uint16_t>(e, block);
    const uint64_t sum = block_sum<kWarps>(own, scratch);
    if (threadIdx.x == 0) atomicAdd(reinterpret_cast<unsigned long long*>(e.sum),
                                   static_cast<unsigned long long>(sum));
}

Entry entry_of(const Matrix& tensor, int64_t* sum) {
    const Rows rows = rows_of(tensor);
    const int bytes = bytes_of(tensor.view.dtype), tile = kVectors * 16 / bytes;
    const int64_t blocks = std::min<int64_t>((rows.size + tile - 1) / tile, kMaxBlocks);
    return {tensor.view.data, rows, sum, 0, static_cast<int>(blocks), bytes,
            is_aligned(tensor.view.data, rows, 16 / bytes, bytes)};
}

void launch_tiles(const Launch& entries, Stream stream) {
    if (entries.blocks > 0)
        launch("fingerprint", stream, entries.blocks, kThreads, tiles_kernel, entries);
}

}  // namespace

void fingerprint(const Fingerprint& a, Stream stream) {
    DeviceGuard guard(stream.device, "fingerprint");
    Launch next;
    for (size_t i = 0; i < a.tensors.size(); ++i) {
        const Entry entry = entry_of(a.tensors[i], a.fingerprints + i);
        if (next.add(entry)) continue;
        launch_tiles(next, stream);
        next = {};
        next.add(entry);
    }
    launch_tiles(next, stream);
}

}  // namespace warpo::cuda
