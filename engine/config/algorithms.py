"""Every algorithm that `warpo train` runs, one row each.

A config names the row and may change its numbers; `resolve` gives the row with these changes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from warpo.engine.config.algorithm import Algorithm
from warpo.kernels.objectives import OBJECTIVES, Objective
from warpo.kernels.preferences import PREFERENCES


def _policy(
    objective: str | Objective, advantages: str, title: str, url: str, **fields: Any
) -> Algorithm:
    if isinstance(objective, str):
        objective = OBJECTIVES[objective]
    return Algorithm(objective=objective, advantages=advantages, title=title, url=url, **fields)


def _outcome(
    objective: str | Objective, baseline: str, title: str, url: str, **fields: Any
) -> Algorithm:
    fields = {"kl_in": "reward", **fields}
    return _policy(objective, "outcome", title, url, baseline=baseline, **fields)


def _group(objective: str | Objective, title: str, url: str, **fields: Any) -> Algorithm:
    fields = {"kl_in": "loss", "advantage_std": "sample", **fields}
    return _outcome(objective, "group", title, url, **fields)


def _critic(objective: str | Objective, title: str, url: str, **fields: Any) -> Algorithm:
    fields = {"kl_in": "reward", "whiten": True, **fields}
    return _policy(objective, "gae", title, url, **fields)


def _preference(row: str, title: str, url: str, loss: str) -> Algorithm:
    others = ("reference",) if PREFERENCES[row].reference else ()
    return Algorithm(
        family="preference",
        title=title,
        url=url,
        objective=PREFERENCES[row],
        others=others,
        loss=loss,
    )


_GRPO = "https://arxiv.org/abs/2402.03300"
_PPO = "https://arxiv.org/abs/1707.06347"
_BERKELEY = "https://rail.eecs.berkeley.edu/deeprlcourse/"
_RLHF = "https://arxiv.org/abs/2203.02155"
# beta of InstructGPT, appendix C.4
_RLHF_KL = 0.02
_ENTROPY = "https://arxiv.org/abs/2505.22617"

_ROWS: dict[str, Algorithm] = {
    "reinforce": _outcome(
        "reinforce", "moving", "REINFORCE, theorem 1; the baseline of its section 6",
        "https://doi.org/10.1007/BF00992696",
    ),
    "reinforce_reward_to_go": _outcome(
        "reinforce", "history", "policy gradient, rewards to go less a baseline, lecture 5",
        _BERKELEY, reward_to_go=True,
    ),
    "opo": _outcome(
        "reinforce", "optimal", "OPO, optimal baseline by length",
        "https://arxiv.org/abs/2505.23585", kl_in="loss",
    ),
    "rloo": _outcome(
        "rloo", "leave_one_out", "RLOO, section 2.3", "https://arxiv.org/abs/2402.14740",
        reward_kl_coef=0.03,
    ),
    "reinforce_plus_plus": _outcome(
        "reinforce_plus_plus", "none", "REINFORCE++ (v9), eq. 1, 4 and 5",
        "https://arxiv.org/abs/2501.03262",
        reward_kl_coef=0.01, reward_to_go=True, whiten=True,
    ),
    "reinforce_plus_plus_baseline": _outcome(
        "reinforce_plus_plus_baseline", "group", "REINFORCE++ with baseline (v9), eq. 6 to 8",
        "https://arxiv.org/abs/2501.03262", kl_in="loss", whiten=True,
    ),
    "remax": _outcome(
        "remax", "greedy", "ReMax, algorithm 1", "https://arxiv.org/abs/2310.10505",
    ),
    "gpg": _outcome(
        "gpg", "group", "GPG, eq. 5 to 8", "https://arxiv.org/abs/2504.02546", kl_in="loss",
        rescaled=True,
    ),
    "off_policy_trajectory": _outcome(
        "off_policy_trajectory", "moving",
        "off-policy policy gradient, ratio of the trajectory, lecture 5",
        _BERKELEY,
    ),
    "off_policy_first_order": _outcome(
        "off_policy_first_order", "moving",
        "off-policy policy gradient, its first order, lecture 5", _BERKELEY,
    ),
    "off_policy_prefix": _outcome(
        "off_policy_prefix", "moving",
        "off-policy policy gradient, ratios of the prefix, lecture 5", _BERKELEY,
    ),
    "off_policy_causal": _policy(
        "off_policy_causal", "causal",
        "off-policy policy gradient, ratios up to the token and on to the reward, lecture 5",
        _BERKELEY,
        baseline="moving", kl_in="reward",
    ),
    "a2c": _critic(
        "reinforce", "advantage actor-critic, section 4 of A3C, with GAE",
        "https://arxiv.org/abs/1602.01783", whiten=False,
    ),
    "ppo": _critic("ppo", "PPO, eq. 7, as in InstructGPT", _PPO, reward_kl_coef=_RLHF_KL),
    "ppo_dual_clip": _critic(
        "ppo_dual_clip", "dual-clip PPO, eq. 8", "https://arxiv.org/abs/1912.09729",
        reward_kl_coef=_RLHF_KL,
    ),
    "ppo_kl": _critic(
        "ppo_kl", "PPO with adaptive KL penalty, eq. 8", _PPO, kl_in="loss",
        previous_reference=True, kl_rule="doubling", kl_target=0.01,
    ),
    "ppo_length_adaptive": _critic(
        OBJECTIVES["ppo"].replace(clip_high=0.28), "length-adaptive GAE of VAPO, eq. 5",
        "https://arxiv.org/abs/2504.05118", gae_lambda=("length:0.05", 1.0),
    ),
    "vapo": _critic(
        OBJECTIVES["ppo"].replace(clip_high=0.28),
        "VAPO: length-adaptive GAE and a loss of right answers",
        "https://arxiv.org/abs/2504.05118", gae_lambda=("length:0.05", 1.0), right_nll_coef=0.1,
    ),
    "ppo_ptx": _critic(
        "ppo", "PPO-ptx of InstructGPT, eq. 2", _RLHF,
        reward_kl_coef=_RLHF_KL, pretraining_coef=27.8,
    ),
    "grpo": _group("grpo", "GRPO, eq. 3", _GRPO),
    "grpo_response": _group(
        "grpo_response", "GRPO of whole completions, DeepSeek-R1, eq. 1 and 2",
        "https://arxiv.org/abs/2501.12948",
    ),
    "grpo_token": _group(
        OBJECTIVES["grpo"].replace(aggregation="token-mean"),
        "GRPO, eq. 3 as a mean over the tokens of the batch", _GRPO,
    ),
    "grpo_process": _policy(
        "grpo", "process", "GRPO with process supervision, section 4.1.3", _GRPO,
        advantage_std="sample",
        caution=(
            "as in the paper, a step's baseline is the mean over all steps of the group: where the "
            "policy decides how many steps there are, the gradient is biased against long or short "
            "completions"
        ),
    ),
    "iterative_grpo": _group(
        "grpo", "iterative GRPO, algorithm 1", _GRPO, reference_every_steps=50,
        trains_reward_model=True,
        caution=(
            "line 12 of the algorithm, the training of the reward model, is done where "
            "reward_model.labels names a source of labels; a reward without a model:DIR stays as "
            "it is"
        ),
    ),
    "gdpo": _policy(
        "grpo", "decoupled", "GDPO, eq. 4 to 7", "https://arxiv.org/abs/2601.05242",
        advantage_std="sample",
    ),
    "pass_at_k": _policy(
        "grpo", "pass_at_k_training", "Pass@k Training, eq. 11 to 15",
        "https://arxiv.org/abs/2508.10751", pass_at_k=4,
    ),
    "pkpo": _policy(
        "reinforce", "pkpo", "PKPO, eq. 33", "https://arxiv.org/abs/2505.15201", pass_at_k=4,
    ),
    "dr_grpo": _group(
        "dr_grpo", "Dr. GRPO, section 3.2", "https://arxiv.org/abs/2503.20783",
        advantage_std="none",
    ),
    "dapo": _group("dapo", "DAPO, eq. 8 and 11", "https://arxiv.org/abs/2503.14476", max_draws=10),
    "gspo": _group("gspo", "GSPO, eq. 5", "https://arxiv.org/abs/2507.18071"),
    "luspo": _group("luspo", "LUSPO, eq. 7", "https://arxiv.org/abs/2602.05261"),
    "dppo_tv": _group(
        "dppo_tv", "DPPO, eq. 11, total variation", "https://arxiv.org/abs/2602.04879"
    ),
    "dppo_kl": _group("dppo_kl", "DPPO, eq. 11, KL", "https://arxiv.org/abs/2602.04879"),
    "vespo": _group("vespo", "VESPO, eq. 17", "https://arxiv.org/abs/2602.10693"),
    "cispo": _group("cispo", "CISPO, eq. 4 and 5", "https://arxiv.org/abs/2506.13585"),
    "gmpo": _group("gmpo", "GMPO, eq. 4", "https://arxiv.org/abs/2507.20673"),
    "sapo": _group("sapo", "SAPO, eq. 5 and 6", "https://arxiv.org/abs/2511.20347"),
    "clip_cov": _group(
        OBJECTIVES["ppo"].replace(clip_low=1.0, clip_high=math.inf), "Clip-Cov, eq. 10 to 12",
        _ENTROPY, covariance="clip", max_draws=10,
    ),
    "kl_cov": _group(
        OBJECTIVES["ppo"].replace(surrogate="none"), "KL-Cov, eq. 10, 13 and 14", _ENTROPY,
        covariance="kl", max_draws=10,
    ),
    "grpo_tis": _group(
        "grpo_tis", "GRPO, truncated importance sampling",
        "https://fengyao.notion.site/off-policy-rl",
    ),
    "grpo_mis": _group(
        "grpo_mis", "GRPO, masked importance sampling", "https://richardli.xyz/rl-collapse"
    ),
    "grpo_icepop": _group("grpo_icepop", "GRPO with IcePop, eq. 1 and 2", "https://arxiv.org/abs/2510.18855"),
    "iterative_dpo": Algorithm(
        title="iterative reasoning preference optimisation, eq. 1",
        url="https://arxiv.org/abs/2404.19733", objective=PREFERENCES["dpo_nll"],
        advantages="pairs", previous_reference=True,
    ),
    "sft": Algorithm(
        family="supervised", title="supervised fine-tuning, as step 1 of InstructGPT", url=_RLHF,
        loss="-log pi of the completion, mean over tokens",
    ),
    "dpo": _preference(
        "dpo", "DPO, eq. 7", "https://arxiv.org/abs/2305.18290",
        "-log sigmoid of the difference of a pair's rewards",
    ),
    "ipo": _preference(
        "ipo", "IPO, eq. 17", "https://arxiv.org/abs/2310.12036",
        "squared distance of the difference from 1 / (2 beta)",
    ),
    "conservative_dpo": _preference(
        "conservative_dpo", "conservative DPO, eq. 3", "https://ericmitchell.ai/cdpo.pdf",
        "DPO, a share of the pairs being the wrong way round",
    ),
    "robust_dpo": _preference(
        "robust_dpo", "robust DPO, section 3.1", "https://arxiv.org/abs/2403.00409",
        "DPO, unbiased under such a share",
    ),
    "hinge": _preference(
        "hinge", "the hinge loss of RSO, eq. 10", "https://arxiv.org/abs/2309.06657",
        "max(0, 1 - difference of a pair's rewards)",
    ),
    "slic": _preference(
        "slic", "SLiC-HF, eq. 2", "https://arxiv.org/abs/2305.10425",
        "the same of log-likelihoods, without a reference",
    ),
    "simpo": _preference(
        "simpo", "SimPO, eq. 6", "https://arxiv.org/abs/2405.14734",
        "-log sigmoid of the difference of mean logprobs, less a margin",
    ),
    "orpo": _preference(
        "orpo", "ORPO, eq. 6 and 7", "https://arxiv.org/abs/2403.07691",
        "-log pi of the chosen, and -log sigmoid of the log odds ratio",
    ),
    "dpo_nll": _preference(
        "dpo_nll", "DPO + NLL, eq. 1", "https://arxiv.org/abs/2404.19733",
        "DPO, and -log pi of the chosen, mean over tokens",
    ),
    "kto": Algorithm(
        family="preference", title="KTO (v2 and later), eq. 8", url="https://arxiv.org/abs/2402.01306",
        others=("reference",), loss="of completions labelled good or bad",
    ),
    "bradley_terry": Algorithm(
        family="reward model", title="reward model of pairs, as in Llama 2, eq. 2",
        url="https://arxiv.org/abs/2307.09288", trained="reward model",
        loss="-log sigmoid(chosen - rejected - margin)",
    ),
    "k_wise": Algorithm(
        family="reward model", title="reward model of rankings, InstructGPT eq. 1", url=_RLHF,
        trained="reward model", loss="Bradley-Terry over all pairs of a ranking",
    ),
    "process_reward": Algorithm(
        family="reward model", title="process reward model, section 2.6", url="https://arxiv.org/abs/2305.20050",
        trained="reward model", loss="cross-entropy of the label of each step",
    ),
    "sac": Algorithm(
        family="control", title="soft actor-critic, eq. 5, 9 and 18", url="https://arxiv.org/abs/1812.05905",
        others=("two critics", "their Polyak averages"), loss="soft Q and soft policy improvement",
    ),
    "sac_v": Algorithm(
        family="control", title="soft actor-critic with a value function, eq. 5 to 12",
        url="https://arxiv.org/abs/1801.01290",
        others=("two critics", "value function", "its Polyak average"),
        loss="soft V, soft Q and soft policy improvement",
    ),
    "sac_discrete": Algorithm(
        family="control", title="soft actor-critic of discrete actions, algorithm 1",
        url="https://arxiv.org/abs/1910.07207", others=("two critics", "their Polyak averages"),
        loss="soft Q and soft policy improvement, expectations over the actions in closed form",
    ),
    "ppo_gymnasium": Algorithm(
        family="control", title="PPO of N actors x T steps, algorithm 1", url=_PPO,
        others=("critic",), objective=OBJECTIVES["ppo"], loss="clipped surrogate",
    ),
    "trpo_gymnasium": Algorithm(
        family="control", title="TRPO, eq. 14", url="https://arxiv.org/abs/1502.05477",
        others=("critic",), loss="surrogate, the mean KL at most max_kl",
    ),
}  # fmt: skip

ALGORITHMS: Mapping[str, Algorithm] = {name: row.replace(name=name) for name, row in _ROWS.items()}
