"""The sections of a run's settings, and the types of single values.

The text under a field is its line in `warpo train --help`.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

from warpo.engine.config import reward_kinds
from warpo.engine.config.estimators import BASELINES
from warpo.engine.config.samplers import SAMPLERS
from warpo.kernels.objectives import AGGREGATIONS, KL_ESTIMATORS

Text = Annotated[str, Field(min_length=1)]
FilePathOrEmpty = Annotated[str, Field(pattern=r"^[^\x00]*$"), AfterValidator(os.path.expanduser)]
FilePath = Annotated[FilePathOrEmpty, Field(min_length=1)]
Texts = Annotated[
    tuple[Text, ...],
    Field(min_length=1),
    BeforeValidator(lambda v: [v] if isinstance(v, str) else v),
]
Count = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
# The range that torch takes.
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]
# The range that vLLM takes in a request.
Copies = Annotated[int, Field(ge=1, le=16384)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Unit = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(gt=0, le=1)]
if TYPE_CHECKING:
    SamplerName = str
    BaselineName = str
    Aggregation = str
    KlEstimator = str
else:
    SamplerName = Literal[*SAMPLERS]
    BaselineName = Literal[*BASELINES]
    Aggregation = Literal[*AGGREGATIONS]
    KlEstimator = Literal[*KL_ESTIMATORS]
LengthAdaptive = Annotated[str, Field(pattern=r"^length:\d*\.?\d+$")]

# Bound on what rounding adds to a logprob, relative to logprobs beyond 1. Seen of random models
# of 4 to 24 layers whose logprobs reach -90, vLLM against the learner on a CPU: 2e-4 in float32,
# where tensor cores may add TF32; 0.96 in bfloat16, and a mean of 0.09. float16 has 3 bits more.
ROUNDING = {"float32": 0.01, "float16": 0.125, "bfloat16": 1.0}

checked = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


@dataclass(frozen=True, kw_only=True, config=checked)
class DataSettings:
    """Prompts to learn from and to be measured on."""

    train: FilePath
    """JSONL (gzipped or not) or Parquet file, or a folder of Parquet files or of a data set that
    `datasets` saved.
    Rows {"prompt": text or [{"role", "content"}, ...], further fields}."""
    eval: Annotated[Count | FilePathOrEmpty, Field(union_mode="left_to_right")] = ""
    """Held-out prompts: a file or folder as for train, or a number of prompts to take out of train,
    at random by seed, with all their repetitions. Empty: none."""


@dataclass(frozen=True, kw_only=True, config=checked)
class RewardSettings:
    """Reward functions and models that score completions."""

    sources: Annotated[
        Texts,
        Field(
            description='One source or several, each "[WEIGHT * ]SOURCE"; the reward is their '
            f"weighted sum. SOURCE: {reward_kinds.HELP}"
        ),
    ]
    deadline_s: Annotated[float, Field(gt=0, le=86400)] = 30.0
    """Seconds that a call of a function or a server may take; then a function is killed, with all
    that it started. math: seconds per completion, at most 5; a call may take 10 times that plus
    0.2 s per completion; completions not judged by then get reward 0."""
    on_error: Literal["stop", "zero", "retry"] = "stop"
    """What to do if a call of a function or a server fails: the function raises, dies, needs too
    much memory or returns nonsense, the server refuses, or the deadline passes. stop: end the
    run, with a checkpoint. retry: make the call again after 1, 2 and 4 s, then stop. zero: ask for
    its completions one by one, for at most 10 deadlines; those that fail again get reward 0 from
    that source. The metrics reward/failed and reward/retries count completions and calls."""
    label_field: str = ""
    """Data field that a server of openrlhf: gets as labels. Empty: it gets empty texts."""
    workers: Annotated[int, Field(ge=1, le=1024)] = 1
    """Processes per function and concurrent requests per server, between which the completions of a
    call are split in order. A function that compares completions needs 1."""
    memory_gib: Annotated[float, Field(ge=0.25, le=65536)] = 64.0
    """Memory that a process of a function may allocate, GiB."""
    normalize: Literal["none", "batch", "running"] = "none"
    """Bring the rewards that are learned from to mean 0 and deviation 1: of the step (batch), or of
    all steps (running). Metrics and evaluations show them as they are."""
    clip: Positive | Literal["none"] = "none"
    """Bound on the absolute value of a reward that is learned from, after reward.normalize."""
    truncated: Literal["score", "zero"] = "score"
    """Reward of a completion that the length limit cut: what its sources give it, or 0 whatever
    they do, so that a reward comes with an end-of-sequence token only."""
    success: float = 1.0
    """A completion with at least this reward counts as correct in the accuracy."""


@dataclass(frozen=True, kw_only=True, config=checked)
class RewardModelSettings:
    """Training of the model:DIR among reward.sources during the run, on pairs of sampled
    completions: line 12 of algorithm 1 in https://arxiv.org/abs/2402.03300."""

    labels: Text = "algorithm"
    """Source whose scores label the completions, written as in reward.sources without a weight: two
    of a prompt with unequal scores are a pair. One that is not among reward.sources is measured at
    weight 0. none: the reward model stays as it is. "algorithm": none, but iterative_grpo with a
    model:DIR asks for one of the two."""
    every_steps: Count | Literal["reference"] = "reference"
    """Steps after which the reward model learns from the pairs of these steps; then its bias is set
    anew. reference: loss.reference_every_steps."""
    pairs_per_step: Count = 64
    """Pairs of a step that are kept to learn from, at most, drawn at random from all of it."""
    replay: Fraction = 0.1
    """Share of the pairs of a batch that are older, as far as there are any."""
    replay_size: Count = 4096
    """Older pairs that are kept to draw from: a random sample of all that there were."""
    batch_size: Count = 64
    """Pairs of an optimizer step; each pair that is learned from is in one of them."""
    lr: Positive = 1e-5
    """Learning rate of the reward model; the rest of update holds for it too."""


@dataclass(frozen=True, kw_only=True, config=checked)
class RolloutSettings:
    """Completions that are sampled in a step."""

    prompts_per_step: Count = 8
    """Prompts drawn in a step."""
    group_size: Copies = 8
    """Completions per prompt; at least 2 for group-relative algorithms."""
    max_draws: Count | Literal["algorithm"] = "algorithm"
    """Dynamic sampling: at most N draws to replace groups whose rewards are all equal.
    "algorithm": 10 for dapo, clip_cov and kl_cov, 1 for the others, which keeps all."""
    temperature: Annotated[float, Field(ge=0.01, le=2)] = 1.0
    """Sampling temperature in training."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the most probable tokens whose mass reaches top_p; 1 disables it. Below 1 the
    sampler's logprobs are those of the truncated distribution and the learner's of the whole one,
    so old_logprobs take a forward pass of the learner, and only loss.correction sees the
    difference."""
    top_k: NonNegativeInt = 0
    """Sample from the k most probable tokens, applied before top_p; 0 disables it. As with top_p,
    old_logprobs then take a forward pass of the learner, and only loss.correction sees the
    difference."""
    max_new_tokens: Count = 256
    """Length limit of a completion, in tokens."""
    max_model_len: Count = 1024
    """Length limit of prompt and completion together, in tokens."""
    dtype: Literal["same", "float32", "bfloat16", "float16"] = "same"
    """Type of the sampler's weights. "same": that of the learner."""
    kv_cache_gib: Positive | Literal["auto"] = "auto"
    """Memory of vLLM's KV cache in GiB. The transformers sampler has no such cache. auto: on CUDA
    what the memory plan leaves of nine tenths of the free memory, at most what the sequences that
    are sampled together fill; on a CPU 4."""

    @property
    def truncated(self) -> bool:
        """True if some tokens cannot be drawn."""
        return self.top_p < 1 or self.top_k > 0

    @property
    def kv_cache_bytes(self) -> int:
        """kv_cache_gib in bytes; 0 while "auto" is not settled."""
        return 0 if self.kv_cache_gib == "auto" else int(self.kv_cache_gib * 2**30)


@dataclass(frozen=True, kw_only=True, config=checked)
class LossSettings:
    """Numbers of the algorithm. "algorithm": the value in its row, see `warpo algorithms NAME`."""

    clip_range: tuple[Unit, NonNegative] | Literal["algorithm"] = "algorithm"
    """The ratio is clipped below at 1 - the first and above at 1 + the second."""
    kl_coef: NonNegative | Literal["algorithm"] = "algorithm"
    """Weight of the KL to the reference, the model that step 1 starts from. 0 needs no reference.
    In ppo_kl the initial weight; in iterative_dpo the beta of DPO."""
    kl_estimator: KlEstimator | Literal["algorithm"] = "algorithm"
    """Estimator of that KL. reverse_k3: of KL(reference || policy)."""
    kl_in: Literal["algorithm", "reward", "loss"] = "algorithm"
    """Where that KL goes: subtracted from the reward of each token, or added to the loss."""
    kl_gradient: Literal["algorithm", "estimator", "k2"] = "algorithm"
    """Gradient of the KL in the loss: that of its estimator, or of k2, whose expectation is the
    gradient of the KL."""
    kl_level: Literal["algorithm", "token", "sequence"] = "algorithm"
    """The KL in the loss is per token, or per completion, from its summed log ratio."""
    kl_target: Positive | Literal["algorithm", "fixed"] = "algorithm"
    """KL in nats per token that kl_coef is adapted towards after every step. fixed: kl_coef stays.
    In ppo_kl the KL is measured after the last optimizer step, on one completion per prompt."""
    reference_every_steps: NonNegativeInt | Literal["algorithm"] = "algorithm"
    """Replace the reference with the policy every N steps; 0: never."""
    entropy_coef: NonNegative | Literal["algorithm"] = "algorithm"
    """Weight of the entropy bonus."""
    aggregation: Aggregation | Literal["algorithm"] = "algorithm"
    """How token losses are aggregated. token-mean: mean over all tokens of an optimizer step.
    sequence-mean-...: mean over completions of the mean over their tokens (token-mean), the sum
    (token-sum), or the sum / rollout.max_new_tokens (token-sum-norm)."""
    reward_entropy_coef: NonNegative | Literal["algorithm"] = "algorithm"
    """Weight of the entropy in the reward: -log of the old policy's probability of each token is
    added to its reward."""
    reward_entropy_target: tuple[Positive, Positive] | Literal["none"] = "none"
    """Target entropy in nats per token, which reward_entropy_coef learns to hold as SAC's
    temperature does, and the learning rate of its logarithm: after a step the coefficient is
    multiplied by exp(-rate x (entropy - target)). none: the coefficient stays."""
    gamma: Unit | Literal["algorithm"] = "algorithm"
    """Discount of rewards and values from token to token."""
    gae_lambda: tuple[Unit | LengthAdaptive, Unit] | Literal["algorithm"] = "algorithm"
    """Lambda of the advantages and lambda of the critic's returns, with a critic. "length:ALPHA" as
    the first means 1 - 1 / (ALPHA x tokens of the completion), at least 0."""
    baseline: BaselineName | Literal["algorithm"] = "algorithm"
    """What is subtracted from the reward of a completion. history: mean of the rewards of all
    earlier steps. moving: their moving average. batch: mean of the step. group: mean of the
    completions of the prompt. leave_one_out: of the others. optimal: of all, weighted by length.
    greedy: reward of the most probable completion of the prompt."""
    baseline_decay: Fraction | Literal["algorithm"] = "algorithm"
    """Weight of the old average in the new one, for baseline: moving."""
    reward_to_go: bool | Literal["algorithm"] = "algorithm"
    """Credit a token with the rewards and the KL from its position on, instead of all of them."""
    advantage_std: Literal["algorithm", "sample", "population", "none"] = "algorithm"
    """Divide reward - baseline by the group's standard deviation (n - 1 or n in the denominator),
    for baselines of the group. none: do not."""
    pass_at_k: Count | Literal["algorithm"] = "algorithm"
    """The k of pass_at_k and pkpo, which raise the best reward among k completions instead of the
    mean reward."""
    whiten: bool | Literal["algorithm"] = "algorithm"
    """Normalise the advantages to mean 0 and deviation 1 over the tokens of a step."""
    nll_coef: NonNegative | Literal["algorithm"] = "algorithm"
    """In iterative_dpo the weight of the negative log-likelihood of the chosen completions, in nats
    per token."""
    right_nll_coef: NonNegative | Literal["algorithm"] = "algorithm"
    """Weight of the negative log-likelihood of the completions with at least reward.success, the
    mean over their tokens in an optimizer step. "algorithm": 0.1 for vapo, 0 for the others."""
    covariance_share: Share | Literal["algorithm"] = "algorithm"
    """Share of the tokens of an optimizer step that clip_cov and kl_cov choose by the covariance of
    logprob and advantage; at least one token. Every optimizer step of a step but the first takes
    a forward pass over its rollouts."""
    covariance_range: tuple[float, float] | Literal["algorithm"] = "algorithm"
    """Lowest and highest covariance of the tokens among which clip_cov draws those without policy
    loss."""
    covariance_kl_coef: Positive | Literal["algorithm"] = "algorithm"
    """Weight of the KL to the old policy, |logp - old_logp|, that kl_cov adds to the losses of the
    tokens with the largest covariances."""
    sequence_mask: NonNegative | Literal["algorithm"] = "algorithm"
    """Off-policy sequence masking: tokens with a negative advantage have no policy loss in a
    completion whose mean logprob has fallen by more than this many nats per token since it was
    sampled. "algorithm": none."""
    pairs: Literal["algorithm", "ranked", "extremes", "all"] = "algorithm"
    """Which completions of a prompt iterative_dpo compares. ranked: best with worst,
    second best with second worst, and so on. extremes: best with worst. all: each with every
    worse one, at the cost of as many forward and backward passes."""
    correction: Literal[
        "algorithm", "none", "truncate_token", "truncate_sequence", "mask_token", "mask_sequence"
    ] = "algorithm"
    """Weight w = exp(old_logprobs - sampler's) of a token, or of the sum over its completion, where
    sampler and learner differ. truncate: w cut to the range. mask: w in the range, 0 outside. With
    either, old_logprobs are the learner's in every step. none: they are only where the sampler's
    differ, and the run says that nothing corrects for it."""
    correction_range: tuple[NonNegative, NonNegative] | Literal["algorithm"] = "algorithm"
    """Lowest and highest weight w of that correction."""


@dataclass(frozen=True, kw_only=True, config=checked)
class CriticSettings:
    """The value model of the algorithms with gae."""

    model: FilePath = "policy"
    """Initial critic. policy: a network of its own with the policy's weights. shared: a head on
    the policy's own trunk. Otherwise the directory of a reward model, or of any classifier of one
    label."""
    lr: Positive = 1e-5
    """Learning rate of a separate critic, to which the other settings of update apply too."""
    warmup_steps: NonNegativeInt = 0
    """First steps, in which only the critic learns and the policy stays fixed."""
    clip_range: Positive | Literal["none"] = 0.2
    """How far a value may move from its old one and still lower the loss. none: any distance."""
    coef: Positive = 0.5
    """Weight of the value loss next to the policy's, if the critic is shared. That loss is half the
    squared error: coef is twice the c1 of papers that write c1 (V - R)^2."""
    aggregation: Aggregation = "token-mean"
    """How the value losses of tokens are aggregated, as loss.aggregation."""
    bootstrap: bool = False
    """Bootstrap truncated completions: what would have followed counts as the value of the state
    after the last token, instead of 0 (https://arxiv.org/abs/1712.00378)."""


@dataclass(frozen=True, kw_only=True, config=checked)
class PretrainingSettings:
    """Supervised examples that are mixed into every optimizer step of the policy (ppo_ptx)."""

    data: FilePathOrEmpty = ""
    """Lines {"prompt", "completion"}, or {"text"}, of which every token is learned. Empty: none."""
    coef: NonNegative | Literal["algorithm"] = "algorithm"
    """Weight of their mean -log pi. "algorithm": 27.8 for ppo_ptx, 0 for the others."""
    aggregation: Literal["token-mean", "sequence-mean-token-sum"] = "token-mean"
    """That mean: over all tokens, or over the examples of the sum over their tokens, as in eq. 2 of
    InstructGPT."""


@dataclass(frozen=True, kw_only=True, config=checked)
class UpdateSettings:
    """AdamW on the rollouts of a step."""

    lr: Positive = 1e-6
    """Learning rate after warm-up."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Decay of AdamW's first and second moment."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay."""
    max_grad_norm: Positive = 1.0
    """Gradients of a larger L2 norm are scaled down to it. A large number switches it off."""
    optimizer_state: Literal["device", "host"] = "device"
    """Where moments and float32 master weights are kept and AdamW runs. host: saves 8 (float32) or
    12 (bfloat16) bytes per weight on the GPU, at the cost of an optimizer step on the CPU."""
    warmup_steps: NonNegativeInt = 0
    """Optimizer steps in which the learning rate rises linearly to lr."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After warm-up the learning rate stays, or falls to 0 at the end of the run, linearly or by
    half a cosine. Optimizer steps that are skipped, by max_kl or for want of pairs, count as
    taken."""
    epochs: Count = 1
    """Passes over the rollouts of a step, each in an order of its own."""
    max_kl: Positive | Literal["none"] = "none"
    """Ends the epochs of a step, of the critic too, after the first that brings the KL of the
    policy that the step began with to the present one above this, in nats per token. It takes a
    forward pass over one completion of each prompt after every epoch."""
    minibatches: Count = 1
    """Optimizer steps in a pass."""
    token_budget: Count = 16384
    """Tokens of a micro-batch, those that its sequences share counted once. Changes memory and
    speed, never the gradient."""
    activation_checkpointing: Literal["auto", "none", "block"] = "auto"
    """block: keep only the input of each layer for the backward pass, which computes the layer a
    second time: less memory, about a third more time, the same gradient bit for bit. Holds for
    critic and reward model too. auto: on CUDA block where the memory plan of a run without it does
    not fit, else none; on a CPU none."""
    compile: bool = False
    """Compile what surrounds the attention of a layer with torch.compile: the first step takes
    longer, later ones less. Not for mixtures of experts."""

    @property
    def per_step(self) -> int:
        """Optimizer steps of a step."""
        return self.epochs * self.minibatches


@dataclass(frozen=True, kw_only=True, config=checked)
class ProbeSettings:
    """Proof that learner and sampler compute with the same weights: by the rollouts of every step
    before the weights move on, and by tokens that both score before an evaluation, before a
    checkpoint, and after every step where top_k or top_p truncate what is sampled."""

    tolerance: Positive | Literal["auto"] = "auto"
    """Largest |learner - sampler| / max(1, |logprob|) of a token that counts as rounding; a tenth
    of it for the mean over tokens. "auto": 0.01 in float32, 0.125 and 1 where learner or sampler
    are float16 and bfloat16."""
    num_sequences: NonNegativeInt = 4
    """Rollouts that are compared. 0: none, and no mismatch/ metrics."""


@dataclass(frozen=True, kw_only=True, config=checked)
class EvaluationSettings:
    """Accuracy on data.eval."""

    every_steps: NonNegativeInt = 0
    """Evaluate every N steps; 0: never."""
    max_prompts: Count = 256
    """Prompts that are evaluated, from the start of the file."""
    samples: Copies = 1
    """Completions per prompt. 1: the most probable one. More: sampled as in training, and besides
    the accuracy pass@k is estimated for k = 1, 2, 4, ... up to this number."""


@dataclass(frozen=True, kw_only=True, config=checked)
class CheckpointSettings:
    """Saved to output_dir/checkpoints; the last step is always saved."""

    every_steps: NonNegativeInt = 0
    """Save every N steps; 0: as every_minutes says."""
    every_minutes: NonNegative = 30.0
    """Save at the end of a step once N minutes have passed since the last checkpoint; 0: never."""
    keep: NonNegativeInt = 2
    """Newest checkpoints that are kept. 0: all."""
