"""Characters of a completion to tokens, for tokenizers that split characters in their own ways."""

import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers

from warpo.engine.rollout.rewards.steps import separator_ends, token_indices


def byte_level():
    """Every byte is a token, as are "ab" and the two first bytes of a euro sign."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate(alphabet)}
    euro = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("€")[0][0]
    merges = [("a", "b"), (euro[0], euro[1])]
    for pair in merges:
        vocabulary["".join(pair)] = len(vocabulary)
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def byte_fallback():
    """Llama's: what is no token is its bytes, and a run of bytes is text as a whole or not."""
    vocabulary = {"<unk>": 0} | {f"<0x{byte:02X}>": byte + 1 for byte in range(256)}
    for symbol in ("▁", "a", "b", ".", "\n"):
        vocabulary[symbol] = len(vocabulary)
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def words():
    """Several characters a token, one of which holds two separators."""
    vocabulary = {word: i for i, word in enumerate(("?", "a.\n\nb", "€ c\n", "d", " ", "\n"))}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def fast(backend):
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def decoder(tokenizer):
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("backend", [byte_level, byte_fallback])
@pytest.mark.parametrize("text", ["ab. a€b€€\n ab", "日本語\n日本語", "a", "ééé"])
def test_every_character_has_the_first_token_that_completes_it(backend, text):
    tokenizer = fast(backend())
    decode = decoder(tokenizer)
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert decode(ids) == text
    ends = list(range(1, len(text) + 1))
    wanted = [
        next(i for i in range(len(ids)) if decode(ids[: i + 1]).startswith(text[:end]))
        for end in ends
    ]
    assert token_indices(decode, ids, text, ends) == wanted
    assert wanted[-1] == len(ids) - 2
    assert [token_indices(decode, ids, text, [end])[0] for end in ends] == wanted


def test_the_indices_of_a_character_in_parts():
    tokenizer = fast(byte_level())
    ids = tokenizer("ab€b", add_special_tokens=False)["input_ids"]
    assert [tokenizer.decode([token]) for token in ids] == ["ab", "\ufffd", "\ufffd", "b"]
    assert token_indices(decoder(tokenizer), ids, "ab€b", [1, 2, 3, 4]) == [0, 0, 2, 3]


def test_bytes_that_are_no_text_have_a_token_too():
    tokenizer = fast(byte_level())
    euro = tokenizer("€", add_special_tokens=False)["input_ids"]
    ids = [*tokenizer("a", add_special_tokens=False)["input_ids"], euro[0], *euro]
    text = tokenizer.decode(ids)
    assert text == "a\ufffd€"
    assert token_indices(decoder(tokenizer), ids, text, [1, 2, 3]) == [0, 1, 3]


def test_two_ends_in_one_token_and_the_end_of_no_text():
    tokenizer = fast(words())
    ids = tokenizer.convert_tokens_to_ids(["a.\n\nb", "€ c\n", "d"])
    text = tokenizer.decode(ids)
    assert text == "a.\n\nb€ c\nd"
    ends = separator_ends(text, "\n")
    assert [text[:end] for end in ends] == ["a.\n", "a.\n\n", "a.\n\nb€ c\n", text]
    assert token_indices(decoder(tokenizer), ids, text, ends) == [0, 0, 1, 2]
    eos = [tokenizer.eos_token_id]
    assert token_indices(decoder(tokenizer), eos, "", [0]) == [0]


def test_where_steps_end():
    assert separator_ends("ab\ncd\n", "\n") == [3, 6]
    assert separator_ends("ab\ncd\n ", "\n") == [3, 6]
    assert separator_ends("ab", "\n") == [2]
    assert separator_ends("", "\n") == [0]
    assert separator_ends("ab<step>c", "<step>") == [8, 9]
