// Offsets of packed sequences: where they are malformed, for a host that may look at them, and
// where a sequence lies, for a device whose offsets nobody has looked at.
#pragma once

#include <utility>

#include "math/exp.h"
#include "view.h"

namespace warpo {

WARPO_HD int64_t index_at(const int32_t* indices, int64_t i) { return indices[i]; }

// Of int32 or int64.
WARPO_HD int64_t index_at(const View& indices, int64_t i) {
    const int64_t offset = i * indices.stride1;
    return indices.dtype == kInt32 ? static_cast<const int32_t*>(indices.data)[offset]
                                   : static_cast<const int64_t*>(indices.data)[offset];
}

WARPO_HD int64_t clamp_index(int64_t index, int64_t bound) {
    return index < 0 ? 0 : index > bound ? bound : index;
}

// Elements [first, end) of a sequence, within those that there are.
struct Extent {
    int64_t first, end;
    bool malformed;
};

// Extent i of `count` that count + 1 offsets cut out of `bound` elements. It is malformed where it
// leaves them, or where it or a neighbour descends, and then it is what lies between its offsets;
// the first and the last reach to the ends. So malformed offsets leave no element out.
template <class Offsets>
WARPO_HD Extent extent_of(const Offsets& offsets, int64_t count, int64_t i, int64_t bound) {
    const int64_t begin = index_at(offsets, i), end = index_at(offsets, i + 1);
    const int64_t before = i > 0 ? index_at(offsets, i - 1) : 0;
    const int64_t after = i + 2 <= count ? index_at(offsets, i + 2) : bound;
    if (begin >= 0 && before <= begin && begin <= end && end <= after && end <= bound)
        return {begin, end, false};
    const int64_t low = i == 0 ? 0 : clamp_index(begin < end ? begin : end, bound);
    const int64_t high = i + 1 == count ? bound : clamp_index(begin < end ? end : begin, bound);
    return {low, high, true};
}

// Place of the first of `count` offsets that is negative, less than the one before or past the
// bound; -1 if there is none.
inline int64_t first_malformed(int64_t count, int64_t bound, const View& offsets) {
    int64_t before = 0;
    for (int64_t i = 0; i < count; ++i) {
        const int64_t offset = index_at(offsets, i);
        if (offset < before || offset > bound) return i;
        before = offset;
    }
    return -1;
}

inline std::pair<int64_t, int64_t> first_and_last(int64_t count, const View& offsets) {
    return {index_at(offsets, 0), index_at(offsets, count - 1)};
}

// Place of the first step that ends before its output, after it or before the step before it; -1
// if there is none. The arguments are fields of ProcessAdvantages, the offsets well-formed.
inline int64_t first_malformed_end(int64_t outputs, int64_t tokens, const int32_t* cu_seqlens,
                                   const View& step_offsets, const View& step_ends) {
    for (int64_t b = 0; b < outputs; ++b) {
        const int64_t length = cu_seqlens ? cu_seqlens[b + 1] - cu_seqlens[b] : tokens;
        const int64_t last = index_at(step_offsets, b + 1);
        int64_t before = 0;
        for (int64_t step = index_at(step_offsets, b); step < last; ++step) {
            const int64_t end = index_at(step_ends, step);
            if (end < before || end >= length) return step;
            before = end;
        }
    }
    return -1;
}

}  // namespace warpo
