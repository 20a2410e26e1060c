import random
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

from warpo.engine import checkpoint
from warpo.engine.errors import CheckpointError

VOCABULARY = 32


def tiny_model(hidden=16, tie=False, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=32,
        num_hidden_layers=1,
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
    restored = checkpoint.load(path, model=resumed, parts={"optimizer": resumed_optimizer})
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

    def full_disk(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="no space left"):
        patched.setattr(torch, "save", full_disk)
        save(2, model)
    assert checkpoint.latest(tmp_path).name == "step-000001"
    assert (tmp_path / "checkpoints" / ".step-000002").exists()
    save(3, model)
    assert checkpoint.latest(tmp_path).name == "step-000003"
    assert not (tmp_path / "checkpoints" / ".step-000002").exists()


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
    with pytest.raises(CheckpointError, match="holds no checkpoint: start without --resume"):
        checkpoint.latest(tmp_path)
    model = tiny_model()
    path = save(1, model)

    def load(model, **parts):
        checkpoint.load(path, model=model, parts=parts)

    other = tiny_model(hidden=8)
    with pytest.raises(
        CheckpointError, match=r"belongs to another model: .* is \(.*16\) there and \(.*8\) here"
    ):
        load(other, optimizer=adamw(other))
    with pytest.raises(CheckpointError, match="keeps optimizer, this run has optimizer, stream"):
        load(model, optimizer=adamw(model), stream=adamw(model))
    two_groups = torch.optim.AdamW([{"params": [p]} for p in model.parameters()])
    with pytest.raises(CheckpointError, match="the state of optimizer does not fit: .*groups"):
        load(model, optimizer=two_groups)
    (path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="the model does not load"):
        load(model, optimizer=adamw(model))
    (path / "trainer.pt").write_bytes((path / "trainer.pt").read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"trainer\.pt is damaged"):
        load(model, optimizer=adamw(model))
    (path / "trainer.pt").unlink()
    with pytest.raises(CheckpointError, match=r"holds no trainer\.pt: it is no checkpoint"):
        load(model, optimizer=adamw(model))


def test_random_states_are_restored_exactly():
    def draw():
        return [random.random(), np.random.rand(), np.random.randn(), torch.rand(1).item()]

    draw()  # leaves NumPy half way through a pair of normals
    state = checkpoint.random_state()
    drawn = [draw(), draw()]
    checkpoint.set_random_state(state)
    assert [draw(), draw()] == drawn
