// AdamW on float32 master weights, rounded into the published ones, in one pass over memory.
#include "cpu/bits.h"
#include "cpu/cpu.h"
#include "math/adamw.h"
#include "math/tiles.h"

namespace warpo::cpu::WARPO_ISA {
namespace {

struct Sums {
    uint64_t fingerprint = 0;
    int64_t changed = 0;
    double master_update = 0, published_update = 0;
};

// Sums of more elements in float32 would lose digits, as the steps are much alike.
constexpr int kBlock = 512;

// The arguments by value: a store to the arrays could change those behind a reference.
template <class T>
void update_block(const AdamwPublish a, const Tile& block, float grad_scale, Sums& sums) {
    const int64_t index = block.row * a.columns + block.first;
    alignas(64) float grad[kBlock];
    load_steps(a.grad, 0, index, block.count, grad);
    T* const published = address<T>(a.published, block.row, block.first);
    float* const master = a.master ? a.master + index : (float*)published;
    float* const exp_avg = a.exp_avg + index;
    float* const exp_avg_sq = a.exp_avg_sq + index;
    float master_update = 0, published_update = 0;
    int32_t changed = 0;
#pragma omp simd reduction(+ : changed, master_update, published_update)
    for (int i = 0; i < block.count; ++i) {
        const AdamwState old = {master[i], exp_avg[i], exp_avg_sq[i]};
        const uint32_t old_bits = bits_of(published[i]);
        const float old_published = to_float(published[i]);
        const AdamwState next = adamw_step(a, old, grad[i] * grad_scale);
        master[i] = next.weight;
        exp_avg[i] = next.exp_avg;
        exp_avg_sq[i] = next.exp_avg_sq;
        from_float(next.weight, published[i]);
        changed += bits_of(published[i]) != old_bits;
        master_update += fabsf(next.weight - old.weight);
        published_update += fabsf(to_float(published[i]) - old_published);
    }
    sums.fingerprint += fingerprint_of(published, block.count, index);
    sums.changed += changed;
    sums.master_update += master_update;
    sums.published_update += published_update;
}

template <class T>
void update_tile(const AdamwPublish& a, const Tile& tile, float grad_scale, Sums& sums) {
    for (int start = 0; start < tile.count; start += kBlock) {
        const int count = tile.count - start < kBlock ? tile.count - start : kBlock;
        update_block<T>(a, {tile.row, tile.first + start, count}, grad_scale, sums);
    }
}

template <class T>
void update(const AdamwPublish& a) {
    const Tiles tiles = tiles_of(a.rows, a.columns);
    const float grad_scale = a.grad_scale * (a.grad_scale_factor ? *a.grad_scale_factor : 1.0f);
#pragma omp parallel for if (a.rows * a.columns >= kParallelWork)
    for (int64_t p = 0; p < tiles.partials; ++p) {
        Sums sums;
        for (int64_t t = p; t < tiles.count; t += tiles.partials)
            update_tile<T>(a, tile_at(tiles, a.columns, t), grad_scale, sums);
        a.partial_counts[2 * p] = (int64_t)sums.fingerprint;
        a.partial_counts[2 * p + 1] = sums.changed;
        a.partial_updates[2 * p] = (float)sums.master_update;
        a.partial_updates[2 * p + 1] = (float)sums.published_update;
    }
    Sums total;
    for (int64_t p = 0; p < tiles.partials; ++p) {
        total.fingerprint += (uint64_t)a.partial_counts[2 * p];
        total.changed += a.partial_counts[2 * p + 1];
        total.master_update += a.partial_updates[2 * p];
        total.published_update += a.partial_updates[2 * p + 1];
    }
    a.counts[0] = (int64_t)total.fingerprint;
    a.counts[1] = total.changed;
    a.updates[0] = (float)total.master_update;
    a.updates[1] = (float)total.published_update;
}

}  // namespace

void adamw_publish(const AdamwPublish& a) {
    switch (a.published.dtype) {
        case kFloat32: return update<float>(a);
        case kBFloat16: return update<BFloat16>(a);
        default: return update<Float16>(a);
    }
}

}  // namespace warpo::cpu::WARPO_ISA
