"""A small run as a user would set it up, for tests of the whole loop."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
import transformers

from tests.engine.random_models import CONFIGS, new_learner
from warpo.engine.config.policy import load_config
from warpo.engine.trainers.policy.train import run

CONFIG = """
model: {folder}/model
output_dir: {folder}/out
dtype: float32
steps: 4
data: {{train: {folder}/train.jsonl, eval: {folder}/eval.jsonl}}
reward: {{sources: "token_rewards:low", deadline_s: 60}}
rollout:
  {{prompts_per_step: 3, group_size: 4, max_new_tokens: 6, max_model_len: 64, kv_cache_gib: 0.03}}
algorithm: grpo
loss: {{kl_coef: 0.01}}
update: {{lr: 1e-3, token_budget: 64, minibatches: 2, epochs: 2}}
evaluation: {{every_steps: 2}}
"""

REWARDS = """
import os

def low(completions, word):
    \"\"\"Share of tokens below t30.\"\"\"
    if os.path.exists("fail"):
        raise ValueError("the reward was told to fail")
    scores = [[int(t[1:]) < 30 for t in text.split()] for text in completions]
    return [sum(s) / max(1, len(s)) for s in scores]
"""


def make_folder(tmp_path: Path) -> Path:
    """A model with its tokenizer, data and a reward function, as a user has them."""
    size = CONFIGS["qwen2"]().vocab_size
    vocabulary = {f"t{i}": i for i in range(2, size)} | {"<pad>": 0, "<eos>": 1}
    model = tokenizers.models.WordLevel(vocabulary, unk_token="t3")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>"
    ).save_pretrained(tmp_path / "model")
    new_learner("qwen2").save_pretrained(tmp_path / "model")
    for name, start in (("train", 0), ("eval", 10)):
        rows = [
            {"prompt": f"t{10 + i} t{40 - i} t7", "word": str(i)} for i in range(start, start + 9)
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "token_rewards.py").write_text(REWARDS)
    (tmp_path / "config.yaml").write_text(CONFIG.format(folder=tmp_path))
    return tmp_path


def train(folder: Path, *overrides: str) -> list[dict]:
    """Run in this process; the rows of metrics.jsonl, as of `rows`."""
    run(load_config(folder / "config.yaml", overrides))
    return rows(folder)


# Of the probe, which runs where a run ends too, so that resumed runs have them more often.
PROBED = {
    *(f"mismatch/kernels_{name}" for name in ("mean", "max", "outside")),
    "mismatch/composition_max",
}


def rows(folder: Path, out: str = "out", *, probed: bool = False) -> list[dict]:
    """Those of metrics.jsonl without timings, and without the probe's unless asked for."""
    lines = (folder / out / "metrics.jsonl").read_text().splitlines()
    left_out = set() if probed else PROBED
    return [
        {k: v for k, v in json.loads(x).items() if k not in left_out and not k.startswith("perf/")}
        for x in lines
    ]
