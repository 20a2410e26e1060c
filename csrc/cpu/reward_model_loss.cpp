// Losses of a reward model: pairs of scores, and groups of ranked scores.
#include "math/reward_model_loss.h"

#include "cpu/cpu.h"
#include "cpu/sequences.h"

namespace warpo::cpu::WARPO_ISA {
namespace {

struct Sums {
    double loss = 0, pairs = 0, correct = 0, margin = 0;
    Moments scores;

    void write(double weight, float* out) const {
        out[kRewardLoss] = (float)weighted((float)weight, loss);
        out[kRewardPairs] = (float)pairs;
        out[kRewardCorrect] = (float)correct;
        out[kRewardMargin] = (float)margin;
        out[kScores] = (float)scores.count;
        out[kScoreMean] = (float)scores.mean;
        out[kScoreM2] = (float)scores.m2;
    }
};

// Pairs of scores that are evaluated together, and where their gradients belong.
struct Pairs {
    int count = 0;
    int64_t better_at[kPairsPerBlock], worse_at[kPairsPerBlock];
    alignas(64) float better[kPairsPerBlock], worse[kPairsPerBlock], margin[kPairsPerBlock];
    alignas(64) float grad_better[kPairsPerBlock], grad_worse[kPairsPerBlock];
};

void evaluate(Pairs& pairs, float centering_coef, Sums& sums) {
    float loss = 0, correct = 0, margin = 0;
#pragma omp simd reduction(+ : loss, correct, margin)
    for (int i = 0; i < pairs.count; ++i) {
        const float better = pairs.better[i], worse = pairs.worse[i];
        const PairTerm term = bradley_terry(better, worse, pairs.margin[i], centering_coef);
        pairs.grad_better[i] = term.grad_better;
        pairs.grad_worse[i] = term.grad_worse;
        loss += term.loss;
        correct += better > worse ? 1.0f : 0.0f;
        margin += better - worse;
    }
    sums.loss += loss;
    sums.pairs += pairs.count;
    sums.correct += correct;
    sums.margin += margin;
}

bool is_valid(const View& mask, int64_t i) { return element<uint8_t>(mask, 0, i, 1) != 0; }

// Count, mean and squared differences of scores, of which score(f) calls f with each.
template <class Scores>
Moments moments_of(Scores scores) {
    double count = 0, sum = 0, m2 = 0;
    scores([&](float score) {
        count += 1;
        sum += score;
    });
    const double mean = count > 0 ? sum / count : 0;
    scores([&](float score) { m2 += (score - mean) * (score - mean); });
    Moments moments;
    moments.merge(count, mean, m2);
    return moments;
}

void one_block(const RewardModelLoss& a, int64_t block) {
    const float weight = inverse_or_zero(*a.denominator);
    const int64_t first = block * kPairsPerBlock;
    const int64_t last = first + kPairsPerBlock < a.pairs ? first + kPairsPerBlock : a.pairs;
    Pairs pairs;
    for (int64_t i = first; i < last; ++i) {
        if (a.grad_chosen) a.grad_chosen[i] = a.grad_rejected[i] = 0;
        if (!is_valid(a.mask, i)) continue;
        pairs.better_at[pairs.count] = i;
        pairs.better[pairs.count] = load_one(a.chosen_scores, 0, i);
        pairs.worse[pairs.count] = load_one(a.rejected_scores, 0, i);
        pairs.margin[pairs.count] = a.margins.data ? load_one(a.margins, 0, i) : 0.0f;
        ++pairs.count;
    }
    Sums sums;
    evaluate(pairs, a.centering_coef, sums);
    sums.scores = moments_of([&](auto add) {
        for (int i = 0; i < pairs.count; ++i) add(pairs.better[i]), add(pairs.worse[i]);
    });
    for (int i = 0; a.grad_chosen && i < pairs.count; ++i) {
        a.grad_chosen[pairs.better_at[i]] = weighted(weight, pairs.grad_better[i]);
        a.grad_rejected[pairs.better_at[i]] = weighted(weight, pairs.grad_worse[i]);
    }
    sums.write(weight, a.partials + block * kNumRewardMetrics);
}

// Evaluates the pairs of a group, adds their gradients and empties the list.
void flush(const RankingLoss& a, float weight, Pairs& pairs, Sums& sums) {
    evaluate(pairs, a.centering_coef, sums);
    for (int i = 0; a.grad_scores && i < pairs.count; ++i) {
        a.grad_scores[pairs.better_at[i]] += weighted(weight, pairs.grad_better[i]);
        a.grad_scores[pairs.worse_at[i]] += weighted(weight, pairs.grad_worse[i]);
    }
    pairs.count = 0;
}

void one_group(const RankingLoss& a, int64_t group) {
    const int64_t first = a.cu_groups[group], last = a.cu_groups[group + 1];
    Sums sums;
    sums.scores = moments_of([&](auto add) {
        for (int64_t i = first; i < last; ++i)
            if (is_valid(a.mask, i)) add(load_one(a.scores, 0, i));
    });
    const double size = sums.scores.count, all_pairs = size * (size - 1) / 2;
    const float weight = all_pairs > 0 ? inverse_or_zero(*a.denominator) / (float)all_pairs : 0.0f;
    for (int64_t i = first; a.grad_scores && i < last; ++i) a.grad_scores[i] = 0;
    Pairs pairs;
    for (int i = 0; i < kPairsPerBlock; ++i) pairs.margin[i] = 0;
    for (int64_t i = first; i < last; ++i) {
        if (!is_valid(a.mask, i)) continue;
        const float better = load_one(a.scores, 0, i);
        const int64_t rank = *address<int64_t>(a.ranks, 0, i);
        for (int64_t j = first; j < last; ++j) {
            if (!is_valid(a.mask, j) || rank >= *address<int64_t>(a.ranks, 0, j)) continue;
            pairs.better_at[pairs.count] = i;
            pairs.worse_at[pairs.count] = j;
            pairs.better[pairs.count] = better;
            pairs.worse[pairs.count] = load_one(a.scores, 0, j);
            if (++pairs.count == kPairsPerBlock) flush(a, weight, pairs, sums);
        }
    }
    flush(a, weight, pairs, sums);
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
