"""Reward models with another tokenizer than the policy: they read what they would learn from."""

import json
from dataclasses import replace

import pytest
import torch
import transformers

from tests.engine.data.test_prompts import character_tokenizer
from tests.engine.random_models import CONFIGS
from tests.engine.rollout.rewards.test_sources import completion, context_of
from tests.engine.tokenizers_of_others import CHATML, byte_level
from warpo.engine.data.examples import load_examples
from warpo.engine.errors import ConfigError, RewardError
from warpo.engine.models.files import load_tokenizer
from warpo.engine.rollout.rewards.combine import RewardSources
from warpo.engine.types import Completion, Prompt

TEXT = [
    ("t10 t40 t7", [10, 11, 12, 1], True),
    ("t10 t40 t7", [20, 21], False),
    ("t11 t39", [1], True),
]
MESSAGES = [{"role": "user", "content": "t10"}]


@pytest.fixture
def other(folder):
    """Writes a reward model with this tokenizer."""

    def write(tokenizer, vocab_size=320, **config):
        with torch.random.fork_rng():
            torch.manual_seed(2)
            settings = CONFIGS["qwen2"]()
            settings.update({"vocab_size": vocab_size, "num_labels": 1, **config})
            model = transformers.Qwen2ForSequenceClassification(settings).float().eval()
        model.save_pretrained(folder / "other")
        tokenizer.save_pretrained(folder / "other")
        return model

    return write


def rollouts(prompts):
    """Prompts of the policy and completions: (prompt, token ids, ended by the policy)."""
    return (
        [Prompt(token_ids=[2], fields={"prompt": p}, prompt_id=len(p)) for p, _, _ in prompts],
        [
            Completion.of(ids, [0.0] * len(ids), finished=ended, weight_version=0)
            for _, ids, ended in prompts
        ],
    )


def plain_scores(model, ids):
    with torch.no_grad():
        return model.score(model.model(torch.tensor([ids])).last_hidden_state)[0, :, 0].tolist()


def score(folder, source, prompts, **options):
    with RewardSources(context_of(folder, source, **options)) as sources:
        return sources(*rollouts(prompts))


def learned(folder, tokenizer, rows):
    """Prompt and completion as algorithm bradley_terry reads them from a file."""
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(json.dumps({**row, "rejected": "t9"}) for row in rows))
    found = load_examples(path, tokenizer, "bradley_terry", token_budget=999, max_length=999)
    return [(example.prompt_ids, example.completions[0]) for example in found]


def test_text_is_read_as_bradley_terry_reads_it(folder, other):
    tokenizer = character_tokenizer(post="<s> $A")
    model = other(tokenizer)
    policy = load_tokenizer(str(folder / "model"))
    found = score(folder, "model:other", TEXT)
    texts = [policy.decode(ids, skip_special_tokens=True) for _, ids, _ in TEXT]
    # an empty completion is no example: the prompt and the end
    wanted = [plain_scores(model, [*tokenizer("t11 t39")["input_ids"], 1])[-1]]
    rows = [{"prompt": p, "chosen": text} for (p, _, _), text in zip(TEXT, texts, strict=True)][:2]
    examples = learned(folder, tokenizer, rows)
    for (prompt, ids), (_, _, ended) in zip(reversed(examples), (TEXT[1], TEXT[0]), strict=True):
        assert (prompt[0], ids[-1]) == (0, 1)
        # what was cut at the length limit is not ended
        wanted.insert(0, plain_scores(model, [*prompt, *(ids if ended else ids[:-1])])[-1])
    assert found.totals == pytest.approx(wanted, abs=1e-5)
    assert len(set(found.totals)) == 3


def test_messages_go_through_its_own_template_and_end_its_own_turn(folder, other):
    tokenizer = byte_level(
        "<eos>", "<|im_start|>", "<|im_end|>", template=CHATML, eos_token="<eos>"
    )
    model = other(tokenizer)
    found = score(folder, "model:other", [(MESSAGES, [10, 11, 1], True)], prompt=MESSAGES)
    ((prompt, ids),) = learned(folder, tokenizer, [{"prompt": MESSAGES, "chosen": "t10 t11"}])
    text = tokenizer.decode([*prompt, *ids])
    assert text == "<|im_start|>user\nt10<|im_end|>\n<|im_start|>assistant\nt10 t11<|im_end|>"
    assert found.totals == pytest.approx([plain_scores(model, [*prompt, *ids])[-1]], abs=1e-5)


def test_steps_end_in_the_tokens_of_both(folder, other):
    tokenizer = character_tokenizer()
    model = other(tokenizer, step_separator="t31")
    prompts = [("t7", [30, 31, 32, 1], True), ("t7", [1], True), ("t7", [33, 34], False)]
    found = score(folder, "process_model:other", prompts)
    # of the policy: t31, and the last token with text; without text the end itself
    assert [[end for end, _ in steps] for steps in found.steps] == [[1, 2], [0], [1]]
    ids = tokenizer("t7t30 t31 t32</s>", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids[:9]) == "t7t30 t31"
    scores = plain_scores(model, ids)
    assert [s for _, s in found.steps[0]] == pytest.approx([scores[8], scores[-2]], abs=1e-5)
    alone = plain_scores(model, tokenizer("t7</s>", add_special_tokens=False)["input_ids"])
    assert found.steps[1][0][1] == pytest.approx(alone[-1], abs=1e-5)


def test_what_it_cannot_read_is_refused(folder, other):
    plain, messages = character_tokenizer(), [(MESSAGES, [10, 1], True)]
    other(plain)
    with pytest.raises(ConfigError, match=r"other has another vocabulary .* no chat template: wri"):
        score(folder, "model:other", messages, prompt=MESSAGES)
    no_end = character_tokenizer()
    no_end.eos_token = None
    other(no_end)
    with pytest.raises(ConfigError, match=r"other has another vocab.* no end-of-sequence token"):
        score(folder, "model:other", TEXT)
    other(plain, max_position_embeddings=12)
    with pytest.raises(RewardError, match="other has 12 positions, .* are 22 of its tokens"):
        score(folder, "model:other", TEXT)
    other(plain, vocab_size=20)
    with pytest.raises(RewardError, match=r"makes the id \d+ of a text, and its model has 20 tok"):
        score(folder, "model:other", TEXT)
    other(plain, step_separator="")
    with pytest.raises(RewardError, match="other scores each of its tokens, and the policy has"):
        score(folder, "process_model:other", TEXT)


def test_a_text_longer_than_the_budget_is_scored(folder, other):
    model, tokenizer = other(character_tokenizer()), character_tokenizer()
    long = [("t10 t40 t7", [10] * 12, False)]
    found = score(folder, "model:other", long)
    ids = tokenizer("t10 t40 t7" + " ".join(["t10"] * 12))["input_ids"]
    assert len(ids) > 24
    assert found.totals == pytest.approx([plain_scores(model, ids)[-1]], abs=1e-5)


def test_the_policys_own_tokens_are_read_as_they_are(folder, reward_model):
    model = reward_model()
    owner = Prompt(token_ids=[3, 4], fields={"prompt": "t3 t4"}, prompt_id=1)
    with RewardSources(context_of(folder, "model:rm")) as sources:
        # no text makes the id 0 in the middle
        (found,) = sources([owner], [replace(completion(0, 5), finished=False)]).totals
    assert found == pytest.approx(plain_scores(model, [3, 4, 0, 5])[-1], abs=1e-5)
