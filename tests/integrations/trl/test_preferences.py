"""TRL's losses of preference pairs."""

import pytest
import torch

from tests.integrations.compare import compare

pytest.importorskip("trl", reason="TRL is not installed: make peers; then make test-integrations")
from datasets import Dataset  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402
from trl import DPOConfig, DPOTrainer  # noqa: E402
from trl.experimental.cpo import CPOTrainer  # noqa: E402
from trl.experimental.orpo import ORPOTrainer  # noqa: E402

from warpo.kernels.integrations import trl  # noqa: E402

WORDS = [f"w{i}" for i in range(40)]
DPO = "DPOTrainer._compute_loss"


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    torch.manual_seed(0)
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=0,
        eos_token_id=1,
    )
    pairs = [
        {
            "prompt": " ".join(WORDS[i : i + 3]),
            "chosen": " " + " ".join(WORDS[i + 5 : i + 6 + i % 4]),
            "rejected": " " + " ".join(WORDS[i + 9 : i + 11 + i % 3]),
        }
        for i in range(12)
    ]
    arguments = DPOConfig(
        output_dir=str(tmp_path_factory.mktemp("dpo")),
        per_device_train_batch_size=4,
        max_steps=3,
        report_to=[],
        use_cpu=True,
        bf16=False,
        logging_steps=1,
        save_strategy="no",
        learning_rate=1e-2,
        disable_tqdm=True,
    )
    data = Dataset.from_list(pairs)
    model = LlamaForCausalLM(config)
    made = DPOTrainer(
        model,
        LlamaForCausalLM(config),
        arguments,
        train_dataset=data,
        processing_class=fast,
    )
    made.inputs = made._prepare_inputs(next(iter(made.get_train_dataloader())))
    return made


def loss_and_metrics(trainer, **inputs):
    trainer._metrics["train"].clear()
    trainer._total_train_tokens = 0
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, {**trainer.inputs, **inputs}, False)
    loss.backward()
    gradients = [p.grad.clone() for p in trainer.model.parameters()]
    return loss.detach(), gradients, {k: list(v) for k, v in trainer._metrics["train"].items()}


def same(found, wanted):
    torch.testing.assert_close(found[:2], wanted[:2])
    assert found[2].keys() == wanted[2].keys()
    for name, values in wanted[2].items():
        assert [type(x) for x in found[2][name]] == [type(x) for x in values], name
        assert found[2][name] == pytest.approx(values, rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("precomputed", [False, True])
@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo", "robust", "sigmoid_norm"])
def test_dpo_loss_and_metrics(trainer, monkeypatch, loss_type, precomputed):
    monkeypatch.setattr(trainer, "loss_types", [loss_type])
    monkeypatch.setattr(trainer, "loss_weights", [0.7])
    monkeypatch.setattr(trainer, "beta", 0.3)
    monkeypatch.setattr(trainer, "label_smoothing", 0.2)
    monkeypatch.setattr(trainer, "precompute_ref_logps", precomputed)
    refs = {}
    if precomputed:
        chosen, rejected = trainer.compute_ref_log_probs(trainer.ref_model, trainer.inputs)
        refs = {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    wanted = loss_and_metrics(trainer, **refs)
    with trl.patch(only=[DPO]):
        same(loss_and_metrics(trainer, **refs), wanted)
    with trl.patch():
        same(loss_and_metrics(trainer, **refs), wanted)


@pytest.mark.parametrize(
    "changes",
    [
        {"loss_types": ["apo_zero"]},
        {"loss_types": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
        {"f_divergence_type": "js_divergence"},
        {"ld_alpha": 0.5},
    ],
    ids=str,
)
def test_what_is_left_to_trl(trainer, monkeypatch, changes):
    for name, value in changes.items():
        monkeypatch.setattr(trainer, name, value)
    wanted = loss_and_metrics(trainer)
    with trl.patch(only=[DPO]):
        found = loss_and_metrics(trainer)
    assert torch.equal(found[0], wanted[0]) and found[2] == wanted[2]


def test_dpo_trainer_trains_the_same(trainer):
    """Three optimizer steps, with the patch and without it."""
    start = {name: x.clone() for name, x in trainer.model.state_dict().items()}
    logs = []
    for only in ([], None):
        trainer.model.load_state_dict(start)
        trainer.optimizer = trainer.lr_scheduler = None
        trainer._metrics["train"].clear()
        trainer._total_train_tokens = 0
        trainer.state.log_history.clear()
        with trl.patch(only=only):
            trainer.train()
        logs.append(trainer.state.log_history[:3])
    for found, wanted in zip(logs[1], logs[0], strict=True):
        assert found.keys() == wanted.keys()
        for name in wanted:
            assert found[name] == pytest.approx(wanted[name], rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("trainer_class", [CPOTrainer, ORPOTrainer])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("average_log_prob", [False, True])
@pytest.mark.parametrize("is_encoder_decoder", [False, True])
def test_logprobs_of_completions(trainer_class, dtype, average_log_prob, is_encoder_decoder):
    logits = (4 * torch.randn(3, 6, 33)).to(dtype)
    labels = torch.randint(0, 33, (3, 6)).masked_fill(torch.arange(6) < 3, -100)
    original = trainer_class.get_batch_logps
    with trl.patch(only=[f"{trainer_class.__name__}.get_batch_logps"]):
        ours = trainer_class.get_batch_logps
    options = (average_log_prob, is_encoder_decoder)

    def theirs(logits, labels, *options):
        return original(logits, labels.clone(), *options)

    compare(theirs, ours, logits, labels, *options, differentiable=[0], scale=60.0)
    kept = labels.clone()
    dirty = logits.masked_fill(
        (labels == -100).roll(0 if is_encoder_decoder else -1, 1)[..., None], torch.nan
    )
    torch.testing.assert_close(ours(dirty, labels, *options), ours(logits, labels, *options))
    assert torch.equal(labels, kept)
