"""warpo's kernels inside torchrl:

from warpo.kernels.integrations import torchrl

torchrl.patch()

The value estimators and their scans over time. Advantages of TD(1) and TD(lambda), and the
vectorised TD(1), call functions that are replaced and gain with them; TD(0) has no scan. Served
are float32 tensors with bool flags and one gamma and lambda for all steps; a tensor of gammas
passes through, and so do other dtypes.

Differs: a next value is not read where the episode terminated, so that a NaN there does not
spread; the vectorised functions cut the powers of gamma lambda off below 1e-7, and fail where
gamma lambda is 0; ours do neither.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from warpo.kernels import ops
from warpo.kernels.integrations.patching import Library
from warpo.kernels.integrations.serving import require, require_constant, require_served

library = Library("torchrl", tested=("0.14.1",))
patch, unpatch, patched = library.patch, library.unpatch, library.patched
names, report = library.names, library.report

FUNCTIONAL = "torchrl.objectives.value.functional"


@library.replaces(FUNCTIONAL, "generalized_advantage_estimate", "discounted_returns")
def generalized_advantage_estimate(
    original: Callable,
    gamma: float,
    lmbda: float,
    state_value: Tensor,
    next_state_value: Tensor,
    reward: Tensor,
    done: Tensor,
    terminated: Tensor | None = None,
    *,
    time_dim: int = -2,
) -> tuple[Tensor, Tensor]:
    numbers = _discounts(gamma, lmbda)
    values = (state_value, next_state_value, reward)
    _require(values, (done, terminated), time_dim)
    return _gae(numbers[0], numbers[1], *values, done, terminated, time_dim)


@library.replaces(FUNCTIONAL, "vec_generalized_advantage_estimate", "discounted_returns")
def vec_generalized_advantage_estimate(
    original: Callable,
    gamma: float | Tensor,
    lmbda: float | Tensor,
    state_value: Tensor,
    next_state_value: Tensor,
    reward: Tensor,
    done: Tensor,
    terminated: Tensor | None = None,
    *,
    time_dim: int = -2,
) -> tuple[Tensor, Tensor]:
    numbers = _discounts(gamma, lmbda, synchronises=True)
    values = (state_value, next_state_value, reward)
    _require(values, (done, terminated), time_dim)
    return _gae(numbers[0], numbers[1], *values, done, terminated, time_dim)


@library.replaces(FUNCTIONAL, "td1_return_estimate", "discounted_returns")
def td1_return_estimate(
    original: Callable,
    gamma: float,
    next_state_value: Tensor,
    reward: Tensor,
    done: Tensor,
    terminated: Tensor | None = None,
    rolling_gamma: bool | None = None,
    *,
    time_dim: int = -2,
) -> Tensor:
    numbers = _discounts(gamma)
    values = (next_state_value, reward)
    require(rolling_gamma in (None, True), "rolling_gamma=False")
    _require(values, (done, terminated), time_dim)
    if terminated is None:
        return _scan(reward, numbers[0], time_dim, terminated=done, last=next_state_value)
    return _scan(
        reward,
        numbers[0],
        time_dim,
        terminated=terminated,
        truncated=done,
        final=next_state_value,
        last=next_state_value,
    )


@library.replaces(FUNCTIONAL, "td_lambda_return_estimate", "discounted_returns")
def td_lambda_return_estimate(
    original: Callable,
    gamma: float,
    lmbda: float,
    next_state_value: Tensor,
    reward: Tensor,
    done: Tensor,
    terminated: Tensor | None = None,
    rolling_gamma: bool | None = None,
    *,
    time_dim: int = -2,
) -> Tensor:
    numbers = _discounts(gamma, lmbda)
    values = (next_state_value, reward)
    require(rolling_gamma in (None, True), "rolling_gamma=False")
    _require(values, (done, terminated), time_dim)
    return _lambda_returns(numbers[0], numbers[1], *values, done, terminated, time_dim)


@library.replaces(FUNCTIONAL, "vec_td_lambda_return_estimate", "discounted_returns")
def vec_td_lambda_return_estimate(
    original: Callable,
    gamma: float | Tensor,
    lmbda: float | Tensor,
    next_state_value: Tensor,
    reward: Tensor,
    done: Tensor,
    terminated: Tensor | None = None,
    rolling_gamma: bool | None = None,
    *,
    time_dim: int = -2,
) -> Tensor:
    numbers = _discounts(gamma, lmbda, synchronises=True)
    values = (next_state_value, reward)
    _require(values, (done, terminated), time_dim)
    return _lambda_returns(numbers[0], numbers[1], *values, done, terminated, time_dim)


@library.replaces(FUNCTIONAL, "vtrace_advantage_estimate", "vtrace")
def vtrace_advantage_estimate(
    original: Callable,
    gamma: float,
    log_pi: Tensor,
    log_mu: Tensor,
    state_value: Tensor,
    next_state_value: Tensor,
    reward: Tensor,
    done: Tensor,
    terminated: Tensor | None = None,
    rho_thresh: float | Tensor = 1.0,
    c_thresh: float | Tensor = 1.0,
    time_dim: int = -2,
) -> tuple[Tensor, Tensor]:
    """The scan of `ops.vtrace` gives v - V: fed with the temporal differences as its rewards and
    without values, since torchrl's next values are not those of the next step.
    """
    numbers = _discounts(gamma)
    bounds: Any = _number(rho_thresh), _number(c_thresh)
    values = (log_pi, log_mu, state_value, next_state_value, reward)
    for bound in bounds:
        require(0 < bound < _RATIO_MAX, "a threshold that no kernel has")
    _require(values, (done, terminated), time_dim)
    require_constant(*values)
    terminated = done if terminated is None else terminated
    deltas = _deltas(numbers[0], state_value, next_state_value, reward, terminated)
    new, old, rewards = (_rows(x, time_dim) for x in (log_pi, log_mu, deltas))
    nothing = deltas.new_zeros(()).expand(new.shape)
    traces, _ = ops.vtrace(
        new,
        old,
        rewards,
        nothing,
        gamma=numbers[0],
        rho_max=bounds[0],
        c_max=bounds[1],
        terminated=_rows(done, time_dim),
        log_ratio_limit=_LOG_RATIO_LIMIT,
    )
    targets = _as_given(traces, reward.shape, time_dim).add_(state_value)
    steps = reward.shape[time_dim]
    after = torch.cat(
        [targets.narrow(time_dim, 1, steps - 1), next_state_value.narrow(time_dim, -1, 1)],
        time_dim,
    )
    after = torch.where(done, next_state_value, after)
    ratio = torch.sub(log_pi, log_mu).exp_().clamp_max_(bounds[0])
    advantages = _deltas(numbers[0], state_value, after, reward, terminated).mul_(ratio)
    return advantages, targets


@library.replaces(FUNCTIONAL, "reward2go", "discounted_returns")
def reward2go(
    original: Callable, reward: Tensor, done: Tensor, gamma: float, *, time_dim: int = -2
) -> Tensor:
    numbers = _discounts(gamma, synchronises=True)
    _require((reward,), (done, None), time_dim)
    return _scan(reward, numbers[0], time_dim, terminated=done)


# exp of it is the largest ratio that `ops.vtrace` can tell from its bound
_LOG_RATIO_LIMIT = 80.0
_RATIO_MAX = math.exp(_LOG_RATIO_LIMIT)


def _gae(
    gamma: float,
    lmbda: float,
    state_value: Tensor,
    next_state_value: Tensor,
    reward: Tensor,
    done: Tensor,
    terminated: Tensor | None,
    time_dim: int,
) -> tuple[Tensor, Tensor]:
    """A_t = delta_t + gamma lambda (1 - done_t) A_{t+1}, and A + V."""
    terminated = done if terminated is None else terminated
    deltas = _deltas(gamma, state_value, next_state_value, reward, terminated)
    advantages = _scan(deltas, gamma * lmbda, time_dim, terminated=done)
    return advantages, advantages + state_value


def _lambda_returns(
    gamma: float,
    lmbda: float,
    next_state_value: Tensor,
    reward: Tensor,
    done: Tensor,
    terminated: Tensor | None,
    time_dim: int,
) -> Tensor:
    """G_t = r_t + gamma ((1 - lambda) V_t' + lambda G_{t+1}), with V_t' the next value, which
    takes the place of G_{t+1} where done and after the last step; 0 where terminated.
    """
    terminated = done if terminated is None else terminated
    values = next_state_value.masked_fill(terminated, 0)
    if lmbda != 1:
        reward = torch.add(reward, values, alpha=gamma * (1 - lmbda))
    return _scan(reward, gamma * lmbda, time_dim, truncated=done, final=values, last=values)


def _deltas(
    gamma: float, state_value: Tensor, next_state_value: Tensor, reward: Tensor, terminated: Tensor
) -> Tensor:
    """r + gamma V' - V, without V' where terminated."""
    next_state_value = next_state_value.masked_fill(terminated, 0)
    return torch.sub(reward, state_value).add_(next_state_value, alpha=gamma)


def _scan(
    reward: Tensor,
    gamma: float,
    time_dim: int,
    *,
    terminated: Tensor | None = None,
    truncated: Tensor | None = None,
    final: Tensor | None = None,
    last: Tensor | None = None,
) -> Tensor:
    """`discounted_returns` over time_dim; of `last` the last step counts."""
    returns = ops.discounted_returns(
        _rows(reward, time_dim),
        gamma=gamma,
        terminated=None if terminated is None else _rows(terminated, time_dim),
        truncated=None if truncated is None else _rows(truncated, time_dim),
        final_values=None if final is None else _rows(final, time_dim),
        last_values=None if last is None else last.select(time_dim, -1).reshape(-1),
    )
    return _as_given(returns, reward.shape, time_dim)


def _rows(tensor: Tensor, time_dim: int) -> Tensor:
    """As [rows, T]; a copy only if there is a dimension of more than one on both sides of time."""
    steps = tensor.shape[time_dim]
    if time_dim == -2 and tensor.shape[-1] == 1:
        return tensor.reshape(-1, steps)
    return tensor.movedim(time_dim, -1).reshape(-1, steps)


def _as_given(rows: Tensor, shape: torch.Size, time_dim: int) -> Tensor:
    if time_dim == -2 and shape[-1] == 1:
        return rows.contiguous().view(shape)
    time_dim %= len(shape)
    others = shape[:time_dim] + shape[time_dim + 1 :]
    return rows.reshape(others + rows.shape[-1:]).movedim(-1, time_dim).contiguous()


def _require(values: Sequence[Tensor], flags: tuple[Tensor, Tensor | None], time_dim: int) -> None:
    """Pass the call on unless shapes, dtypes and device are such that the library accepts them and
    we do.
    """
    done = flags[0]
    shape = done.shape
    require_served(*values)
    for x in values:
        require(x.dtype == torch.float32, "values that are not float32")
        require(x.shape == shape, "tensors of two shapes")
    for flag in flags:
        if flag is not None:
            require(flag.dtype == torch.bool, "flags that are not bool")
            require(flag.shape == shape, "tensors of two shapes")
            require(flag.device == values[0].device, "tensors on two devices")
    # a tensor of one element is not transposed by the library
    require(done.numel() > 1, "a single step")
    require(-done.dim() <= time_dim < done.dim(), "a time_dim that the tensors do not have")


def _discounts(*numbers: float | Tensor, synchronises: bool = False) -> tuple[float, ...]:
    """gamma, or gamma and lambda, as numbers in [0, 1]."""
    found = tuple(_number(x, synchronises) for x in numbers)
    for x in found:
        require(0 <= x <= 1, "gamma or lambda outside [0, 1]")
    return found


def _number(x: float | Tensor, synchronises: bool = False) -> float:
    """A number, or a scalar tensor that no gradient goes to; one on a device is read where the
    library itself `synchronises` alone.
    """
    if not isinstance(x, Tensor):
        return float(x)
    require(
        x.numel() == 1
        and x.dtype == torch.float32
        and not x.requires_grad
        and (synchronises or x.device.type == "cpu")
        and not torch.compiler.is_compiling(),
        "gamma, lambda or a threshold as a tensor that is no constant scalar",
    )
    return x.item()
