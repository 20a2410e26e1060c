// Advantages of n steps, row by row on the steps that count:
//   A_t = sum_{l < m} gamma^l r_t+l + gamma^m V_t+m - V_t,  m = n, or the steps up to the end
// https://arxiv.org/abs/1506.02438 eq. 14.
#include <math.h>

#include <vector>

#include "cpu/cpu.h"
#include "cpu/load.h"

namespace warpo::cpu::WARPO_ISA {
namespace {

struct Row {
    std::vector<int64_t> at;            // places of the steps that count
    std::vector<float> rewards, values;  // with the value after the last step

    void gather(const Gae& a, int64_t row, int64_t begin, int64_t end) {
        at.clear(), rewards.clear(), values.clear();
        float tail = 0;
        for (int64_t t = begin; t < end; ++t) {
            const bool keep = element<uint8_t>(a.mask, row, t, 1);
            if (!keep && a.mask_mode == kCompact) tail += load_one(a.rewards, row, t);
            if (!keep && a.mask_mode != kZero) continue;
            if (keep) tail = 0;  // what it holds was not behind the last valid step
            at.push_back(t);
            rewards.push_back(keep ? load_one(a.rewards, row, t) : 0);
            values.push_back(keep ? load_one(a.values, row, t) : 0);
        }
        if (!at.empty() && a.mask_mode == kCompact) rewards.back() += tail;
        values.push_back(a.last_values.data ? load_one(a.last_values, row, 0) : 0);
    }
};

// In place x_i = sum_{l < n} gamma^l x_i+l: of windows of a length those of twice the length, and
// from these the window that the bits of n make up, from the front.
void add_windows(std::vector<float>& x, std::vector<float>& part, float gamma, int64_t n) {
    const int64_t count = (int64_t)x.size();
    part.assign(x.begin(), x.end());
    int64_t length = 0;
    for (int64_t size = 1; size <= n; size *= 2) {
        if (n & size) {
            // x becomes `part`, followed by what x was
            const float decay = (float)pow(gamma, (double)size);
            const bool first = length == 0;
            for (int64_t i = 0; i < count; ++i) {
                const float behind = !first && i + size < count ? decay * x[i + size] : 0.0f;
                x[i] = part[i] + behind;
            }
            length += size;
        }
        const float decay = (float)pow(gamma, (double)size);
#pragma omp simd
        for (int64_t i = 0; i < count - size; ++i) part[i] += decay * part[i + size];
    }
}

void forward_row(const NStepAdvantages& s, int64_t row, Row& steps, std::vector<float>& part) {
    const Gae& a = s.gae;
    const int64_t begin = a.cu_seqlens ? a.cu_seqlens[row] : 0;
    const int64_t end = a.cu_seqlens ? a.cu_seqlens[row + 1] : a.steps;
    steps.gather(a, row, begin, end);
    const int64_t count = (int64_t)steps.at.size();
    // nothing behind a discount of 0 is read
    const int64_t wanted = a.gamma == 0 ? 1 : s.n, n = wanted < count ? wanted : count;
    add_windows(steps.rewards, part, a.gamma, n);
    const auto power = [&](int64_t m) { return (float)pow((double)a.gamma, (double)m); };
    const float all = power(n);
    float* const advantages = address<float>(a.advantages, row, 0);
    float* const returns = address<float>(a.returns, row, 0);
    if (a.mask.data)
        for (int64_t t = begin; t < end; ++t)
            advantages[t * a.advantages.stride1] = returns[t * a.returns.stride1] = 0;
    for (int64_t i = 0; i < count; ++i) {
        const int64_t t = steps.at[i];
        if (!element<uint8_t>(a.mask, row, t, 1)) continue;
        const int64_t m = i + n < count ? n : count - i;
        const float decay = m == n ? all : power(m);
        const float found =
            decay == 0 ? steps.rewards[i] : steps.rewards[i] + decay * steps.values[i + m];
        returns[t * a.returns.stride1] = found;
        advantages[t * a.advantages.stride1] = found - steps.values[i];
    }
}

void zero_outside(const Gae& a, const View& out) {
    if (!a.cu_seqlens) return;
    for (int64_t t = 0; t < a.cu_seqlens[0]; ++t) *address<float>(out, 0, t) = 0;
    for (int64_t t = a.cu_seqlens[a.rows]; t < a.steps; ++t) *address<float>(out, 0, t) = 0;
}

}  // namespace

void n_step_advantages(const NStepAdvantages& s) {
    const Gae& a = s.gae;
    zero_outside(a, a.advantages);
    zero_outside(a, a.returns);
#pragma omp parallel if ((a.cu_seqlens ? a.steps : a.rows * a.steps) >= kParallelWork)
    {
        Row steps;
        std::vector<float> part;
#pragma omp for schedule(guided)
        for (int64_t row = 0; row < a.rows; ++row) forward_row(s, row, steps, part);
    }
}

}  // namespace warpo::cpu::WARPO_ISA
