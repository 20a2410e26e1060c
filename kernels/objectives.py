"""Published objectives as data: what a policy loss is made of, and one row for each paper.

ratio      = exp(logp - old), of a token, its geometric mean or its product over the sequence, or
             its product up to the token
surrogate  = of ratio and advantage, one of SURROGATES
correction = weight from exp(old - sampler), for a sampler that is not quite the old policy
loss_t     = -correction surrogate + kl_coef kl(logp, ref) - entropy_coef entropy
loss       = aggregate(loss_t) over the valid tokens, with an explicit denominator
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any

from warpo.kernels._arguments.objective import ObjectiveArguments

# In the order of the enumerations in csrc/arguments/policy_loss.h.
RATIO_LEVELS = ("token", "sequence", "prefix", "product")
SURROGATES = (
    "clip",
    "dual_clip",
    "stop_gradient",
    "mask",
    "none",
    "reinforce",
    "geometric",
    "soft_gate",
    "divergence_tv",
    "divergence_kl",
    "gamma",
)
CORRECTIONS = ("none", "truncate", "mask")
# Those of samples of the policy in the order of the enumeration, and then again of the reference.
KL_ESTIMATORS = ("k1", "k2", "k3", "reverse_k3")

KL_GRADIENTS = ("estimator", "k2")
KL_LEVELS = ("token", "sequence")
KL_SAMPLED_FROM = ("policy", "reference")
CORRECTION_LEVELS = ("token", "sequence")
CORRECTION_NANS = ("propagate", "mask")
AGGREGATIONS = (
    "token-mean",
    "sequence-mean-token-mean",
    "sequence-mean-token-sum",
    "sequence-mean-token-sum-norm",
)


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A policy objective: with ratio r, advantage A and bounds low = 1 - clip_low, high = 1 +
    clip_high.

    Attributes:
        ratio_level: "token": exp(logp_t - old_t). "sequence": exp of the mean of logp_t - old_t
            over the valid tokens, the same for each of them. "prefix": exp of the sum over the
            valid tokens up to t, with "stop_gradient" alone. "product": exp of the sum over the
            valid tokens, the ratio of the probabilities of the whole sequence, for each of them.
        surrogate:
            "clip"           min(r A, clip(r, low, high) A)
            "dual_clip"      the same, and where A < 0 not below dual_clip A
            "stop_gradient"  clip(r, low, high) A logp, with no gradient through the ratio
            "mask"           r A where low <= r <= high, else 0
            "none"           r A
            "reinforce"      A logp; the ratio is there for the metrics
            "geometric"      r A, where each log ratio is cut at log high (A >= 0) or log low
                             (A < 0) before their mean; ratio_level "sequence"
            "soft_gate"      4 / tau sigmoid(tau (r - 1)) A
            "divergence_tv"  r A, but 0 where the probability p of the token has moved too far from
                             p_old = p / r: where A > 0, r > 1 and |p - p_old| > clip_high, or
                             A < 0, r < 1 and |p - p_old| > clip_low; ratio_level "token"
            "divergence_kl"  the same with p_old log(p_old / p) + (1 - p_old) log((1 - p_old) /
                             (1 - p)) in place of |p - p_old|
            "gamma"          r^power e^(rate (1 - r)) A logp, with no gradient through the ratio
        clip_low: in [0, 1]; 1 is no bound.
        clip_high: >= 0; inf is no bound.
        dual_clip: above 1, of "dual_clip".
        tau_positive, tau_negative: tau of "soft_gate" where A > 0, and elsewhere.
        power_positive, power_negative, rate_positive, rate_negative: power and rate of "gamma"
            where A >= 0, and where A < 0.
        kl_coef: weight of the KL term; 0 leaves it out, and no reference is needed.
        kl_estimator: with d = ref - logp: k1 = -d, k2 = d^2 / 2, k3 = e^d - 1 - d of KL(policy ||
            reference); reverse_k3 = d e^d - (e^d - 1) of KL(reference || policy)
            (http://joschu.net/blog/kl-approx.html). d is at most log_ratio_limit in e^d.
        kl_gradient: of the "estimator", or of "k2" whatever the estimator: the expectation of that
            is the gradient of the KL. That of k1 is 0, so it takes "k2".
        kl_level: "token": d of the token. "sequence": the sum of d over the valid tokens, so that
            each of them has the KL of the whole sequence.
        kl_sampled_from: who drew the tokens. "reference": d = logp - ref, so that k1, k2 and k3 are
            of KL(reference || policy) and reverse_k3 of KL(policy || reference); the expectations
            of the gradients of k1 and k3, -1 and e^d - 1, are the gradient of that KL.
        entropy_coef: weight of the entropy bonus; 0 leaves it out.
        correction: with w = exp(old - sampler): "none"; "truncate": clip(w, correction_low,
            correction_high); "mask": w between the bounds, else 0. A constant.
        correction_level: "token", or "sequence": w from the sum of old - sampler over the valid
            tokens.
        correction_nan: for a w that is NaN, as where the sampler returned NaN for a logprob:
            "propagate": it reaches the loss. "mask": it becomes 0, as of a w that "mask" leaves
            out: the token (at level "sequence" the sequence) has no surrogate, and still counts in
            the denominator, the KL and the entropy; the metric `corrected` counts it.
        sequence_mask: >= 0; inf is none. Off-policy sequence masking of DeepSeek-V3.2,
            https://arxiv.org/abs/2512.02556: where A < 0 and the mean over the valid tokens of mu -
            logp is above it, the token's advantage is 0: it has no surrogate, and still counts in
            the denominator, the KL and the entropy. mu: sampler_logprobs with a correction, else
            old_logprobs. Not of "geometric".
        aggregation: how the losses of the tokens become one number, before it is divided by
            `denominator`:
            "token-mean"                    sum over tokens; denominator: number of valid tokens
            "sequence-mean-token-mean"      sum over sequences of their token mean; number of
                                            sequences
            "sequence-mean-token-sum"       sum over tokens; number of sequences
            "sequence-mean-token-sum-norm"  sum over tokens; number of sequences x a constant length
        log_ratio_limit: log ratios and log corrections are clamped to +- this before exp; the
            gradient is 0 where they are. d of k3 is bounded from above only, by the same limit: far
            below the reference, d < -limit, its gradient 1 - e^d stays.

    Raises:
        ValueError: a value or a combination that has no meaning.
    """

    ratio_level: str = "token"
    surrogate: str = "clip"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = 3.0
    tau_positive: float = 1.0
    tau_negative: float = 1.05
    power_positive: float = 2.0
    power_negative: float = 3.0
    rate_positive: float = 3.0
    rate_negative: float = 2.0
    kl_coef: float = 0.0
    kl_estimator: str = "k3"
    kl_gradient: str = "estimator"
    kl_level: str = "token"
    kl_sampled_from: str = "policy"
    entropy_coef: float = 0.0
    correction: str = "none"
    correction_level: str = "token"
    correction_low: float = 0.0
    correction_high: float = 2.0
    correction_nan: str = "propagate"
    sequence_mask: float = math.inf
    aggregation: str = "token-mean"
    log_ratio_limit: float = 20.0
    arguments: ObjectiveArguments = field(init=False, repr=False, compare=False)
    """As the backends take it."""

    def __post_init__(self) -> None:
        self._check_choices()
        self._check_numbers()
        self._check_combinations()
        correction = CORRECTIONS.index(self.correction)
        if correction and self.correction_nan == "mask":
            correction += len(CORRECTIONS) - 1
        arguments = ObjectiveArguments(
            ratio_level=RATIO_LEVELS.index(self.ratio_level),
            surrogate=SURROGATES.index(self.surrogate),
            ratio_low=1 - self.clip_low,
            ratio_high=1 + self.clip_high,
            dual_clip=self.dual_clip,
            tau_positive=self.tau_positive,
            tau_negative=self.tau_negative,
            power_positive=self.power_positive,
            power_negative=self.power_negative,
            rate_positive=self.rate_positive,
            rate_negative=self.rate_negative,
            correction=correction,
            correction_sequence=self.correction_level == "sequence",
            correction_low=self.correction_low,
            correction_high=self.correction_high,
            kl_straight_through=self.kl_gradient == "k2",
            kl_sequence=self.kl_level == "sequence",
            entropy_coef=self.entropy_coef,
            log_ratio_limit=self.log_ratio_limit,
            sequence_mean=self.aggregation == "sequence-mean-token-mean",
        )
        object.__setattr__(self, "arguments", arguments)

    @property
    def kl_code(self) -> int:
        """Of the estimator, in the enumeration of csrc/arguments/policy_loss.h."""
        code = 1 + KL_ESTIMATORS.index(self.kl_estimator)
        return code + len(KL_ESTIMATORS) * KL_SAMPLED_FROM.index(self.kl_sampled_from)

    def replace(self, **changes: Any) -> "Objective":
        """The same objective with some fields changed."""
        return replace(self, **changes)

    def _check_choices(self) -> None:
        for name, choices in (
            ("ratio_level", RATIO_LEVELS),
            ("surrogate", SURROGATES),
            ("kl_estimator", KL_ESTIMATORS),
            ("kl_gradient", KL_GRADIENTS),
            ("kl_level", KL_LEVELS),
            ("kl_sampled_from", KL_SAMPLED_FROM),
            ("correction", CORRECTIONS),
            ("correction_level", CORRECTION_LEVELS),
            ("correction_nan", CORRECTION_NANS),
            ("aggregation", AGGREGATIONS),
        ):
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")

    def _check_numbers(self) -> None:
        for name, low, high in (
            ("clip_low", 0.0, 1.0),
            ("clip_high", 0.0, math.inf),
            ("kl_coef", 0.0, math.inf),
            ("entropy_coef", 0.0, math.inf),
            ("correction_low", 0.0, math.inf),
            ("correction_high", self.correction_low, math.inf),
            ("sequence_mask", 0.0, math.inf),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                allowed = f">= {low:g}" if high == math.inf else f"in [{low:g}, {high:g}]"
                raise ValueError(f"{name} must be {allowed}, got {value}")
        if not self.dual_clip > 1:
            raise ValueError(f"dual_clip must be above 1, got {self.dual_clip}")
        for name, reason in (
            ("tau_positive", ""),
            ("tau_negative", ""),
            ("power_positive", ""),
            ("power_negative", ""),
            ("rate_positive", ""),
            ("rate_negative", ""),
            ("log_ratio_limit", ": exp overflows float32 above 88"),
        ):
            value = getattr(self, name)
            if not 0 < value <= 80:
                raise ValueError(f"{name} must be in (0, 80], got {value}{reason}")

    def _check_combinations(self) -> None:
        if self.ratio_level == "prefix" and self.surrogate != "stop_gradient":
            raise ValueError(
                "ratio_level 'prefix' weighs the gradient of logp, and takes none itself: "
                f"set surrogate to 'stop_gradient', got {self.surrogate!r}"
            )
        if self.surrogate == "geometric" and self.ratio_level != "sequence":
            raise ValueError(
                "surrogate 'geometric' is a mean over the sequence: "
                f"set ratio_level to 'sequence', got {self.ratio_level!r}"
            )
        if self.surrogate == "geometric" and self.sequence_mask < math.inf:
            raise ValueError(
                f"sequence_mask = {self.sequence_mask:g} takes advantages away whose signs choose "
                "the bounds of surrogate 'geometric': set it to inf, or another surrogate"
            )
        if self.surrogate.startswith("divergence") and self.ratio_level != "token":
            raise ValueError(
                f"surrogate {self.surrogate!r} compares probabilities of a token: "
                f"set ratio_level to 'token', got {self.ratio_level!r}"
            )
        of_policy, of_k2 = self.kl_sampled_from == "policy", self.kl_gradient == "k2"
        if self.kl_estimator == "k1" and of_policy and not of_k2:
            raise ValueError(
                "kl_estimator 'k1' of samples of the policy has a gradient whose expectation is 0: "
                "set kl_gradient to 'k2', got 'estimator'"
            )
        if of_k2 and not (of_policy and self.kl_estimator != "reverse_k3"):
            raise ValueError(
                "kl_gradient 'k2' is that of KL(policy || reference) from samples of the policy: "
                f"set it to 'estimator' with kl_estimator {self.kl_estimator!r} and "
                f"kl_sampled_from {self.kl_sampled_from!r}"
            )


# The baseline is in the advantages, so these papers share one loss: REINFORCE, Williams 1992,
# https://doi.org/10.1007/BF00992696 theorem 1, summed over the tokens of a completion.
_REINFORCE = Objective(surrogate="reinforce", aggregation="sequence-mean-token-sum")
# https://arxiv.org/abs/2402.03300 eq. 3 and 4. Outcome and process supervision differ in the
# advantages, one per completion or one per token.
_GRPO = Objective(kl_coef=0.04, aggregation="sequence-mean-token-mean")

_OFF_POLICY = Objective(
    ratio_level="prefix",
    surrogate="stop_gradient",
    clip_low=1.0,
    clip_high=math.inf,
    aggregation="sequence-mean-token-sum",
)

OBJECTIVES: dict[str, Objective] = {
    "reinforce": _REINFORCE,
    # https://arxiv.org/abs/2402.14740 section 2.3: leave-one-out baseline, KL in the reward
    "rloo": _REINFORCE,
    # https://arxiv.org/abs/2310.10505 algorithm 1: baseline is the reward of the greedy completion
    "remax": _REINFORCE,
    # https://arxiv.org/abs/2504.02546: mean over the tokens of all completions
    "gpg": Objective(surrogate="reinforce"),
    # https://arxiv.org/abs/2501.03262: PPO's clipping without a critic, KL in the reward,
    # advantages normalised over the batch
    "reinforce_plus_plus": Objective(aggregation="sequence-mean-token-mean"),
    # the same paper, baseline of the group: KL in the loss, estimated by k2; the coefficient is a
    # setting of the run
    "reinforce_plus_plus_baseline": Objective(
        kl_coef=1e-3, kl_estimator="k2", aggregation="sequence-mean-token-mean"
    ),
    # https://arxiv.org/abs/1707.06347 eq. 7; the KL shapes the reward, not the loss
    "ppo": Objective(),
    # https://arxiv.org/abs/1912.09729 eq. 8
    "ppo_dual_clip": Objective(surrogate="dual_clip", dual_clip=3.0),
    # https://arxiv.org/abs/1707.06347 eq. 8, with ref_logprobs = old_logprobs; pass kl_coef to
    # `policy_loss` to adapt it. The samples are the old policy's: k3 of KL(old || new)
    "ppo_kl": Objective(surrogate="none", kl_coef=1.0, kl_sampled_from="reference"),
    "grpo": _GRPO,
    # https://arxiv.org/abs/2501.12948 eq. 1 and 2: ratio and KL of the whole completion
    "grpo_response": _GRPO.replace(ratio_level="product", kl_level="sequence"),
    # https://arxiv.org/abs/2503.20783 section 3.2: no length and no std normalisation
    "dr_grpo": Objective(aggregation="sequence-mean-token-sum-norm"),
    # https://arxiv.org/abs/2503.14476 eq. 8: clip-higher, token-level loss, no KL
    "dapo": Objective(clip_low=0.2, clip_high=0.28),
    # https://arxiv.org/abs/2507.18071 eq. 5, bounds of its section 5.1
    "gspo": Objective(
        ratio_level="sequence",
        clip_low=3e-4,
        clip_high=4e-4,
        aggregation="sequence-mean-token-mean",
    ),
    # https://arxiv.org/abs/2602.05261 eq. 7: GSPO's loss of a completion times its length
    "luspo": Objective(
        ratio_level="sequence",
        clip_low=3e-4,
        clip_high=4e-4,
        aggregation="sequence-mean-token-sum",
    ),
    # https://arxiv.org/abs/2602.04879 eq. 11 to 14, old_logprobs being the sampler's; the bounds
    # are those of its users
    "dppo_tv": Objective(surrogate="divergence_tv", clip_low=0.2, clip_high=0.2),
    "dppo_kl": Objective(surrogate="divergence_kl", clip_low=0.05, clip_high=0.05),
    # https://arxiv.org/abs/2602.10693 eq. 17, scaled to be 1 at a ratio of 1, with powers and rates
    # of its code
    "vespo": Objective(ratio_level="product", surrogate="gamma"),
    # https://arxiv.org/abs/2506.13585 eq. 4 and 5, without a lower bound; the upper one is tuned
    # there and not stated: that of DAPO
    "cispo": Objective(surrogate="stop_gradient", clip_low=1.0, clip_high=0.28),
    # https://arxiv.org/abs/2507.20673 eq. 4: log ratios within +-0.4
    "gmpo": Objective(
        ratio_level="sequence",
        surrogate="geometric",
        clip_low=-math.expm1(-0.4),
        clip_high=math.expm1(0.4),
        aggregation="sequence-mean-token-mean",
    ),
    # https://arxiv.org/abs/2511.20347 eq. 5 and 6, temperatures of its experiments
    "sapo": Objective(surrogate="soft_gate", aggregation="sequence-mean-token-mean"),
    # Off-policy policy gradient: every step is weighed by the ratio of the whole trajectory,
    # https://rail.eecs.berkeley.edu/deeprlcourse/ lecture 5
    "off_policy_trajectory": _OFF_POLICY.replace(ratio_level="product"),
    # the same lecture, with per-step causality: the gradient at a step is weighed by the ratios of
    # the steps up to it
    "off_policy_prefix": _OFF_POLICY,
    # and the rewards from it on by the ratios between: those are in the advantages
    "off_policy_causal": _OFF_POLICY,
    # its first-order approximation, by the ratio of the step alone
    "off_policy_first_order": Objective(surrogate="none", aggregation="sequence-mean-token-sum"),
    # GRPO where sampler and learner disagree. Truncated importance sampling:
    # https://fengyao.notion.site/off-policy-rl, cap 2
    "grpo_tis": _GRPO.replace(correction="truncate", correction_high=2.0),
    # masked importance sampling of whole completions: https://richardli.xyz/rl-collapse, cap 2
    "grpo_mis": _GRPO.replace(correction="mask", correction_level="sequence", correction_high=2.0),
    # IcePop, https://arxiv.org/abs/2510.18855: tokens outside [0.5, 5]
    "grpo_icepop": _GRPO.replace(correction="mask", correction_low=0.5, correction_high=5.0),
}


def get_objective(objective: "str | Objective") -> Objective:
    """The row of that name, or the objective itself.

    Raises:
        ValueError: no row has that name; the message lists those that exist.
    """
    if isinstance(objective, Objective):
        return objective
    if objective not in OBJECTIVES:
        raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}; got {objective!r}")
    return OBJECTIVES[objective]
