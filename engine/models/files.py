"""Reading a model's folder: what is missing, damaged or does not belong together is refused, in one
line that names the file and what to do.

transformers fills a tensor that a checkpoint lacks with random numbers, retries a name that the hub
does not answer for over a minute, and raises whatever its parsers raise: here is the one place that
reads configs, tokenizers and weights.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import huggingface_hub
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError
from safetensors import safe_open
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import logging as transformers_logging

from warpo.engine.config.policy import looks_like_a_path
from warpo.engine.errors import ConfigError, one_line

HUB_TIMEOUT_S = 10.0
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
PICKLED_WEIGHTS = ("pytorch_model.bin", "pytorch_model.bin.index.json")
# What generate() reads where it samples, and does not write back where it does not.
_SAMPLING_ONLY = (
    *("temperature", "top_p", "top_k", "min_p"),
    *("top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"),
)

logger = logging.getLogger(__name__)
T = TypeVar("T")


def read_config(path: str, **changes: Any) -> PretrainedConfig:
    """The config of a model.

    Args:
        path: a directory, or a name on the hub.
        changes: new values of attributes.

    Raises:
        ConfigError: there is no such model, or its config.json is missing or damaged.
    """
    if not _is_on_hub(path):
        _check_config(Path(path))
    return _loaded(path, "config.json", lambda: AutoConfig.from_pretrained(path, **changes))


def check_files(path: str) -> PretrainedConfig:
    """Refuse a model whose files cannot be what a run needs, before anything is read at length.

    Returns:
        Its config.

    Raises:
        ConfigError: as `read_config` and `load_weights`, as far as the files' heads tell.
    """
    config = read_config(path)
    if getattr(config, "quantization_config", None):
        raise ConfigError(f"{path} is quantised, and only plain weights are trained and published")
    if not _is_on_hub(path):
        _check_weight_files(Path(path))
        _read_json(Path(path) / "generation_config.json")
    return config


def max_positions(text_config: Any) -> int | None:
    """The positions that a model is made for; None where its config sets no limit."""
    limits = [
        getattr(text_config, name, None) for name in ("max_position_embeddings", "n_positions")
    ]
    known = [limit for limit in limits if isinstance(limit, int) and limit > 0]
    if not known:
        return None
    rope = getattr(text_config, "rope_parameters", None) or {}
    factor = rope.get("factor") if isinstance(rope, dict) else None
    if isinstance(factor, int | float):
        original = rope.get("original_max_position_embeddings") or known[0]
        known.append(int(factor * original))
    return max(known)


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to a model.

    Raises:
        ConfigError: there is none, or it is damaged.
    """
    if not _is_on_hub(path):
        folder = Path(path)
        if not any((folder / name).exists() for name in TOKENIZER_FILES):
            raise ConfigError(
                f"{folder} has no tokenizer, which is one of {', '.join(TOKENIZER_FILES)}: copy "
                "the files of the model's tokenizer there"
            )
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            _read_json(folder / name)
    return _loaded(path, "tokenizer", lambda: _tokenizer(path))


def _tokenizer(path: str) -> PreTrainedTokenizerBase:
    saved_as = get_tokenizer_config(path).get("tokenizer_class")
    if saved_as in ("TokenizersBackend", "PreTrainedTokenizerFast"):
        # AutoTokenizer prefers the class of the model's type, which splits text by its own rules.
        return PreTrainedTokenizerFast.from_pretrained(path)
    return AutoTokenizer.from_pretrained(path)


def load_weights(
    kind: Any, path: str, *, new: tuple[str, ...] = (), **options: Any
) -> PreTrainedModel:
    """A model of one of transformers' auto classes, with all of its tensors from its files.

    Args:
        kind: AutoModelForCausalLM, AutoModelForSequenceClassification.
        new: tensors that need not be there.
        options: keyword arguments of from_pretrained.

    Raises:
        ConfigError: a file is missing or damaged; a tensor is missing, or has another shape or
            more layers than config.json says; the weights are quantised.
    """
    check_files(path)
    transformers_logging.disable_progress_bar()
    model, found = _loaded(
        path,
        "model",
        lambda: kind.from_pretrained(
            path, output_loading_info=True, ignore_mismatched_sizes=True, **options
        ),
    )
    _check_tensors(path, model, found, new)
    _mend_generation_config(path, model)
    return model


def _is_on_hub(path: str) -> bool:
    """True if a path is a name on the hub, which answers for it or has it in its cache here.

    Raises:
        ConfigError: neither a directory nor a name that is known there.
    """
    folder = Path(path)
    if folder.is_dir():
        return False
    if folder.exists():
        raise ConfigError(f"{path} is a file: give the directory of the model that it belongs to")
    if looks_like_a_path(path):
        raise ConfigError(f"there is no directory {path}")
    _ask_hub(path)
    return True


@cache
def _ask_hub(name: str) -> None:
    nothing = f"there is no directory {name}, and the hub"
    try:
        cached = isinstance(huggingface_hub.try_to_load_from_cache(name, "config.json"), str)
        if huggingface_hub.constants.HF_HUB_OFFLINE:
            if cached:
                return
            raise ConfigError(f"{nothing} is switched off by HF_HUB_OFFLINE and its cache lacks it")
        huggingface_hub.HfApi().model_info(name, timeout=HUB_TIMEOUT_S)
    except HFValidationError:
        raise ConfigError(f"{nothing} has names like org/model only") from None
    except GatedRepoError:
        raise ConfigError(
            f"{name} is gated on the hub: accept its terms there, and log in with `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise ConfigError(
            f"{nothing} has no model {name}, or keeps it private: check the name, or log in with "
            "`hf auth login`"
        ) from None
    except ConfigError:
        raise
    except Exception as error:
        if not cached:
            raise ConfigError(
                f"{nothing} cannot be reached: {one_line(error)}. Give the directory of a model"
            ) from error
        # What follows would ask again, for minutes.
        huggingface_hub.constants.HF_HUB_OFFLINE = True


def _check_config(folder: Path) -> None:
    """config.json is there, is JSON and names a type of model that transformers knows."""
    if not any(folder.iterdir()):
        raise ConfigError(f"{folder} is empty: give the directory of a Hugging Face model")
    path = folder / "config.json"
    config = _read_json(path)
    if config is None:
        raise ConfigError(f"{path} is missing: {folder} is not the directory of a model")
    kind = config.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise ConfigError(
            f"{path}: model_type is {kind!r}, which this transformers does not know"
            + ("; code that comes with a model is not run" if "auto_map" in config else "")
        )


def _read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None where there is no file."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is damaged: {one_line(error)}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} is damaged: it holds {type(value).__name__}, not an object")
    return value


def _check_weight_files(folder: Path) -> None:
    """Every file that holds weights is there and whole, as far as its header says."""
    index = folder / "model.safetensors.index.json"
    listed = _read_json(index)
    # transformers prefers the one file to the index
    if (folder / "model.safetensors").exists():
        _tensor_names(folder / "model.safetensors")
    elif listed is not None:
        places = listed.get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(n, str) for n in places.values()):
            raise ConfigError(f"{index} is damaged: weight_map does not map tensors to files")
        shards = {name: _tensor_names(folder / name, index) for name in set(places.values())}
        lost = sorted(tensor for tensor, name in places.items() if tensor not in shards[name])
        if lost:
            raise ConfigError(
                f"{folder / places[lost[0]]} lacks {_some(lost)}, which {index.name} says it holds"
            )
    elif not any((folder / name).exists() for name in PICKLED_WEIGHTS):
        raise ConfigError(
            f"{folder} has no weights, which are in model.safetensors, in {PICKLED_WEIGHTS[0]} or "
            f"in files that {index.name} lists"
        )


def _tensor_names(path: Path, index: Path | None = None) -> set[str]:
    if not path.is_file():
        raise ConfigError(f"{path} is missing" + (f", which {index.name} lists" if index else ""))
    try:
        with safe_open(path, framework="pt") as tensors:
            return set(tensors.keys())
    except Exception as error:  # safetensors raises its own, and what the system does
        raise ConfigError(
            f"{path} is damaged or cut off ({one_line(error)}): copy or download it again"
        ) from None


def _check_tensors(
    path: str, model: PreTrainedModel, found: dict[str, Any], new: tuple[str, ...]
) -> None:
    missing = sorted(set(found["missing_keys"]) - set(new))
    if missing:
        raise ConfigError(
            f"the weights of {path} lack {_some(missing)}, of which transformers would make random "
            "numbers: take the files of a whole checkpoint"
        )
    if found["mismatched_keys"]:
        name, there, here = min(found["mismatched_keys"])
        raise ConfigError(
            f"{path}: {name} has shape {list(there)} in the weights and {list(here)} by "
            f"config.json, and {len(found['mismatched_keys'])} tensors differ so: the two are not "
            "of one model"
        )
    if found.get("error_msgs"):
        raise ConfigError(f"{path}: {one_line(found['error_msgs'][0])}")
    layers = {_layer(name) for name, _ in model.named_parameters()}
    lists = {name for name, _ in layers}
    beyond = [
        name
        for name in sorted(found["unexpected_keys"])
        if _layer(name)[0] in lists and _layer(name) not in layers
    ]
    if beyond:
        raise ConfigError(
            f"the weights of {path} have {_some(beyond)}, in a layer that config.json does not "
            "count: the two are not of one model"
        )


def _layer(name: str) -> tuple[str, int]:
    """The list of layers that a tensor belongs to, and which of them; ("", 0) where to none."""
    match = re.match(r"(.*?\.)(\d+)\.", name)
    return (match[1], int(match[2])) if match else ("", 0)


def _mend_generation_config(path: str, model: PreTrainedModel) -> None:
    """Let the generation config be one that transformers writes back with a checkpoint."""
    config = getattr(model, "generation_config", None)
    if config is None or _writes_back(config) is None:
        return
    dropped = []
    if not config.do_sample:
        for name in _SAMPLING_ONLY:
            if getattr(config, name, None) is not None:
                dropped.append(f"{name} {getattr(config, name)}")
                setattr(config, name, None)
    error = _writes_back(config)
    if error is not None:
        raise ConfigError(
            f"{Path(path) / 'generation_config.json'} could not be saved with a checkpoint: "
            f"{error}. Correct it, or take it away"
        )
    logger.warning(
        "%s does not sample (do_sample is false) and has %s, which transformers would not save: "
        "checkpoints go without",
        Path(path) / "generation_config.json",
        ", ".join(dropped),
    )


def _writes_back(config: Any) -> str | None:
    """Why a generation config would not be saved, if it would not."""
    try:
        config.validate(strict=True)
    except Exception as error:
        return one_line(error)
    return None


def _loaded(path: str, what: str, load: Callable[[], T]) -> T:
    try:
        return load()
    except ConfigError:
        raise
    except Exception as error:  # its parsers raise what they like
        raise ConfigError(
            f"the {what} of {path} does not load: {type(error).__name__}: {one_line(error)}"
        ) from error


def _some(names: Iterable[str]) -> str:
    first, *rest = list(names)
    return first + (f" and {len(rest)} more tensors" if rest else "")
