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

// Mean and sum of squared differences of the kept elements.
template <class Element>
void add_moments(Element element, const int32_t* keep, int count, int valid, Moments& moments) {
    if (valid == 0) return;
    float sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < count; ++i) sum += keep[i] ? element(i) : 0.0f;
    const float mean = sum / (float)valid;
#pragma omp simd reduction(+ : squares)
    for (int i = 0; i < count; ++i) {
        const float centred = keep[i] ? element(i) - mean : 0.0f;
        squares += centred * centred;
    }
    moments.merge(valid, mean, squares);
}

void evaluate(const ValueLoss& a, int count, float weight, const Tile& tile, float* grad,
              Sums& sums) {
    const float clip_range = a.clip_range, delta = a.huber_delta;
    float loss = 0, clipped = 0;
#pragma omp simd reduction(+ : loss, clipped)
    for (int i = 0; i < count; ++i) {
        const ValueTerm term =
            clipped_value_loss(tile.value[i], tile.old[i], tile.target[i], clip_range, delta);
        const bool keep = tile.keep[i];
        loss += keep ? term.loss : 0.0f;
        clipped += keep ? term.clipped : 0.0f;
        grad[i] = keep ? weight * term.derivative : 0.0f;
    }
    sums.loss += loss;
    sums.clipped += clipped;
}

void one_sequence(const ValueLoss& a, int64_t sequence) {
    const Span span = find_span(a.cu_seqlens, a.steps, sequence);
    float weight = inverse_or_zero(*a.denominator);
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
        evaluate(a, count, weight, tile,
                 a.grad_values ? a.grad_values + span.offset + start : scratch, sums);
        add_moments([&](int i) { return tile.target[i]; }, tile.keep, count, valid, sums.returns);
        add_moments([&](int i) { return tile.target[i] - tile.value[i]; }, tile.keep, count, valid,
                    sums.errors);
    }
    float* out = a.partials + sequence * kNumValueMetrics;
    out[kValueLoss] = (float)(sums.loss * weight);
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
