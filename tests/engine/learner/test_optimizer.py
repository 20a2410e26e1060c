"""The optimizer of the learner; its kernel is tested in tests/kernels/test_adamw_publish.py."""

import io
import math

import pytest
import torch
from torch import nn

from tests.tolerance import ADAMW_ABSOLUTE, ADAMW_RELATIVE, STEP_RELATIVE, assert_close
from warpo.engine.learner.optimizer import (
    AdamW,
    clip_coefficient,
    gradient_norm,
    update_metrics,
)
from warpo.engine.learner.schedule import Schedule
from warpo.kernels import ops

MAX_GRAD_NORM = 2.0
OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
DTYPES = [torch.float32, torch.bfloat16]
SHAPES = {"matrix": (30, 40), "vector": (7,), "scalar": (), "rows": (4, 33)}

each_dtype = pytest.mark.parametrize("dtype", DTYPES)
staged_or_not = pytest.mark.parametrize("staged", [False, True], ids=["device", "host"])


def parameters(dtype: torch.dtype, seed: int = 0) -> dict[str, nn.Parameter]:
    """Dense ones; slices of rows and of columns out of one fused weight."""
    generator = torch.Generator().manual_seed(seed)
    made = {
        name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()
    }
    fused = torch.randn(12, 50, generator=generator).to(dtype)
    made["rows"] = fused[4:8, 10:43]
    made["more"] = fused[8:]
    return {name: nn.Parameter(tensor) for name, tensor in made.items()}


def set_gradients(named: dict[str, nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in named.values():
        gradient = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        parameter.grad = gradient.to(parameter.grad_dtype)


def new(named: dict[str, nn.Parameter], staged: bool = False, **options) -> AdamW:
    """With state on the host the copies between CPU and CPU are made as between CPU and GPU."""
    optimizer = AdamW(named.items(), **(OPTIONS | options))
    optimizer._staged = staged
    return optimizer


def learn(named: dict[str, nn.Parameter], optimizer: AdamW, steps: range):
    for step in steps:
        set_gradients(named, step)
        update = optimizer.step(MAX_GRAD_NORM)
    return update


def saved(optimizer: AdamW) -> dict:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=True)


def test_gradients_accumulate_in_float32():
    weight = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = AdamW([("weight", weight)], lr=0.0)
    for _ in range(1000):
        weight.sum().backward()
    # in bfloat16 the sum of ones stays at 256
    assert weight.grad.dtype == torch.float32 and weight.grad.tolist() == [1000.0] * 4
    assert optimizer.step().grad_norm == 2000.0


@staged_or_not
@each_dtype
def test_the_master_weights_are_those_of_torch_adamw(dtype, staged):
    named = parameters(dtype)
    copies = {name: nn.Parameter(p.detach().float().clone()) for name, p in named.items()}
    optimizer, peer = new(named, staged), torch.optim.AdamW(copies.values(), **OPTIONS)
    for step in range(4):
        set_gradients(named, step)
        scale = clip_coefficient(gradient_norm(named.values()), MAX_GRAD_NORM)
        assert 0 < scale < 1
        for name, copy in copies.items():
            copy.grad = named[name].grad.float() * scale
        optimizer.step(MAX_GRAD_NORM)
        peer.step()
    for name, parameter in named.items():
        master = optimizer.state[parameter].get("master", parameter)
        assert_close(
            master,
            copies[name],
            relative=4 * ADAMW_RELATIVE,
            absolute=ADAMW_ABSOLUTE + 4 * STEP_RELATIVE * OPTIONS["lr"],
            what=name,
        )
        assert torch.equal(parameter, master.to(dtype))


@staged_or_not
@each_dtype
def test_weights_are_written_in_place_and_nothing_beside_them(dtype, staged):
    storage = torch.full((6, 50), 7.0, dtype=dtype)
    named = {"slice": nn.Parameter(storage[1:5, 3:40])}
    address = named["slice"].data_ptr()
    learn(named, new(named, staged, lr=0.5), range(2))
    assert named["slice"].data_ptr() == address == storage[1:, 3:].data_ptr()
    outside = torch.ones_like(storage, dtype=torch.bool)
    outside[1:5, 3:40] = False
    assert (storage[outside] == 7).all() and (storage[~outside] != 7).any()


@each_dtype
def test_state_on_the_host_gives_the_same_bits(dtype):
    runs = []
    for staged in (False, True):
        named = parameters(dtype)
        optimizer = new(named, staged)
        updates = [learn(named, optimizer, range(step, step + 1)) for step in range(3)]
        runs.append((named, optimizer, updates))
    (one, optimizer, updates), (other, host, host_updates) = runs
    for name in one:
        assert torch.equal(one[name], other[name])
        for key, value in optimizer.state[one[name]].items():
            if key != "step":
                assert torch.equal(value, host.state[other[name]][key]), key
    for a, b in zip(updates, host_updates, strict=True):
        assert a.fingerprints == b.fingerprints and a.changed == b.changed
        torch.testing.assert_close(a.master_update, b.master_update)


@staged_or_not
@each_dtype
def test_the_update_is_reported(dtype, staged):
    named = parameters(dtype)
    optimizer = new(named, staged, lr=1e-4, weight_decay=0.0)
    learn(named, optimizer, range(1))
    before = {name: p.detach().clone() for name, p in named.items()}
    masters = {n: optimizer.state[p].get("master", p).detach().clone() for n, p in named.items()}
    update = learn(named, optimizer, range(1, 2))
    assert update.fingerprints == {name: ops.fingerprint(p) for name, p in named.items()}
    assert update.total == sum(p.numel() for p in named.values())
    assert update.changed == sum((p != before[name]).sum() for name, p in named.items())
    moved = sum(
        (optimizer.state[p].get("master", p) - masters[n]).double().abs().sum()
        for n, p in named.items()
    )
    rounded = sum((p - before[n]).double().abs().sum() for n, p in named.items())
    metrics = update_metrics([update])
    assert metrics["update/changed_frac"] == update.changed.item() / update.total
    lost = 1 - (rounded / moved).item()
    assert metrics["update/rounding_lost_frac"] == pytest.approx(lost, abs=1e-3)
    # in bfloat16 a step of 1e-4 moves a weight near 1 only where it lies near a boundary
    assert (metrics["update/changed_frac"] < 0.3) == (dtype == torch.bfloat16)


@staged_or_not
def test_a_parameter_without_gradient_is_left_alone_and_reported(staged):
    named = parameters(torch.bfloat16)
    optimizer = new(named, staged)
    set_gradients(named, 0)
    named["matrix"].grad = None
    before = named["matrix"].detach().clone()
    update = optimizer.step()
    assert torch.equal(named["matrix"], before) and named["matrix"] not in optimizer.state
    assert update.fingerprints == {name: ops.fingerprint(p) for name, p in named.items()}
    optimizer.zero_grad()
    update = optimizer.step()
    assert update.changed == 0 and update_metrics([update])["update/rounding_lost_frac"] == 0
    assert len(update.fingerprints) == len(named)


@each_dtype
@pytest.mark.parametrize("before", [False, True], ids=["device", "host"])
@pytest.mark.parametrize("after", [False, True], ids=["device", "host"])
def test_a_resumed_run_goes_on_bit_for_bit(dtype, before, after):
    named = parameters(dtype)
    optimizer = new(named, before)
    schedule = Schedule(optimizer, warmup_steps=5)
    learn(named, optimizer, range(3))
    schedule.step()
    state, weights = saved(optimizer), {name: p.detach().clone() for name, p in named.items()}
    resumed = parameters(dtype, seed=1)
    with torch.no_grad():
        for name, parameter in resumed.items():
            parameter.copy_(weights[name])
    fresh = new(resumed, after)
    going_on = Schedule(fresh, warmup_steps=5)
    fresh.load_state_dict(state)
    going_on.load_state_dict(schedule.state_dict())
    assert fresh.param_groups[0]["lr"] == schedule.get_last_lr()[0] == OPTIONS["lr"] * (2 / 6)
    wanted = learn(named, optimizer, range(3, 6))
    assert learn(resumed, fresh, range(3, 6)).fingerprints == wanted.fingerprints
    for name, parameter in named.items():
        assert torch.equal(resumed[name], parameter)
        for key, value in optimizer.state[parameter].items():
            own = fresh.state[resumed[name]][key]
            assert own == value if key == "step" else torch.equal(own, value)


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup_steps", [0, 3])
def test_the_learning_rate_rises_and_falls_as_its_schedule_says(name, warmup_steps):
    optimizer, total = new(parameters(torch.float32), lr=2.0), 11
    schedule = Schedule(optimizer, name, warmup_steps=warmup_steps, num_steps=total)
    other = new(parameters(torch.float32), lr=2.0)
    skipping = Schedule(other, name, warmup_steps=warmup_steps, num_steps=total)
    found = []
    for _ in range(total):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer._opt_called = True
        schedule.step()
    for step, lr in enumerate(found):
        left = (total - step) / (total - warmup_steps)
        fallen = {"constant": 1.0, "linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2}
        rising = (step + 1) / (warmup_steps + 1)
        expected = 2.0 * (rising if step < warmup_steps else fallen[name])
        assert lr == pytest.approx(expected, rel=1e-12) and lr > 0
    assert schedule.get_last_lr()[0] == (2.0 if name == "constant" else 0)
    skipping.skip(4)
    assert skipping.get_last_lr()[0] == other.param_groups[0]["lr"] == found[4]


def test_a_resumed_run_may_have_other_settings():
    optimizer = new(parameters(torch.float32))
    schedule = Schedule(optimizer, warmup_steps=3)
    schedule.step()
    other = new(parameters(torch.float32), lr=1.0, weight_decay=0.25, betas=(0.5, 0.75))
    going_on = Schedule(other, warmup_steps=3)
    other.load_state_dict(saved(optimizer))
    going_on.load_state_dict(schedule.state_dict())
    group = other.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["betas"]) == (0.5, 0.25, (0.5, 0.75))
    going_on.step()
    assert group["lr"] == 0.75


@staged_or_not
def test_after_a_reset_it_starts_from_the_weights_that_were_loaded(staged):
    named, loaded = parameters(torch.bfloat16), parameters(torch.bfloat16, seed=1)
    optimizer = new(named, staged)
    learn(named, optimizer, range(2))
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(loaded[name])
    optimizer.reset()
    wanted = learn(loaded, new(loaded), range(2))
    assert learn(named, optimizer, range(2)).fingerprints == wanted.fingerprints


@each_dtype
def test_float32_keeps_two_moments_and_narrower_weights_a_master_too(dtype):
    named = parameters(dtype)
    optimizer = new(named)
    assert not optimizer.state
    learn(named, optimizer, range(1))
    narrow = dtype == torch.bfloat16
    for parameter in named.values():
        state = optimizer.state[parameter]
        assert set(state) == {"step", "exp_avg", "exp_avg_sq"} | ({"master"} if narrow else set())
        assert all(state[k].dtype == torch.float32 for k in state if k != "step")


@each_dtype
def test_the_clip_coefficient_is_that_of_torch(dtype):
    named = parameters(dtype)
    set_gradients(named, 0)
    norm = gradient_norm(named.values())
    exact = torch.cat([p.grad.double().flatten() for p in named.values()]).norm()
    assert norm.dtype == torch.float32 and norm.item() == pytest.approx(exact.item(), rel=1e-6)
    assert clip_coefficient(norm, 1e3) == 1
    clipped = {n: nn.Parameter(p.detach().float()) for n, p in named.items()}
    for name, parameter in clipped.items():
        parameter.grad = named[name].grad.float().clone()
    nn.utils.clip_grad_norm_(clipped.values(), 0.5)
    for name, parameter in clipped.items():
        scaled = named[name].grad.float() * clip_coefficient(norm, 0.5)
        torch.testing.assert_close(scaled, parameter.grad)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"lr": float("nan")}, "lr must be a number >= 0, got nan"),
        ({"lr": -1.0}, "lr must be a number >= 0, got -1.0"),
        ({"eps": float("inf")}, "eps must be a number >= 0"),
        ({"weight_decay": -0.1}, "weight_decay must be a number >= 0"),
        ({"betas": (0.9, 1.0)}, r"betas must be in \[0, 1\), got \(0.9, 1.0\)"),
        ({"state": "disk"}, "state must be 'device' or 'host', got 'disk'"),
    ],
)
def test_bad_options_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        AdamW(parameters(torch.float32).items(), **(OPTIONS | change))


@pytest.mark.parametrize(
    "named, message",
    [
        ([], "there are no parameters"),
        ([nn.Parameter(torch.zeros(2))], r"pass model.named_parameters\(\)"),
        ([("w", nn.Parameter(torch.zeros(2).half()))], "w must be float32 or bfloat16"),
        ([("w", nn.Parameter(torch.zeros(2, 3).t()))], "w must be dense in its last dimension"),
        ([("w", torch.zeros(2, requires_grad=True) * 2)], "non-leaf"),
    ],
)
def test_bad_parameters_are_named(named, message):
    with pytest.raises(ValueError, match=message):
        AdamW(named, lr=1e-3)


def test_a_schedule_that_gives_nan_steps_nothing():
    named = parameters(torch.float32)
    optimizer = new(named)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float("nan"))
    before = {name: p.detach().clone() for name, p in named.items()}
    with pytest.raises(ValueError, match="lr must be >= 0, got nan"):
        learn(named, optimizer, range(1))
    assert all(torch.equal(p, before[name]) for name, p in named.items())


def test_a_sparse_gradient_is_refused():
    embedding = nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="gradient of weight is sparse: build it with sparse=F"):
        AdamW(embedding.named_parameters(), lr=1e-3).step()


def test_a_state_of_other_parameters_is_refused():
    named = parameters(torch.bfloat16)
    optimizer = new(named)
    learn(named, optimizer, range(1))
    state = saved(optimizer)
    renamed = {f"other.{name}": p for name, p in parameters(torch.bfloat16).items()}
    with pytest.raises(ValueError, match="it has parameter 'matrix' where 'other.m"):
        new(renamed).load_state_dict(state)
    with pytest.raises(ValueError, match="matrix, which is torch.float32, .*resume with the dtype"):
        new(parameters(torch.float32)).load_state_dict(state)
    state["state"][0]["exp_avg"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"exp_avg of matrix must be float32 \(30, 40\), got"):
        new(parameters(torch.bfloat16)).load_state_dict(state)
