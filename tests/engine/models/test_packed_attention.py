"""Every way to compute the attention of a packed row, against the padded batch that defines it."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import flex_attention as torch_flex
from transformers import masking_utils

from tests.engine import architectures
from tests.engine.tiny_models import tiny_config, tiny_model
from warpo.engine.models import attention, flex
from warpo.engine.models.attention import Mask, packed_attention, padded_attention
from warpo.engine.models.batch import Batch, pack
from warpo.engine.models.flex import BLOCK, block_mask, row_attention
from warpo.engine.models.trie_attention import trie_attention
from warpo.engine.types import TokenSequence

SIZE = 16
# Beyond twice the definition's own error in the same dtype, relative to the largest element: sums
# are added in another order; and in bfloat16 what comes out is rounded once.
SLACK = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2.0**-8}


def causal() -> Mask:
    return Mask(masking_utils.causal_mask_function, None)


def window(size: int) -> Mask:
    return Mask(masking_utils.sliding_window_causal_mask_function(size), size)


def chunks(size: int) -> Mask:
    function = masking_utils.chunked_causal_mask_function(size, torch.zeros(1, dtype=torch.int64))
    return Mask(function, size)


@dataclass(frozen=True)
class Row:
    """A packed row and what its tokens ask for."""

    batch: Batch
    query: Tensor
    key: Tensor
    value: Tensor
    sinks: Tensor
    grad: Tensor

    @staticmethod
    def of(batch: Batch, heads: int, kv_heads: int, value_size: int = SIZE, seed: int = 0) -> "Row":
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        n = batch.num_tokens
        return Row(
            batch=batch,
            query=2 * draw(1, n, heads, SIZE).transpose(1, 2),
            key=draw(1, n, kv_heads, SIZE).transpose(1, 2),
            value=draw(1, n, kv_heads, value_size).transpose(1, 2),
            sinks=draw(heads),
            grad=draw(1, n, heads, value_size),
        )

    def to(self, dtype: torch.dtype) -> "Row":
        """Rounded to a dtype."""
        tensors = (self.query, self.key, self.value, self.sinks, self.grad)
        return Row(self.batch, *(x.to(dtype) for x in tensors))


def results(row: Row, attend, sinks: bool) -> list[Tensor]:
    """What comes out, and the gradients of query, key, value and sinks."""
    inputs = [x.clone().requires_grad_() for x in (row.query, row.key, row.value)]
    inputs += [row.sinks.clone().requires_grad_()] * sinks
    out = attend(*inputs[:3], inputs[3] if sinks else None)
    assert out.shape == row.grad.shape and out.dtype == row.query.dtype
    return [out.detach(), *torch.autograd.grad(out, inputs, row.grad)]


def padded(row: Row, mask: Mask | None = None, softcap: float | None = None):
    gather_index, scatter_index = row.batch.gather_index, row.batch.scatter_index
    made = (mask or causal()).of(gather_index.shape[1], torch.device("cpu"))

    def attend(query, key, value, sinks):
        options = dict(mask=made, scaling=0.3, softcap=softcap, sinks=sinks)
        return padded_attention(query, key, value, gather_index, scatter_index, **options)

    return attend


def by_segments(row: Row):
    return lambda *inputs: trie_attention(*inputs[:3], row.batch.segments, 0.3, inputs[3])


def by_blocks(row: Row, mask: Mask | None = None, softcap: float | None = None):
    batch = row.batch
    longest = batch.gather_index.shape[1]
    blocks = (mask or causal()).blocks(longest, batch.subtree_end, batch.scatter_index % longest)

    def attend(query, key, value, sinks):
        return row_attention(query, key, value, blocks, 0.3, softcap, sinks).transpose(1, 2)

    return attend


def agrees(row: Row, dtype: torch.dtype, way, definition, *, sinks: bool) -> None:
    """Out and gradients are as near to float64 as twice those of the definition in that dtype."""
    rounded = row.to(dtype)
    exact = results(rounded.to(torch.float64), definition, sinks)
    found, own = results(rounded, way, sinks), results(rounded, definition, sinks)
    for x, y, wanted in zip(found, own, exact, strict=True):
        scale = wanted.abs().max().clamp(min=1)
        error, allowed = (x.double() - wanted).abs().max(), (y.double() - wanted).abs().max()
        assert error <= 2 * allowed + SLACK[dtype] * scale


# few tokens, so that sequences begin alike, repeat, and end within others
IDS = st.lists(st.integers(0, 2), min_size=2, max_size=9)
BATCHES = st.lists(IDS, min_size=1, max_size=7).map(lambda rows: pack([*map(scored, rows)]))
HEADS = st.sampled_from([(1, 1), (4, 4), (4, 2), (3, 1)])


def scored(ids: list[int]) -> TokenSequence:
    return TokenSequence.scored(ids)


def groups(prompt: int, lengths: list[int], number: int = 2, seed: int = 0) -> Batch:
    """Prompts with completions, of which some begin alike."""
    rng = np.random.default_rng(seed)
    sequences = []
    for _ in range(number):
        first = rng.integers(0, 50, prompt)
        for length in lengths:
            rest = rng.integers(0, 50, length)
            rest[: length // 4] = 7
            sequences.append(TokenSequence.of(first, rest))
    return pack(sequences)


@given(BATCHES, HEADS, st.booleans(), st.sampled_from([*SLACK]))
def test_segments_are_the_padded_batch(batch, heads, sinks, dtype):
    row = Row.of(batch, *heads)
    agrees(row, dtype, by_segments(row), padded(row), sinks=sinks)


@pytest.mark.parametrize("dtype", [*SLACK])
@pytest.mark.parametrize("sinks", [False, True])
def test_segments_of_groups(dtype, sinks):
    row = Row.of(groups(40, [5, 60, 150, 600]), 4, 2)
    agrees(row, dtype, by_segments(row), padded(row), sinks=sinks)


def test_segments_are_runs_of_the_trie():
    batch = pack([scored(ids) for ids in ([1, 2, 3, 4], [1, 2, 5], [1, 2, 3], [6, 7])])
    assert batch.input_ids[0].tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert batch.segments.runs == ((0, 2, 5), (2, 4, 4), (4, 5, 5), (5, 7, 7))


def test_a_gradient_has_the_same_bits_in_every_run():
    row = Row.of(groups(20, [5, 90, 90]), 4, 2).to(torch.float32)
    first, second = (results(row, by_segments(row), sinks=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.fixture
def unfused(monkeypatch):
    """FlexAttention by its own formula, which the compiled kernels are to compute.

    torch refuses a gradient on a CPU, where it has no kernel for it; its formula has one.
    """
    torch._dynamo.reset()  # it would make sizes of heads dynamic, which the formula is not
    monkeypatch.setattr(flex, "_compiled", lambda: torch_flex.flex_attention)
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
    monkeypatch.setattr(torch_flex, "_warn_once", lambda *_, **__: None)


# made anew for each row, as for each forward pass
MASKS = {"causal": causal, "window": lambda: window(6), "chunks": lambda: chunks(5)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize(("softcap", "sinks"), [(None, False), (2.0, False), (None, True)])
def test_blocks_are_the_padded_batch(unfused, mask, softcap, sinks, dtype):
    row = Row.of(groups(30, [5, 60, 150]), 4, 2, value_size=24)
    way = by_blocks(row, mask(), softcap)
    agrees(row, dtype, way, padded(row, mask(), softcap), sinks=sinks)


@pytest.mark.parametrize(
    "model_type",
    # soft caps, sinks and windows, windows, chunks, values of another width than keys
    ["gemma2", "gpt_oss", "mistral", "llama4_text", "deepseek_v3"],
)
def test_models_of_every_kind_attend_by_blocks(unfused, monkeypatch, model_type):
    monkeypatch.setattr(attention, "runs_flex", lambda query, value: True)
    model = tiny_model(tiny_config(model_type))
    assert architectures.difference(model) <= architectures.TOLERANCE


def test_short_rows_are_padded_and_long_ones_are_not(monkeypatch):
    called = []
    monkeypatch.setattr(attention, "trie_attention", lambda *_: called.append(_))
    monkeypatch.setattr(attention, "padded_attention", lambda *_, **__: called.append(None))
    for batch, mask, by_segments in (
        (groups(128, [64] * 8), causal(), True),
        (groups(128, [64] * 8), window(90), False),
        (groups(128, [64] * 8), window(200), True),
        (groups(4, [8] * 8), causal(), False),
    ):
        row = Row.of(batch, 4, 4)
        packed_attention(
            torch.nn.Module(),
            row.query,
            row.key,
            row.value,
            mask,
            gather_index=batch.gather_index,
            scatter_index=batch.scatter_index,
            subtree_end=batch.subtree_end,
            segments=batch.segments,
        )
        assert (called.pop() is not None) is by_segments


@pytest.mark.parametrize("function", [None, masking_utils.sliding_window_causal_mask_function(90)])
def test_blocks_are_those_of_the_mask(monkeypatch, function):
    monkeypatch.setattr(flex, "ROWS", BLOCK)
    batch = groups(200, [30, 150, 400])
    n, depths = batch.num_tokens, batch.position_ids[0]
    found = block_mask(function, batch.subtree_end, depths)
    wanted = torch_flex.create_block_mask(found.mask_mod, 1, 1, n, n, device="cpu")
    assert found.shape == wanted.shape
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name
    assert torch.equal(found.to_dense(), wanted.to_dense())


def test_rows_of_any_length_are_compiled_twice(unfused, monkeypatch):
    """For the first length, then for all; a mask made anew takes nothing more. The kernels need a
    GPU: here torch compiles forward and backward pass to what it runs by itself.
    """
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(torch_flex.flex_attention, fullgraph=True, backend=counter)
    monkeypatch.setattr(flex, "_compiled", lambda: compiled)
    for prompt, mask in ((40, causal), (57, causal), (71, causal), (66, window), (83, window)):
        row = Row.of(groups(prompt, [50, 70 + prompt]), 2, 1).to(torch.float32)
        size = (6,) if mask is window else ()
        way, definition = by_blocks(row, mask(*size)), padded(row, mask(*size))
        for _layer in range(2):
            found = results(row, way, sinks=False)
        for x, wanted in zip(found, results(row, definition, sinks=False), strict=True):
            torch.testing.assert_close(x, wanted, rtol=0, atol=3e-5)
    assert counter.frame_count == 4
