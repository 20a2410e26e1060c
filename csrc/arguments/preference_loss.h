#pragma once
#include "arguments/denominator.h"
#include "view.h"

namespace warpo {

// The tokens of the completions on one side. A completion without valid tokens does not count.
struct Completions {
    int64_t steps;              // length of a row; with cu_seqlens: total tokens
    const int32_t* cu_seqlens;  // (completions + 1), or nullptr
    View logprobs;              // float
    View ref_logprobs;          // float, optional
    View mask;                  // uint8, optional
    float* grad_logprobs;       // contiguous (rows * steps), float32; nullptr: not wanted
};

// A GPU sums a completion in so many slices, by the place of a token alone: four floats each.
constexpr int64_t kCompletionSlices = 32;

// Order of the metrics vector and, each of its own pair, of a row of partials.
enum PreferenceMetric : int {
    kPreferenceLoss,  // sum of loss / denominator
    kPreferencePairs,
    kPreferenceCorrect,  // the chosen completion has the larger reward
    kChosenReward,
    kRejectedReward,
    kChosenLogprob,  // of the whole completion
    kRejectedLogprob,
    kChosenNll,  // -mean over the tokens
    kNumPreferenceMetrics
};

// What the loss of a pair is a function of.
enum Link : int { kLogistic = 0, kHinge = 1, kSquare = 2 };

struct PreferenceLoss {
    int64_t pairs;
    Completions chosen, rejected;
    int link;
    bool length_normalise;  // mean over tokens, not sum
    bool odds;              // margin of the log odds, not of the log probabilities
    float beta;
    float margin;              // target margin: subtracted (logistic, hinge), or that of kSquare
    float positive_weight;     // kLogistic: of -log sigmoid(x)
    float negative_weight;     // ... of -log sigmoid(-x)
    float nll_coef;            // weight of the mean -log p of the tokens of the chosen completion
    Denominator denominator;
    // float32 workspace: pairs times kNumPreferenceMetrics, and 4 kCompletionSlices a completion
    float* partials;
    float* loss;     // ()
    float* metrics;  // (kNumPreferenceMetrics)
};

enum KtoMetric : int {
    kKtoLoss,  // sum of loss / denominator
    kDesirable,
    kUndesirable,
    kDesirableReward,
    kUndesirableReward,
    kDesirableLogprob,
    kUndesirableLogprob,
    kNumKtoMetrics
};

struct KtoLoss {
    int64_t examples;
    Completions completions;
    View desirable;   // (0, i) uint8
    const float* kl;  // the reference point, one float on the device
    float beta, desirable_weight, undesirable_weight;
    Denominator denominator;
    // float32 workspace: examples times kNumKtoMetrics, and 4 kCompletionSlices a completion
    float* partials;
    float* loss;     // ()
    float* metrics;  // (kNumKtoMetrics)
};

}  // namespace warpo
