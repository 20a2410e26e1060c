"""What a row of the table of algorithms says.

A row of the policy family is what it is made of: an estimator of advantages (estimators.py), an
objective (kernels/objectives.py), where the KL penalty stands, and which models it needs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from warpo.engine.config.estimators import BASELINES, ESTIMATORS, Baseline, Estimator
from warpo.kernels.objectives import Objective
from warpo.kernels.preferences import Preference

Std = Literal["sample", "population", "none"]
PairChoice = Literal["ranked", "extremes", "all"]
Family = Literal["policy", "supervised", "preference", "reward model", "control"]


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """One row.

    Attributes:
        family: the data that the row trains from, which decides its settings.
        title, url: the paper, with the equation.
        trained, others: the models of a row that is not of the policy family.
        loss: the loss that such a row minimises, in words.
        objective: of the policy, or the loss of pairs.
        advantages: key of ESTIMATORS.
        baseline: key of BASELINES, which "outcome" subtracts from the reward.
        baseline_decay: share of the old baseline in the new one, of "moving".
        reward_to_go: a token's reward is what is still to come, instead of that of the whole
            completion, of "outcome".
        advantage_std: divisor of the group's advantages.
        pass_at_k: number k of completions whose best reward is raised, of "pass_at_k_training" and
            "pkpo".
        rescaled: the advantages are multiplied by groups over groups of unequal rewards.
        whiten: the advantages are normalised over all tokens of the step.
        kl_in: whether the KL to the reference is taken off the reward of each token or added to the
            loss.
        reward_kl_coef: weight of that KL in the reward. In the loss it is the objective's.
        reward_kl_estimator: of the KL in the reward.
        reward_entropy_coef: weight of -log pi_old of each token, which is added to its reward.
        reward_entropy_target: nats per token that it learns to keep the entropy at, and the rate of
            learning its logarithm, https://arxiv.org/abs/1812.05905 eq. 18; None: it is fixed.
        reward_normalize: the rewards of completions are normalised by those of the step ("batch")
            or of all steps ("running").
        reward_clip: bound on the absolute value of a reward, after that; None: no bound.
        previous_reference: the reference is the policy that the step began with.
        kl_rule: rule by which the coefficient of the KL follows kl_target: "proportional",
            https://arxiv.org/abs/1909.08593 section 2.2, or "doubling",
            https://arxiv.org/abs/1707.06347 section 4.
        kl_target: nats per token; None: the coefficient is fixed.
        reference_every_steps: replace the reference with the policy every N steps; 0: never.
        gamma: discount of rewards and values from token to token, of "gae" and "outcome".
        gae_lambda: lambda of the advantages, and of the returns that the critic learns.
            "length:ALPHA": 1 - 1 / (ALPHA x length of the completion), at least 0,
            https://arxiv.org/abs/2504.05118.
        pairs: which completions of a group "pairs" compares, see `make_pairs`.
        max_draws: how often prompts are drawn until all groups of a step have unequal rewards. 1:
            groups of equal rewards are kept.
        pretraining_coef: weight of the supervised loss on pre-training data, next to the policy's.
        trains_reward_model: the reward model learns too, see config/reward_model.py.
        right_nll_coef: weight of the negative log-likelihood of right completions, next to the
            policy's loss.
        covariance: what is done to tokens whose logprob and advantage are high together: they have
            no surrogate ("clip"), or pay a KL to the old policy ("kl"), see learner/covariance.py.
        covariance_share: share of the tokens of an optimizer step that are chosen.
        covariance_range: lowest and highest covariance of those that "clip" chooses from.
        covariance_kl_coef: weight of the KL of "kl".
        caution: a warning to read before relying on the row.
    """

    name: str = ""
    family: Family = "policy"
    title: str
    url: str
    trained: str = "actor"
    others: tuple[str, ...] = ()
    loss: str = ""
    objective: Objective | Preference | None = None
    advantages: str = ""
    baseline: str = "none"
    baseline_decay: float = 0.9
    reward_to_go: bool = False
    advantage_std: Std = "none"
    pass_at_k: int = 1
    rescaled: bool = False
    whiten: bool = False
    kl_in: Literal["reward", "loss"] = "loss"
    reward_kl_coef: float = 0.0
    reward_kl_estimator: str = "k1"
    reward_entropy_coef: float = 0.0
    reward_entropy_target: tuple[float, float] | None = None
    reward_normalize: Literal["none", "batch", "running"] = "none"
    reward_clip: float | None = None
    previous_reference: bool = False
    kl_rule: Literal["proportional", "doubling"] = "proportional"
    kl_target: float | None = None
    reference_every_steps: int = 0
    gamma: float = 1.0
    gae_lambda: tuple[float | str, float] = (0.95, 0.95)
    pairs: PairChoice = "ranked"
    max_draws: int = 1
    pretraining_coef: float = 0.0
    trains_reward_model: bool = False
    right_nll_coef: float = 0.0
    covariance: Literal["none", "clip", "kl"] = "none"
    covariance_share: float = 0.0002
    covariance_range: tuple[float, float] = (1.0, 5.0)
    covariance_kl_coef: float = 1.0
    caution: str = ""

    @property
    def estimator(self) -> Estimator:
        """The facts of its advantages; those of a row that has none are all False."""
        return ESTIMATORS.get(self.advantages, Estimator(text=""))

    @property
    def subtracts(self) -> Baseline:
        """The facts of its baseline."""
        return BASELINES[self.baseline]

    @property
    def needs_group(self) -> bool:
        """True if it compares a completion with others of its prompt, so there must be two."""
        return self.estimator.needs_group or self.subtracts.of_group

    @property
    def divides_by_std(self) -> bool:
        """True if advantages may be divided by the deviation of the group."""
        return self.estimator.needs_steps or self.subtracts.of_group or self.advantage_std != "none"

    @property
    def may_redraw(self) -> bool:
        """True if groups of one reward teach it nothing, so that others may be drawn instead."""
        return self.subtracts.of_group and not self.reward_to_go

    @property
    def advantage_text(self) -> str:
        """The formula of its advantages, in words."""
        if not self.estimator.reads_baseline:
            return self.estimator.text
        text = "reward-to-go" if self.reward_to_go else "reward"
        text = self.estimator.text or text
        text += f" - {self.subtracts.text}" if self.subtracts.text else ""
        text += ", over its standard deviation" if self.advantage_std != "none" else ""
        text += ", times groups over groups of unequal rewards" if self.rescaled else ""
        return text + (", normalised over the batch" if self.whiten else "")

    @property
    def has_critic(self) -> bool:
        """True if the advantages need values of states."""
        return self.estimator.needs_critic

    @property
    def kl_in_reward(self) -> bool:
        """True if the KL is subtracted from the rewards instead of added to the loss."""
        return self.kl_in == "reward"

    @property
    def kl_coef(self) -> float:
        """Weight of the KL, wherever it stands."""
        if self.kl_in_reward:
            return self.reward_kl_coef
        return self.objective.kl_coef if isinstance(self.objective, Objective) else 0.0

    @property
    def kl_adapts_in_loss(self) -> bool:
        """True if the objective's kl_coef changes from step to step."""
        return self.kl_target is not None and not self.kl_in_reward

    @property
    def kl_adapts_to_step(self) -> bool:
        """True if kl_coef follows the KL to the policy that the step began with."""
        return self.kl_target is not None and self.previous_reference

    @property
    def has_reference(self) -> bool:
        """True if a frozen model is held next to the policy."""
        return self.kl_coef > 0 and not self.previous_reference

    @property
    def needs_old_logprobs(self) -> bool:
        """True if they are read before the policy's loss is: by rewards, by what its reference is,
        by the choice of tokens, or by the returns of an optimizer step.
        """
        rewards = self.reward_entropy_coef > 0 or self.reward_entropy_target is not None
        rewards = rewards or (self.kl_in_reward and self.kl_coef > 0)
        chooses = self.covariance != "none" or self.estimator.is_causal
        return rewards or chooses or self.previous_reference

    @property
    def models(self) -> tuple[str, ...]:
        """The models that a run holds, the trained one first."""
        if self.family != "policy":
            return (self.trained, *self.others)
        critic = ("critic",) if self.has_critic else ()
        return ("actor", *critic, "reward", *(("reference",) if self.has_reference else ()))

    def replace(self, **changes: Any) -> Algorithm:
        """The same row with some fields changed."""
        return replace(self, **changes)
