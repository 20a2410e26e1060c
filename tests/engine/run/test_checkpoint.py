import errno
import os
import random
import resource
import shutil

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from tests.torture.checkpoints import DAMAGES, Run, flip, try_damage
from warpo.engine.errors import CheckpointError, TrainingError
from warpo.engine.run import checkpoint

VOCABULARY = 32


def tiny_model(hidden=16, tie=False, dtype=torch.float32, seed=0, layers=1):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tie,
    )
    return LlamaForCausalLM(config).to(dtype)


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


@pytest.fixture
def tokenizer():
    words = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")


@pytest.fixture
def save(tmp_path, tokenizer):
    def save_step(step, model, keep=0, optimizer=None):
        parts = {"optimizer": optimizer or adamw(model)}
        return checkpoint.save(
            tmp_path,
            step=step,
            model=model,
            tokenizer=tokenizer,
            parts=parts,
            keep=keep,
            settings={"steps": 3},
        )

    return save_step


def learn(model, optimizer, steps):
    """Steps on tokens drawn from all three generators; the losses."""
    losses = []
    for _ in range(steps):
        shift = int(np.random.randint(5)) + random.randrange(5)
        ids = (torch.randint(VOCABULARY, (1, 8)) + shift) % VOCABULARY
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_continues_bit_for_bit(save, tie, dtype):
    model = tiny_model(tie=tie, dtype=dtype)
    optimizer = adamw(model)
    learn(model, optimizer, 3)
    path = save(3, model, optimizer=optimizer)
    wanted = learn(model, optimizer, 4)

    resumed = tiny_model(tie=tie, dtype=dtype, seed=1)
    resumed_optimizer = adamw(resumed)
    storage = [parameter.data_ptr() for parameter in resumed.parameters()]
    restored = checkpoint.load(
        checkpoint.read(path), model=resumed, parts={"optimizer": resumed_optimizer}
    )
    assert restored == 3
    assert [parameter.data_ptr() for parameter in resumed.parameters()] == storage
    assert learn(resumed, resumed_optimizer, 4) == wanted
    for mine, theirs in zip(resumed.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_the_directory_is_a_model_that_transformers_loads(save):
    model = tiny_model(dtype=torch.bfloat16)
    path = save(3, model)
    assert path.name == "step-000003"
    loaded = AutoModelForCausalLM.from_pretrained(path)
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert AutoTokenizer.from_pretrained(path).eos_token == "</s>"


def test_weights_that_are_slices_of_one_storage_are_saved_apart(save):
    model = tiny_model()
    attention = model.model.layers[0].self_attn
    fused = torch.cat([attention.k_proj.weight.data, attention.v_proj.weight.data])
    attention.k_proj.weight.data, attention.v_proj.weight.data = fused.chunk(2)
    loaded = AutoModelForCausalLM.from_pretrained(save(1, model))
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name])


def test_the_newest_are_kept(save, tmp_path):
    model = tiny_model()
    for step in (1, 2, 3):
        save(step, model, keep=2)
    names = sorted(entry.name for entry in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-000002", "step-000003"]
    save(4, model, keep=0)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 3


def test_an_interrupted_save_is_not_a_checkpoint(save, tmp_path, monkeypatch):
    model = tiny_model()
    save(1, model)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(torch, "save", interrupted)
        save(2, model)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]


@pytest.fixture
def limited():
    """No file of this process grows beyond 20 kB: what a quota or a full disk does to it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("file", ["model.safetensors", "trainer.pt"])
def test_a_disk_that_takes_no_more_is_named_and_keeps_the_last_good(file, tmp_path, limited):
    run = Run(torch.float32)
    parts = {"stream": run.stream}
    options = dict(tokenizer=None, keep=1, settings={})
    checkpoint.save(tmp_path, step=1, model=None, parts=parts, **options)
    run.learn()
    model = tiny_model(hidden=64) if file == "model.safetensors" else None
    parts |= {"optimizer": run.optimizer} if file == "trainer.pt" else {}
    with pytest.raises(CheckpointError) as caught:
        checkpoint.save(tmp_path, step=2, model=model, parts=parts, **options)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/checkpoints/step-000002 cannot be written: File too")
    assert "it needs 1.1 MB, and the disk mounted at /" in message
    assert message.endswith("Newest that is complete: step-000001")
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (errno.EACCES, "Permission denied; make it writable or choose another output_dir. Newest"),
        (errno.EROFS, "Read-only file system; make it writable or choose another"),
        (errno.EDQUOT, "Disk quota exceeded; it needs 1.1 MB, and the disk mounted at"),
        (errno.ENOSPC, "No space left on device; it needs 1.1 MB, and the disk mounted at"),
    ],
)
def test_what_the_disk_refuses_is_told_with_its_cure(save, tmp_path, monkeypatch, number, text):
    def refused(*_):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched, pytest.raises(CheckpointError, match=text):
        patched.setattr(os, "fsync", refused)
        save(1, tiny_model())
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_step_saved_again_replaces_the_old(save):
    save(1, tiny_model(seed=1))
    second = tiny_model(seed=2)
    loaded = AutoModelForCausalLM.from_pretrained(save(1, second))
    assert torch.equal(loaded.lm_head.weight, second.lm_head.weight)


def test_a_million_steps_sort_after_999999(save, tmp_path):
    root = tmp_path / "checkpoints"
    save(1, tiny_model())
    for name in ("step-999999", "step-1000000"):
        shutil.copytree(root / "step-000001", root / name)
    assert checkpoint.latest(tmp_path).name == "step-1000000"


def test_what_does_not_fit_is_refused(save, tmp_path):
    assert checkpoint.latest(tmp_path) is None and checkpoint.open_latest(tmp_path) is None
    model = tiny_model()
    path = save(1, model)

    def load(model, **parts):
        checkpoint.load(checkpoint.read(path), model=model, parts=parts)

    other = tiny_model(hidden=8)
    with pytest.raises(
        CheckpointError, match=r"belongs to another model: .* is \(.*16\) there and \(.*8\) here"
    ):
        load(other, optimizer=adamw(other))
    deeper = tiny_model(layers=2)
    with pytest.raises(CheckpointError, match=r"another model: model.layers.1.* is absent there"):
        load(deeper, optimizer=adamw(deeper))
    narrow = tiny_model(dtype=torch.bfloat16)
    with pytest.raises(CheckpointError, match=r"is torch.float32 there and torch.bfloat16 here"):
        load(narrow, optimizer=adamw(narrow))
    with pytest.raises(CheckpointError, match="keeps optimizer, this run has optimizer, stream"):
        load(model, optimizer=adamw(model), stream=adamw(model))
    two_groups = torch.optim.AdamW([{"params": [p]} for p in model.parameters()])
    with pytest.raises(CheckpointError, match="the state of optimizer does not fit: .*groups"):
        load(model, optimizer=two_groups)


@pytest.mark.parametrize("name", DAMAGES)
def test_nothing_damaged_is_used(name, tmp_path):
    assert try_damage(name, torch.bfloat16, random.Random(1), tmp_path) is None


def test_the_cure_of_a_damage_names_what_is_left(save, tmp_path):
    for step in (1, 2, 3):
        save(step, tiny_model())
    root = tmp_path / "checkpoints"

    def message():
        with pytest.raises(CheckpointError) as caught:
            checkpoint.open_latest(tmp_path)
        return str(caught.value)

    (root / "step-000003/config.json").unlink()
    assert message() == (
        f"{root}/step-000003/config.json is missing; delete step-000003 to resume from step-000002"
    )
    flip(root / "step-000002/trainer.pt", random.Random(0))
    assert message().endswith("; delete step-000002 and step-000003 to resume from step-000001")
    shutil.rmtree(root / "step-000001")
    assert message().endswith(f"; delete {root} to start anew")
    shutil.rmtree(root / "step-000002")
    assert message().endswith(f"; delete {root}/step-000003 to start anew")


def test_what_is_not_finite_is_not_saved(save, tmp_path):
    model = tiny_model()
    optimizer = adamw(model)
    learn(model, optimizer, 1)
    with torch.no_grad():
        model.lm_head.weight[3, 4] = torch.nan
    with pytest.raises(TrainingError, match="step 2 is not saved, since lm_head.weight is not fin"):
        save(2, model)
    assert checkpoint.latest(tmp_path) is None
    good = save(1, tiny_model())
    next(iter(optimizer.state.values()))["exp_avg"][0] = torch.inf
    with pytest.raises(TrainingError, match="exp_avg is not finite.*last good one, step-000001"):
        save(2, tiny_model(), keep=1, optimizer=optimizer)
    assert checkpoint.latest(tmp_path) == good


def test_a_model_that_cannot_be_saved_is_refused_before_the_run(tmp_path, tokenizer, monkeypatch):
    model = tiny_model()

    def rehearse():
        checkpoint.rehearse(tmp_path, model, tokenizer, model.parameters())

    rehearse()
    assert not list((tmp_path / "checkpoints").iterdir())
    model.generation_config.do_sample, model.generation_config.temperature = False, 0.9
    with pytest.raises(CheckpointError, match="could not be saved after the run: GenerationConfig"):
        rehearse()
    model.generation_config.temperature = None
    usage = shutil.disk_usage(tmp_path)._replace(free=40_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match="No space left on device; it needs 1.1 MB, .* has 0"):
        rehearse()
    assert not list((tmp_path / "checkpoints").iterdir())


def test_random_states_are_restored_exactly():
    def draw():
        return [random.random(), np.random.rand(), np.random.randn(), torch.rand(1).item()]

    draw()  # leaves NumPy half way through a pair of normals
    state = checkpoint.random_state()
    drawn = [draw(), draw()]
    checkpoint.set_random_state(state)
    assert [draw(), draw()] == drawn
