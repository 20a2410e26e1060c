// Every operation, and the arguments it takes. The CPU and the CUDA library implement them all;
// bindings, dispatch and declarations come from this list, so an operation is named here once.
//
// From Python the arguments are the fields of the struct in their order, tensors as Views: sizes
// first. Python checks shapes and dtypes; every output is allocated by the caller.
//
// With cu_seqlens the tokens of all sequences lie in one row: token t of sequence b is step
// cu_seqlens[b] + t, stride0 of a per-token array is 0, and arrays that are one a sequence have
// stride1 0.
#pragma once

#include "arguments/adamw_publish.h"
#include "arguments/aggregate.h"
#include "arguments/approx_kl.h"
#include "arguments/fingerprint.h"
#include "arguments/gae.h"
#include "arguments/group_advantages.h"
#include "arguments/kept_set_logprobs.h"
#include "arguments/logprobs.h"
#include "arguments/policy_loss.h"
#include "arguments/policy_loss_from_logits.h"
#include "arguments/preference_loss.h"
#include "arguments/process_advantages.h"
#include "arguments/reward_model_loss.h"
#include "arguments/soft_q_targets.h"
#include "arguments/squashed_gaussian.h"
#include "arguments/value_loss.h"
#include "arguments/whiten.h"

// clang-format off
#define WARPO_OPERATIONS(X)                                 \
    X(logprobs_forward, Logprobs)                           \
    X(logprobs_backward, LogprobsBackward)                  \
    X(gae_forward, Gae)                                     \
    X(gae_backward, GaeBackward)                            \
    X(shaped_gae, ShapedGae)                                \
    X(vtrace, Vtrace)                                       \
    X(n_step_advantages, NStepAdvantages)                   \
    X(policy_loss, PolicyLoss)                              \
    X(policy_loss_from_logits, PolicyLossFromLogits)        \
    X(scale_gradient, ScaleGradient)                        \
    X(value_loss, ValueLoss)                                \
    X(aggregate_forward, Aggregate)                         \
    X(aggregate_backward, AggregateBackward)                \
    X(approx_kl_forward, ApproxKl)                          \
    X(approx_kl_backward, ApproxKlBackward)                 \
    X(reward_model_loss, RewardModelLoss)                   \
    X(ranking_loss, RankingLoss)                            \
    X(preference_loss, PreferenceLoss)                      \
    X(kto_loss, KtoLoss)                                    \
    X(group_advantages_forward, GroupAdvantages)            \
    X(group_advantages_backward, GroupAdvantagesBackward)   \
    X(process_advantages, ProcessAdvantages)                \
    X(whiten_forward, Whiten)                               \
    X(whiten_backward, WhitenBackward)                      \
    X(adamw_publish, AdamwPublish)                          \
    X(squashed_gaussian_forward, SquashedGaussian)          \
    X(squashed_gaussian_backward, SquashedGaussianBackward) \
    X(soft_q_targets, SoftQTargets)                         \
    X(fingerprint, Fingerprint)                             \
    X(kept_set_logprobs_forward, KeptSetLogprobs)           \
    X(kept_set_logprobs_backward, KeptSetLogprobsBackward)  \
    X(kept_set_weight_gradient, KeptSetWeightGradient)
// clang-format on
