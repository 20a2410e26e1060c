"""The config of each algorithm: a file of examples/, or the nearest of them with other settings."""

from __future__ import annotations

import shlex
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"

_OUTCOME = "dapo --reward.sources examples.arithmetic:reward --rollout.max_new_tokens 5"
_CRITIC = f"{_OUTCOME} --critic.lr 1e-4 --critic.warmup_steps 2"
_KL = "grpo --steps 20 --evaluation.every_steps 5 --update.epochs"
_DATA = "--data.train runs/arithmetic/{0}.jsonl --data.eval runs/arithmetic/{0}_eval.jsonl"

# As the words of `warpo train examples/<file>.yaml --algorithm NAME ...`
_OTHERS = {
    "reinforce": _OUTCOME,
    "reinforce_reward_to_go": _OUTCOME,
    "opo": _OUTCOME,
    "rloo": f"{_KL} 1",
    "reinforce_plus_plus": f"{_KL} 1",
    "reinforce_plus_plus_baseline": _OUTCOME,
    "remax": _OUTCOME,
    "gpg": _OUTCOME,
    "off_policy_trajectory": f"{_OUTCOME} --update.minibatches 4",
    "off_policy_first_order": f"{_OUTCOME} --update.minibatches 4",
    "off_policy_prefix": f"{_OUTCOME} --update.minibatches 4",
    "a2c": _CRITIC,
    "off_policy_causal": f"{_OUTCOME} --update.minibatches 4",
    "ppo_dual_clip": "ppo",
    "ppo_kl": _CRITIC,
    # 0.05 of the paper is meant for thousands of tokens
    "ppo_length_adaptive": f"{_CRITIC} --loss.gae_lambda length:1 1.0",
    "vapo": f"{_CRITIC} --loss.gae_lambda length:1 1.0",
    "grpo_response": f"{_KL} 1",
    "grpo_token": f"{_KL} 1",
    "grpo_process": f"{_KL} 1 --reward.sources examples.arithmetic:step_rewards --reward.success 2",
    "gdpo": (
        f"{_OUTCOME} --reward.sources examples.arithmetic:reward examples.arithmetic:step_rewards"
    ),
    "pass_at_k": f"{_OUTCOME} --loss.pass_at_k 2",
    "pkpo": f"{_OUTCOME} --loss.pass_at_k 2",
    "dr_grpo": _OUTCOME,
    "gspo": _OUTCOME,
    "luspo": f"{_OUTCOME} --update.minibatches 4",
    "dppo_tv": f"{_OUTCOME} --update.minibatches 4",
    "dppo_kl": f"{_OUTCOME} --update.minibatches 4",
    "vespo": f"{_OUTCOME} --update.minibatches 4",
    "cispo": _OUTCOME,
    "gmpo": _OUTCOME,
    "sapo": _OUTCOME,
    "clip_cov": f"{_OUTCOME} --update.minibatches 4 --loss.covariance_share 0.02",
    "kl_cov": f"{_OUTCOME} --update.minibatches 4 --loss.covariance_share 0.02",
    "grpo_tis": f"{_OUTCOME} --rollout.temperature 1",
    "grpo_mis": _OUTCOME,
    "grpo_icepop": _OUTCOME,
    "iterative_dpo": _OUTCOME,
    "ipo": "dpo",
    "conservative_dpo": "dpo --loss.label_smoothing 0.1",
    "robust_dpo": "dpo --loss.label_smoothing 0.1",
    "hinge": "dpo",
    "slic": "dpo",
    "simpo": "dpo",
    "orpo": "dpo",
    "dpo_nll": "dpo",
    "kto": f"dpo --batch_size 64 {_DATA.format('kto')}",
    "k_wise": f"bradley_terry {_DATA.format('rankings')}",
    # a step is a token; "\n" is what lines of text need
    "process_reward": (
        f"bradley_terry --batch_size 64 {_DATA.format('steps')} --data.step_separator ''"
    ),
    "sac_v": "sac --sac.temperature 0.2",
}


def config_of(algorithm: str) -> tuple[Path, list[str]]:
    """The file and the overrides with which `warpo train` runs an algorithm."""
    if algorithm not in _OTHERS:
        return EXAMPLES / f"{algorithm}.yaml", []
    file, *words = shlex.split(_OTHERS[algorithm])
    name = ["--algorithm", algorithm, "--output_dir", f"runs/arithmetic/{algorithm}"]
    return EXAMPLES / f"{file}.yaml", [*name, *words]
