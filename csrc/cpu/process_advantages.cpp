// Advantages from rewards of steps: those of a group are normalised together, and a token has the
// sum of the steps that end at or after it.
#include <math.h>

#include <algorithm>
#include <vector>

#include "cpu/cpu.h"
#include "cpu/load.h"
#include "math/offsets.h"

namespace warpo::cpu::WARPO_ISA {
namespace {

struct Stats {
    double mean = 0, scale = 0;
};

// Calls visit(reward) for every step of a group.
template <class Visit>
void for_each_reward(const ProcessAdvantages& a, int64_t group, Visit visit) {
    const int64_t first = a.order ? a.offsets[group] : group * a.group_size;
    const int64_t end = a.order ? a.offsets[group + 1] : first + a.group_size;
    for (int64_t i = first; i < end; ++i) {
        const int64_t output = a.order ? a.order[i] : i;
        const int64_t last = index_at(a.step_offsets, output + 1);
        for (int64_t step = index_at(a.step_offsets, output); step < last; ++step)
            visit(load_one(a.step_rewards, 0, step));
    }
}

// Writes mean and std of a group; its scale is 0 where all rewards are equal.
Stats stats_of(const ProcessAdvantages& a, int64_t group, int32_t& degenerate) {
    int64_t count = 0;
    float first = 0;
    double sum = 0;
    bool all_equal = true;
    for_each_reward(a, group, [&](float reward) {
        if (count++ == 0) first = reward;
        sum += reward;
        all_equal = all_equal && reward == first;  // false for NaN
    });
    Stats stats;
    double std = 0;
    stats.mean = all_equal ? first : sum / (double)count;
    if (!all_equal) {
        double squares = 0;
        for_each_reward(a, group, [&](float reward) {
            squares += (reward - stats.mean) * (reward - stats.mean);
        });
        if (a.std_mode != kNoStd)
            std = sqrt(squares / (double)(a.std_mode == kSampleStd ? count - 1 : count));
        stats.scale = a.std_mode == kNoStd ? 1.0 : 1.0 / (std + a.eps);
    }
    a.mean[group] = (float)stats.mean;
    a.std[group] = (float)std;
    degenerate += all_equal && count > 0;
    return stats;
}

// Walks the steps backwards: the tokens after the end of the step before have the sum so far.
void write_output(const ProcessAdvantages& a, int64_t output, const Stats& stats) {
    const int64_t start = a.cu_seqlens ? a.cu_seqlens[output] : output * a.tokens;
    const int64_t length = a.cu_seqlens ? a.cu_seqlens[output + 1] - start : a.tokens;
    float* const advantages = a.advantages + start;
    const int64_t first = index_at(a.step_offsets, output);
    int64_t step = index_at(a.step_offsets, output + 1);
    int64_t filled = length;  // tokens from here on are written
    double sum = 0;
    while (true) {
        int64_t begin = step > first ? index_at(a.step_ends, step - 1) + 1 : 0;
        begin = std::min(std::max<int64_t>(begin, 0), filled);
        std::fill(advantages + begin, advantages + filled, (float)sum);
        filled = begin;
        if (step-- == first) return;
        const double centred = load_one(a.step_rewards, 0, step) - stats.mean;
        sum += stats.scale == 0 ? 0.0 : centred * stats.scale;
    }
}

}  // namespace

void process_advantages(const ProcessAdvantages& a) {
    std::vector<Stats> stats(a.groups);
    int32_t degenerate = 0;
    for (int64_t group = 0; group < a.groups; ++group)
        stats[group] = stats_of(a, group, degenerate);
    *a.degenerate += degenerate;
    const bool parallel = (a.cu_seqlens ? 1 : a.outputs) * a.tokens >= kParallelWork;
#pragma omp parallel for if (parallel)
    for (int64_t output = 0; output < a.outputs; ++output) {
        const int64_t group = a.group_ids ? a.group_ids[output] : output / a.group_size;
        const bool exists = group >= 0 && group < a.groups;
        write_output(a, output, exists ? stats[group] : Stats{});
    }
}

}  // namespace warpo::cpu::WARPO_ISA
