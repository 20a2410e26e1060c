#pragma once
#include "arguments/denominator.h"
#include "view.h"

namespace warpo {

// Order of the metrics vector and, each of its own part of the batch, of a row of partials.
enum RewardMetric : int {
    kRewardLoss,     // sum of weight * loss
    kRewardPairs,    // pairs compared
    kRewardCorrect,  // the better one has the larger score
    kRewardMargin,   // sum over pairs of score of the better - score of the worse
    kScores,         // valid scores
    kScoreMean,
    kScoreM2,  // sum of (score - mean)^2
    kNumRewardMetrics
};

// Rows of partials that an operation needs, one a block of kPairsPerBlock pairs.
constexpr int64_t kPairsPerBlock = 256;

struct RewardModelLoss {
    int64_t pairs;
    View chosen_scores, rejected_scores;  // (0, i) float
    View margins;                         // (0, i) float, optional
    View mask;                            // (0, i) uint8, optional
    float centering_coef;
    Denominator denominator;
    float *grad_chosen, *grad_rejected;  // (pairs) float32; nullptr: not wanted
    float* partials;  // (ceil(pairs / kPairsPerBlock), kNumRewardMetrics) float32 workspace
    float* loss;      // ()
    float* metrics;   // (kNumRewardMetrics)
};

struct RankingLoss {
    int64_t groups, num_scores;
    View scores;               // (0, i) float
    View ranks;                // (0, i) int64, lower is better
    View mask;                 // (0, i) uint8, optional
    const int32_t* cu_groups;  // (groups + 1): group g holds cu_groups[g] .. cu_groups[g + 1]
    float centering_coef;
    Denominator denominator;
    float* grad_scores;        // (scores), zeros on entry; nullptr: not wanted
    float* partials;           // (groups, kNumRewardMetrics) float32 workspace
    float* loss;               // ()
    float* metrics;            // (kNumRewardMetrics)
};

}  // namespace warpo
