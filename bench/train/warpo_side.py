"""The job on warpo: what `warpo train` runs, and its metrics.

python -m warpo.bench.train.warpo_side JOB.json RESULT.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from warpo.bench.train.job import Clock, Job, read_job, versions
from warpo.engine.config import policy as config
from warpo.engine.config import sections
from warpo.engine.run.log import RunLog

IMPORTS = ("warpo.engine.trainers.policy.train",)


def config_of(job: Job, output_dir: str) -> config.Config:
    return config.Config(
        model=job.model_path,
        output_dir=output_dir,
        # one more, untimed: the last step's checkpoint brings a probe that the others do without
        steps=job.steps + job.warm_up + 1,
        seed=job.seed,
        device="cpu",
        sampler=cast(Any, job.sampler),
        data=sections.DataSettings(train=job.prompts_path),
        reward=sections.RewardSettings(sources=("warpo.bench.train.job:reward",)),
        rollout=sections.RolloutSettings(
            prompts_per_step=job.prompts_per_step,
            group_size=job.group_size,
            max_new_tokens=job.new_tokens,
            max_model_len=job.max_model_len,
            kv_cache_gib=job.kv_cache_gib,
        ),
        algorithm="grpo",
        loss=sections.LossSettings(kl_coef=0.0),
        update=sections.UpdateSettings(
            lr=job.lr, token_budget=max(16384, job.completions * job.max_model_len)
        ),
    )


def main() -> None:
    job, result = read_job(sys.argv[1]), Path(sys.argv[2])
    from warpo.engine.trainers.policy.train import run

    clock, rows = Clock(), []
    clock.watch_learner()
    write = RunLog.write

    def timed_write(log: RunLog, step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
        row = write(log, step, metrics)
        if step > job.steps + job.warm_up:
            return row
        seconds = {
            name: row.get(f"perf/{name}_s", 0.0)
            for name in ("sample", "reward", "score", "publish", "verify", "probe")
        }
        # what update has beside forward and backward: clipping, optimizer, its metrics
        learned = clock.phases.get("forward", 0.0) + clock.phases.get("backward", 0.0)
        clock.end_step(**seconds, optimizer=row["perf/update_s"] - learned)
        rows.append(row)
        return row

    replace: Any = setattr
    replace(RunLog, "write", timed_write)
    run(config_of(job, str(result.with_suffix(""))))
    answer = clock.answer(
        job.warm_up,
        completion_tokens=rows[-1]["completion/length_mean"] * job.completions,
        reward=rows[-1]["reward/mean"],
        versions=versions(job),
    )
    result.write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main()
