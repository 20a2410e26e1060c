#pragma once
#include "arguments/denominator.h"
#include "view.h"

namespace warpo {

// Order of the metrics vector and, each of its own sequence or part of one, of a row of partials.
// Means and sums of squared differences from them merge without cancellation; sums of squares would
// not.
enum ValueMetric : int {
    kValueLoss,     // sum of weight * loss
    kValueTokens,   // valid tokens
    kValueClipped,  // the clipped branch is the larger one
    kReturnMean,
    kReturnM2,  // sum of (return - mean)^2
    kErrorMean,
    kErrorM2,  // of return - value
    kNumValueMetrics
};

// A GPU splits the sequences of a small batch into parts, each with a row of partials: at most this
// many rows, unless there are more sequences.
constexpr int64_t kMinValuePartials = 512;

struct ValueLoss {
    int64_t sequences, steps;          // steps: length of a row; with cu_seqlens: total tokens
    const int32_t* cu_seqlens;         // (sequences + 1), or nullptr
    View values, old_values, returns;  // float; old_values absent: not clipped
    View mask;                         // uint8, optional
    bool sequence_mean;                // weight = 1 / (valid tokens of the sequence * denominator)
    float clip_range;                  // inf without old_values
    float huber_delta;                 // errors above it count linearly; inf: squared everywhere
    Denominator denominator;
    float* grad_values;                // contiguous (rows * steps), float32; nullptr: not wanted
    float* partials;  // (max(sequences, kMinValuePartials), kNumValueMetrics) float32 workspace
    float* loss;      // ()
    float* metrics;   // (kNumValueMetrics)
};

}  // namespace warpo
