#pragma once
#include "view.h"

namespace warpo {

// kLeaveOneOutStd: for each member the sample std of the others; `std` is that of the group.
enum Std : int { kNoStd = 0, kSampleStd = 1, kPopulationStd = 2, kLeaveOneOutStd = 3 };

struct GroupAdvantages {
    int64_t groups;
    View rewards;  // (0, i) float
    View lengths;  // (0, i) float32, optional: their weights in the baseline, else the mean
    // group g holds g * group_size + [0, group_size), or order[offsets[g] .. offsets[g + 1])
    int64_t group_size;
    const int64_t *order, *offsets;  // both or neither
    int std_mode;
    bool leave_one_out;
    float eps;
    float* advantages;    // (rewards)
    float *mean, *std;    // (groups); std is 0 with kNoStd
    int32_t* degenerate;  // (), zero on entry: number of groups whose rewards are all equal
};

struct GroupAdvantagesBackward {
    GroupAdvantages forward;  // with mean and std, without its other outputs
    View grad_advantages;  // (0, i) float32
    float* grad_rewards;   // (rewards)
};

}  // namespace warpo
