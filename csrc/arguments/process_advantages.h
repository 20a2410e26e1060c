#pragma once
#include "arguments/group_advantages.h"

namespace warpo {

struct ProcessAdvantages {
    int64_t outputs, groups, steps;  // steps: of all outputs
    int64_t tokens;             // length of a row; with cu_seqlens: of all outputs
    const int32_t* cu_seqlens;  // (outputs + 1), or nullptr
    View step_rewards;          // (0, i) float
    View step_offsets;          // (0, b) int32 or int64: the steps of output b begin here
    View step_ends;             // (0, i) int32 or int64, ascending within an output
    // output b is of group b / group_size, or group_ids[b]; the members of group g are then
    // order[offsets[g] .. offsets[g + 1])
    int64_t group_size;
    const int64_t *group_ids, *order, *offsets;  // all or none
    int std_mode;
    float eps;
    float* advantages;    // (outputs, tokens), or (tokens) with cu_seqlens
    float *mean, *std;    // (groups), zero on entry with group_ids; std is 0 with kNoStd
    int32_t* degenerate;  // (), zero on entry: number of groups whose steps all have one reward
};

}  // namespace warpo
