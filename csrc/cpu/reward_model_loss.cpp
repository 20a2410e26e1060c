// Losses of a reward model: pairs of scores, and groups of ranked scores.
#include "math/reward_model_loss.h"

#include "cpu/cpu.h"
#include "cpu/sequences.h"

namespace warpo::cpu::WARPO_ISA {
namespace {

struct Sums {
    double loss = 0, pairs = 0, correct = 0, margin = 0;
    Moments scores;

    void add_pair(const PairTerm& term, float better, float worse) {
        loss += term.loss;
        pairs += 1;
        correct += better > worse;
        margin += (double)better - worse;
    }
    void write(double weight, float* out) const {
        out[kRewardLoss] = (float)(loss * weight);
        out[kRewardPairs] = (float)pairs;
        out[kRewardCorrect] = (float)correct;
        out[kRewardMargin] = (float)margin;
        out[kScores] = (float)scores.count;
        out[kScoreMean] = (float)scores.mean;
        out[kScoreM2] = (float)scores.m2;
    }
};

bool is_valid(const View& mask, int64_t i) { return element<uint8_t>(mask, 0, i, 1) != 0; }

void one_block(const RewardModelLoss& a, int64_t block) {
    const float weight = inverse_or_zero(*a.denominator);
    const int64_t first = block * kPairsPerBlock;
    const int64_t last = first + kPairsPerBlock < a.pairs ? first + kPairsPerBlock : a.pairs;
    Sums sums;
    for (int64_t i = first; i < last; ++i) {
        PairTerm term = {0, 0, 0};
        if (is_valid(a.mask, i)) {
            const float better = load_one(a.chosen_scores, 0, i);
            const float worse = load_one(a.rejected_scores, 0, i);
            const float margin = a.margins.data ? load_one(a.margins, 0, i) : 0.0f;
            term = bradley_terry(better, worse, margin, a.centering_coef);
            sums.add_pair(term, better, worse);
            sums.scores.merge(1, better, 0);
            sums.scores.merge(1, worse, 0);
        }
        if (!a.grad_chosen) continue;
        a.grad_chosen[i] = weight * term.grad_better;
        a.grad_rejected[i] = weight * term.grad_worse;
    }
    sums.write(weight, a.partials + block * kNumRewardMetrics);
}

void one_group(const RankingLoss& a, int64_t group) {
    const int64_t first = a.cu_groups[group], last = a.cu_groups[group + 1];
    Sums sums;
    for (int64_t i = first; i < last; ++i) {
        if (a.grad_scores) a.grad_scores[i] = 0;
        if (is_valid(a.mask, i)) sums.scores.merge(1, load_one(a.scores, 0, i), 0);
    }
    const double size = sums.scores.count, all_pairs = size * (size - 1) / 2;
    const float weight = all_pairs > 0 ? inverse_or_zero(*a.denominator) / (float)all_pairs : 0.0f;
    for (int64_t i = first; i < last; ++i) {
        if (!is_valid(a.mask, i)) continue;
        const float better = load_one(a.scores, 0, i);
        for (int64_t j = first; j < last; ++j) {
            if (!is_valid(a.mask, j)) continue;
            if (*address<int64_t>(a.ranks, 0, i) >= *address<int64_t>(a.ranks, 0, j)) continue;
            const float worse = load_one(a.scores, 0, j);
            const PairTerm term = bradley_terry(better, worse, 0.0f, a.centering_coef);
            sums.add_pair(term, better, worse);
            if (!a.grad_scores) continue;
            a.grad_scores[i] += weight * term.grad_better;
            a.grad_scores[j] += weight * term.grad_worse;
        }
    }
    sums.write(weight, a.partials + group * kNumRewardMetrics);
}

}  // namespace

void reward_model_loss(const RewardModelLoss& a) {
    const int64_t blocks = (a.pairs + kPairsPerBlock - 1) / kPairsPerBlock;
#pragma omp parallel for if (a.pairs >= kParallelWork)
    for (int64_t block = 0; block < blocks; ++block) one_block(a, block);
    merge_partials<kNumRewardMetrics, kScores, kScoreMean>(a.partials, blocks, a.loss, a.metrics);
}

void ranking_loss(const RankingLoss& a) {
#pragma omp parallel for schedule(dynamic) if (a.cu_groups[a.groups] >= kParallelWork)
    for (int64_t group = 0; group < a.groups; ++group) one_group(a, group);
    merge_partials<kNumRewardMetrics, kScores, kScoreMean>(a.partials, a.groups, a.loss, a.metrics);
}

}  // namespace warpo::cpu::WARPO_ISA
