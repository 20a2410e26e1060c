// A 64-bit fingerprint of the bits of a tensor.
#include "cpu/bits.h"
#include "cpu/cpu.h"
#include "math/tiles.h"

namespace warpo::cpu::WARPO_ISA {
namespace {

template <class T>
uint64_t of_tensor(const Fingerprint& a) {
    const int64_t size = a.rows * a.columns;
    const Tiles tiles = tiles_of(1, size);
    uint64_t sum = 0;
#pragma omp parallel for reduction(+ : sum) if (size >= kParallelWork)
    for (int64_t t = 0; t < tiles.count; ++t) {
        const Tile tile = tile_at(tiles, size, t);
        T gathered[kTileSize];
        const T* elements = gathered;
        if (a.rows == 1)
            elements = address<T>(a.tensor, 0, tile.first);
        else
            gather(a.tensor, a.columns, tile.first, tile.count, gathered);
        sum += fingerprint_of(elements, tile.count, tile.first);
    }
    return sum;
}

}  // namespace

void fingerprint(const Fingerprint& a) {
    *a.fingerprint = (int64_t)(a.tensor.dtype == kFloat32 ? of_tensor<float>(a)
                                                          : of_tensor<BFloat16>(a));
}

}  // namespace warpo::cpu::WARPO_ISA
