#pragma once
#include "arguments/denominator.h"
#include "view.h"

namespace warpo {

// Order of AGGREGATIONS in kernels/objectives.py.
enum Aggregation : int {
    kTokenMean = 0,
    kSequenceMeanTokenMean = 1,
    kSequenceMeanTokenSum = 2,
    kSequenceMeanTokenSumNorm = 3,
};

// Parts that a GPU cuts the sequences of a small batch into: at most this many in all.
constexpr int64_t kMinAggregateParts = 512;

struct Aggregate {
    int64_t sequences, steps;   // steps: length of a row; with cu_seqlens: total tokens
    const int32_t* cu_seqlens;  // (sequences + 1), or nullptr
    View values;                // float
    View mask;                  // optional: uint8, or float32 weights of the tokens, >= 0
    int aggregation;
    Denominator denominator;  // number < 0: the count that the aggregation asks for
    float* weights;            // (sequences): of a valid token; a denominator of 0 gives 0. Then
                               // (max(sequences, kMinAggregateParts), 2) for sum and valid tokens
                               // (or sum of their weights) of each part
    float* result;             // ()
};

struct AggregateBackward {
    int64_t sequences, steps;
    const int32_t* cu_seqlens;
    View mask;
    const float* weights;
    const float* grad;  // one float on the device
    View grad_values;   // contiguous, of the dtype of the values
};

}  // namespace warpo
