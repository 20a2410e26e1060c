// Losses of a reward model: pairs of scores, and groups of ranked scores.
#include "math/reward_model_loss.h"

#include <string.h>

#include "cpu/cpu.h"
#include "cpu/sequences.h"

namespace warpo::cpu::WARPO_ISA {
namespace {

struct Sums {
    double loss = 0, pairs = 0, correct = 0, margin = 0;
    Moments scores;

    void write(float* out) const {
        out[kRewardLoss] = (float)loss;
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
    alignas(64) float weight[kPairsPerBlock];
    alignas(64) float grad_better[kPairsPerBlock], grad_worse[kPairsPerBlock];
};

void evaluate(Pairs& pairs, float centering_coef, Sums& sums) {
    constexpr int kVector = 16;  // to whole ones, by pairs that weigh 0
    const int count = pairs.count, padded = (count + kVector - 1) / kVector * kVector;
    for (int i = count; i < padded; ++i)
        pairs.better[i] = pairs.worse[i] = pairs.margin[i] = pairs.weight[i] = 0;
    float loss = 0, correct = 0, margin = 0;
#pragma omp simd reduction(+ : loss, correct, margin)
    for (int i = 0; i < padded; ++i) {
        const float better = pairs.better[i], worse = pairs.worse[i], weight = pairs.weight[i];
        const PairTerm term = bradley_terry(better, worse, pairs.margin[i], centering_coef);
        pairs.grad_better[i] = weighted(weight, term.grad_better);
        pairs.grad_worse[i] = weighted(weight, term.grad_worse);
        loss += weighted(weight, term.loss);
        correct += better > worse ? 1.0f : 0.0f;
        margin += better - worse;
    }
    sums.loss += loss;
    sums.pairs += count;
    sums.correct += correct;
    sums.margin += margin;
}

void add_moments(const float* scores, int count, Moments& moments) {
    double sum = 0, m2 = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < count; ++i) sum += scores[i];
    const double mean = sum / count;
#pragma omp simd reduction(+ : m2)
    for (int i = 0; i < count; ++i) m2 += (scores[i] - mean) * (scores[i] - mean);
    moments.merge(count, mean, m2);
}

bool is_valid(const View& mask, int64_t i) { return element<uint8_t>(mask, 0, i, 1) != 0; }

// The pairs [first, first + count) that are valid, loaded.
void load_pairs(const RewardModelLoss& a, int64_t first, int count, Pairs& pairs) {
    load_steps(a.chosen_scores, 0, first, count, pairs.better);
    load_steps(a.rejected_scores, 0, first, count, pairs.worse);
    memset(pairs.margin, 0, sizeof pairs.margin);
    if (a.margins.data) load_steps(a.margins, 0, first, count, pairs.margin);
    pairs.count = 0;
    for (int i = 0; i < count && a.mask.data; ++i) {
        if (!is_valid(a.mask, first + i)) continue;
        pairs.better_at[pairs.count] = i;
        pairs.better[pairs.count] = pairs.better[i];
        pairs.worse[pairs.count] = pairs.worse[i];
        pairs.margin[pairs.count++] = pairs.margin[i];
    }
    if (!a.mask.data) pairs.count = count;
    const float weight = inverse_or_zero(value_of(a.denominator));
    for (int i = 0; i < pairs.count; ++i) pairs.weight[i] = weight;
}

void store_gradients(const RewardModelLoss& a, int64_t first, int count, const Pairs& pairs) {
    float *const chosen = a.grad_chosen + first, *const rejected = a.grad_rejected + first;
    if (!a.mask.data) {
        memcpy(chosen, pairs.grad_better, count * sizeof(float));
        memcpy(rejected, pairs.grad_worse, count * sizeof(float));
        return;
    }
    for (int i = 0; i < count; ++i) chosen[i] = rejected[i] = 0;
    for (int i = 0; i < pairs.count; ++i) {
        chosen[pairs.better_at[i]] = pairs.grad_better[i];
        rejected[pairs.better_at[i]] = pairs.grad_worse[i];
    }
}

void one_block(const RewardModelLoss& a, int64_t block) {
    const int64_t first = block * kPairsPerBlock, left = a.pairs - first;
    const int count = (int)(left < kPairsPerBlock ? left : kPairsPerBlock);
    Pairs pairs;
    load_pairs(a, first, count, pairs);
    Sums sums;
    evaluate(pairs, a.centering_coef, sums);
    add_moments(pairs.better, pairs.count, sums.scores);
    add_moments(pairs.worse, pairs.count, sums.scores);
    if (a.grad_chosen) store_gradients(a, first, count, pairs);
    sums.write(a.partials + block * kNumRewardMetrics);
}

// Evaluates the pairs of some groups, adds their gradients and empties the list.
void flush(const RankingLoss& a, Pairs& pairs, Sums& sums) {
    evaluate(pairs, a.centering_coef, sums);
    for (int i = 0; a.grad_scores && i < pairs.count; ++i) {
        a.grad_scores[pairs.better_at[i]] += pairs.grad_better[i];
        a.grad_scores[pairs.worse_at[i]] += pairs.grad_worse[i];
    }
    pairs.count = 0;
}

// Of the valid scores of a group; returns how many there are.
template <class T>
int64_t add_scores(const RankingLoss& a, int64_t first, int64_t last, Moments& moments) {
    alignas(64) float scores[kPairsPerBlock];
    int64_t valid = 0;
    int count = 0;
    for (int64_t i = first; i < last; ++i) {
        if (!is_valid(a.mask, i)) continue;
        scores[count++] = to_float(*address<T>(a.scores, 0, i));
        if (count < kPairsPerBlock && i + 1 < last) continue;
        add_moments(scores, count, moments);
        valid += count;
        count = 0;
    }
    if (count > 0) add_moments(scores, count, moments);
    return valid + count;
}

template <class T>
void one_group(const RankingLoss& a, int64_t group, Pairs& pairs, Sums& sums) {
    const int64_t first = a.cu_groups[group], last = a.cu_groups[group + 1];
    const float size = (float)add_scores<T>(a, first, last, sums.scores);
    const float inverse = inverse_or_zero(value_of(a.denominator));
    const float weight = size > 1 ? inverse / (size * (size - 1) / 2) : 0;
    for (int64_t i = first; i < last; ++i) {
        if (!is_valid(a.mask, i)) continue;
        const int64_t rank = *address<int64_t>(a.ranks, 0, i);
        for (int64_t j = i + 1; j < last; ++j) {
            const int64_t other = *address<int64_t>(a.ranks, 0, j);
            if (!is_valid(a.mask, j) || rank == other) continue;
            const int64_t better = rank < other ? i : j, worse = i + j - better;
            pairs.better_at[pairs.count] = better;
            pairs.worse_at[pairs.count] = worse;
            pairs.better[pairs.count] = to_float(*address<T>(a.scores, 0, better));
            pairs.worse[pairs.count] = to_float(*address<T>(a.scores, 0, worse));
            pairs.weight[pairs.count] = weight;
            if (++pairs.count == kPairsPerBlock) flush(a, pairs, sums);
        }
    }
}

// Groups whose pairs are evaluated together, so that few vectors are filled in part.
constexpr int64_t kGroupsPerBlock = 32;

template <class T>
void one_block(const RankingLoss& a, int64_t block) {
    const int64_t begin = block * kGroupsPerBlock;
    Pairs pairs;
    memset(pairs.margin, 0, sizeof pairs.margin);
    Sums sums;
    for (int64_t group = begin; group < begin + kGroupsPerBlock && group < a.groups; ++group)
        one_group<T>(a, group, pairs, sums);
    flush(a, pairs, sums);
    sums.write(a.partials + block * kNumRewardMetrics);
}

}  // namespace

void reward_model_loss(const RewardModelLoss& a) {
    const int64_t blocks = (a.pairs + kPairsPerBlock - 1) / kPairsPerBlock;
#pragma omp parallel for if (a.pairs >= kParallelWork)
    for (int64_t block = 0; block < blocks; ++block) one_block(a, block);
    merge_partials<kNumRewardMetrics, kScores, kScoreMean>(a.partials, blocks, a.loss, a.metrics);
}

void ranking_loss(const RankingLoss& a) {
    const int64_t scores = a.cu_groups[a.groups];
    const int64_t blocks = (a.groups + kGroupsPerBlock - 1) / kGroupsPerBlock;
    auto* const one = a.scores.dtype == kFloat32    ? one_block<float>
                      : a.scores.dtype == kBFloat16 ? one_block<BFloat16>
                                                    : one_block<Float16>;
#pragma omp parallel for schedule(dynamic) if (scores >= kParallelWork)
    for (int64_t block = 0; block < blocks; ++block) one(a, block);
    merge_partials<kNumRewardMetrics, kScores, kScoreMean>(a.partials, blocks, a.loss, a.metrics);
}

}  // namespace warpo::cpu::WARPO_ISA
