"""The learner computes a model's own function, or the model is refused before it is loaded."""

import json

import pytest
import torch
import transformers
from safetensors.torch import save_file

from tests.engine import architectures
from tests.engine.runs import CONFIG, make_folder
from tests.engine.tiny_models import MODEL_TYPES, tiny_config, tiny_model
from tests.engine.vllm_survey import survey
from warpo.engine.config.file import read_tree
from warpo.engine.config.offline import OfflineConfig
from warpo.engine.config.policy import load_config
from warpo.engine.errors import ConfigError, DataError
from warpo.engine.models import attention
from warpo.engine.models.architectures import check_tokens, plain_attention, refusal
from warpo.engine.models.attention import Mask, UnsupportedAttention, packed_attention
from warpo.engine.models.batch import pack
from warpo.engine.models.model import attention_of
from warpo.engine.plan.memory import plan_memory
from warpo.engine.preflight import check
from warpo.engine.rollout.sampler.hf_sampler import TransformersSampler
from warpo.engine.trainers.offline.train import run as run_offline
from warpo.engine.trainers.policy.train import run
from warpo.engine.types import TokenSequence

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "model_type",
    # plain, soft caps, sinks, windows of 8 tokens, chunks of 8 tokens, values of another width than
    # keys, experts
    ["qwen2", "gemma2", "gpt_oss", "mistral", "llama4_text", "deepseek_v3", "qwen3_moe", "mixtral"],
)
def test_packed_rows_are_the_models_eager_attention_alone(model_type):
    config = tiny_config(model_type)
    assert not refusal(config, architectures.LONGEST)
    assert architectures.difference(tiny_model(config)) <= architectures.TOLERANCE


@pytest.mark.parametrize(
    "model_type",
    # a state, a state beside attention, linear attention and experts
    ["mamba", "falcon_h1", *(pytest.param("qwen3_next", marks=pytest.mark.slow),)],
)
def test_layers_with_a_state_get_a_row_for_each_sequence(model_type):
    config = tiny_config(model_type)
    assert attention_of(config, transformers.MODEL_FOR_CAUSAL_LM_MAPPING) == "eager"
    assert not refusal(config, architectures.LONGEST)
    assert architectures.difference(tiny_model(config)) <= architectures.TOLERANCE


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("deepseek_v32", "indexed_attention"),
        ("bloom", "_supports_attention_backend"),
        ("gptj", "_supports_attention_backend"),
        ("falcon", "_supports_attention_backend"),
        ("gpt_neo", "_supports_attention_backend"),
        ("stablelm", "_supports_attention_backend"),
        ("mpt", "_supports_attention_backend"),
        ("nemotron", "no keywords"),
        ("bert", "is_causal is False"),
    ],
)
def test_what_packed_rows_do_not_compute_is_refused(model_type, reason):
    try:
        config = tiny_config(model_type)
    except Exception:  # the recipe does not fit, see its docstring
        config = transformers.CONFIG_MAPPING[model_type]()
    found = refusal(config, architectures.LONGEST)
    assert reason in found and "\n" not in found


LONGROPE = {
    "rope_type": "longrope",
    "partial_rotary_factor": 1.0,
    "rope_theta": 1e4,
    "original_max_position_embeddings": 27,
    "short_factor": [1.0] * 16,
    "long_factor": [4.0] * 16,
}


@pytest.mark.parametrize(
    ("model_type", "rope", "limit"),
    [
        ("phi3", LONGROPE, 27),
        ("llama", {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, 27),
    ],
)
def test_rope_that_depends_on_the_row_is_refused_where_it_does(model_type, rope, limit):
    config = tiny_config(model_type)
    config.max_position_embeddings = 256 if rope is LONGROPE else limit
    config.rope_parameters = dict(rope)
    config.original_max_position_embeddings = limit
    assert limit == architectures.LONGEST
    assert not refusal(config, limit)
    assert architectures.difference(tiny_model(config)) <= architectures.TOLERANCE
    found = refusal(config, limit + 1, cure="lower rollout.max_model_len")
    assert rope["rope_type"] in found and f"lower rollout.max_model_len to {limit}" in found


def test_static_rope_has_no_limit():
    config = tiny_config("llama")
    config.rope_parameters = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    assert not refusal(config, 10_000)


def test_a_table_of_positions_is_a_limit():
    assert not refusal(tiny_config("gpt2"), 256)
    assert "256 learned positions" in refusal(tiny_config("gpt2"), 257, cure="lower it")


def test_quantised_weights_are_refused():
    config = tiny_config("qwen2")
    config.quantization_config = {"quant_method": "fp8"}
    assert "quantised (fp8)" in refusal(config, 8)


def test_a_type_without_a_classifier_is_refused_as_reward_model_alone():
    assert not refusal(tiny_config("granite"), 8)
    assert "no sequence classifier of the type granite" in refusal(
        tiny_config("granite"), 8, scalar=True
    )


def one_call(**options):
    batch = pack([TokenSequence.scored([1, 2, 3])])
    heads = torch.ones(1, 2, 3, 4)
    module = torch.nn.Module()
    mask = Mask(transformers.masking_utils.causal_mask_function, None)
    options = {
        "attention_mask": mask,
        "gather_index": batch.gather_index,
        "scatter_index": batch.scatter_index,
        "subtree_end": batch.subtree_end,
        "segments": batch.segments,
    } | options
    return packed_attention(module, heads, heads, heads, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"position_bias": torch.ones(1, 2, 3, 3)},
        {"chunk_size": 8},
        {"attention_mask": torch.ones(3, 3)},
        {"attention_mask": None},
        {"is_causal": False},
        {"gather_index": None},
    ],
)
def test_no_option_of_an_attention_is_dropped(options):
    one_call(nothing=None, off=False)
    with pytest.raises(UnsupportedAttention):
        one_call(**options)


def test_ids_outside_the_vocabulary_are_refused(tmp_path):
    tiny_config("qwen2").save_pretrained(tmp_path)
    check_tokens(str(tmp_path), 69, "train.jsonl")
    with pytest.raises(DataError, match=r"train\.jsonl has token id 70, .* has 70 tokens"):
        check_tokens(str(tmp_path), 70, "train.jsonl")


def without_weights(tmp_path, model_type: str) -> None:
    """The folder of a run whose model has a config and a tokenizer, and no tensor to load."""
    make_folder(tmp_path)
    save_file({}, tmp_path / "model" / "model.safetensors")
    tiny_config(model_type).save_pretrained(tmp_path / "model")


SFT = """
model: {folder}/model
output_dir: {folder}/out
algorithm: {algorithm}
steps: 1
data: {{train: {folder}/sft.jsonl}}
"""


@pytest.mark.parametrize("entry", ["train", "check", "critic", "reward", "sft", "bradley_terry"])
def test_every_entry_refuses_before_weights_are_read(tmp_path, monkeypatch, entry):
    monkeypatch.chdir(tmp_path)
    without_weights(tmp_path, "granite" if entry in ("critic", "reward") else "bloom")
    if entry in ("sft", "bradley_terry"):
        row = {"prompt": "t3", "completion": "t4"}
        if entry == "bradley_terry":
            row = {"prompt": "t3", "chosen": "t4", "rejected": "t5"}
        (tmp_path / "sft.jsonl").write_text(json.dumps(row))
        (tmp_path / "sft.yaml").write_text(SFT.format(folder=tmp_path, algorithm=entry))
        with pytest.raises(ConfigError, match="bloom"):
            run_offline(read_tree(OfflineConfig, tmp_path / "sft.yaml", []))
        return
    words = {
        "critic": ["--algorithm", "ppo", "--loss.kl_coef", "0.01"],
        "reward": ["--reward.sources", f"model:{tmp_path}/model"],
    }.get(entry, [])
    config = load_config(tmp_path / "config.yaml", words)
    with pytest.raises(ConfigError, match="bloom|granite"):
        check.run(config, plan_only=True) if entry == "check" else run(config)


def test_the_transformers_sampler_computes_soft_caps(tmp_path):
    config = tiny_config("gemma2")
    assert (plain_attention(config), plain_attention(tiny_config("qwen2"))) == ("eager", "sdpa")
    model = tiny_model(config)
    model.save_pretrained(tmp_path)
    sampler = TransformersSampler(
        str(tmp_path), dtype="float32", max_model_len=64, eos_token_ids=[1]
    )
    ids, _ = architectures.sequences()[0]
    logprobs = model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    wanted = logprobs.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
    found = torch.tensor(sampler.score([ids])[0])
    torch.testing.assert_close(found, wanted, rtol=0, atol=architectures.TOLERANCE)


def plan(tmp_path, config):
    config.save_pretrained(tmp_path / "model")
    (tmp_path / "config.yaml").write_text(CONFIG.format(folder=tmp_path))
    return plan_memory(load_config(tmp_path / "config.yaml", []), [5, 9], CPU, "alias")


def phi3_longrope():
    config = tiny_config("phi3")
    config.rope_parameters = dict(LONGROPE)
    config.original_max_position_embeddings = 128
    return config


@pytest.mark.parametrize(
    "model_type",
    [
        "gpt2",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("qwen3_moe", "gpt_oss", "gemma4_text", "phi3", "opt")
        ),
    ],
)
def test_memory_of_every_architecture_is_planned(tmp_path, model_type):
    config = phi3_longrope() if model_type == "phi3" else tiny_config(model_type)
    planned = plan(tmp_path, config)
    model = tiny_model(config)
    assert planned.held["sampler weights"] == sum(p.nbytes for p in model.parameters())
    # its gradients, and activations
    assert planned.phases["update"] > planned.phases["score"]


def test_memory_of_a_gpus_attention_is_planned(tmp_path, monkeypatch):
    """Of tensors that linear in the tokens are kept, none of which is padded."""
    config = tiny_config("gemma2")
    padded = plan(tmp_path, config).phases["update"]
    monkeypatch.setattr(attention, "runs_flex", lambda query, value: query.device.type == "cpu")
    assert plan(tmp_path, config).phases["update"] < padded


@pytest.mark.slow
def test_activations_of_experts_are_those_of_the_tokens(tmp_path):
    """Each token visits two of four experts: products of other shapes would show here."""
    config = tiny_config("qwen3_moe")
    config.moe_intermediate_size = 2048
    wide = plan(tmp_path, config).phases["score"]
    config.num_experts_per_tok = 1
    assert wide > plan(tmp_path, config).phases["score"]


@pytest.mark.slow
def test_models_on_vllms_transformers_backend_share_their_weights():
    assert survey("smollm3") == "alias"


@pytest.mark.slow
def test_the_table_of_architectures_is_what_is_found():
    known = architectures.read()
    rows = [architectures.find(name, known.get(name)) for name in MODEL_TYPES]
    assert not [row for row in rows if "wrong" in row.equal]
    assert architectures.FILE.read_text() == architectures.render(rows)
