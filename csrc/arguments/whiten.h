#pragma once
#include "view.h"

namespace warpo {

// What an element is centred and scaled with.
enum WhitenStat : int { kWhitenMean, kWhitenScale, kWhitenCount, kNumWhitenStats };

struct Whiten {
    int64_t rows, columns;
    View x;     // float
    View mask;  // uint8, optional
    bool shift_mean;
    float eps;
    float* partials;  // (kMaxPartials, 3) workspace, see math/tiles.h
    float* stats;     // (kNumWhitenStats)
    float* whitened;  // (rows, columns)
};

struct WhitenBackward {
    Whiten forward;      // with stats, without whitened
    View grad_whitened;  // float32
    float* grad_x;       // (rows, columns)
};

}  // namespace warpo
