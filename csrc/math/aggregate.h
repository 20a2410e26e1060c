// How the values of sequences become one number, for host and device: the cut of a sequence into
// parts, whose sums are added up in their order, and the weight of a valid token.
#pragma once

#include <cmath>

#include "arguments/aggregate.h"
#include "math/exp.h"
#include "math/offsets.h"
#include "math/weight.h"

namespace warpo {

// Tokens of a part are `least` or more where a sequence has several. By shape alone, so the sums do
// not depend on the number of threads.
template <class Arguments>
WARPO_HD int64_t parts_per_sequence(const Arguments& a, int64_t least) {
    const int64_t wanted = (a.steps + least - 1) / least;
    const int64_t most = a.sequences > 0 ? kMinAggregateParts / a.sequences : 1;
    const int64_t parts = wanted < most ? wanted : most;
    return parts > 1 ? parts : 1;
}

// Steps [first, first + count) of a row of the views; `offset` of the first in a dense output.
struct TokenRange {
    int64_t row, first, count, offset;
    bool malformed;  // on a GPU its results are NaN
};

template <class Arguments>
WARPO_HD TokenRange tokens_of_part(const Arguments& a, int64_t sequence, int64_t part,
                                   int64_t parts) {
    Extent extent = {0, a.steps, false};
    if (a.cu_seqlens) extent = extent_of(a.cu_seqlens, a.sequences, sequence, a.steps);
    const int64_t start = extent.first, length = extent.end - start;
    const int64_t share = (length + parts - 1) / parts, begin = part * share;
    const int64_t left = length - begin, count = left < share ? left : share;
    const int64_t row = a.cu_seqlens ? 0 : sequence;
    return {row, start + begin, count > 0 ? count : 0, row * a.steps + start + begin,
            extent.malformed};
}

// Of a token, by its entry in the mask; 0: not read. A negative one is NaN, and so is the result.
WARPO_HD float weight_of(uint8_t flag) { return flag != 0 ? 1.0f : 0.0f; }
WARPO_HD float weight_of(float weight) { return weight >= 0.0f ? weight : NAN; }

WARPO_HD float* partials_of(const Aggregate& a) { return a.weights + a.sequences; }

WARPO_HD float inverse_denominator(const Aggregate& a, float tokens) {
    const float count = a.aggregation == kTokenMean ? tokens : (float)a.sequences;
    const float denominator = value_of(a.denominator);
    return inverse_or_zero(denominator < 0.0f && !a.denominator.tensor ? count : denominator);
}

WARPO_HD float sequence_weight(const Aggregate& a, float inverse_denominator, float tokens) {
    const bool mean = a.aggregation == kSequenceMeanTokenMean && tokens > 0.0f;
    return mean ? inverse_denominator / tokens : inverse_denominator;
}

}  // namespace warpo
