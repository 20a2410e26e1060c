// 64-bit fingerprints of the bits of tensors.
#include "cpu/bits.h"
#include "cpu/cpu.h"
#include "cpu/parts.h"

namespace warpo::cpu::WARPO_ISA {
namespace {

constexpr int64_t kTilesOfPart = 4;

template <class T>
uint64_t of_part(const Matrix& tensor, int64_t part) {
    const int64_t size = tensor.rows * tensor.columns;
    const Tiles tiles = tiles_of(tensor);
    const int64_t first = part * kTilesOfPart, end = std::min(first + kTilesOfPart, tiles.count);
    uint64_t sum = 0;
    for (int64_t t = first; t < end; ++t) {
        const Tile tile = tile_at(tiles, size, t);
        T gathered[kTileSize];
        const T* elements = gathered;
        if (tensor.rows == 1)
            elements = (const T*)tensor.view.data + tile.first;
        else
            gather(tensor.view, tensor.columns, tile.first, tile.count, gathered);
        sum += fingerprint_of(elements, tile.count, tile.first);
    }
    return sum;
}

}  // namespace

void fingerprint(const Fingerprint& a) {
    Parts parts;
    for (const Matrix& tensor : a.tensors)
        parts.add(tensor, (tiles_of(tensor).count + kTilesOfPart - 1) / kTilesOfPart);
    auto* const sums = (uint64_t*)a.fingerprints;
    for_each_part(parts, [&](int64_t i, int64_t part) {
        const Matrix& tensor = a.tensors[i];
        const uint64_t sum = tensor.view.dtype == kFloat32 ? of_part<float>(tensor, part)
                                                           : of_part<BFloat16>(tensor, part);
#pragma omp atomic
        sums[i] += sum;
    });
}

}  // namespace warpo::cpu::WARPO_ISA
