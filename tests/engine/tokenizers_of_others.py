"""Small tokenizers that join texts and end turns as Llama 2, Gemma, Qwen and Llama 3.1 do."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

GEMMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + "
    "('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + "
    "'<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}{{ ' ' + m.content + ' ' + eos_token }}"
    "{% endif %}{% endfor %}"
)
# What it does with tool_calls is Llama 3.1's: a key that is there must hold one call.
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if 'tool_calls' in m %}{% if m.tool_calls | length != 1 %}"
    "{{ raise_exception('one tool call at most') }}{% endif %}"
    "{{ '<|start|>' + m.role + '\n' + m.tool_calls[0].function.name + '('"
    " + m.tool_calls[0].function.arguments | tojson + ')<|eot_id|>' }}"
    "{% else %}{{ '<|start|>' + m.role + (' ' + m.name if 'name' in m else '') + '\n'"
    " + m.content + '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)


def byte_level(
    *special: str, template: str | None = None, merges: tuple[str, ...] = (), **names: str
) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as Qwen and Llama 3 have it: a space belongs to the word behind it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = [*alphabet, *(merge.replace(" ", "") for merge in merges)]
    tokenizer = Tokenizer(
        models.BPE(
            {token: i for i, token in enumerate(vocabulary)},
            [tuple(merge.split(" ")) for merge in merges],
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _with_special(tokenizer, special, template, names)


def sentencepiece(template: str | None = None) -> PreTrainedTokenizerFast:
    """BPE as Llama 2's tokenizer.json has it: a text begins with a space of the tokenizer's own."""
    characters = "▁0123456789+=:.abcdefghijklmnopqrstuvwxyzABCINST[]/\n"
    vocabulary = ["<unk>", "<s>", "</s>", *characters, "▁y", "▁ye", "▁yes", "ye", "yes"]
    tokenizer = Tokenizer(
        models.BPE(
            {token: i for i, token in enumerate(vocabulary)},
            [("▁", "y"), ("▁y", "e"), ("▁ye", "s"), ("y", "e"), ("ye", "s")],
            unk_token="<unk>",
            fuse_unk=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return _with_special(tokenizer, (), template, names)


def _with_special(
    tokenizer: Tokenizer, special: tuple[str, ...], template: str | None, names: dict[str, str]
) -> PreTrainedTokenizerFast:
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, additional_special_tokens=list(special), **names
    )
    fast.chat_template = template
    return fast
