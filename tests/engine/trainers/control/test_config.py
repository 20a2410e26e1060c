import subprocess
import sys
from pathlib import Path

import pytest

from warpo.engine.config.control import ControlConfig
from warpo.engine.config.file import keys, read_tree
from warpo.engine.errors import ConfigError
from warpo.engine.trainers.control.environments import spaces_of
from warpo.engine.trainers.control.train import run

EXAMPLES = Path(__file__).parents[4] / "examples"


def test_every_key_has_a_text_and_there_are_at_most_60():
    known = keys(ControlConfig)
    assert len(known) <= 60 and all(key.text for key in known.values())


@pytest.mark.parametrize("name", ["sac", "sac_discrete", "ppo_gymnasium", "trpo_gymnasium"])
def test_the_examples_are_valid(name):
    config = read_tree(ControlConfig, EXAMPLES / f"{name}.yaml", [])
    assert config.algorithm == name
    spaces_of(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"environment": "CartPol-v1"}, r"'CartPol-v1' is unknown, did you mean 'CartPole-v1'\?"),
        ({"environment": "Pendulum-v9"}, "did you mean 'Pendulum-v1'"),
        ({"environment": "no_such_module:Thing-v0"}, "no_such_module"),
        ({"sac": {"polyak": 0.1}}, "sac.polyak = 0.1 has no effect with algorithm = 'ppo_gymnas"),
        ({"ppo": {"minibatch_size": 5}}, "ppo.minibatch_size = 5 does not divide the 16 steps"),
        ({"algorithm": "sac", "ppo": {"epochs": 3}}, "ppo.epochs = 3 has no effect"),
        ({"algorithm": "sac", "sac": {"batch_size": 50}}, "sac.batch_size = 50 is more than sac.b"),
        ({"algorithm": "sac", "num_envs": 41}, "num_envs = 41 is more than sac.buffer_size = 40"),
        ({"algorithm": "trpo_gymnasium", "ppo": {"epochs": 3}}, "ppo.epochs = 3 has no effect"),
        ({"trpo": {"max_kl": 0.1}}, "trpo.max_kl = 0.1 has no effect with algorithm = 'ppo_gymn"),
        ({"algorithm": "sac_v", "trpo": {"max_kl": 0.1}}, "trpo.max_kl = 0.1 has no effect"),
        ({"algorithm": "sac_discrete", "num_envs": 41}, "num_envs = 41 is more than sac.buffer_si"),
        (
            {"algorithm": "trpo_gymnasium", "trpo": {"minibatch_size": 5}},
            "trpo.minibatch_size = 5 does not divide the 16 steps",
        ),
        (
            {"algorithm": "sac", "sac": {"temperature": 0.2, "target_entropy": -1.0}},
            "sac.target_entropy = -1 has no effect with sac.temperature = 0.2",
        ),
    ],
)
def test_settings_that_cannot_run_are_refused(config, changes, message):
    with pytest.raises(ValueError, match=message):
        config(changes.pop("algorithm", "ppo_gymnasium"), **changes)


def test_a_file_with_such_a_setting_is_named(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("algorithm: sac\nenvironment: Pendulum\noutput_dir: o\nsteps: 5\n")
    with pytest.raises(ConfigError, match="run.yaml: environment = 'Pendulum' is unknown, did you"):
        read_tree(ControlConfig, path, [])


@pytest.mark.parametrize(
    ("algorithm", "environment", "message"),
    [
        (
            "sac",
            "CartPole-v1",
            "'sac' needs continuous actions.*set algorithm to sac_discrete, ppo_gymnasium or trpo_",
        ),
        ("sac_v", "CartPole-v1", "'sac_v' needs continuous actions"),
        ("sac_v", "warpo-tests/WalkUnbounded-v0", "'sac_v' needs bounded actions"),
        (
            "sac_discrete",
            "Pendulum-v1",
            "'sac_discrete' needs discrete actions, one number.*set algorithm to sac, sac_v",
        ),
        ("sac_discrete", "warpo-tests/WalkSeveral-v0", "MultiDiscrete.*$"),
        ("trpo_gymnasium", "warpo-tests/WalkSeveral-v0", "needs discrete or continuous actions"),
        ("sac", "warpo-tests/WalkUnbounded-v0", "'sac' needs bounded actions"),
        ("ppo_gymnasium", "warpo-tests/WalkSeveral-v0", "needs discrete or continuous actions"),
        ("ppo_gymnasium", "warpo-tests/Varying-v0", "no fixed number of components"),
    ],
)
def test_environments_that_the_algorithm_cannot_act_in_are_refused_before_anything_is_built(
    config, algorithm, environment, message
):
    refused = config(algorithm, environment=environment)
    with pytest.raises(ConfigError, match=message):
        run(refused)
    assert not Path(refused.output_dir).exists()


@pytest.mark.parametrize("target", [1.1, -1.0])
def test_an_entropy_that_the_actions_cannot_have_is_refused(config, target):
    with pytest.raises(
        ConfigError, match=r"target_entropy = -?1.*of 3 actions .* log\(3\) = 1.1 nats"
    ):
        run(config("sac_discrete", sac={"target_entropy": target}))


def test_an_environment_whose_package_is_missing_says_which(config):
    with pytest.raises(ConfigError, match="Broken-v0' cannot be made: No module named 'no_such_p"):
        run(config(environment="warpo-tests/Broken-v0"))


def test_reading_settings_loads_neither_transformers_nor_vllm():
    code = (
        "import sys; import warpo.engine.trainers.control.train; "
        "print(sorted({'transformers', 'vllm'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
