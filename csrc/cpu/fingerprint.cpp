// A 64-bit fingerprint of the bits of a tensor.
#include "cpu/bits.h"
#include "cpu/cpu.h"
#include "math/tiles.h"

namespace warpo::cpu::WARPO_ISA {
namespace {

uint64_t of_tile(const Fingerprint& a, const Tile& tile) {
    const int64_t index = tile.row * a.columns + tile.first;
    if (a.tensor.dtype == kFloat32)
        return fingerprint_of(address<float>(a.tensor, tile.row, tile.first), tile.count, index);
    return fingerprint_of(address<BFloat16>(a.tensor, tile.row, tile.first), tile.count, index);
}

}  // namespace

void fingerprint(const Fingerprint& a) {
    const Tiles tiles = tiles_of(a.rows, a.columns);
    uint64_t sum = 0;
#pragma omp parallel for reduction(+ : sum) if (a.rows * a.columns >= kParallelWork)
    for (int64_t t = 0; t < tiles.count; ++t) sum += of_tile(a, tile_at(tiles, a.columns, t));
    *a.fingerprint = (int64_t)sum;
}

}  // namespace warpo::cpu::WARPO_ISA
