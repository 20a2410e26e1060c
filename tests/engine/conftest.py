"""One checkpoint on disk and one sampler of each kind for each small model."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

from warpo.engine.run.process import set_thread_waiting

set_thread_waiting()
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

from tests.engine.random_models import (  # noqa: E402
    CONFIGS,
    EOS_TOKEN_IDS,
    MAX_MODEL_LEN,
    connect,
    new_learner,
)
from tests.engine.runs import make_folder  # noqa: E402
from warpo.engine.config.samplers import SAMPLERS  # noqa: E402
from warpo.engine.models.files import load_tokenizer  # noqa: E402
from warpo.engine.rollout.sampler.base import (  # noqa: E402
    ColocatedSampler,
    SamplerSettings,
    open_sampler,
)


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """The folder of a checkpoint of `new_learner(name)`."""
    folder = tmp_path_factory.mktemp("models")
    transformers.utils.logging.disable_progress_bar()

    def path(name: str) -> str:
        model_folder: Path = folder / name
        if not model_folder.exists():
            new_learner(name).save_pretrained(model_folder)
        return str(model_folder)

    return path


@pytest.fixture(scope="session")
def build(model_path: Callable[[str], str]) -> Callable[[str, str], ColocatedSampler]:
    """The one sampler of a kind for a model, holding the weights of `new_learner(name)`.

    Shared by all tests, since a test that publishes leaves other weights: they are put back.
    """
    built: dict[tuple[str, str], ColocatedSampler] = {}

    def sampler(kind: str, name: str) -> ColocatedSampler:
        package = SAMPLERS[kind].package
        if package and importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
        if (kind, name) not in built:
            settings = SamplerSettings(
                model_path=model_path(name),
                dtype="float32",
                max_model_len=MAX_MODEL_LEN,
                eos_token_ids=EOS_TOKEN_IDS,
                kv_cache_gib=1 / 32,
                device=torch.device("cpu"),
            )
            built[kind, name] = open_sampler(kind, settings)
        else:
            connect(built[kind, name], new_learner(name), "copy")
        return built[kind, name]

    return sampler


@pytest.fixture(params=list(SAMPLERS))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def sampler(build: Callable[[str, str], ColocatedSampler], kind: str) -> ColocatedSampler:
    return build(kind, "qwen2")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a small run, which is the current directory."""
    monkeypatch.chdir(make_folder(tmp_path))
    return tmp_path


@pytest.fixture
def reward_model(folder: Path) -> Callable[..., transformers.PreTrainedModel]:
    """Writes a checkpoint with the tokenizer of the run; `config` overrides its attributes."""

    def write(name: str = "rm", labels: int = 1, **config: object) -> transformers.PreTrainedModel:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            settings = CONFIGS["qwen2"]()
            settings.num_labels = labels
            settings.update(config)
            model = transformers.Qwen2ForSequenceClassification(settings).float().eval()
        model.save_pretrained(folder / name)
        load_tokenizer(str(folder / "model")).save_pretrained(folder / name)
        return model

    return write
