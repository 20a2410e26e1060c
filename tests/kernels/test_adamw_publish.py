from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.backends import BACKENDS, DEVICE, DTYPES, dtypes, each_backend, examples, strided
from tests.kernels.opcheck import opcheck
from tests.oracles.adamw import adamw as oracle
from tests.oracles.adamw import random_bits, round_at_random
from tests.tolerance import ADAMW_ABSOLUTE, ADAMW_RELATIVE, SUM_RELATIVE, assert_close
from warpo.kernels import ops, reference
from warpo.kernels._adamw_publish import AdamwPublishInputs, _operator

HYPER = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}


@st.composite
def cases(draw, backend: str):
    """Weights, gradients of some steps, and where to publish."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = draw(st.sampled_from([(), (1,), (0, 3), (37,), (4097,), (3, 5, 7), (20, 300)]))
    weights = torch.randn(shape, generator=generator)
    scale = draw(st.sampled_from([1.0, 1e-4]))
    steps = draw(st.integers(1, 4))
    grads = [scale * torch.randn(shape, generator=generator) for _ in range(steps)]
    dtype = draw(st.sampled_from(dtypes(backend)))
    layout = draw(st.sampled_from(["dense", "sliced"])) if len(shape) in (1, 2) else "dense"
    published = strided(weights.to(draw(st.sampled_from(DTYPES))), layout)
    hyper = {
        "lr": draw(st.sampled_from([1e-6, 1e-3, 0.1])),
        "beta1": draw(st.sampled_from([0.0, 0.9])),
        "beta2": draw(st.sampled_from([0.0, 0.95, 0.999])),
        "eps": draw(st.sampled_from([1e-8, 1e-5])),
        "weight_decay": draw(st.sampled_from([0.0, 0.1])),
    }
    return weights.to(DEVICE), [g.to(DEVICE, dtype) for g in grads], published, hyper


def state_of(weights: torch.Tensor, flat: bool) -> list[torch.Tensor]:
    master = weights.clone().view(-1) if flat else weights.clone()
    return [master, torch.zeros_like(master), torch.zeros_like(master)]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int16 if tensor.element_size() == 2 else torch.int32)


@each_backend
def test_values_equal_torch_adamw_in_float64(backend):
    @settings(max_examples=examples(backend, 100))
    @given(cases(backend), st.booleans(), st.sampled_from([None, 1.0, 0.25]))
    def check(case, flat, clip):
        weights, grads, published, hyper = case
        exact = torch.nn.Parameter(weights.double())
        optimizer = torch.optim.AdamW(
            [exact],
            lr=hyper["lr"],
            betas=(hyper["beta1"], hyper["beta2"]),
            eps=hyper["eps"],
            weight_decay=hyper["weight_decay"],
        )
        state = state_of(weights, flat)
        scale = 1.0 if clip is None else torch.tensor(clip, device=DEVICE)
        for step, grad in enumerate(grads, start=1):
            before, published_before = state[0].clone(), published.clone()
            exact.grad = grad.double() * scale
            optimizer.step()
            if flat:
                grad = grad.reshape(-1)
            result = ops.adamw_publish(
                grad, *state, published, **hyper, step=step, grad_scale=scale, backend=backend
            )
            master = state[0].view(weights.shape)
            # a step is at most some lr, known to some ulp, where the gradient is not near eps
            absolute = ADAMW_ABSOLUTE + step * 1e-4 * hyper["lr"]
            assert_close(
                master, exact, relative=ADAMW_RELATIVE * step, absolute=absolute, what="master"
            )
            assert torch.equal(bits(published), bits(master.to(published.dtype)))
            assert result.fingerprint == reference.fingerprint(published)
            assert result.fingerprint == ops.fingerprint(published, backend=backend)
            changed = (bits(published) != bits(published_before)).sum()
            assert result.changed == changed and result.changed.dtype == torch.int64
            sums = [(state[0] - before), (published.double() - published_before.double())]
            for name, actual, update in zip(
                ("master_update", "published_update"), result[2:], sums, strict=True
            ):
                wanted = update.double().abs().sum()
                assert_close(actual, wanted, relative=SUM_RELATIVE, absolute=1e-9, what=name)

    check()


def test_the_reference_equals_the_oracle_and_torch():
    weights, grads = torch.randn(40, dtype=torch.float64), torch.randn(5, 40, dtype=torch.float64)
    state = state_of(weights, False)
    published = weights.bfloat16()
    exact = torch.nn.Parameter(weights.clone())
    optimizer = torch.optim.AdamW(
        [exact], lr=HYPER["lr"], betas=(0.9, 0.99), eps=HYPER["eps"], weight_decay=0.1
    )
    for step, grad in enumerate(grads, start=1):
        exact.grad = grad.clone()
        optimizer.step()
        reference.adamw_publish(grad, *state, published, **HYPER, step=step)
    wanted = torch.from_numpy(oracle(weights.numpy(), [g.numpy() for g in grads], **HYPER))
    assert torch.allclose(state[0], wanted, rtol=1e-12, atol=1e-12)
    assert torch.allclose(state[0], exact, rtol=1e-12, atol=1e-12)
    assert torch.equal(published, wanted.bfloat16())


@each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_to_nearest_with_ties_to_even(backend, dtype):
    # halfway between two, subnormal, overflowing and infinite, in both signs
    ties = torch.arange(1, 64).float() * 2.0**-16 + 1
    special = torch.tensor([0.0, 1e-7, 6e-8, 2.9e-8, 65504, 65519, 65520, 1e38, 3.4e38, torch.inf])
    values = torch.cat([ties, ties * 2.0**-20, special])
    master = torch.cat([values, -values]).to(DEVICE)
    state = [master.clone(), torch.zeros_like(master), torch.zeros_like(master)]
    published = torch.zeros_like(master, dtype=dtype)
    ops.adamw_publish(
        torch.zeros_like(master),
        *state,
        published,
        **(HYPER | {"lr": 0.0}),
        step=1,
        backend=backend,
    )
    assert torch.equal(state[0], master)
    assert torch.equal(bits(published), bits(master.to(dtype)))


@each_backend
def test_small_steps_are_lost_in_bfloat16_but_not_in_the_master(backend):
    weights = torch.rand(5000, device=DEVICE) + 1
    state, published = state_of(weights, False), weights.bfloat16()
    grad = torch.ones_like(weights)
    ops.adamw_publish(grad, *state, published, **(HYPER | {"lr": 0.0}), step=1, backend=backend)
    result = ops.adamw_publish(
        grad, *state, published, **(HYPER | {"lr": 1e-6}), step=2, backend=backend
    )
    assert 0 <= int(result.changed) < 50 and (state[0] != weights).any()
    assert abs(float(result.master_update) / 5000 / 1.15e-6 - 1) < 0.3


@each_backend
def test_what_lies_between_the_rows_is_left_alone(backend):
    storage = torch.full((6, 50), 7.0, device=DEVICE)
    published = storage[1:5, 3:40]
    weights = torch.randn(4, 37, device=DEVICE)
    ops.adamw_publish(
        weights, *state_of(weights, True), published, **HYPER, step=1, backend=backend
    )
    outside = torch.ones_like(storage, dtype=torch.bool)
    outside[1:5, 3:40] = False
    assert (storage[outside] == 7).all() and (storage[~outside] != 7).any()


@each_backend
@pytest.mark.parametrize("layout", ["dense", "sliced"])
def test_float32_weights_can_be_their_own_master(backend, layout):
    weights = torch.randn(7, 5000 if backend == "cpu" else 300, device=DEVICE)
    separate, own = (strided(weights.clone(), layout) for _ in range(2))
    with_master, without = state_of(weights, False), state_of(weights, False)[1:]
    scale = torch.tensor(0.3, device=DEVICE)
    for step in (1, 2, 3):
        arguments = HYPER | {"step": step, "grad_scale": scale, "backend": backend}
        grad = torch.randn_like(weights)
        expected = ops.adamw_publish(grad, *with_master, separate, **arguments)
        result = ops.adamw_publish(grad, None, *without, own, **arguments)
        for a, b in zip(
            (own, *without, *result), (separate, *with_master[1:], *expected), strict=True
        ):
            assert torch.equal(a, b)


@each_backend
def test_a_nan_gradient_stays_with_its_weight(backend):
    weights = torch.randn(100, device=DEVICE)
    state, published = state_of(weights, False), weights.bfloat16()
    grad = torch.ones_like(weights)
    grad[7] = torch.nan
    result = ops.adamw_publish(grad, *state, published, **HYPER, step=1, backend=backend)
    for tensor in (*state, published):
        assert tensor.isnan().nonzero().tolist() == [[7]]
    assert result.fingerprint == ops.fingerprint(published, backend=backend)
    assert result.master_update.isnan()


@each_backend
def test_every_run_gives_the_same_bits(backend):
    weights = torch.randn(30000, device=DEVICE)
    grad = torch.randn(30000, device=DEVICE)
    runs = []
    for _ in range(2 if backend == "triton" else 10):
        state, published = state_of(weights, False), weights.bfloat16()
        result = ops.adamw_publish(grad, *state, published, **HYPER, step=1, backend=backend)
        runs.append((*state, published, *result))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def rounded(values: torch.Tensor, random: list[int] | None) -> torch.Tensor:
    """float32 to bfloat16: at random, or to nearest."""
    if random is None:
        return values.bfloat16()
    at_random = round_at_random(values.cpu().numpy().ravel(), random)
    return torch.from_numpy(at_random).view(values.shape).to(DEVICE, torch.bfloat16)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("master", [True, False])
@pytest.mark.parametrize("seed", [None, 0, 2**63 - 1])
@pytest.mark.parametrize("shape", [(3, 5, 7), (1437,), (17, 61)])
def test_bfloat16_state_is_that_of_float32_rounded(backend, master, seed, shape):
    generator = torch.Generator().manual_seed(1)
    draw = [torch.randn(shape, generator=generator).bfloat16() for _ in range(4)]
    grad, weights, exp_avg, exp_avg_sq = (x.to(DEVICE) for x in draw)
    published = strided(weights.clone(), "sliced" if len(shape) == 2 else "dense")
    if not master and seed is None:
        published = published.float()
    low = [exp_avg, exp_avg_sq.abs()]
    high = [x.float() for x in low]
    exact = weights.float()
    arguments = HYPER | {"step": 7, "backend": backend}
    ops.adamw_publish(grad, None, *high, exact, **arguments)
    masters = weights.float() if master else None
    result = ops.adamw_publish(grad, masters, *low, published, **arguments, seed=seed)
    random = None if seed is None else random_bits(seed, 7, exact.numel())
    for moment, wanted, shift in zip(low, high, (16, 32), strict=True):
        assert torch.equal(moment, rounded(wanted, random and [r >> shift for r in random]))
    assert masters is None or torch.equal(masters, exact)
    wanted = (
        exact if published.dtype == torch.float32 else rounded(exact, None if master else random)
    )
    assert torch.equal(published, wanted)
    assert result.fingerprint == reference.fingerprint(published)
    assert result.changed == (published != weights).sum()
    update = (published.double() - weights.double()).abs().sum()
    assert_close(result.published_update, update, relative=SUM_RELATIVE, absolute=0, what="sum")


@each_backend
def test_stochastic_rounding_is_unbiased(backend):
    size, seeds = (2000, 3) if backend == "triton" else (5000, 12)
    value = 1 + 0.3 * 2**-7
    sums = torch.zeros(3, dtype=torch.float64)
    for seed in range(seeds):
        published = torch.ones(size, device=DEVICE, dtype=torch.bfloat16)
        moments = [torch.zeros_like(published) for _ in range(2)]
        grad = torch.full((size,), value, device=DEVICE)
        # m = g and v = g^2; the weight becomes 1 + 0.3 * 2^-7
        hyper = {"lr": 0.3 * 2**-7, "beta1": 0.0, "beta2": 0.0, "eps": 0.0, "weight_decay": 0.0}
        ops.adamw_publish(-grad, None, *moments, published, **hyper, step=1, seed=seed)
        sums += torch.stack([x.double().sum().cpu() for x in (published, *moments)])
    mean = sums / (size * seeds)
    for actual, wanted in zip(mean, (value, -value, value**2), strict=True):
        p = abs(wanted) * 2**7 % 1
        deviation = 2**-7 * (p * (1 - p) / (size * seeds)) ** 0.5
        assert abs(actual - wanted) < 4 * deviation, (actual, wanted, deviation)


@each_backend
def test_steps_below_the_last_place_move_weights_in_expectation(backend):
    size = 2000
    published = torch.full((size,), 2.0, device=DEVICE, dtype=torch.bfloat16)
    moments = [torch.zeros_like(published) for _ in range(2)]
    grad = torch.ones(size, device=DEVICE)
    hyper = HYPER | {"lr": 1e-4, "weight_decay": 0.0, "backend": backend}
    steps = 5 if backend == "triton" else 20
    for step in range(1, steps + 1):
        ops.adamw_publish(grad, None, *moments, published, **hyper, step=step, seed=5)
    moved, ulp = steps * 1e-4, 2**-7
    deviation = (ulp * moved / size) ** 0.5
    assert abs(2 - published.double().mean() - moved) < 4 * deviation


@each_backend
def test_random_numbers_depend_on_seed_step_and_position_only(backend):
    full = 3000 if backend == "triton" else 40000
    grad, weights = torch.randn(2, full, device=DEVICE)

    def run(size: int, step: int = 1, seed: int = 3) -> torch.Tensor:
        published = weights[:size].bfloat16()
        moments = [torch.zeros_like(published) for _ in range(2)]
        arguments = HYPER | {"step": step, "seed": seed, "backend": backend}
        ops.adamw_publish(grad[:size], None, *moments, published, **arguments)
        return torch.stack([published, *moments])

    whole, threads = run(full), torch.get_num_threads()
    torch.set_num_threads(1)
    assert torch.equal(run(full), whole) and torch.equal(run(777), whole[:, :777])
    torch.set_num_threads(threads)
    for other in (run(full, step=2), run(full, seed=4)):
        assert ((other != whole).float().mean(1) > 0.1).all()


@st.composite
def lists(draw, backend: str):
    """Of parameters that differ in everything: lists for `adamw_publish_foreach`, and seeds."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    seeded = draw(st.booleans())
    grads, masters, firsts, seconds, published = [], [], [], [], []
    for _ in range(draw(st.integers(1, 6))):
        shape = draw(st.sampled_from([(), (1,), (0, 3), (37,), (4099,), (3, 5, 7), (20, 300)]))
        weights = torch.randn(shape, generator=generator)
        layout = draw(st.sampled_from(["dense", "sliced"])) if len(shape) in (1, 2) else "dense"
        own = draw(st.booleans())
        dtype = torch.bfloat16 if seeded else torch.float32
        published.append(
            strided(weights.to(dtype if own else draw(st.sampled_from(DTYPES))), layout)
        )
        masters.append(None if own else weights.to(DEVICE))
        moments = torch.bfloat16 if seeded or draw(st.booleans()) else torch.float32
        moment = torch.randn(shape, generator=generator).to(DEVICE, moments)
        firsts.append(moment)
        seconds.append(moment.abs())
        grad = torch.randn(shape, generator=generator).to(
            DEVICE, draw(st.sampled_from(dtypes(backend)))
        )
        grads.append(grad.view(-1) if draw(st.booleans()) else grad)
    numbers = range(1, len(grads) + 1)
    return (grads, masters, firsts, seconds, published), numbers, numbers if seeded else None


def copy_of(tensors: tuple[list, ...]) -> list[list]:
    """With the same strides between rows."""
    copied = [[None if x is None else x.clone() for x in column] for column in tensors]
    copied[4] = [x.clone() if x.is_contiguous() else strided(x, "sliced") for x in tensors[4]]
    return copied


@each_backend
def test_many_are_stepped_as_each_alone_bit_for_bit(backend):
    @settings(max_examples=examples(backend, 100))
    @given(lists(backend), st.sampled_from([1.0, 0.25]))
    def check(case, scale):
        tensors, steps, seeds = case
        scale = torch.tensor(scale, device=DEVICE)
        arguments = HYPER | {"grad_scale": scale, "backend": backend}
        together, alone = copy_of(tensors), copy_of(tensors)
        results = ops.adamw_publish_foreach(*together, **arguments, steps=steps, seeds=seeds)
        for i, (parameter, step) in enumerate(zip(zip(*alone, strict=True), steps, strict=True)):
            seed = None if seeds is None else seeds[i]
            single = ops.adamw_publish(*parameter, **arguments, step=step, seed=seed)
            for mine, wanted in zip(results, single, strict=True):
                assert mine.dtype == wanted.dtype and torch.equal(mine[i], wanted)
            for column, wanted in zip(together, parameter, strict=True):
                assert wanted is None or torch.equal(column[i], wanted)

    check()


@each_backend
def test_hundreds_of_parameters_at_once(backend):
    """More than a launch takes; the reference gives the same, up to rounding."""
    count = 20 if backend == "triton" else 1100
    shapes = [(i % 5, i % 7 + 1) for i in range(count)]
    weights = [torch.randn(shape, device=DEVICE) for shape in shapes]
    runs = []
    for chosen in (backend, "reference"):
        grads = [x.flip(0) for x in weights]
        moments = [[torch.zeros_like(x) for x in weights] for _ in range(2)]
        published = [x.bfloat16() if i % 3 else x.clone() for i, x in enumerate(weights)]
        masters = [x.clone() if i % 3 else None for i, x in enumerate(weights)]
        lists = (grads, masters, *moments, published)
        results = ops.adamw_publish_foreach(
            *lists, **HYPER, steps=range(1, count + 1), backend=chosen
        )
        assert torch.equal(
            results.fingerprint, torch.stack([reference.fingerprint(x) for x in published])
        )
        runs.append((*moments[0], *moments[1], 1e-3 * results.master_update))
    # a step of 1e-3 is known to a unit in the last place of a weight, 1e-7
    torch.testing.assert_close(*runs, rtol=1e-5, atol=1e-7)


@each_backend
def test_a_graph_that_saved_a_weight_refuses_its_backward(backend):
    weights = torch.randn(10, device=DEVICE)
    state = state_of(weights, False)
    x = torch.ones(10, device=DEVICE, requires_grad=True)
    loss = (x * weights).sum()
    ops.adamw_publish(x.detach(), *state, weights, **HYPER, step=1, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@each_backend
def test_a_parameter_can_be_published_without_grad_mode(backend):
    published = torch.nn.Parameter(torch.ones(4, 3, device=DEVICE))
    state = state_of(torch.ones(12, device=DEVICE), True)
    grad = torch.ones(4, 3, device=DEVICE)
    with torch.no_grad():
        ops.adamw_publish(grad, *state, published, **HYPER, step=1, backend=backend)
    assert torch.equal(published.detach().view(-1), state[0]) and (published != 1).all()


@each_backend
def test_opcheck(backend):
    grad, master, exp_avg, exp_avg_sq = (torch.randn(150, device=DEVICE).abs() for _ in range(4))
    small = [torch.ones(5, device=DEVICE) for _ in range(4)]
    inputs = AdamwPublishInputs(
        grads=[grad, small[0]],
        masters=[master],
        exp_avgs=[exp_avg, small[1]],
        exp_avg_sqs=[exp_avg_sq, small[2]],
        published=[torch.randn(3, 60, device=DEVICE)[:, :50], small[3]],
        master_places=[0, -1],
        lr=1e-3,
        beta1=0.9,
        beta2=0.9,
        eps=1e-8,
        weight_decay=0.1,
        grad_scale=1.0,
        grad_scale_factor=None,
        stochastic=False,
        seeds=[0, 0],
        steps=[1, 2],
        backend=backend,
    )
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    opcheck(_operator, inputs, test_utils=utils)
    own = inputs._replace(masters=[], master_places=[-1, -1])
    opcheck(_operator, own, test_utils=utils)


@pytest.mark.parametrize("backend", BACKENDS[:1])
def test_compiles_without_a_graph_break(backend):
    def update(grad, master, exp_avg, exp_avg_sq, published):
        result = ops.adamw_publish(
            grad * 2, master, exp_avg, exp_avg_sq, published, **HYPER, step=1, backend=backend
        )
        return result.fingerprint

    compiled = torch.compile(update, fullgraph=True, backend="aot_eager")
    for size in (5, 6, 70):
        weights, grad = torch.randn(2, size, device=DEVICE), torch.randn(2, size, device=DEVICE)
        runs = []
        for function in (update, compiled):
            state, published = state_of(weights, False), weights.bfloat16()
            runs.append((function(grad, *state, published), *state, published))
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


W = torch.zeros(2, 3)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"grads": [W, W[:1]]}, r"grads\[1\] must be of the shape of published\[1\], \(2, 3\), or"),
        ({"masters": [W, W.half()]}, r"masters\[1\] must be float32, got float16"),
        ({"masters": [W]}, "masters must have an entry for each of the 2 published, got 1"),
        ({"steps": [1]}, "steps must have an entry for each of the 2 published"),
        ({"steps": [1, 0]}, "step must be >= 1"),
        ({"seeds": [1, 2]}, r"would have no effect: the moments are float32, and published\[0\]"),
        ({"published": [W, W.t()]}, r"of the shape of published\[1\]"),
        ({name: [] for name in ("grads", "masters", "published")}, "pass at least one parameter"),
    ],
)
def test_of_many_the_bad_one_is_named(changed, message):
    tensors = ("grads", "masters", "exp_avgs", "exp_avg_sqs", "published")
    arguments = {name: [W.clone(), W.clone()] for name in tensors} | {"steps": [1, 1]} | changed
    with pytest.raises(ValueError, match=message):
        ops.adamw_publish_foreach(**arguments, **HYPER)


def test_a_table_of_addresses_is_not_captured(monkeypatch):
    from warpo.kernels._triton import tables

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="fingerprint: .*a CUDA graph cannot.*backend='cuda'"):
        tables.send([[1]], torch.int64, "fingerprint", SimpleNamespace(is_cuda=True))


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"grad": torch.zeros(3)}, r"grad must be of the shape of published, \(2, 3\), or flat"),
        ({"grad": torch.zeros(3, 2).t()}, r"grad must be dense.*pass grad.contiguous\(\)"),
        ({"grad": W.long()}, "grad must be float32 | bfloat16 | float16"),
        ({"master": W.bfloat16()}, "master must be float32, got bfloat16"),
        (
            {"master": None, "published": W.bfloat16()},
            r"pass master=published.float\(\), or a seed for stochastic rounding",
        ),
        ({"master": None, "published": W.half(), "seed": 1}, r"pass master=published.float\(\)$"),
        ({"seed": 1}, "seed = 1 would have no effect: the moments are float32, and published has"),
        ({"seed": 1, "master": None}, "published is float32; pass seed=None"),
        ({"seed": -1, "exp_avg": W.bfloat16(), "exp_avg_sq": W.bfloat16()}, r"in \[0, 2\^63\)"),
        ({"exp_avg": W.bfloat16()}, "exp_avg_sq must be bfloat16, got float32"),
        ({"exp_avg": W.half()}, "exp_avg must be float32 | bfloat16, got float16"),
        ({"exp_avg": torch.zeros(3, 2).t()}, "exp_avg must be dense.*allocate it dense"),
        ({"exp_avg_sq": torch.zeros(6, 1)}, "exp_avg_sq must be of the shape"),
        ({"published": torch.zeros(3, 2).t()}, "published must be dense in its last dimension"),
        ({"published": W.clone().requires_grad_()}, r"pass published.detach\(\)"),
        ({"grad_scale": torch.zeros(1)}, r"grad_scale must be of shape \(\), got \(1,\)"),
        ({"grad_scale": torch.zeros((), dtype=torch.float64)}, "grad_scale must be float32"),
        ({"lr": -1.0}, "lr must be >= 0, got -1.0"),
        ({"eps": -1.0}, "eps must be >= 0"),
        ({"weight_decay": -1.0}, "weight_decay must be >= 0"),
        ({"beta1": 1.0}, r"beta1 must be in \[0, 1\), got 1.0"),
        ({"beta2": -0.1}, r"beta2 must be in \[0, 1\)"),
        ({"step": 0}, "step must be >= 1, the number of this step, got 0"),
    ],
)
def test_bad_arguments_are_named(changed, message):
    arguments = {
        "grad": W,
        "master": W,
        "exp_avg": W,
        "exp_avg_sq": W,
        "published": W,
        "step": 1,
        **HYPER,
    }
    with pytest.raises(ValueError, match=message):
        ops.adamw_publish(**(arguments | changed))
