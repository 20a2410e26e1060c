"""Arguments of the reverse scans for hypothesis, and what their tests do alike."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from hypothesis import strategies as st

from tests.kernels.backends import DEVICE, dtypes, strided
from tests.tolerance import SCAN_ABSOLUTE, SCAN_RELATIVE, assert_close

LENGTHS = [0, 1, 2, 5, 16, 24, 25, 31, 64, 129, 300, 530]


def draw_shape(draw: Callable, time_dims: list[int]) -> tuple[tuple[int, ...], int, dict]:
    """Shape of per-step tensors, number of rows, and the options of the layout."""
    if draw(st.integers(0, 3)) == 0:
        lengths = draw(st.lists(st.sampled_from(LENGTHS), max_size=5))
        bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        return (sum(lengths),), len(lengths), {"cu_seqlens": bounds.to(DEVICE)}
    rows, steps = draw(st.sampled_from([0, 1, 2, 7, 33])), draw(st.sampled_from(LENGTHS))
    time_dim = draw(st.sampled_from(time_dims))
    options = {"time_dim": time_dim} if len(time_dims) > 1 else {}
    return ((steps, rows) if time_dim == 0 else (rows, steps)), rows, options


def is_behind_last(mask: torch.Tensor, layout: dict) -> torch.Tensor:
    """Masked steps that no valid step of their row follows."""
    if "cu_seqlens" in layout:
        bounds = layout["cu_seqlens"].tolist()
        spans = [slice(*x) for x in zip(bounds[:-1], bounds[1:], strict=True)]
        pieces = [is_behind_last(mask[span][None], {})[0] for span in spans]
        return torch.cat(pieces) if pieces else mask == 0
    dim = layout.get("time_dim", -1)
    return (mask != 0).long().flip(dim).cumsum(dim).flip(dim) == 0


@st.composite
def scan_cases(
    draw, backend: str, per_step: tuple[str, ...], ends: bool = True, row_values: bool = True
):
    """(float tensors per step and per row, other tensors and options, shape), in any layout, with
    NaN wherever nothing may be read.
    """
    shape, rows, layout = draw_shape(draw, [-1, 0, 1] if ends else [-1])
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    strides = draw(st.sampled_from(["dense", "sliced", "transposed"]))
    dtype = draw(st.sampled_from(dtypes(backend)))

    def flags(shape: tuple[int, ...], share: float) -> torch.Tensor:
        chosen = torch.rand(shape, generator=generator) < share
        return chosen if draw(st.booleans()) else chosen.to(torch.uint8)

    floats = {name: torch.randn(shape, generator=generator) for name in per_step}
    others: dict = {}
    options = {"mask_mode": draw(st.sampled_from(["carry", "zero", "compact"]))}
    if draw(st.booleans()):
        others["mask"] = mask = flags(shape, draw(st.sampled_from([0.0, 0.02, 0.5, 0.9])))
        for name in per_step:
            hidden = mask == 0
            if name == "rewards" and options["mask_mode"] == "compact":
                hidden &= ~is_behind_last(mask, layout)
            floats[name] = floats[name].masked_fill(hidden, torch.nan)
    if draw(st.booleans()):
        floats["last_values"] = torch.randn((rows,), generator=generator)
    if ends and draw(st.booleans()):
        others["terminated"] = flags(shape, 0.1)
    if ends and draw(st.booleans()):
        others["truncated"] = flags(shape, 0.1)
        floats["final_values"] = torch.randn(shape, generator=generator)
    if ends:
        options["done_convention"] = draw(st.sampled_from(["ends_at_t", "starts_at_t"]))
    if options.get("done_convention") == "starts_at_t" and draw(st.booleans()):
        others["last_terminated"] = flags((rows,), 0.5)
        others["last_truncated"] = flags((rows,), 0.5)
    floats = {name: strided(x.to(dtype), strides) for name, x in floats.items()}
    others = {name: strided(x, strides) for name, x in others.items()}
    return floats, others | options | layout, shape


def every_case(
    per_step: tuple[str, ...], ends: bool = True
) -> Iterator[tuple[dict, dict, tuple[int, ...]]]:
    """What `scan_cases` draws, each mask mode in each layout once, with everything given."""
    generator = torch.Generator().manual_seed(0)

    def flags(shape: tuple[int, ...], share: float) -> torch.Tensor:
        return (torch.rand(shape, generator=generator) < share).to(DEVICE)

    bounds = torch.tensor([0, 3, 3, 90, 670], dtype=torch.int32, device=DEVICE)
    layouts = [((5, 70), 5, {}), ((670,), 4, {"cu_seqlens": bounds})]
    if ends:
        layouts.append(((70, 5), 5, {"time_dim": 0}))
    for shape, rows, layout in layouts:
        for mode in ("carry", "zero", "compact"):
            names = (*per_step, "final_values") if ends else per_step
            floats = {name: torch.randn(shape, generator=generator) for name in names}
            floats["last_values"] = torch.randn((rows,), generator=generator)
            floats = {name: x.to(DEVICE) for name, x in floats.items()}
            others = {"mask": flags(shape, 0.6), "mask_mode": mode} | layout
            if ends:
                others |= {name: flags(shape, 0.05) for name in ("terminated", "truncated")}
            yield floats, others, shape


def assert_scan_close(actual, expected, what: str, scale: float = 10) -> None:
    assert actual.dtype == torch.float32 or "gradient" in what
    assert_close(
        actual, expected, relative=SCAN_RELATIVE, absolute=SCAN_ABSOLUTE * scale, what=what
    )


def assert_gradients_close(mine: dict, exact: dict) -> None:
    """Those of leaves of the same names, of which the float64 one may be without a gradient."""
    for name, leaf in mine.items():
        wanted = exact[name].grad
        wanted = torch.zeros_like(exact[name]) if wanted is None else wanted
        assert_scan_close(leaf.grad, wanted, f"gradient of {name}")


def leaves(floats: dict) -> tuple[dict, dict]:
    """The tensors as leaves, and their float64 copies."""
    mine = {name: x.detach().requires_grad_() for name, x in floats.items()}
    return mine, {name: x.detach().double().requires_grad_() for name, x in floats.items()}


PER_ROW = ("last_values", "last_terminated", "last_truncated", "terminal_rewards")


def on_rows(
    oracle: Callable, arguments: dict, per_step: tuple[str, ...], count: int = 2
) -> list[torch.Tensor]:
    """The `count` results of a NumPy function of one row, for arguments in any layout."""
    per_step = (*per_step, "mask", "terminated", "truncated", "final_values")
    options = dict(arguments)
    bounds, time_dim = options.pop("cu_seqlens", None), options.pop("time_dim", -1)
    arrays = {
        name: options.pop(name).cpu().numpy() for name in (*per_step, *PER_ROW) if name in arguments
    }
    first = arrays[per_step[0]]
    if bounds is not None:
        where = [slice(*x) for x in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)]
    else:
        rows = range(first.shape[1 - time_dim % 2])
        where = [(slice(None), b) if time_dim == 0 else (b, slice(None)) for b in rows]
    results = [np.zeros(first.shape) for _ in range(count)]
    for b, row in enumerate(where):
        taken = {name: x[b] if name in PER_ROW else x[row] for name, x in arrays.items()}
        for result, found in zip(results, oracle(**taken, **options), strict=True):
            result[row] = found
    return [torch.from_numpy(x) for x in results]
