"""Offsets of packed sequences, such as cu_seqlens: what is refused, and which tokens they cut out.

Offsets are well-formed where they start at 0 or later, do not descend, and end at the number of
tokens or before it. Tokens before the first sequence and after the last belong to no sequence: the
padding of a pack.

The values are looked at by the body of an operator, where they are real tensors, and on the CPU
only: on a GPU that would stop the host. There the kernels read and write within the tokens
whatever the offsets are, and what belongs to a malformed sequence becomes NaN:
csrc/math/offsets.h.
"""

import torch
from torch import Tensor

from warpo.kernels import dispatch
from warpo.kernels._checks import check_tensor


def check_offsets(name: str, offsets: Tensor, like: Tensor, shape: str = "(B + 1,)") -> int:
    """Dtype, device and layout; returns the number of sequences."""
    check_tensor(name, offsets, (torch.int32,), like=like)
    if offsets.dim() != 1 or offsets.numel() == 0 or not offsets.is_contiguous():
        raise ValueError(f"{name} must be a dense {shape}, got {tuple(offsets.shape)}")
    return offsets.numel() - 1


def _on_host(tensor: Tensor) -> bool:
    """Whether its values can be looked at without a wait for the device."""
    return tensor.is_cpu


def check_values(name: str, offsets: Tensor | None, bound: int, elements: str = "tokens") -> bool:
    """Whether the offsets, if any, are known to be well-formed: False where the device alone can
    tell.

    Raises:
        ValueError: they are on the CPU and malformed.
    """
    if offsets is None:
        return True
    if not _on_host(offsets):
        return False
    place = dispatch.load("cpu").first_malformed(offsets.numel(), bound, offsets)
    if place < 0:
        return True
    offset = int(offsets[place])
    if offset > bound:
        raise ValueError(f"{name}[{place}] = {offset} is past the {bound} {elements}")
    if place == 0:
        raise ValueError(f"{name}[0] = {offset} is before the first of the {bound} {elements}")
    raise ValueError(
        f"{name}[{place}] = {offset} is less than {name}[{place - 1}] = {int(offsets[place - 1])}: "
        "offsets must not descend"
    )


def check_step_ends(
    step_offsets: Tensor, step_ends: Tensor, num_tokens: int, cu_seqlens: Tensor | None
) -> None:
    """Ends of the steps of outputs, whose offsets are well-formed.

    Raises:
        ValueError: they are on the CPU, and one is outside its output or before the end of the step
            before it.
    """
    if not _on_host(step_ends):
        return
    step = dispatch.load("cpu").first_malformed_end(
        step_offsets.numel() - 1, num_tokens, cu_seqlens, step_offsets, step_ends
    )
    if step < 0:
        return
    output = int(sequence_of_tokens(step_offsets, step_ends.numel())[step])
    length = num_tokens if cu_seqlens is None else int(cu_seqlens[output : output + 2].diff())
    end = int(step_ends[step])
    if 0 <= end < length:
        raise ValueError(
            f"step_ends[{step}] = {end} is less than step_ends[{step - 1}] = "
            f"{int(step_ends[step - 1])}: the ends of an output must not descend"
        )
    raise ValueError(f"step_ends[{step}] = {end} is outside the {length} tokens of output {output}")


def first_and_last(offsets: Tensor) -> tuple[int, int] | None:
    """The tokens from the first sequence to the last; None where the host cannot look at them."""
    if torch.compiler.is_compiling() or type(offsets) is not Tensor or not _on_host(offsets):
        return None
    return dispatch.load("cpu").first_and_last(offsets.numel(), offsets)


def is_malformed(offsets: Tensor, bound: int) -> Tensor:
    """() bool on the device of the offsets, which the host does not wait for."""
    return (offsets.clamp(0, bound).cummax(0).values != offsets).any()


def in_a_sequence(offsets: Tensor, tokens: int) -> Tensor:
    """(tokens,) bool."""
    place = torch.arange(tokens, device=offsets.device)
    return (place >= offsets[0]) & (place < offsets[-1])


def sequence_of_tokens(offsets: Tensor, tokens: int) -> Tensor:
    """(tokens,) int64: the sequence of each token; some sequence for a token of none. There is one
    sequence at least.
    """
    place = torch.arange(tokens, device=offsets.device)
    found = torch.bucketize(place, offsets[1:], right=True)
    return found.clamp(max=offsets.numel() - 2)


def valid_tokens(mask: Tensor | None, offsets: Tensor | None, tokens: int) -> Tensor | None:
    """(tokens,) bool of packed tokens that are not masked and belong to a sequence; the mask itself
    without offsets.
    """
    if offsets is None:
        return mask
    inside = in_a_sequence(offsets, tokens)
    return inside if mask is None else inside & (mask != 0)
