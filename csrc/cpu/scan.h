// First-order recurrences over contiguous steps: a vector holds consecutive steps, is scanned in
// log2(lanes) shifts, and only the state goes from vector to vector. What a step's result is
// depends on the number of steps alone.
#pragma once

#include <string.h>

#include "cpu/gae.h"

namespace warpo::cpu::WARPO_ISA {

// Lane i of the result is lane i + by (kReverse) or i - by of x, from outside `fill`.
template <int by, bool kReverse>
WARPO_HD Floats shift(Floats x, Floats fill) {
    Ints from;
    for (int i = 0; i < kLanes; ++i) {
        const int lane = kReverse ? i + by : i - by;
        from[i] = lane < 0 ? kLanes + i : lane;
    }
    return __builtin_shuffle(x, fill, from);
}

// x -> offset + slope x, where a slope of 0 also stops NaN and inf.
struct Maps {
    Floats slope, offset;
};

template <int by, bool kReverse>
WARPO_HD void compose_with_shifted(Maps& maps) {
    const Floats one = Floats{} + 1.0f, zero = {};
    const Floats slope = shift<by, kReverse>(maps.slope, one);
    const Floats offset = shift<by, kReverse>(maps.offset, zero);
    maps.offset = maps.slope == 0 ? maps.offset : maps.offset + maps.slope * offset;
    maps.slope *= slope;
}

// In place x_i += slope_i x_i+1 (kReverse) or slope_i x_i-1, from `state`; returns the last result.
// Both arrays have room for kLanes more on either side, of any content.
template <bool kReverse>
inline float scan(const float* slopes, float* x, int count, float state) {
    for (int done = 0; done < count; done += kLanes) {
        const int at = kReverse ? count - kLanes - done : done;
        Maps maps;
        memcpy(&maps.slope, slopes + at, sizeof(Floats));
        memcpy(&maps.offset, x + at, sizeof(Floats));
        compose_with_shifted<1, kReverse>(maps);
        compose_with_shifted<2, kReverse>(maps);
        if constexpr (kLanes > 4) compose_with_shifted<4, kReverse>(maps);
        if constexpr (kLanes > 8) compose_with_shifted<8, kReverse>(maps);
        maps.offset = maps.slope == 0 ? maps.offset : maps.offset + maps.slope * state;
        memcpy(x + at, &maps.offset, sizeof(Floats));
        state = maps.offset[kReverse ? 0 : kLanes - 1];
    }
    return count == 0 ? state : x[kReverse ? 0 : count - 1];
}

// The same with one slope for all steps.
template <bool kReverse>
inline float scan(float slope, float* x, int count, float state) {
    const Floats zero = {};
    Floats powers;  // of the distance to `state`
    float power = slope;
    for (int i = 0; i < kLanes; ++i, power *= slope) powers[kReverse ? kLanes - 1 - i : i] = power;
    const float slope2 = slope * slope, slope4 = slope2 * slope2, slope8 = slope4 * slope4;
    for (int done = 0; done < count; done += kLanes) {
        const int at = kReverse ? count - kLanes - done : done;
        Floats y;
        memcpy(&y, x + at, sizeof y);
        y += slope * shift<1, kReverse>(y, zero);
        y += slope2 * shift<2, kReverse>(y, zero);
        if constexpr (kLanes > 4) y += slope4 * shift<4, kReverse>(y, zero);
        if constexpr (kLanes > 8) y += slope8 * shift<8, kReverse>(y, zero);
        y += powers * state;
        memcpy(x + at, &y, sizeof y);
        state = y[kReverse ? 0 : kLanes - 1];
    }
    return count == 0 ? state : x[kReverse ? 0 : count - 1];
}

}  // namespace warpo::cpu::WARPO_ISA
