"""Folders of models as users have them, missing, damaged, mixed up: one line each, and no model of
random numbers."""

from __future__ import annotations

import json
import re
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import safetensors.torch
import torch
import transformers

from tests.engine.runs import make_folder
from warpo.engine.config.sections import RewardSettings
from warpo.engine.errors import WarpoError
from warpo.engine.models.files import check_files, load_tokenizer, read_config
from warpo.engine.models.model import eos_token_ids, load_model
from warpo.engine.models.scalar import load_scalar_model
from warpo.engine.rollout.rewards.base import SourceContext
from warpo.engine.rollout.rewards.model import RewardModel
from warpo.engine.rollout.sampler.hf_sampler import TransformersSampler

CPU = torch.device("cpu")
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
NORM = "model.layers.1.post_attention_layernorm.weight"

Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model with its tokenizer."""
    return make_folder(tmp_path_factory.mktemp("whole")) / "model"


@pytest.fixture(scope="module")
def classifier(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model of the same size and tokenizer."""
    folder = tmp_path_factory.mktemp("classifier") / "model"
    shutil.copytree(whole, folder)
    transformers.AutoModelForSequenceClassification.from_pretrained(
        whole, num_labels=1
    ).save_pretrained(folder)
    return folder


def load_policy(path: str) -> None:
    """As build() does before and while it loads."""
    check_files(path)
    tokenizer = load_tokenizer(path)
    eos_token_ids(load_model(path, "float32", CPU), tokenizer)


def write(name: str, content: str | bytes) -> Damage:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def remove(*names: str) -> Damage:
    return lambda folder: [(folder / name).unlink() for name in names]


def change(name: str, **values: Any) -> Damage:
    """Keys of a JSON file; None takes one away."""

    def damage(folder: Path) -> None:
        settings = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        settings |= values
        (folder / name).write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))

    return damage


def cut(name: str, share: float) -> Damage:
    def damage(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * share)])

    return damage


def tensors(edit: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def damage(folder: Path) -> None:
        loaded = safetensors.torch.load_file(folder / WEIGHTS)
        edit(loaded)
        safetensors.torch.save_file(loaded, folder / WEIGHTS, metadata={"format": "pt"})

    return damage


def shard(lose: str = "", **changes: Any) -> Damage:
    """The weights in two files with an index; one of the files lost, the index changed."""

    def damage(folder: Path) -> None:
        loaded = safetensors.torch.load_file(folder / WEIGHTS)
        places = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(sorted(loaded))}
        for part in set(places.values()):
            held = {name: tensor for name, tensor in loaded.items() if places[name] == part}
            safetensors.torch.save_file(held, folder / part, metadata={"format": "pt"})
        (folder / WEIGHTS).unlink()
        index = {"metadata": {}, "weight_map": places, **changes}
        (folder / INDEX).write_text(json.dumps(index))
        if lose:
            (folder / lose).unlink()

    return damage


def several(*damages: Damage) -> Damage:
    return lambda folder: [damage(folder) for damage in damages]


def clear(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


HUGE_HEADER = struct.pack("<Q", 2**60) + b"{}"
CONFIG = {
    "an empty folder": (clear, "is empty: give the directory"),
    "no config": (remove("config.json"), r"config\.json is missing"),
    "config cut off": (cut("config.json", 0.5), r"config\.json is damaged"),
    "config empty": (write("config.json", ""), r"config\.json is damaged"),
    "config of another encoding": (write("config.json", b"\xff\xfe{}"), r"config\.json is damaged"),
    "config a list": (write("config.json", "[]"), "it holds list, not an object"),
    "config nested deep": (write("config.json", "[" * 100_000), r"config\.json is damaged"),
    "config a folder": (
        several(remove("config.json"), lambda folder: (folder / "config.json").mkdir()),
        r"config\.json is damaged",
    ),
    "no type": (change("config.json", model_type=None), "model_type is None"),
    "an unknown type": (change("config.json", model_type="xyz"), "model_type is 'xyz', which this"),
    "code that comes with it": (
        change("config.json", model_type="mine", auto_map={"AutoConfig": "x.Y"}),
        "code that comes with a model is not run",
    ),
    "a size of text": (change("config.json", hidden_size="big"), "config.json of .* does not load"),
    "a quantised model": (
        change("config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
        "is quantised",
    ),
}
FILES = {
    "no weights": (remove(WEIGHTS), "has no weights, which are in"),
    "weights cut off": (cut(WEIGHTS, 0.5), r"model\.safetensors is damaged or cut off"),
    "weights empty": (write(WEIGHTS, b""), "is damaged or cut off"),
    "weights of zeros": (write(WEIGHTS, bytes(4096)), "is damaged or cut off"),
    "weights of text": (write(WEIGHTS, "version https://git-lfs"), "is damaged or cut off"),
    "a header that is too long": (write(WEIGHTS, HUGE_HEADER), "is damaged or cut off"),
    "a pickle of another kind": (
        several(remove(WEIGHTS), write("pytorch_model.bin", b"\x80\x04K\x01.")),
        "the model of .* does not load",
    ),
    "a shard lost": (
        shard(lose="part-1.safetensors"),
        rf"part-1\.safetensors is missing, which {INDEX} lists",
    ),
    "an index cut off": (several(shard(), cut(INDEX, 0.5)), rf"{INDEX} is damaged"),
    "an index without a map": (shard(weight_map=None), "weight_map does not map"),
    "an index of other tensors": (
        shard(weight_map={"model.x": "part-0.safetensors"}),
        r"part-0\.safetensors lacks model\.x, which",
    ),
    "a shard cut off": (
        several(shard(), cut("part-0.safetensors", 0.9)),
        r"part-0\.safetensors is damaged",
    ),
    "generation config cut off": (
        cut("generation_config.json", 0.5),
        r"generation_config\.json is damaged",
    ),
}
TENSORS = {
    "a tensor missing": (
        tensors(lambda t: t.pop(NORM)),
        rf"lack {re.escape(NORM)}, of which transformers would make random numbers",
    ),
    "a layer missing": (
        tensors(lambda t: [t.pop(name) for name in list(t) if ".layers.1." in name]),
        r"lack model\.layers\.1\.\S+ and 11 more tensors",
    ),
    "no tensors": (tensors(dict.clear), r"lack \S+ and 2[56] more tensors"),
    "tensors of other names": (
        tensors(lambda t: t.update({f"x.{name}": t.pop(name) for name in list(t)})),
        "of which transformers would make random numbers",
    ),
    "a tensor of another shape": (
        tensors(lambda t: t.update({NORM: t[NORM][:100].clone()})),
        rf"{re.escape(NORM)} has shape \[100\] in the weights and \[128\] by config\.json",
    ),
    "more layers than the config": (
        change("config.json", num_hidden_layers=1, layer_types=None),
        r"model\.layers\.1\.\S+ and \d+ more tensors, in a layer that config\.json does not count",
    ),
    "fewer layers than the config": (
        change("config.json", num_hidden_layers=3, layer_types=None),
        r"lack model\.layers\.2\.",
    ),
    "another width than the config": (
        change("config.json", hidden_size=256),
        "the two are not of one model",
    ),
    "another vocabulary than the config": (
        change("config.json", vocab_size=70),
        r"model\.embed_tokens\.weight has shape \[64, 128\]",
    ),
}
TOKENIZER = {
    "no tokenizer": (remove("tokenizer.json", "tokenizer_config.json"), "has no tokenizer, which"),
    "tokenizer cut off": (cut("tokenizer.json", 0.5), r"tokenizer\.json is damaged"),
    "tokenizer of an empty object": (
        write("tokenizer.json", "{}"),
        "tokenizer of .* does not load",
    ),
    "tokenizer of other bytes": (write("tokenizer.json", b"\xff"), r"tokenizer\.json is damaged"),
    "tokenizer config cut off": (
        cut("tokenizer_config.json", 0.5),
        r"tokenizer_config\.json is damaged",
    ),
    "a tokenizer class of code": (
        change("tokenizer_config.json", tokenizer_class="MyTokenizer"),
        None,
    ),
}
GENERATION = {
    "an eos outside the vocabulary": (
        change("generation_config.json", eos_token_id=64),
        "eos_token_id is 64, and the model's vocabulary is 0 to 63",
    ),
    "one of several outside": (
        change("generation_config.json", eos_token_id=[1, 151645]),
        "eos_token_id is 151645",
    ),
    "a negative eos": (change("generation_config.json", eos_token_id=-1), "eos_token_id is -1"),
    "an eos of text": (change("generation_config.json", eos_token_id="</s>"), "eos_token_id"),
    "what cannot be saved": (
        change("generation_config.json", num_return_sequences=4),
        "Greedy methods .* do not support `num_return_sequences`",
    ),
}


def refused(load: Callable[[str], object], path: Path, message: str | None) -> None:
    """In one line that names the folder; None: or loaded."""
    try:
        load(str(path))
    except WarpoError as error:
        text = str(error)
        assert "\n" not in text and len(text) < 600 and str(path) in text, text
        assert message is None or re.search(message, text), text
    else:
        assert message is None, "loaded"


POLICY = CONFIG | FILES | TENSORS | TOKENIZER | GENERATION


@pytest.mark.parametrize("name", POLICY)
def test_a_damaged_model_is_refused_in_one_line(whole: Path, tmp_path: Path, name: str) -> None:
    damage, message = POLICY[name]
    folder = Path(shutil.copytree(whole, tmp_path / "model"))
    damage(folder)
    refused(load_policy, folder, message)


@pytest.mark.parametrize("name", [*CONFIG, *FILES, *TENSORS])
def test_a_damaged_reward_model_is_refused_in_one_line(
    classifier: Path, whole: Path, tmp_path: Path, name: str
) -> None:
    damage, message = (CONFIG | FILES | TENSORS)[name]
    folder = Path(shutil.copytree(classifier, tmp_path / "model"))
    if not (folder / "generation_config.json").exists():
        shutil.copy(whole / "generation_config.json", folder)
    damage(folder)
    context = SourceContext(
        settings=RewardSettings(sources="math"),
        fields=[],
        prompt="",
        tokenizer=load_tokenizer(str(whole)),
        max_new_tokens=8,
        dtype="float32",
        device=CPU,
        token_budget=64,
    )
    refused(lambda path: RewardModel(path, context), folder, message)


@pytest.mark.parametrize("name", TENSORS)
def test_no_reader_makes_random_numbers_of_what_is_missing(
    whole: Path, tmp_path: Path, name: str
) -> None:
    damage, message = TENSORS[name]
    folder = Path(shutil.copytree(whole, tmp_path / "model"))
    damage(folder)
    sampler = dict(dtype="float32", max_model_len=64, eos_token_ids=[1])
    refused(lambda path: TransformersSampler(path, **sampler), folder, message)
    refused(lambda path: load_scalar_model(path, "float32", CPU), folder, message)


def test_a_head_is_new_in_a_critic_only_where_the_folder_is_a_language_models(
    whole: Path, classifier: Path, tmp_path: Path
) -> None:
    assert not load_scalar_model(str(whole), "float32", CPU).score.weight.any()
    assert load_scalar_model(str(classifier), "float32", CPU).score.weight.any()
    folder = Path(shutil.copytree(classifier, tmp_path / "model"))
    tensors(lambda t: t.pop("score.weight"))(folder)
    refused(lambda path: load_scalar_model(path, "float32", CPU), folder, r"lack score\.weight")


@pytest.mark.parametrize("damage", [shard(), lambda folder: None])
def test_what_is_whole_loads(whole: Path, tmp_path: Path, damage: Damage) -> None:
    """The head is tied, so the files lack it."""
    folder = Path(shutil.copytree(whole, tmp_path / "model"))
    damage(folder)
    load_policy(str(folder))


def test_sampling_settings_that_transformers_would_not_save_are_dropped_with_a_word(
    whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Llama 2 and Vicuna come with them."""
    folder = Path(shutil.copytree(whole, tmp_path / "model"))
    change("generation_config.json", do_sample=False, temperature=0.9, top_p=0.6)(folder)
    model = load_model(str(folder), "float32", CPU)
    assert "do_sample is false) and has temperature 0.9, top_p 0.6" in caplog.text
    model.save_pretrained(tmp_path / "saved")
    again = load_model(str(tmp_path / "saved"), "float32", CPU)
    assert (again.generation_config.do_sample, again.generation_config.eos_token_id) == (False, 1)
    change("generation_config.json", do_sample=True, temperature=0.9)(folder)
    assert load_model(str(folder), "float32", CPU).generation_config.temperature == 0.9


def test_a_hub_that_knows_no_such_model_or_cannot_be_reached_is_asked_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    start = time.monotonic()
    with pytest.raises(
        WarpoError, match="models/none, and the hub (cannot be reached|has no model)"
    ):
        load_policy("models/none")
    assert time.monotonic() - start < 15


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/none/model", "there is no directory /none/model"),
        ("./none", r"there is no directory \./none"),
        ("a/b/c", "there is no directory a/b/c"),
        ("models/none", "there is no directory models/none, and the hub is switched off by HF_HUB"),
        ("none", "there is no directory none, and the hub"),
        ("a b", "there is no directory a b, and the hub has names like org/model only"),
        (__file__, "is a file: give the directory"),
    ],
)
def test_a_name_that_is_no_folder_is_refused_at_once(path: str, message: str) -> None:
    for load in (read_config, load_tokenizer, load_policy):
        with pytest.raises(WarpoError, match=message):
            load(path)
