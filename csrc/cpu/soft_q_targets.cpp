// r + gamma (1 - terminated) (min(q1, q2) - alpha log pi), tile by tile.
#include "math/soft_q_targets.h"

#include "cpu/cpu.h"
#include "cpu/load.h"

namespace warpo::cpu::WARPO_ISA {
namespace {

constexpr int kTile = 1024;

void one_tile(const SoftQTargets& a, int64_t first, int count, float alpha) {
    alignas(64) float reward[kTile], q1[kTile], q2[kTile], logprob[kTile];
    alignas(64) int32_t ends[kTile];
    load_steps(a.rewards, 0, first, count, reward);
    load_steps(a.next_q1, 0, first, count, q1);
    load_steps(a.next_q2, 0, first, count, q2);
    load_steps(a.next_logprobs, 0, first, count, logprob);
    const uint8_t* const terminated = address<uint8_t>(a.terminated, 0, first);
    for (int i = 0; i < count; ++i) ends[i] = terminated[i * a.terminated.stride1];
    const float gamma = a.gamma;
    float* const out = a.targets + first;
#pragma omp simd
    for (int i = 0; i < count; ++i) {
        const float target = soft_q_target(reward[i], q1[i], q2[i], logprob[i], alpha, gamma);
        out[i] = ends[i] ? reward[i] : target;
    }
}

}  // namespace

void soft_q_targets(const SoftQTargets& a) {
    const float alpha = *a.alpha;
#pragma omp parallel for if (a.transitions >= kParallelWork)
    for (int64_t first = 0; first < a.transitions; first += kTile) {
        const int64_t left = a.transitions - first;
        one_tile(a, first, (int)(left < kTile ? left : kTile), alpha);
    }
}

}  // namespace warpo::cpu::WARPO_ISA
