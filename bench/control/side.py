"""One run of one trainer, in a process of its own: python -m warpo.bench.control.side NAME CONFIG
RESULT [--key value ...]. Writes the returns of its evaluations and the seconds that it took.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from warpo.bench import peers
from warpo.engine.config.control import ControlConfig
from warpo.engine.config.file import read_tree
from warpo.engine.run.log import read_rows
from warpo.engine.trainers.control.environments import evaluate

Curve = list[tuple[int, float]]


def warpo_curve(config: ControlConfig) -> Curve:
    from warpo.engine.trainers.control.train import run

    run(config)
    rows = read_rows(Path(config.output_dir) / "metrics.jsonl")
    return [(row["step"], row["eval/return"]) for row in rows if "eval/return" in row]


def stable_baselines3_curve(config: ControlConfig) -> Curve:
    """The same settings, evaluated at the same moments in the same episodes."""
    make_vec_env = peers.load("stable_baselines3.common.env_util", "make_vec_env")
    env = make_vec_env(config.environment, n_envs=config.num_envs, seed=config.seed)
    common = {"seed": config.seed, "device": config.device, "gamma": config.gamma}
    common["learning_rate"] = config.lr
    model = {"sac": _sac, "ppo_gymnasium": _ppo, "trpo_gymnasium": _trpo}[config.algorithm](
        config, env, common
    )
    curve: Curve = []
    model.learn(config.steps, callback=_evaluation(config, curve))
    return curve


def _sac(config: ControlConfig, env: Any, common: dict[str, Any]) -> Any:
    sac = config.sac
    return peers.load("stable_baselines3", "SAC")(
        "MlpPolicy",
        env,
        **common,
        buffer_size=sac.buffer_size,
        learning_starts=sac.learning_starts,
        batch_size=sac.batch_size,
        tau=sac.polyak,
        gradient_steps=sac.updates_per_step,
        ent_coef="auto" if sac.temperature == "learned" else sac.temperature,
        target_entropy=sac.target_entropy,
        policy_kwargs={"net_arch": [sac.hidden_size] * sac.hidden_layers},
    )


def _ppo(config: ControlConfig, env: Any, common: dict[str, Any]) -> Any:
    ppo, layers = config.ppo, [config.ppo.hidden_size] * config.ppo.hidden_layers
    return peers.load("stable_baselines3", "PPO")(
        "MlpPolicy",
        env,
        **common,
        n_steps=ppo.rollout_steps,
        batch_size=ppo.minibatch_size,
        n_epochs=ppo.epochs,
        gae_lambda=ppo.gae_lambda,
        clip_range=ppo.clip_range,
        clip_range_vf=None if ppo.value_clip_range == "none" else ppo.value_clip_range,
        normalize_advantage=ppo.normalize_advantages,
        ent_coef=ppo.entropy_coef,
        vf_coef=ppo.value_coef / 2,  # of the squared error, not of half of it
        max_grad_norm=ppo.max_grad_norm,
        policy_kwargs={"net_arch": {"pi": layers, "vf": layers}},
    )


def _trpo(config: ControlConfig, env: Any, common: dict[str, Any]) -> Any:
    """Of sb3-contrib, whose KL is that of the new policy to the old."""
    trpo, layers = config.trpo, [config.trpo.hidden_size] * config.trpo.hidden_layers
    return peers.load("sb3_contrib", "TRPO")(
        "MlpPolicy",
        env,
        **common,
        n_steps=trpo.rollout_steps,
        batch_size=trpo.minibatch_size,
        cg_max_steps=trpo.cg_iterations,
        cg_damping=trpo.cg_damping,
        line_search_shrinking_factor=trpo.line_search_shrink,
        line_search_max_iter=trpo.line_search_iterations,
        n_critic_updates=trpo.value_epochs,
        gae_lambda=trpo.gae_lambda,
        normalize_advantage=trpo.normalize_advantages,
        target_kl=trpo.max_kl,
        policy_kwargs={"net_arch": {"pi": layers, "vf": layers}},
    )


def _evaluation(config: ControlConfig, curve: Curve) -> Any:
    """A callback that adds (step, mean return) to `curve` where warpo's run would evaluate."""
    base: Any = peers.load("stable_baselines3.common.callbacks", "BaseCallback")
    every = config.evaluation.every_steps

    class Evaluation(base):
        last = 0

        def _on_step(self) -> bool:
            return True

        def _on_rollout_start(self) -> None:
            # the updates on the rollout before are done
            if self.num_timesteps // every > self.last // every:
                self._evaluate()

        def _on_training_end(self) -> None:
            if self.num_timesteps > self.last:
                self._evaluate()

        def _evaluate(self) -> None:
            self.last = self.num_timesteps
            returns = evaluate(
                lambda observation: self.model.predict(observation, deterministic=True)[0],
                config.environment,
                episodes=config.evaluation.episodes,
                seed=config.seed,
            )
            curve.append((self.num_timesteps, float(np.mean(returns))))

    return Evaluation()


SIDES: dict[str, Callable[[ControlConfig], Curve]] = {
    "warpo": warpo_curve,
    "stable-baselines3": stable_baselines3_curve,
}


def main() -> None:
    name, config_path, result, *overrides = sys.argv[1:]
    config = read_tree(ControlConfig, Path(config_path), overrides)
    if name != "warpo":
        # their imports are no part of the run
        peers.load("stable_baselines3", "PPO")
        peers.load("sb3_contrib", "TRPO")
    import warpo.engine.trainers.control.train  # noqa: F401

    start, cpu_start = time.perf_counter(), time.process_time()
    curve = SIDES[name](config)
    answer = {
        "run_s": time.perf_counter() - start,
        "cpu_s": time.process_time() - cpu_start,
        "curve": curve,
    }
    Path(result).write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
