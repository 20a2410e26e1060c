import torch
import torch.nn.functional as F

from warpo.engine.models.attention import backward_is_deterministic


class Mode(torch.autograd.Function):
    """Identity that notes torch's deterministic mode in its backward pass."""

    seen: list[int] = []

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        Mode.seen.append(torch.get_deterministic_debug_mode())
        return grad


def test_only_the_backward_of_that_node_is_deterministic():
    Mode.seen.clear()
    x = torch.ones(3, requires_grad=True)
    first = Mode.apply(x)
    chosen = Mode.apply(first)
    last = Mode.apply(chosen)
    backward_is_deterministic(chosen.grad_fn)
    last.sum().backward()
    assert Mode.seen == [0, 2, 0]
    assert torch.get_deterministic_debug_mode() == 0


def test_packed_attention_asks_for_it(monkeypatch):
    """On a GPU: what resumes must have the bits of what went on."""
    from warpo.engine.models import attention

    nodes = []
    monkeypatch.setattr(attention, "backward_is_deterministic", nodes.append)
    query = torch.randn(2, 2, 5, 16, requires_grad=True)
    out = attention._attention(query, query, query, is_causal=True)
    assert nodes == [out.grad_fn]
    torch.testing.assert_close(
        out, F.scaled_dot_product_attention(query, query, query, is_causal=True), rtol=0, atol=0
    )
    assert torch.backends.cuda.cudnn_sdp_enabled()
