// (x - mean) / sqrt(variance + eps) over all valid elements, and the gradient: partial moments of
// fixed parts in parallel, merged in their order.
#include "cpu/cpu.h"
#include "cpu/load.h"
#include "math/moments.h"
#include "math/tiles.h"

namespace warpo::cpu::WARPO_ISA {
namespace {

// Valid elements of a tile; the others are 0.
struct Loaded {
    alignas(64) float x[kTileSize];
    alignas(64) float keep[kTileSize];  // 1 or 0
};

// Masked slots become 0 by selection: they may hold NaN.
void load_kept(const View& view, const Tile& tile, const float* keep, float* out) {
    load_steps(view, tile.row, tile.first, tile.count, out);
#pragma omp simd
    for (int i = 0; i < tile.count; ++i) out[i] = keep[i] != 0 ? out[i] : 0.0f;
}

void load_tile(const Whiten& a, const Tile& tile, Loaded& loaded) {
    const uint8_t* mask = a.mask.data ? address<uint8_t>(a.mask, tile.row, tile.first) : nullptr;
    const int64_t stride = a.mask.stride1;
    if (!mask) {
        for (int i = 0; i < tile.count; ++i) loaded.keep[i] = 1.0f;
    } else if (stride == 1) {
#pragma omp simd
        for (int i = 0; i < tile.count; ++i) loaded.keep[i] = mask[i] ? 1.0f : 0.0f;
    } else {
        for (int i = 0; i < tile.count; ++i) loaded.keep[i] = mask[i * stride] ? 1.0f : 0.0f;
    }
    load_kept(a.x, tile, loaded.keep, loaded.x);
}

Moments<double> moments_of(const Tile& tile, const Loaded& loaded) {
    float count = 0, total = 0;
#pragma omp simd reduction(+ : count, total)
    for (int i = 0; i < tile.count; ++i) {
        count += loaded.keep[i];
        total += loaded.x[i];
    }
    const float pivot = total / (count > 0 ? count : 1.0f);
    float sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum, squares)
    for (int i = 0; i < tile.count; ++i) {
        const float difference = loaded.keep[i] != 0 ? loaded.x[i] - pivot : 0.0f;
        sum += difference;
        squares += difference * difference;
    }
    return moments_about<double>(pivot, count, sum, squares);
}

Moments<double> merge_all(const float* partials, int64_t count) {
    Moments<double> total = {0, 0, 0};
    for (int64_t p = 0; p < count; ++p, partials += 3)
        total = merge<double>(total, {partials[0], partials[1], partials[2]});
    return total;
}

void write_whitened(const Whiten& a, const Tile& tile, float mean, float scale) {
    Loaded loaded;
    load_tile(a, tile, loaded);
    const float offset = a.shift_mean ? 0.0f : mean;
    float* const out = a.whitened + tile.row * a.columns + tile.first;
#pragma omp simd
    for (int i = 0; i < tile.count; ++i) {
        const float value = (loaded.x[i] - mean) * scale + offset;
        out[i] = loaded.keep[i] != 0 ? value : 0.0f;
    }
}

struct GradSums {
    double grad, moment;  // of the gradient, and of its product with the standardised element
};

GradSums grad_sums_of(const WhitenBackward& b, const Tile& tile) {
    const Whiten& a = b.forward;
    const float mean = a.stats[kWhitenMean], scale = a.stats[kWhitenScale];
    Loaded loaded;
    alignas(64) float upstream[kTileSize];
    load_tile(a, tile, loaded);
    load_kept(b.grad_whitened, tile, loaded.keep, upstream);
    float grad = 0, moment = 0;
#pragma omp simd reduction(+ : grad, moment)
    for (int i = 0; i < tile.count; ++i) {
        const float standardised = (loaded.x[i] - mean) * scale;
        grad += upstream[i];
        moment += loaded.keep[i] != 0 ? upstream[i] * standardised : 0.0f;
    }
    return {grad, moment};
}

// grad_j = s (G_j - mean G - x_j sum_i G_i x_i / (n - 1)) with the standardised x and s = scale;
// without a shift of the mean, plus mean G.
void write_grad(const WhitenBackward& b, const Tile& tile, const GradSums& sums) {
    const Whiten& a = b.forward;
    const float mean = a.stats[kWhitenMean], scale = a.stats[kWhitenScale];
    const double count = a.stats[kWhitenCount];
    const float mean_grad = (float)(sums.grad / (count > 0 ? count : 1.0));
    const float slope = (float)(sums.moment / (count > 1 ? count - 1 : 1.0));
    const float offset = a.shift_mean ? 0.0f : mean_grad;
    Loaded loaded;
    alignas(64) float upstream[kTileSize];
    load_tile(a, tile, loaded);
    load_kept(b.grad_whitened, tile, loaded.keep, upstream);
    float* const out = b.grad_x + tile.row * a.columns + tile.first;
#pragma omp simd
    for (int i = 0; i < tile.count; ++i) {
        const float standardised = (loaded.x[i] - mean) * scale;
        const float grad = scale * (upstream[i] - mean_grad - slope * standardised) + offset;
        out[i] = loaded.keep[i] != 0 ? grad : 0.0f;
    }
}

}  // namespace

void whiten_forward(const Whiten& a) {
    const Tiles tiles = tiles_of(a.rows, a.columns);
    const bool parallel = a.rows * a.columns >= kParallelWork;
#pragma omp parallel for if (parallel)
    for (int64_t p = 0; p < tiles.partials; ++p) {
        Moments<double> m = {0, 0, 0};
        Loaded loaded;
        for (int64_t t = p; t < tiles.count; t += tiles.partials) {
            const Tile tile = tile_at(tiles, a.columns, t);
            load_tile(a, tile, loaded);
            m = merge(m, moments_of(tile, loaded));
        }
        float* const partial = a.partials + 3 * p;
        partial[0] = (float)m.count, partial[1] = (float)m.mean, partial[2] = (float)m.squares;
    }
    const Moments<double> m = merge_all(a.partials, tiles.partials);
    a.stats[kWhitenMean] = (float)m.mean;
    a.stats[kWhitenScale] = (float)inverse_std<double>(m, a.eps);
    a.stats[kWhitenCount] = (float)m.count;
#pragma omp parallel for if (parallel)
    for (int64_t t = 0; t < tiles.count; ++t)
        write_whitened(a, tile_at(tiles, a.columns, t), a.stats[kWhitenMean],
                       a.stats[kWhitenScale]);
}

void whiten_backward(const WhitenBackward& b) {
    const Whiten& a = b.forward;
    const Tiles tiles = tiles_of(a.rows, a.columns);
    const bool parallel = a.rows * a.columns >= kParallelWork;
#pragma omp parallel for if (parallel)
    for (int64_t p = 0; p < tiles.partials; ++p) {
        GradSums sums = {0, 0};
        for (int64_t t = p; t < tiles.count; t += tiles.partials) {
            const GradSums next = grad_sums_of(b, tile_at(tiles, a.columns, t));
            sums.grad += next.grad;
            sums.moment += next.moment;
        }
        a.partials[3 * p] = (float)sums.grad;
        a.partials[3 * p + 1] = (float)sums.moment;
    }
    GradSums sums = {0, 0};
    for (int64_t p = 0; p < tiles.partials; ++p) {
        sums.grad += a.partials[3 * p];
        sums.moment += a.partials[3 * p + 1];
    }
#pragma omp parallel for if (parallel)
    for (int64_t t = 0; t < tiles.count; ++t) write_grad(b, tile_at(tiles, a.columns, t), sums);
}

}  // namespace warpo::cpu::WARPO_ISA
