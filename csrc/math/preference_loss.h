// The losses of one pair of completions, and of one completion with a verdict, from the sums over
// their tokens: values and derivatives, one text for host and device.
#pragma once

#include "arguments/preference_loss.h"
#include "math/logistic.h"

namespace warpo {

// Sums over the valid tokens of a completion.
struct CompletionSums {
    float count;
    float logprob;
    float ratio;  // of logprob - ref_logprob; of logprob without a reference
};

struct Slope {
    float value, derivative;
};

// log(p / (1 - p)) of p = e^x. x counts as at most -2^-24, the spacing of float32 below 1: an
// completion of probability 1 would have infinite odds. The gradient is 0 where that bound holds.
WARPO_HD Slope log_odds(float x) {
    const float largest = -5.9604645e-8f;
    const bool bounded = x > largest;
    const float below = bounded ? largest : x;
    return {below - log1mexp(below), bounded ? 0.0f : -1.0f / expm1f(below)};
}

// Loss of a pair whose log probabilities, or log odds, differ by `difference`.
WARPO_HD Slope link_loss(const PreferenceLoss& a, float difference) {
    if (a.link == kSquare) {
        const float error = difference - a.margin;
        return {error * error, 2.0f * error};
    }
    if (a.link == kHinge) {
        const float missing = a.margin - a.beta * difference;
        if (missing != missing) return {missing, missing};
        return missing > 0.0f ? Slope{missing, -a.beta} : Slope{0.0f, 0.0f};
    }
    const float scale = a.odds ? 1.0f : a.beta;
    const float x = scale * difference - a.margin;
    const LogSigmoid preference = log_sigmoid(x);
    // -log sigmoid(-x) = x - log sigmoid(x), with derivative sigmoid(x)
    const float wrong = preference.derivative;
    return {a.negative_weight * (x - preference.value) - a.positive_weight * preference.value,
            scale * (a.negative_weight * (1.0f - wrong) - a.positive_weight * wrong)};
}

struct PreferenceTerm {
    float loss;
    float grad_chosen, grad_rejected;  // of the loss, with respect to each token
    float chosen_reward, rejected_reward, nll;
};

// Of completions with at least one token each.
WARPO_HD PreferenceTerm preference_term(const PreferenceLoss& a, const CompletionSums& chosen,
                                        const CompletionSums& rejected) {
    const float chosen_share = a.length_normalise ? 1.0f / chosen.count : 1.0f;
    const float rejected_share = a.length_normalise ? 1.0f / rejected.count : 1.0f;
    const float x = chosen.ratio * chosen_share, y = rejected.ratio * rejected_share;
    Slope better = {x, 1.0f}, worse = {y, 1.0f};
    if (a.odds) {
        better = log_odds(x);
        worse = log_odds(y);
    }
    const Slope link = link_loss(a, better.value - worse.value);
    PreferenceTerm term;
    term.nll = -chosen.logprob / chosen.count;
    term.loss = link.value + (a.nll_coef != 0.0f ? a.nll_coef * term.nll : 0.0f);
    term.grad_chosen = link.derivative * better.derivative * chosen_share;
    term.grad_chosen -= a.nll_coef / chosen.count;
    term.grad_rejected = -link.derivative * worse.derivative * rejected_share;
    term.chosen_reward = a.beta * x;
    term.rejected_reward = a.beta * y;
    return term;
}

struct KtoTerm {
    float loss, grad, reward;
};

// KTO, https://arxiv.org/abs/2402.01306: weight (1 - sigmoid(+-beta (ratio - kl)))
WARPO_HD KtoTerm kto_term(const KtoLoss& a, float kl, bool desirable, float ratio) {
    const float weight = desirable ? a.desirable_weight : a.undesirable_weight;
    const float slope = desirable ? a.beta : -a.beta;
    const float x = slope * (ratio - kl);
    const float loss = weight * log_sigmoid(x).derivative;
    return {loss, -loss * slope * log_sigmoid(-x).derivative, a.beta * ratio};
}

}  // namespace warpo
