import itertools

import pytest

from warpo.engine.config.file import keys
from warpo.engine.config.policy import Config, load_config
from warpo.engine.errors import ConfigError

MINIMAL = """\
model: some-org/some-model
output_dir: runs/a
steps: 3
sampler: transformers
data:
  train: prompts.jsonl
reward:
  sources: rewards:exact
"""


@pytest.fixture
def load(tmp_path):
    def load_text(text: str, *overrides: str) -> Config:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return load_config(path, overrides)

    return load_text


def test_yaml_gives_values_and_the_rest_are_defaults(load):
    config = load(MINIMAL + "update: {lr: 1e-5, betas: [0.9, 0.95]}\n")
    assert config.update.lr == 1e-5  # YAML 1.1 reads 1e-5 as text
    assert config.update.betas == (0.9, 0.95)
    assert config.rollout.group_size == 8
    assert config.max_prompt_tokens == 1024 - 256


def test_overrides_win_over_yaml_and_are_coerced(load):
    config = load(
        MINIMAL,
        *("--steps", "7", "--update.lr=2e-4", "--update.betas", "0.8", "0.9", "--resume"),
        *("--rollout.group-size", "4", "--loss.clip_range", "0.1", "0.3", "--data.eval", ""),
    )
    assert (config.steps, config.update.lr, config.update.betas) == (7, 2e-4, (0.8, 0.9))
    assert (config.resume, config.rollout.group_size) == (True, 4)
    assert config.loss.clip_range == (0.1, 0.3)


def test_an_override_supplies_what_the_file_lacks(load):
    assert load(MINIMAL.replace("steps: 3\n", ""), "--steps", "5").steps == 5


def test_numbers_are_those_of_yaml_1_2(load):
    config = load(MINIMAL + "seed: 017\nupdate: {lr: 1e-5, betas: [.5, 0.9]}\nresume: yes\n")
    assert (config.seed, config.update.lr, config.update.betas) == (17, 1e-5, (0.5, 0.9))
    assert config.resume


def test_aliases_that_grow_without_end_are_not_followed(load):
    names = [f"a{i}" for i in range(40)]
    lines = [f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]" for a, b in itertools.pairwise(names)]
    with pytest.raises(ConfigError, match="unknown key a0"):
        load(MINIMAL + "\n".join(["a0: &a0 x", *lines]))


def test_an_empty_section_means_its_defaults(load):
    assert load(MINIMAL + "update:\n").update.lr == 1e-6


def test_the_tree_has_at_most_105_keys_each_with_a_text():
    every_key = keys(Config)
    assert len(every_key) <= 105
    assert [key.name for key in every_key.values() if not key.text] == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz: 3\n", r"run\.yaml:9: unknown key stepz: did you mean steps\?"),
        ("update:\n  max_gradnorm: 1\n", r"yaml:10: .*did you mean update\.max_grad_norm\?"),
        ("lr: 1\n", r"unknown key lr: did you mean reward_model\.lr or critic\.lr or "),
        ("update: {zzz: 1}\n", r"unknown key update\.zzz: update has update\.lr, "),
        (
            "rollout: {stop: x}\n",
            r"unknown key rollout\.stop: rollout has rollout\.prompts_per_step",
        ),
        ("loss: {beta: 1}\n", r"unknown key loss\.beta: loss has loss\.clip_range, "),
        ("updat: {lr: 1}\n", r"unknown key updat: did you mean update\?"),
        ("qqq: 1\n", r"unknown key qqq: `warpo train --help` lists all keys"),
        ("loss: grpo\n", r"loss is a section, wanted its keys: loss\.clip_range, loss\.kl_coef"),
        ("seed: 1\nseed: 2\n", r"yaml:10: seed is set a second time, first at .*run\.yaml:9"),
        ("update: {lr: fast}\n", r"yaml:9: update\.lr = 'fast': wanted a number > 0"),
        ("update: {lr: .nan}\n", r"update\.lr = nan: wanted a number > 0"),
        ("update: {betas: [0.9]}\n", r"betas = \[0\.9\]: wanted 2 values, each a number >= 0 and"),
        ("rollout: {group_size: 0}\n", r"group_size = 0: wanted an integer >= 1"),
        ("seed: true\n", r"seed = True: wanted an integer >= 0"),
        ("dtype: fp16\n", r"dtype = 'fp16': wanted auto or float32 or bfloat16"),
        (
            "loss: {clip_range: [2, 1]}\n",
            r"clip_range = \[2, 1\]: wanted 2 values, each a number >= 0 ",
        ),
        ("loss: {clip_range: 0.2}\n", r"clip_range = 0\.2: wanted 2 values, .* or algorithm"),
        ("loss: {gae_lambda: [1, length:0.1]}\n", r"gae_lambda = \[1, 'length:0\.1'\]: wanted 2 "),
        ("loss: {kl_target: -1}\n", r"kl_target = -1: wanted a number > 0, or algorithm or fixed"),
        ("rollout: {top_p: 0}\n", r"top_p = 0: wanted a number > 0 and <= 1"),
        ("rollout: {temperature: 0.005}\n", r"temperature = 0\.005: wanted a number >= 0\.01 and"),
        ("rollout: {temperature: 3}\n", r"temperature = 3: wanted a number >= 0\.01 and <= 2"),
        ("rollout: {group_size: 20000}\n", r"group_size = 20000: wanted an integer >= 1 and <= 16"),
        (f"seed: {10**29}\n", r"seed = 1000+: wanted an integer >= 0 and <= 9223372036854775807"),
        ("rollout: {top_k: -1}\n", r"top_k = -1: wanted an integer >= 0"),
        ("loss: {correction: mask}\n", r"wanted algorithm or none or truncate_token or "),
        (
            "loss: {correction_range: [1]}\n",
            r"= \[1\]: wanted 2 values, each a number >= 0, or alg",
        ),
        ("resume: maybe\n", r"resume = 'maybe': wanted true or false"),
        ("a: [\n", r"run\.yaml:10: not YAML"),
        ("seed: !!python/name:os.system x\n", r"run\.yaml:9: not YAML: could not determine"),
        ("steps: 2026-02-30\n", r"yaml:9: steps is set a second time"),
        ("seed: 2026-02-30\n", r"yaml:9: seed = '2026-02-30': wanted an integer >= 0"),
        ("seed: !!timestamp 2026-02-30\n", r"seed = '2026-02-30': wanted an integer"),
        ("seed: !!timestamp three\n", r"seed = 'three': wanted an integer"),
        ("seed: !!int three\n", r"seed = 'three': wanted an integer"),
        ("seed: 1:30\n", r"seed = '1:30': wanted an integer"),
        ("seed: 0x10\n", r"seed = '0x10': wanted an integer"),
        (f"seed: {'9' * 5000}\n", r"seed = '9{59}\.\.\. \(5002 characters\): wanted an integer"),
        ("seed: {a: 1}\n", r"seed = a mapping or a list in a list: wanted an integer"),
        ("update: &u {lr: *u}\n", r"update\.lr = a mapping or a list in a list: wanted a number"),
        ("seed: " + "[" * 3000 + "\n", r"run\.yaml: nested too deep"),
        ("? [a]\n: 3\n", r"yaml:9: not YAML: a key is not text"),
        ("seed: \x07\n", r"run\.yaml: not YAML: character 145 is '\\x07': special characters"),
    ],
)
def test_faults_in_the_file_name_line_key_value_and_wish(load, text, message):
    with pytest.raises(ConfigError, match=message):
        load(MINIMAL + text)


def test_all_faults_are_told_at_once(load):
    with pytest.raises(ConfigError) as caught:
        load("steps: 0\nseed: -1\n")
    lines = str(caught.value).splitlines()
    assert len(lines) == 6
    assert any("data.train is required" in line and "--data.train VALUE" in line for line in lines)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--stepz=3"], r"--stepz: unknown key stepz: did you mean steps\?"),
        (["--steps"], r"--steps: wanted one value \(an integer >= 1\), got 0"),
        (["--steps", "3", "4"], r"wanted one value .* got 2"),
        (["steps", "3"], r"'steps': wanted --key value"),
        (["--update", "3"], r"update is a section"),
        (["--reward.deadline_s", "1e10"], r"_s = '1e10': wanted a number > 0 and <= 86400"),
        (["--reward.workers", "0"], r"workers = '0': wanted an integer >= 1 and <= 1024"),
        (["--reward.memory_gib", "0.1"], r"= '0.1': wanted a number >= 0.25 and <= 65536"),
        (["--reward.on_error", "skip"], r"= 'skip': wanted stop or zero or retry"),
        (["--update.lr", "-1"], r"--update\.lr: update\.lr = '-1': wanted a number > 0"),
    ],
)
def test_faults_in_overrides_name_the_option(load, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load(MINIMAL, *overrides)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("evaluation: {every_steps: 2}\n", r"evaluation\.every_steps = 2 needs data\.eval"),
        ("rollout: {max_new_tokens: 1024}\n", r"leaves no room for a prompt"),
        ("update: {token_budget: 512}\n", r"raise it to rollout\.max_model_len = 1024"),
        ("update: {minibatches: 65}\n", r"more than the 64 rollouts of a step"),
        ("update: {warmup_steps: 3}\n", r"must be below the 3 optimizer steps"),
    ],
)
def test_settings_that_cannot_run_together_are_refused(load, text, message):
    with pytest.raises(ConfigError, match=message):
        load(MINIMAL + text)


def test_other_refusals(load, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="No such file"):
        load_config(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match=r"reward.sources: 'rewards.exact': wanted module:func"):
        load(MINIMAL, "--reward.sources", "rewards.exact")
    for absent in ("./absent", "/absent", "org/model/step-000100"):
        with pytest.raises(ConfigError, match=f"model: there is no directory {absent}"):
            load(MINIMAL, "--model", absent)
    (tmp_path / "bytes.yaml").write_bytes(b"model: \xff")
    with pytest.raises(ConfigError, match="not UTF-8 at byte 7"):
        load_config(tmp_path / "bytes.yaml")
    with pytest.raises(ConfigError, match="wanted `key: value` lines"):
        load("- a\n")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="vLLM is not installed.*--sampler transformers"):
        load(MINIMAL, "--sampler", "vllm")


def test_reward_sources_are_one_text_or_several(load):
    assert load(MINIMAL).reward.sources == ("rewards:exact",)
    several = ("math", "0.5 * overlong:16")
    assert load(MINIMAL, "--reward.sources", *several).reward.sources == several
    text = MINIMAL.replace("sources: rewards:exact", "sources: [math, 0.5 * overlong:16]")
    assert load(text).reward.sources == several
    with pytest.raises(ConfigError, match=r"reward.sources = \[\]: wanted text or a list of it"):
        load(MINIMAL.replace("sources: rewards:exact", "sources: []"))
    with pytest.raises(ConfigError, match=r"reward.sources = \[3\]: wanted text or a list of it"):
        load(MINIMAL.replace("sources: rewards:exact", "sources: [3]"))
    with pytest.raises(ConfigError, match=r"--reward.sources: reward.sources = \[\]"):
        load(MINIMAL, "--reward.sources")


@pytest.mark.parametrize(
    "words",
    [
        ["--reward.sources", "http://me:hunter-2@h/ x"],
        ["--reward.sources", "me:hunter-2@h/x"],
        ["--reward.sources", "x * http://me:hunter-2@h/x"],
        ["--reward.sources", "x:hunter-2*y@h/x"],
        ["--reward.sources", "http://me:hunter-2@h/x", "http://me:hunter-2@h/x"],
        ["--reward.sources", "http://me:hunter-2@h/x", ""],
        ["--reward.source", "http://me:hunter-2@h/x"],
        ["http://me:hunter-2@h/x"],
        ["--seed", "http://me:hunter-2@h/x"],
    ],
)
def test_no_refusal_shows_a_password(load, words):
    with pytest.raises(ConfigError) as caught:
        load(MINIMAL, *words)
    assert "hunter-2" not in str(caught.value)
