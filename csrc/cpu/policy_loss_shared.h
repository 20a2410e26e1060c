// What the policy loss takes of a whole sequence before its tokens.
#pragma once

#include <math.h>

#include "cpu/policy_loss_tile.h"
#include "math/policy_loss.h"

namespace warpo::cpu::WARPO_ISA {
namespace {

// What the tokens of a sequence share, and must be known before any of them is evaluated.
struct Shared {
    double valid = 0, log_ratio = 0, log_weight = 0, kl_difference = 0;  // sums

    void add(const Shared& other) {
        valid += other.valid;
        kl_difference += other.kl_difference;
        log_ratio += other.log_ratio;
        log_weight += other.log_weight;
    }
};

struct GeometricBounds { float log_low, log_high; };

GeometricBounds geometric_bounds(const PolicyLoss& a) {
    return {logf(a.ratio_low), logf(a.ratio_high)};
}

float sum_log_ratio(const PolicyLoss& a, int count, const Tile& tile) {
    float sum = 0;
    if (a.surrogate == kGeometric) {
        const GeometricBounds bounds = geometric_bounds(a);
        const float* advantage = tile.advantage;
#pragma omp simd reduction(+ : sum)
        for (int i = 0; i < count; ++i) {
            const GeometricTerm term = geometric_log_ratio(tile.log_ratio[i], advantage[i],
                                                           bounds.log_low, bounds.log_high);
            sum += tile.keep[i] ? term.log_ratio : 0.0f;
        }
        return sum;
    }
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < count; ++i) sum += tile.keep[i] ? tile.log_ratio[i] : 0.0f;
    return sum;
}

float sum_difference(int count, const Tile& tile, const float* left, const float* right) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < count; ++i) sum += tile.keep[i] ? left[i] - right[i] : 0.0f;
    return sum;
}

bool has_sequence_kl(const PolicyLoss& a) { return a.kl != kNoKl && a.kl_sequence; }

Shared share(const PolicyLoss& a, const Span& span) {
    const bool ratio = shares_ratio(a.ratio_level);
    const bool weight = a.correction != kNoCorrection && a.correction_sequence;
    const bool kl = has_sequence_kl(a);
    Shared shared;
    if (!a.mask.data) shared.valid = (double)span.count;
    if (!a.mask.data && !ratio && !weight && !kl) return shared;
    Tile tile;
    for_each_tile(span, [&](int64_t start, int count) {
        tile.load_keep(a, span, start, count);
        if (a.mask.data) shared.valid += tile.count_valid(count);
        if (ratio) {
            tile.load_log_ratio(a, span, start, count);
            if (a.surrogate == kGeometric) tile.load_advantage(a, span, start, count);
            shared.log_ratio += sum_log_ratio(a, count, tile);
        }
        if (weight) {
            tile.old = tile.old_storage.load(a.old_logprobs, span, start, count);
            tile.sampler = tile.sampler_storage.load(a.sampler_logprobs, span, start, count);
            shared.log_weight += sum_difference(count, tile, tile.old, tile.sampler);
        }
        if (kl) {
            tile.ref = tile.ref_storage.load(a.ref_logprobs, span, start, count);
            tile.logp = tile.logp_storage.load(a.logprobs, span, start, count);
            shared.kl_difference += sum_difference(count, tile, tile.ref, tile.logp);
        }
    });
    return shared;
}

}  // namespace
}  // namespace warpo::cpu::WARPO_ISA
