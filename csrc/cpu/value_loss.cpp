// Clipped value loss: loss, metrics and gradient in one call.
#include "math/value_loss.h"

#include "cpu/cpu.h"
#include "cpu/sequences.h"

namespace warpo::cpu::WARPO_ISA {
namespace {

struct Tile {
    const float *value, *old, *target;
    alignas(64) int32_t keep[kTile];
};

struct Sums {
    double loss = 0, clipped = 0;
    Moments returns, errors;
};

// `grad` and the sums of a tile of which `valid` elements are kept.
void evaluate(const ValueLoss& a, int count, int valid, float weight, const Tile& tile, float* grad,
              Sums& sums) {
    const float clip_range = a.clip_range, delta = a.huber_delta;
    const float *value = tile.value, *old = tile.old, *target = tile.target;
    float loss = 0, clipped = 0, returns = 0, errors = 0;
#pragma omp simd reduction(+ : loss, clipped, returns, errors)
    for (int i = 0; i < count; ++i) {
        const ValueTerm term = clipped_value_loss(value[i], old[i], target[i], clip_range, delta);
        const bool keep = tile.keep[i];
        loss += keep ? term.loss : 0.0f;
        clipped += keep ? term.clipped : 0.0f;
        returns += keep ? target[i] : 0.0f;
        errors += keep ? target[i] - value[i] : 0.0f;
        grad[i] = keep ? weighted(weight, term.derivative) : 0.0f;
    }
    if (valid == 0) return;
    sums.loss += loss;
    sums.clipped += clipped;
    const float return_mean = returns / (float)valid, error_mean = errors / (float)valid;
    float return_squares = 0, error_squares = 0;
#pragma omp simd reduction(+ : return_squares, error_squares)
    for (int i = 0; i < count; ++i) {
        // loaded under no condition, or the sums would go through memory
        const float from_return = target[i] - return_mean;
        const float from_error = target[i] - value[i] - error_mean;
        return_squares += tile.keep[i] ? from_return * from_return : 0.0f;
        error_squares += tile.keep[i] ? from_error * from_error : 0.0f;
    }
    sums.returns.merge(valid, return_mean, return_squares);
    sums.errors.merge(valid, error_mean, error_squares);
}

void one_sequence(const ValueLoss& a, int64_t sequence) {
    const Span span = find_span(a.cu_seqlens, a.steps, sequence);
    float weight = inverse_or_zero(value_of(a.denominator));
    if (a.sequence_mean) {
        const int64_t valid = count_valid(a.mask, span);
        if (valid > 0) weight /= (float)valid;
    }
    Tile tile;
    Sums sums;
    alignas(64) float values[kTile], olds[kTile], targets[kTile], scratch[kTile];
    for (int64_t start = 0; start < span.count; start += kTile) {
        const int count = tile_count(span, start);
        const int valid = load_keep(a.mask, span, start, count, tile.keep);
        tile.value = read_tile(a.values, span, start, count, values);
        tile.old = a.old_values.data ? read_tile(a.old_values, span, start, count, olds)
                                     : tile.value;
        tile.target = read_tile(a.returns, span, start, count, targets);
        evaluate(a, count, valid, weight, tile,
                 a.grad_values ? a.grad_values + span.offset + start : scratch, sums);
    }
    float* out = a.partials + sequence * kNumValueMetrics;
    out[kValueLoss] = (float)weighted(weight, sums.loss);
    out[kValueTokens] = (float)sums.returns.count;
    out[kValueClipped] = (float)sums.clipped;
    out[kReturnMean] = (float)sums.returns.mean;
    out[kReturnM2] = (float)sums.returns.m2;
    out[kErrorMean] = (float)sums.errors.mean;
    out[kErrorM2] = (float)sums.errors.m2;
}

}  // namespace

void value_loss(const ValueLoss& a) {
    const int64_t tokens = a.cu_seqlens ? a.steps : a.sequences * a.steps;
#pragma omp parallel for schedule(dynamic) if (tokens >= kParallelWork)
    for (int64_t sequence = 0; sequence < a.sequences; ++sequence) one_sequence(a, sequence);
    merge_partials<kNumValueMetrics, kValueTokens, kReturnMean>(a.partials, a.sequences, a.loss,
                                                                a.metrics);
}

}  // namespace warpo::cpu::WARPO_ISA
