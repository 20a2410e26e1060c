"""Check that the learner computes a model's own function, before any weight is read.

Sequences of a step are packed into one row, which is exact for models of a certain kind. Models
with layers of state or convolution get a row for each sequence and their own
eager attention instead. What has to hold is found in the model's config, its class and one forward
pass of its shapes:

    attention    in a packed row every layer mixes tokens by transformers' replaceable attention and
                 masks, asks it for nothing that packed attention does not compute, and does so
                 nowhere else
    rope         rotary angles of a token do not depend on what else is in the row
    positions    are given for each token, and a table of them is as long as a sequence
    vocabulary   token ids are below its size
    weights      are plain numbers, not quantised ones
    loss         is the algorithm's: routers of experts add none of their own

docs/architectures.md is the list of transformers' models, made by these rules and held against
numbers by a test.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AttentionInterface,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights

from warpo.engine.config.policy import Config
from warpo.engine.config.resolve import resolve
from warpo.engine.config.reward_model import reward_sources
from warpo.engine.config.reward_sources import parse_sources
from warpo.engine.errors import ConfigError, DataError
from warpo.engine.models.attention import ATTENTION, UnsupportedAttention, packed_attention
from warpo.engine.models.batch import pack
from warpo.engine.models.files import read_config
from warpo.engine.models.model import attention_of, forward, is_packed, other_layers
from warpo.engine.models.scalar import token_scores
from warpo.engine.types import TokenSequence

# Kinds of layers, as `layer_types` of a config has them, that are exact where each sequence has a
# row and padding follows it: causal in their order, and the same for each token otherwise.
ROW_LAYERS = {
    "state",
    "linear_attention",
    "mamba",
    "recurrent",
    "conv",
    "hybrid",
    "hybrid_sliding",
    "moe",
    "mlp",
    "dense",
}


def check_run(config: Config) -> None:
    """Refuse the models of a run that the learner cannot compute: policy, critic, reward models.

    Raises:
        ConfigError: one cannot be; it says which, why, and what to do.
    """
    scalar = [s.checkpoint for s in parse_sources(reward_sources(config)) if s.checkpoint]
    if resolve(config).has_critic and config.critic.model != "shared":
        scalar.append(config.model if config.critic.model == "policy" else config.critic.model)
    longest, cure = config.rollout.max_model_len, "lower rollout.max_model_len"
    check_model(config.model, longest=longest, cure=cure)
    for path in dict.fromkeys(scalar):
        check_model(path, longest=longest, cure=cure, scalar=True)


def check_model(path: str, *, longest: int, cure: str, scalar: bool = False) -> None:
    """Refuse a model that the learner cannot compute; only its config is read.

    Args:
        longest: tokens of the longest sequence.
        cure: advice on how to shorten them.
        scalar: it is to give a number for each token: critic, reward model.

    Raises:
        ConfigError: see `refusal`.
    """
    reason = refusal(read_config(path), longest, cure=cure, scalar=scalar)
    if reason:
        raise ConfigError(f"{path}: {reason}")


def check_tokens(path: str, largest: int, source: str) -> None:
    """Refuse data whose largest token id has no embedding in the model.

    Raises:
        DataError: the tokenizer gives such an id to a text of `source`.
    """
    size = read_config(path).get_text_config().vocab_size
    if largest >= size:
        raise DataError(
            f"{source} has token id {largest}, and the vocabulary of {path} has {size} tokens: "
            "its tokenizer belongs to another model, or has tokens that were added after training; "
            "use the model's own, or resize its embeddings"
        )


def refusal(config: PretrainedConfig, longest: int, *, cure: str = "", scalar: bool = False) -> str:
    """Why the learner does not compute this model's function; empty where it does."""
    kind, classes = config.model_type, _classes(scalar)
    if type(config) not in classes:
        return (
            f"transformers has no {'sequence classifier' if scalar else 'causal language model'} "
            f"of the type {kind}: take a model of another type"
        )
    reason = _of_config(config) or _of_class(classes[type(config)], config)
    reason = reason or _of_rope(config, longest, cure)
    if reason:
        return reason
    try:
        model = _model_alone(config, scalar=scalar)
        return _of_positions(model, longest, cure) or _of_forward(model, scalar)
    except UnsupportedAttention as error:
        return f"{kind} asks for {error}, which the learner's attention does not compute"
    except Exception as error:  # whatever the code of some 200 models raises
        text = str(error).strip().split("\n")[0][:200]
        return f"{kind} cannot be run on packed rows ({type(error).__name__}: {text})"


def _classes(scalar: bool) -> Any:
    return MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING if scalar else MODEL_FOR_CAUSAL_LM_MAPPING


def _of_config(config: PretrainedConfig) -> str:
    quantization = getattr(config, "quantization_config", None)
    if quantization:
        get = quantization.get if isinstance(quantization, dict) else quantization.__dict__.get
        return (
            f"its weights are quantised ({get('quant_method')}), and training needs plain ones: "
            "take the model before quantisation"
        )
    if getattr(config.get_text_config(), "output_router_logits", False):
        return (
            "its config asks for an auxiliary loss of its routers (output_router_logits is true), "
            "which no algorithm adds: set output_router_logits to false in config.json"
        )
    if not getattr(config, "is_causal", True):
        return f"{config.model_type} attends to later tokens (is_causal is false in its config)"
    return ""


def _of_class(cls: type[PreTrainedModel], config: PretrainedConfig) -> str:
    unknown = sorted({*other_layers(config, cls)} - ROW_LAYERS)
    if unknown:
        return (
            f"layers of {config.model_type} choose what they attend to ({', '.join(unknown)}), "
            "which packed or padded rows do not leave as it is: take a model of another type"
        )
    if not cls._supports_attention_backend and not other_layers(config, cls):
        return (
            f"the attention or the positions of {config.model_type} cannot be replaced "
            "(transformers: _supports_attention_backend is False), as packed rows need it: take a "
            "model of another type"
        )
    return ""


def _of_rope(config: PretrainedConfig, longest: int, cure: str) -> str:
    """Rotary factors that are chosen by the longest sequence of a row."""
    for rope in rope_parameters(config):
        kind = str(rope.get("rope_type", "default"))
        text = config.get_text_config()
        limit = getattr(text, "max_position_embeddings", longest)
        if kind == "longrope":
            limit = rope.get("original_max_position_embeddings") or limit
        elif kind != "dynamic":
            continue
        if longest > limit:
            return (
                f"its rotary positions (rope_type {kind}) depend on the longest sequence of a row "
                f"beyond {limit} tokens, and sequences have up to {longest}: {cure} to {limit}"
            )
    return ""


def rope_parameters(config: PretrainedConfig) -> list[dict[str, Any]]:
    """Rope parameters of all layers, or of each kind of layers if they differ."""
    text = copy.deepcopy(config.get_text_config())
    if getattr(text, "rope_parameters", None):
        # some keep the original length next to them, which this puts in
        text.standardize_rope_params()
    found = getattr(text, "rope_parameters", None) or {}
    nested = [value for value in found.values() if isinstance(value, dict)]
    return nested or ([found] if found else [])


def _of_positions(model: PreTrainedModel, longest: int, cure: str) -> str:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", longest)
    tables = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and ("pos" in name or name.endswith("wpe"))
    ]
    if tables and longest > limit:
        return (
            f"it has {limit} learned positions ({tables[0]}), and sequences have up to {longest} "
            f"tokens: {cure} to {limit}"
        )
    return ""


def _of_forward(model: PreTrainedModel, scalar: bool) -> str:
    """Every layer that runs has to call the attention, where rows are packed."""
    kind = model.config.model_type
    ran, calls = _run(model, scalar=scalar)
    if scalar and not isinstance(getattr(model, "score", None), nn.Linear):
        return f"the sequence classifier of {kind} has no linear head: take a model of another type"
    if not is_packed(model):
        return ""
    attended = {call.module for call in calls}
    groups = [
        modules
        for modules in model.modules()
        if isinstance(modules, nn.ModuleList) and attended & {*modules.modules()}
    ]
    plain = [
        layer
        for layers in groups
        for layer in layers
        if layer in ran and not attended & {*layer.modules()}
    ]
    if not attended or plain:
        return (
            f"layers of {kind} ({type(plain[0]).__name__ if plain else 'all'}) mix tokens by other "
            "means than the attention that can be replaced: take a model of another type"
        )
    return ""


@dataclass(frozen=True, slots=True)
class _Call:
    """A call of the packed attention: its module, the numbers in the keys and values of a token,
    and whether it has a soft cap or sinks.
    """

    module: nn.Module
    width: int
    by_formula: bool


def cache_width(config: PretrainedConfig) -> int:
    """Numbers that a token leaves in the caches of keys and values of all layers."""
    _, calls = _run(_model_alone(config))
    return sum(call.width for call in calls)


def plain_attention(config: PretrainedConfig) -> Literal["eager", "sdpa"]:
    """The attention of transformers that computes all that the model asks for: its sdpa drops soft
    caps and sinks.
    """
    _, calls = _run(_model_alone(config))
    return "eager" if any(call.by_formula for call in calls) else "sdpa"


def _run(model: PreTrainedModel, *, scalar: bool = False) -> tuple[set[nn.Module], list[_Call]]:
    """A forward pass of the shapes of two sequences: modules that run, calls of the attention."""
    ran: set[nn.Module] = set()
    calls: list[_Call] = []

    def run(module: nn.Module, _: object) -> None:
        ran.add(module)

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any
    ) -> Any:
        width = key.shape[1] * key.shape[3] + value.shape[1] * value.shape[3]
        by_formula = any(options.get(name) is not None for name in ("softcap", "s_aux"))
        calls.append(_Call(module, width, by_formula))
        return packed_attention(module, query, key, value, *args, **options)

    batch = pack([TokenSequence.of([1, 2], rest) for rest in ([3, 4], [5])])
    parameter = next(model.parameters())
    fake = parameter.fake_mode if isinstance(parameter, FakeTensor) else nullcontext()
    handles = [module.register_forward_pre_hook(run) for module in model.modules()]
    AttentionInterface.register(ATTENTION, attend)
    try:
        with fake, shapes_only(packed=is_packed(model)), torch.no_grad():
            batch = batch.to(parameter.device)
            if scalar:
                token_scores(model, batch, batch.logit_positions)
            else:
                forward(model, batch)
    finally:
        AttentionInterface.register(ATTENTION, packed_attention)
        for handle in handles:
            handle.remove()
    return ran, calls


def _model_alone(config: PretrainedConfig, *, scalar: bool = False) -> PreTrainedModel:
    """On the device meta, which is fast; fake where a model's own masks look for their values."""
    if attention_of(config, _classes(scalar)) == ATTENTION:
        return shape_model(config, torch.device("meta"), scalar=scalar)
    with FakeTensorMode(allow_non_fake_inputs=True):
        return shape_model(config, torch.device("cpu"), scalar=scalar)


def shape_model(
    config: PretrainedConfig,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    scalar: bool = False,
) -> PreTrainedModel:
    """A model to run without numbers: on the device meta, or under a fake tensor mode."""
    config = copy.deepcopy(config)
    auto: Any = AutoModelForCausalLM
    if scalar:
        auto, config.num_labels = AutoModelForSequenceClassification, 1
    attention = attention_of(config, _classes(scalar))
    with device, no_init_weights():
        model = auto.from_config(config, dtype=dtype, attn_implementation=attention).eval()
    model.tie_weights()
    for module in model.modules():
        # It would look at the largest position, which has no value here; `refusal` has seen to it.
        kind = getattr(module, "rope_type", None)
        if kind is not None:
            static: Any = dict.fromkeys(kind, "default") if isinstance(kind, dict) else "default"
            module.rope_type = static
    return model


class shapes_only(TorchDispatchMode):  # noqa: N801  # a context, as torch.no_grad is
    """Run a model of `shape_model`: what torch has no shapes for gets them here.

    Args:
        packed: refuse a convolution, which would reach from one sequence into the next.
    """

    def __init__(self, *, packed: bool = False) -> None:
        super().__init__()
        self._packed = packed

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        convolution = func is torch.ops.aten.convolution.default
        if self._packed and convolution and max(args[1].shape[2:]) > 1:
            raise UnsupportedAttention("a convolution over tokens besides its attention")
        if func is torch.ops.aten._grouped_mm.default:
            # Experts: torch knows only the shapes of bfloat16. Rows of a, or of each group.
            a, b, groups = args[0], args[1], args[2]
            rows = (a.shape[0],) if b.dim() == 3 else (groups.shape[0], a.shape[0])
            return a.new_empty(*rows, b.shape[-1])
        return func(*args, **(kwargs or {}))
