import json

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from warpo.engine.data.examples import load_examples
from warpo.engine.data.prompts import columns, load_prompts
from warpo.engine.data.stream import PromptStream
from warpo.engine.errors import CheckpointError, DataError

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}"
    "{% endif %}<s>{{ m.role[0] }}:{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>a:{% endif %}"
)


def character_tokenizer(post: str = "$A", template: str | None = None) -> PreTrainedTokenizerFast:
    """One token a character; `post` says which special tokens surround a text."""
    symbols = ["<s>", "</s>", "?", *"abcdefghijklmnopqrstuvwxyz0123456789+=: "]
    vocabulary = {symbol: i for i, symbol in enumerate(dict.fromkeys(symbols))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=post, special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = template
    return fast


@pytest.fixture
def write(tmp_path):
    def write_lines(*lines):
        path = tmp_path / "d.jsonl"
        text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
        path.write_text(text + "\n", encoding="utf-8")
        return path

    return write_lines


def test_text_gets_the_tokens_the_tokenizer_puts_before_it(write):
    path = write({"prompt": "2+2=", "answer": "4"}, "", {"prompt": "ab", "answer": "c"})
    prompts = load_prompts(path, character_tokenizer("<s> $A"), 5)
    assert [prompt.token_ids[0] for prompt in prompts] == [0, 0]
    assert character_tokenizer().decode(prompts[0].token_ids[1:]) == "2+2="
    assert columns(prompts) == {"prompt": ["2+2=", "ab"], "answer": ["4", "c"]}


def test_a_tokenizer_without_the_letter_a_has_its_bos_and_fails_in_a_line(write):
    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "two": 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>")
    (prompt,) = load_prompts(write({"prompt": "two two"}), tokenizer, 5)
    assert prompt.token_ids == [0, 2, 2]
    with pytest.raises(
        DataError, match=r"d.jsonl:2: the tokenizer fails on the text: WordLevel er"
    ):
        load_prompts(write({"prompt": "two"}, {"prompt": "a"}), tokenizer, 5)
    with pytest.raises(
        DataError, match=r"d.jsonl:1: the tokenizer fails on the text: WordLevel er"
    ):
        load_prompts(write({"prompt": "a"}), tokenizer, 5)
    path = write(*({"prompt": "two", "completion": text} for text in (" two", " a")))
    with pytest.raises(
        DataError, match=r"d.jsonl:2: the tokenizer fails on the text: WordLevel er"
    ):
        load_examples(path, tokenizer, "sft", token_budget=9, max_length=9)


def test_chat_goes_through_the_template_once(write):
    messages = [{"role": "system", "content": "x"}, {"role": "user", "content": "ab"}]
    tokenizer = character_tokenizer("<s> $A", TEMPLATE)
    (prompt,) = load_prompts(write({"prompt": messages}), tokenizer, 50)
    wanted = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert prompt.token_ids == wanted
    assert tokenizer.decode(prompt.token_ids) == "<s>s:x</s><s>u:ab</s><s>a:"


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n{"prompt": "b"}\r\n')
    assert len(load_prompts(path, character_tokenizer(), 5)) == 2


FINE = {"prompt": "ab", "answer": "c"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a"', r"d\.jsonl:2: not JSON: .* at column 15"),
        ('["a"]', r"d\.jsonl:2: wanted a JSON object, got list: \['a'\]"),
        ({"promt": "a", "answer": "c"}, r"d\.jsonl:2: the field 'prompt' is missing: .*'promt'"),
        (
            {"question": "a", "answer": "c"},
            r":2: the field 'prompt' is missing: the row has question, answer, wanted prompt",
        ),
        ({"prompt": "a"}, r"d\.jsonl:2: the field 'answer' is missing, line 1 has it"),
        (
            '{"prompt": "a", "answer": 1, "answer": 2}',
            r":2: the key 'answer' stands twice in one obj",
        ),
        ('{"prompt": "a", "answer": {"a": 1, "a": 1}}', r":2: the key 'a' stands twice"),
        (f'{{"prompt": "a", "answer": {"1" * 5000}}}', r":2: an integer has more than 4300 digits"),
        ('{"prompt": "a", "answer": NaN}', r":2: not JSON: NaN is not a finite number"),
        ('{"prompt": "a", "answer": -Infinity}', r":2: not JSON: -Infinity is not a finite number"),
        ('{"prompt": "a", "answer": 1e999}', r":2: not JSON: 1e999 is not a finite number"),
        (f'{{"prompt": "a", "answer": {"[" * 3000}', r":2: values are nested deeper than 100"),
        (
            f'{{"prompt": "a", "answer": {"[" * 100 + "]" * 100}}}',
            r":2: values are nested deeper than 100",
        ),
        ({**FINE, "answer": ["\udc00"]}, r":2: answer holds half a surrogate pair"),
        ({**FINE, "id": 1}, r"d\.jsonl:2: the field 'id' is new, line 1 lacks it"),
        ({**FINE, "prompt": ""}, r"d\.jsonl:2: prompt is empty"),
        ({**FINE, "prompt": 7}, r"d\.jsonl:2: prompt must be text or a list .*, got int: 7"),
        ({**FINE, "prompt": None}, r"d\.jsonl:2: prompt must be text or a list .*, got NoneType"),
        ({**FINE, "prompt": "\ud800"}, r"d\.jsonl:2: prompt holds half a surrogate pair"),
        (
            {**FINE, "prompt": [{"role": "user", "content": "a"}]},
            r"d\.jsonl:2: text and chat prompts are mixed: line 1 is of the other kind",
        ),
    ],
)
def test_a_bad_line_is_refused_by_file_line_and_reason(write, line, message):
    with pytest.raises(DataError, match=message):
        load_prompts(write(FINE, line), character_tokenizer(), 5)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], r"prompt is empty, wanted at least one chat message"),
        ([{"role": "user"}], r"message 0 must be .*got \{'role': 'user'\}"),
        (["hello"], r"message 0 must be"),
        ([{"role": "user", "content": 3}], r"content of message 0 must be text, got int: 3"),
        ([{"role": "", "content": "a"}], r"role of message 0 is empty"),
        ([{"role": "assistant", "content": "a"}], r"ends with an assistant message"),
        ([{"role": "tool", "content": "a"}], r"chat template refuses the messages: no tools here"),
    ],
)
def test_bad_chat_messages_are_refused(write, messages, message):
    tokenizer = character_tokenizer(template=TEMPLATE)
    good = {"prompt": [{"role": "user", "content": "a"}]}
    with pytest.raises(DataError, match=r"d\.jsonl:2: .*" + message):
        load_prompts(write(good, {"prompt": messages}), tokenizer, 50)


def test_unusable_files_are_refused(write, tmp_path):
    with pytest.raises(DataError, match=r"absent\.jsonl: No such file"):
        load_prompts(tmp_path / "absent.jsonl", character_tokenizer(), 5)
    with pytest.raises(DataError, match=r"d\.jsonl: the file is empty"):
        load_prompts(write("", " "), character_tokenizer(), 5)
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "a"}\n{"prompt": "\xe9"}\n')
    with pytest.raises(DataError, match=r"latin\.jsonl:2: not UTF-8 at byte 13 of the line"):
        load_prompts(tmp_path / "latin.jsonl", character_tokenizer(), 5)
    with pytest.raises(DataError, match=r"d\.jsonl:1: rename the field 'completions'"):
        load_prompts(write({"prompt": "a", "completions": 1}), character_tokenizer(), 5)


def test_chat_needs_a_template(write):
    path = write({"prompt": [{"role": "user", "content": "a"}]})
    with pytest.raises(DataError, match=r"d\.jsonl:1: .*has no chat template: write the prompts"):
        load_prompts(path, character_tokenizer(), 5)


def test_nothing_follows_a_text_and_one_that_ends_itself_is_refused(write):
    (prompt,) = load_prompts(write(FINE), character_tokenizer("<s> $A </s>"), 5)
    assert character_tokenizer().decode(prompt.token_ids) == "<s>ab"
    with pytest.raises(DataError, match=r":1: the prompt ends with .*: remove it from the text"):
        load_prompts(write({"prompt": "ab</s>"}), character_tokenizer(), 5)


def test_long_prompts_are_refused_with_the_cure(write):
    path = write(FINE, {"prompt": "abcdef", "answer": ""}, {"prompt": "abcdefgh", "answer": ""})
    with pytest.raises(
        DataError,
        match=r":2: prompt of 6 tokens, at most 5 fit \(rollout\.max_model_len - .*"
        r"\(1 more are too long\): raise rollout\.max_model_len by 3",
    ):
        load_prompts(path, character_tokenizer(), 5)


@pytest.fixture
def prompts(write):
    return load_prompts(write(*({"prompt": f"a{i}"} for i in range(7))), character_tokenizer(), 5)


def test_every_epoch_draws_each_prompt_once_in_another_order(prompts):
    stream = PromptStream(prompts, prompts.keys, 3, seed=5)
    drawn = [p.fields["prompt"] for _ in range(7) for p in stream.next()]
    epochs = [drawn[i : i + 7] for i in (0, 7, 14)]
    assert [sorted(epoch) for epoch in epochs] == [[f"a{i}" for i in range(7)]] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert stream.epoch == 3


@pytest.mark.parametrize("steps_before", [0, 1, 2, 5, 7])
def test_a_resumed_stream_continues_exactly(prompts, steps_before):
    whole = PromptStream(prompts, prompts.keys, 3, seed=5)
    for _ in range(steps_before):
        whole.next()
    resumed = PromptStream(prompts, prompts.keys, 3, seed=5)
    resumed.load_state_dict(whole.state_dict())
    assert [whole.next() for _ in range(9)] == [resumed.next() for _ in range(9)]


def test_the_order_depends_on_the_seed(prompts):
    orders = [PromptStream(prompts, prompts.keys, 7, seed=seed).next() for seed in range(4)]
    assert len({tuple(p.fields["prompt"] for p in order) for order in orders}) == 4


def test_resuming_with_another_seed_or_file_is_refused(prompts, write):
    state = PromptStream(prompts, prompts.keys, 3, seed=5).state_dict()
    with pytest.raises(CheckpointError, match="with seed 5, this run has seed 6.*set seed to 5"):
        PromptStream(prompts, prompts.keys, 3, seed=6).load_state_dict(state)
    others = load_prompts(write({"prompt": "b"}), character_tokenizer(), 5)
    with pytest.raises(CheckpointError, match="data.train has none of the 7 prompts that the che"):
        PromptStream(others, others.keys, 3, seed=5).load_state_dict(state)
