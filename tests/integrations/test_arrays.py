"""Against the loops of single-file PPO, written from their formulas."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.integrations.compare import compare
from warpo.kernels.integrations import arrays


def loop(rewards, values, dones, next_value, next_done, gamma, gae_lambda):
    """Generalised advantage estimation as CleanRL's PPO goes through it."""
    like = torch.zeros_like if isinstance(rewards, torch.Tensor) else np.zeros_like
    advantages, last = like(rewards), 0
    steps = len(rewards)
    for t in reversed(range(steps)):
        alive = 1.0 - (next_done if t == steps - 1 else dones[t + 1])
        after = next_value if t == steps - 1 else values[t + 1]
        delta = rewards[t] + gamma * after * alive - values[t]
        advantages[t] = last = delta + gamma * gae_lambda * alive * last
    return advantages, advantages + values


LAYOUTS = {
    "dense": lambda x: x,
    "transposed": lambda x: np.asfortranarray(x),
    "sliced": lambda x: np.repeat(x, 3, 0)[::3],
    "reversed": lambda x: x[::-1].copy()[::-1],
    "read-only": lambda x: np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape),
}


@st.composite
def rollouts(draw, dtypes=(np.float32, np.float64)):
    shape = (draw(st.integers(1, 90)), *draw(st.sampled_from([(), (1,), (3,), (40,)])))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    layout = LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))]
    dtype, flags = draw(st.sampled_from(dtypes)), draw(st.sampled_from([np.float32, np.bool_]))
    rewards, values = (layout(rng.normal(size=shape).astype(dtype)) for _ in range(2))
    dones = layout((rng.random(shape) < 0.2).astype(flags))
    next_value = np.asarray(rng.normal(size=shape[1:]), dtype)
    next_done = np.asarray(rng.random(shape[1:]) < 0.5, flags)
    return rewards, values, dones, next_value, next_done


gammas = st.sampled_from([0.99, 1.0, 0.0])
lambdas = st.sampled_from([0.95, 1.0, 0.0])


@given(rollouts(), gammas, lambdas)
def test_gae_of_numpy(rollout, gamma, gae_lambda):
    before = [x.copy() for x in rollout]
    wanted = loop(*(x.astype(np.float64) for x in rollout), gamma, gae_lambda)
    found = arrays.gae(*rollout, gamma, gae_lambda)
    dtype = rollout[0].dtype
    rounding = {4: 1e-6, 8: 1e-14}[dtype.itemsize]
    for mine, exact in zip(found, wanted, strict=True):
        assert type(mine) is np.ndarray and mine.dtype == dtype and mine.shape == exact.shape
        np.testing.assert_allclose(mine, exact, rtol=rounding, atol=10 * rounding)
    for given_array, copy in zip(rollout, before, strict=True):
        np.testing.assert_array_equal(given_array, copy)


REAL = ["?", "i1", "u1"]
REAL += [order + kind for kind in ("i2", "u2", "i4", "f2", "f4", "f8") for order in "<>"]
REAL += ["u4", "i8", "u8"]
FOREIGN = ["O", "c8", "M8[s]", "m8[s]", "U3", [("r", "f4"), ("v", "f4")]]
FOREIGN += ["g"] if np.dtype("g").itemsize > 8 else []


def rollout_of(steps=6, envs=3):
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=(2, steps, envs)).astype(np.float32)
    dones, next_done = rng.random((steps, envs)) < 0.2, np.array([True, False, False])[:envs]
    return dict(
        rewards=np.round(3 * rewards.clip(0)),
        values=values,
        dones=dones,
        next_value=np.float32([0.5, 1.0, 2.0])[:envs],
        next_done=next_done,
    )


def assert_exact(found, inputs):
    wanted = loop(*(np.asarray(x).astype(np.float64) for x in inputs.values()), 0.9, 0.8)
    for mine, exact in zip(found, wanted, strict=True):
        np.testing.assert_allclose(np.asarray(mine, np.float64), exact, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("name", ["rewards", "values", "dones", "next_value", "next_done"])
@pytest.mark.parametrize("dtype", REAL)
@pytest.mark.parametrize("layout", ["dense", "reversed", "read-only", "field"])
def test_every_dtype_and_byte_order(name, dtype, layout):
    inputs = rollout_of()
    array = np.ones(3) if name == "next_value" else np.round(inputs[name])
    array = array.clip(0).astype(dtype)
    if layout == "field":
        packed = np.zeros(array.shape, [("pad", "u1"), ("x", dtype)])
        packed["x"] = array
        array = packed["x"]
    else:
        array = LAYOUTS[layout](array)
    inputs[name] = array
    found = arrays.gae(**inputs, gamma=0.9, gae_lambda=0.8)
    dtypes = np.result_type(inputs["rewards"], inputs["values"])
    assert {x.dtype for x in found} == {dtypes} and dtypes.isnative
    assert_exact(found, inputs)


def test_strides_of_0_and_no_steps():
    inputs = rollout_of()
    for name in ("rewards", "values", "dones"):
        inputs[name] = np.broadcast_to(inputs[name][:1, :1], (6, 3))
    assert_exact(arrays.gae(**inputs, gamma=0.9, gae_lambda=0.8), inputs)
    for kind in (np.asarray, torch.as_tensor):
        none = {k: kind(v[:0] if v.ndim == 2 else v) for k, v in inputs.items()}
        assert [x.shape for x in arrays.gae(**none, gamma=0.9, gae_lambda=0.8)] == [(0, 3)] * 2


def test_half_precision_of_numpy_comes_back_as_it_went_in():
    inputs = rollout_of()
    for name in ("rewards", "values"):
        inputs[name] = inputs[name].astype(np.float16)
    found = arrays.gae(**inputs, gamma=0.9, gae_lambda=0.8)
    assert {x.dtype for x in found} == {np.dtype(np.float16)}


@pytest.mark.parametrize("name", ["rewards", "values", "dones", "next_value", "next_done"])
@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_foreign_memory_is_refused_by_name(name, kind):
    inputs = rollout_of()
    shape = inputs[name].shape
    others = {k: kind(v) for k, v in inputs.items()}
    for dtype in FOREIGN:
        with pytest.raises(ValueError, match=f"^{name} must be bool, integers or"):
            arrays.gae(**others | {name: np.zeros(shape, dtype)}, gamma=0.9, gae_lambda=0.8)
    for array, message in (
        (np.zeros(shape).tolist(), f"{name} must be a NumPy array or tensor, got list: pass numpy"),
        (np.ma.masked_array(np.zeros(shape), True), f"{name} is a masked array"),
        ("x", f"{name} must be a NumPy array or tensor, got str"),
        (None, f"{name} must be a NumPy array or tensor, got NoneType"),
        (torch.zeros(shape, dtype=torch.complex64), f"{name} must be bool, integers or"),
    ):
        with pytest.raises(ValueError, match=message):
            arrays.gae(**others | {name: array}, gamma=0.9, gae_lambda=0.8)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool, torch.int16])
def test_clipped_rewards_of_tensors(dtype):
    inputs = rollout_of()
    inputs["rewards"] = torch.tensor(np.sign(inputs["rewards"])).to(dtype)
    found = arrays.gae(**inputs, gamma=0.9, gae_lambda=0.8)
    assert all(isinstance(x, torch.Tensor) and x.dtype == torch.float32 for x in found)
    assert_exact(found, inputs)


def test_kinds_may_be_mixed_and_numbers_stand_for_one_environment():
    inputs = rollout_of(envs=1)
    for kinds in ((np.asarray, torch.as_tensor), (torch.as_tensor, np.asarray)):
        mixed = {k: kinds[k != "rewards"](v) for k, v in inputs.items()}
        found = arrays.gae(**mixed, gamma=0.9, gae_lambda=0.8)
        assert {type(x) for x in found} == {type(mixed["rewards"])}
        assert_exact(found, inputs)
        for value, done in ((0.5, True), (np.float32(0.5), np.True_)):
            mixed |= {"next_value": value, "next_done": done}
            assert_exact(arrays.gae(**mixed, gamma=0.9, gae_lambda=0.8), inputs)


@pytest.mark.parametrize("size", [0, 1])
def test_small_minibatches(size):
    x = torch.zeros(size, requires_grad=True)
    found = arrays.policy_loss(x, x.detach(), x.detach(), 0.2)
    assert [float(y.detach()) for y in found] == [0.0, 0.0]
    assert arrays.value_loss(x, x.detach(), x.detach(), 0.2) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"oldlogprob": np.zeros(3, np.float32)}, "oldlogprob must be a tensor, got ndarray"),
        ({"advantages": [0.0] * 3}, "advantages must be a tensor, got list"),
        ({"advantages": torch.zeros(3).double()}, "advantages must be float32 .*got float64: pass"),
        ({"advantages": torch.zeros(3, 1)}, r"advantages must be \(3,\), got \(3, 1\)"),
        ({"newlogprob": torch.tensor(0.0)}, r"newlogprob must be \(1,\), got \(\)"),
    ],
)
def test_minibatches_are_refused_by_name(changes, message):
    named = dict.fromkeys(("newlogprob", "oldlogprob", "advantages"), torch.zeros(3)) | changes
    with pytest.raises(ValueError, match=message):
        arrays.policy_loss(**named, clip_coef=0.2)


@given(rollouts((np.float32, np.float64)), gammas, lambdas)
def test_gae_of_tensors(rollout, gamma, gae_lambda):
    rewards, values, dones, next_value, next_done = map(torch.from_numpy, map(np.copy, rollout))

    def original(rewards, values, next_value):
        floats = (dones.to(rewards.dtype), next_value, next_done.to(rewards.dtype))
        return loop(rewards, values, *floats, gamma, gae_lambda)

    def ours(rewards, values, next_value):
        return tuple(arrays.gae(rewards, values, dones, next_value, next_done, gamma, gae_lambda))

    compare(original, ours, rewards, values, next_value, scale=10.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gae_of_tensors_is_differentiable(dtype):
    inputs = [torch.randn(6, 3, dtype=torch.float64) for _ in range(2)]
    next_value = torch.randn(3, dtype=torch.float64)
    dones, next_done = torch.rand(6, 3) < 0.3, torch.tensor([True, False, False])
    found = []
    for run in (torch.float64, dtype):
        leaves = [x.to(run, copy=True).requires_grad_() for x in (*inputs, next_value)]
        advantages, returns = arrays.gae(*leaves[:2], dones, leaves[2], next_done, 0.9, 0.8)
        (advantages.square().sum() + returns.sum()).backward()
        found.append([x.grad.double() for x in leaves])
    for exact, mine in zip(*found, strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-5, atol=1e-5)


def test_half_precision_comes_back_as_it_went_in():
    inputs = [torch.randn(9, 2).bfloat16() for _ in range(2)]
    none = torch.zeros(9, 2)
    found = arrays.gae(*inputs, none, torch.zeros(1, 2).bfloat16(), none[0], 0.99, 0.95)
    assert {x.dtype for x in found} == {torch.bfloat16}


def test_a_value_behind_the_end_of_an_episode_is_not_read():
    ones = np.ones((5, 2), np.float32)
    dones, values = np.zeros((5, 2), np.float32), ones.copy()
    dones[3, 0] = 1
    wanted = arrays.gae(ones, values, dones, ones[0], dones[0], 0.9, 0.8)
    values[3:, 0] = np.nan
    found = arrays.gae(ones, values, dones, ones[0], dones[0], 0.9, 0.8)
    for mine, exact in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(mine[:3], exact[:3])


@pytest.mark.parametrize("kind", [np.asarray, torch.tensor])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards": (2, 3, 4)}, r"\(T, N\) or \(T,\), got \(2, 3, 4\)"),
        ({"values": (2, 4)}, r"shape of rewards, \(2, 3\), got \(2, 4\)"),
        ({"next_value": (2,)}, r"one per environment, 3, got \(2,\)"),
        ({"gamma": 1.5}, "gamma must be in"),
        ({"dtype": "int32"}, "float32"),
    ],
)
def test_bad_arguments_are_named(kind, changes, message):
    shapes = dict.fromkeys(("rewards", "values", "dones"), (2, 3))
    shapes |= dict.fromkeys(("next_value", "next_done"), (3,))
    numbers = {"gamma": 0.9, "gae_lambda": 0.8}
    given_shapes = shapes | {k: v for k, v in changes.items() if k in shapes}
    dtype = changes.get("dtype", "float32")
    inputs = {k: kind(np.zeros(shape, dtype)) for k, shape in given_shapes.items()}
    inputs |= numbers | {k: v for k, v in changes.items() if k in numbers}
    with pytest.raises(ValueError, match=message):
        arrays.gae(**inputs)


minibatches = st.tuples(st.integers(1, 300), st.integers(0, 99), st.sampled_from([0.2, 0.01]))


def numbers_of(size, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator) for _ in range(3)]


@given(minibatches)
def test_policy_loss(minibatch):
    size, seed, clip_coef = minibatch
    new, noise, advantages = numbers_of(size, seed)

    def original(new, old, advantages):
        logratio = new - old
        ratio = logratio.exp()
        unclipped = -advantages * ratio
        clipped = -advantages * ratio.clamp(1 - clip_coef, 1 + clip_coef)
        return torch.max(unclipped, clipped).mean(), ((ratio - 1) - logratio).detach().mean()

    def ours(new, old, advantages):
        return tuple(arrays.policy_loss(new, old, advantages, clip_coef))

    old = new + 0.3 * noise
    compare(original, ours, new, old, advantages, differentiable=[0], scale=5.0)


@given(minibatches, st.booleans())
def test_value_loss(minibatch, clip):
    size, seed, clip_coef = minibatch
    new, noise, returns = numbers_of(size, seed)

    def original(new, old, returns):
        unclipped = (new - returns) ** 2
        if not clip:
            return 0.5 * unclipped.mean()
        clipped = (old + (new - old).clamp(-clip_coef, clip_coef) - returns) ** 2
        return 0.5 * torch.max(unclipped, clipped).mean()

    def ours(new, old, returns):
        return arrays.value_loss(new, old, returns, clip_coef if clip else None)

    compare(original, ours, new, new + 0.3 * noise, returns, differentiable=[0], scale=5.0)


def test_importing_needs_torch_and_numpy_alone():
    code = (
        "import sys; from warpo.kernels.integrations import arrays; "
        "print({'gymnasium', 'stable_baselines3', 'transformers', 'triton'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
