// Tiles of steps for a vector of rows: one row a lane, whatever the strides of the arrays.
#pragma once

#include "cpu/cpu.h"
#include "cpu/load.h"

namespace warpo::cpu::WARPO_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr int kTileSteps = 64;

typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));

using FloatTile = Floats[kTileSteps];
using IntTile = Ints[kTileSteps];

constexpr int32_t kKeep = 1, kTerminated = 2, kTruncated = 4;  // bits of an IntTile

// Where a tile lies: rows [row, row + lanes), steps [step, step + steps).
struct TileAt {
    int64_t row, step;
    int lanes, steps;
};

// Interleaving the halves of the list rotates the bits of (row, column) by one; half of all bits
// are the column.
template <class Vector>
WARPO_HD void transpose(Vector (&block)[kLanes]) {
    Ints low, high;
    for (int i = 0; i < kLanes; ++i) {
        low[i] = i / 2 + (i % 2 ? kLanes : 0);
        high[i] = low[i] + kLanes / 2;
    }
    for (int bits = 1; bits < kLanes; bits *= 2) {
        Vector next[kLanes];
        for (int i = 0; i < kLanes / 2; ++i) {
            next[2 * i] = __builtin_shuffle(block[i], block[i + kLanes / 2], low);
            next[2 * i + 1] = __builtin_shuffle(block[i], block[i + kLanes / 2], high);
        }
        for (int i = 0; i < kLanes; ++i) block[i] = next[i];
    }
}

template <class T, class Vector, class Convert>
WARPO_HD void load(const View& view, const TileAt& at, Vector* tile, Convert convert) {
    const T* const base = address<T>(view, at.row, at.step);
    const int64_t row_stride = view.stride0, step_stride = view.stride1;
    int s = 0;
    if (row_stride == 1 && at.lanes == kLanes) {
        for (; s < at.steps; ++s)
#pragma omp simd
            for (int l = 0; l < kLanes; ++l) tile[s][l] = convert(base[s * step_stride + l]);
    } else if (step_stride == 1 && at.lanes == kLanes) {
        for (; s + kLanes <= at.steps; s += kLanes) {
            Vector block[kLanes];
            for (int l = 0; l < kLanes; ++l)
#pragma omp simd
                for (int i = 0; i < kLanes; ++i)
                    block[l][i] = convert(base[l * row_stride + s + i]);
            transpose(block);
            for (int i = 0; i < kLanes; ++i) tile[s + i] = block[i];
        }
    }
    for (int l = 0; l < at.lanes; ++l)
        for (int i = s; i < at.steps; ++i)
            tile[i][l] = convert(base[l * row_stride + i * step_stride]);
}

// An absent view leaves the tile alone.
inline void load_tile(const View& view, const TileAt& at, FloatTile& tile) {
    if (!view.data) return;
    switch (view.dtype) {
        case kFloat32: return load<float>(view, at, tile, [](float x) { return to_float(x); });
        case kBFloat16:
            return load<BFloat16>(view, at, tile, [](BFloat16 x) { return to_float(x); });
        default: return load<Float16>(view, at, tile, [](Float16 x) { return to_float(x); });
    }
}

inline void store_tile(const View& view, const TileAt& at, const FloatTile& tile) {
    if (!view.data) return;
    float* const base = address<float>(view, at.row, at.step);
    const int64_t row_stride = view.stride0, step_stride = view.stride1;
    int s = 0;
    if (row_stride == 1 && at.lanes == kLanes) {
        for (; s < at.steps; ++s) memcpy(base + s * step_stride, &tile[s], sizeof(Floats));
    } else if (step_stride == 1 && at.lanes == kLanes) {
        for (; s + kLanes <= at.steps; s += kLanes) {
            Floats block[kLanes];
            for (int i = 0; i < kLanes; ++i) block[i] = tile[s + i];
            transpose(block);
            for (int l = 0; l < kLanes; ++l)
                memcpy(base + l * row_stride + s, &block[l], sizeof(Floats));
        }
    }
    for (int l = 0; l < at.lanes; ++l)
        for (int i = s; i < at.steps; ++i) base[l * row_stride + i * step_stride] = tile[i][l];
}

inline void add_flag(const View& view, const TileAt& at, int32_t flag, IntTile& tile) {
    if (!view.data) return;
    IntTile loaded;
    for (int s = 0; s < at.steps && at.lanes < kLanes; ++s) loaded[s] = Ints{};
    load<uint8_t>(view, at, loaded, [flag](uint8_t x) { return x ? flag : 0; });
    for (int s = 0; s < at.steps; ++s) tile[s] |= loaded[s];
}

// The flags of ends: shifted by one step where flag t says that an episode starts at t.
inline void add_ends(const Gae& a, const View& view, const View& last, const TileAt& at,
                     int32_t flag, IntTile& tile) {
    if (!view.data || !a.starts_at_t) return add_flag(view, at, flag, tile);
    TileAt next = at;
    next.step += 1;
    const bool at_end = at.step + at.steps == a.steps;
    if (at_end) next.steps -= 1;
    add_flag(view, next, flag, tile);
    if (at_end && last.data)
        for (int l = 0; l < at.lanes; ++l)
            if (element<uint8_t>(last, at.row + l, 0, 0)) tile[at.steps - 1][l] |= flag;
}

// Flags of ends hold on kept steps only.
inline void load_flags(const Gae& a, const TileAt& at, IntTile& tile) {
    const Ints initial = Ints{} + (a.mask.data ? 0 : kKeep);
    for (int s = 0; s < at.steps; ++s) tile[s] = initial;
    add_flag(a.mask, at, kKeep, tile);
    add_ends(a, a.terminated, a.last_terminated, at, kTerminated, tile);
    add_ends(a, a.truncated, a.last_truncated, at, kTruncated, tile);
    for (int s = 0; s < at.steps; ++s) tile[s] &= -(tile[s] & kKeep);
}

}  // namespace warpo::cpu::WARPO_ISA
