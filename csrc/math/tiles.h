// How an array [rows, columns] is cut for a reduction over all of it: into tiles of at most
// kTileSize steps of one row, and partial result p takes tiles p, p + partials, ... The cut depends
// on the shape alone, so the sums do not depend on the number of threads.
#pragma once

#include <algorithm>
#include <vector>

#include "math/exp.h"
#include "view.h"

namespace warpo {

constexpr int64_t kTileSize = 4096, kMaxPartials = 1024;

struct Tiles {
    int64_t per_row, count, partials;
};

WARPO_HD Tiles tiles_of(int64_t rows, int64_t columns) {
    const int64_t per_row = (columns + kTileSize - 1) / kTileSize, count = rows * per_row;
    return {per_row, count, count < kMaxPartials ? count : kMaxPartials};
}

struct Tile {
    int64_t row, first;
    int count;
};

WARPO_HD Tile tile_at(const Tiles& tiles, int64_t columns, int64_t index) {
    const int64_t row = index / tiles.per_row;
    const int64_t first = (index - row * tiles.per_row) * kTileSize;
    return {row, first, (int)(columns - first < kTileSize ? columns - first : kTileSize)};
}

// A list of tensors, each cut by itself into parts, which follow those of the tensors before it:
// from first[tensor] to first[tensor + 1].
struct Parts {
    std::vector<int64_t> first{0};
    int64_t elements = 0;

    void add(const Matrix& tensor, int64_t parts) {
        first.push_back(first.back() + parts);
        elements += tensor.rows * tensor.columns;
    }
    int64_t count() const { return first.back(); }
    int64_t tensor_of(int64_t part) const {
        return std::upper_bound(first.begin(), first.end(), part) - first.begin() - 1;
    }
};

// As one row of its elements.
inline Tiles tiles_of(const Matrix& tensor) { return tiles_of(1, tensor.rows * tensor.columns); }

}  // namespace warpo
