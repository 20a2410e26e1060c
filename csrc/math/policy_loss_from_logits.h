// From the log-probability and the entropy of a token to the derivatives of the loss in both.
#pragma once

#include "arguments/policy_loss_from_logits.h"
#include "math/policy_loss.h"

namespace warpo {

// What the loss of a token takes beside its logits; 0 where absent.
struct TokenInputs {
    float old_logp, advantage, ref_logp, sampler_logp, valid_tokens;
};

struct TokenGradient {
    float by_logp, by_entropy;
};

WARPO_HD TokenGradient token_gradient(const PolicyLossFromLogits& a, const TokenInputs& token,
                                      float logp) {
    const float old = a.old_logprobs.data ? token.old_logp : logp;
    float correction = 1.0f;
    if (a.correction != kNoCorrection) {
        correction = correction_weight(old - token.sampler_logp, a.correction, a.correction_low,
                                       a.correction_high, a.log_ratio_limit)
                         .weight;
    }
    const float log_ratio = a.old_logprobs.data ? logp - old : 0.0f;
    const TokenTerms terms = token_terms(a.surrogate, surrogate_options(a), log_ratio, logp,
                                         token.advantage, correction);
    TokenGradient gradient = {-(terms.by_log_ratio + terms.by_logp), -a.entropy_coef};
    if (a.kl != kNoKl) {
        const float coefficient = a.adaptive_kl_coef ? *a.adaptive_kl_coef : a.kl_coef;
        gradient.by_logp += coefficient * kl_estimate(logp, token.ref_logp, a.kl,
                                                      a.kl_straight_through, a.log_ratio_limit)
                                              .derivative;
    }
    const float weight =
        token_weight(value_of(a.denominator), a.valid_tokens.data != nullptr, token.valid_tokens);
    gradient.by_logp = weighted(weight, gradient.by_logp);
    gradient.by_entropy = weighted(weight, gradient.by_entropy);
    return gradient;
}

}  // namespace warpo
