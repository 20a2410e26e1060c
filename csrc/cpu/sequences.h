// Sequences of padded or packed tokens on the CPU: where they lie, tiles of them without the masked
// slots, and per-sequence results merged in the order of the sequences.
#pragma once

#include "cpu/load.h"
#include "math/weight.h"

namespace warpo::cpu::WARPO_ISA {
namespace {

// Steps [first, first + count) of a row of the views; `offset` of the first in a dense output.
struct Span {
    int64_t row, first, count, offset;
};

inline Span find_span(const int32_t* cu_seqlens, int64_t steps, int64_t sequence) {
    if (!cu_seqlens) return {sequence, 0, steps, sequence * steps};
    const int64_t first = cu_seqlens[sequence];
    return {sequence, first, cu_seqlens[sequence + 1] - first, first};
}

constexpr int kTile = 512;

inline int tile_count(const Span& span, int64_t start) {
    return span.count - start < kTile ? (int)(span.count - start) : kTile;
}

// Number of tokens of the tile that are valid; keep says which.
inline int load_keep(const View& mask, const Span& span, int64_t start, int count, int32_t* keep) {
    if (!mask.data) {
        for (int i = 0; i < count; ++i) keep[i] = 1;
        return count;
    }
    const uint8_t* flags = address<uint8_t>(mask, span.row, span.first + start);
    int valid = 0;
    for (int i = 0; i < count; ++i) {
        keep[i] = flags[i * mask.stride1] != 0;
        valid += keep[i];
    }
    return valid;
}

// Masked elements become 0, whatever they hold.
inline void load_kept(const View& view, const Span& span, int64_t start, int count,
                      const int32_t* keep, float* out) {
    load_steps(view, span.row, span.first + start, count, out);
#pragma omp simd
    for (int i = 0; i < count; ++i) out[i] = keep[i] ? out[i] : 0.0f;
}

// Elements of the tile where they lie, or converted into storage; masked ones may hold anything.
inline const float* read_tile(const View& view, const Span& span, int64_t start, int count,
                              float* storage) {
    if (view.dtype == kFloat32 && view.stride1 == 1)
        return address<float>(view, span.row, span.first + start);
    load_steps(view, span.row, span.first + start, count, storage);
    return storage;
}

inline int64_t count_valid(const View& mask, const Span& span) {
    if (!mask.data) return span.count;
    const uint8_t* flags = address<uint8_t>(mask, span.row, span.first);
    int64_t valid = 0;
    for (int64_t i = 0; i < span.count; ++i) valid += flags[i * mask.stride1] != 0;
    return valid;
}

// Count, mean and sum of squared differences from the mean.
struct Moments {
    double count = 0, mean = 0, m2 = 0;

    // Chan, Golub, LeVeque 1979, eq. 2.1
    void merge(double other_count, double other_mean, double other_m2) {
        if (other_count == 0) return;
        const double total = count + other_count, difference = other_mean - mean;
        mean += difference * (other_count / total);
        m2 += other_m2 + difference * difference * (count * other_count / total);
        count = total;
    }
};

// Rows of partials as one: sums, and from column kFirstMoment on pairs of mean and m2 over the
// count in column kCount. Column 0 is the loss.
template <int kMetrics, int kCount, int kFirstMoment>
void merge_partials(const float* partials, int64_t rows, float* loss, float* metrics) {
    double sums[kFirstMoment] = {};
    Moments moments[(kMetrics - kFirstMoment) / 2 + 1];
    for (int64_t row = 0; row < rows; ++row) {
        const float* partial = partials + row * kMetrics;
        for (int m = 0; m < kFirstMoment; ++m) sums[m] += partial[m];
        for (int m = kFirstMoment; m < kMetrics; m += 2)
            moments[(m - kFirstMoment) / 2].merge(partial[kCount], partial[m], partial[m + 1]);
    }
    for (int m = 0; m < kFirstMoment; ++m) metrics[m] = (float)sums[m];
    for (int m = kFirstMoment; m < kMetrics; m += 2) {
        metrics[m] = (float)moments[(m - kFirstMoment) / 2].mean;
        metrics[m + 1] = (float)moments[(m - kFirstMoment) / 2].m2;
    }
    *loss = metrics[0];
}

}  // namespace
}  // namespace warpo::cpu::WARPO_ISA
