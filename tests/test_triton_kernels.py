"""Kernels compute what the modules do: on a CUDA device, or anywhere with Triton and TRITON_INTERPRET=1."""

import os

import pytest
import torch as th
from torch.nn import functional as F

from sb3_mbdpo import evaluator, head_stacks, search
from sb3_mbdpo.activations import SimNorm
from sb3_mbdpo.evaluator import Evaluator, fuses_simplicial_norm
from sb3_mbdpo.hardware import HAS_TRITON, uses_kernels
from sb3_mbdpo.head_stacks import MOST_ACTIONS
from sb3_mbdpo.layers import mlp
from sb3_mbdpo.search import MIN_STD, combine_elites
from sb3_mbdpo.two_hot import TwoHot
from sb3_mbdpo.world_model import TaskSpec
from tests.fakes import make_config, make_model

CUDA = th.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
needs_triton = pytest.mark.skipif(
    not HAS_TRITON or not (CUDA or os.environ.get("TRITON_INTERPRET") == "1"), reason="needs a CUDA device, Triton"
)
PAIRS = pytest.mark.parametrize("pairs", [False, True], ids=["few rows", "many rows"])
DTYPES = pytest.mark.parametrize("dtype", [th.float32, th.bfloat16])


def normal(seed: int, *shape: int) -> th.Tensor:
    return th.randn(*shape, generator=th.Generator().manual_seed(seed)).to(DEVICE)


def assert_close(found: th.Tensor, expected: th.Tensor, dtype: th.dtype) -> None:
    assert found.dtype == dtype
    tolerance = 1e-5 if dtype == th.float32 else 1e-2
    th.testing.assert_close(found.float(), expected.float(), rtol=tolerance, atol=tolerance)


def test_a_cpu_has_no_use_for_kernels() -> None:
    layer = mlp(6, [16], 16, SimNorm(8))[-1]
    with th.no_grad():
        assert not fuses_simplicial_norm(layer, th.zeros(2, 16))
        assert not th.compile(lambda x: x + uses_kernels(x), backend="eager")(th.zeros(1))


@pytest.mark.skipif(not (HAS_TRITON and CUDA), reason="needs a CUDA device, Triton")
def test_kernels_are_for_what_is_compiled_without_gradient() -> None:
    x, asked = th.zeros(1, device="cuda"), th.compile(lambda x: x + uses_kernels(x), backend="eager")
    assert not uses_kernels(x) and not asked(x)
    with th.no_grad():
        assert not uses_kernels(x) and asked(x)


@needs_triton
@DTYPES
@PAIRS
@pytest.mark.parametrize(
    ("heads", "rows", "share", "width", "parts"),
    [
        (3, 12, 4, 512, ("product",)),
        (1, 5, 1, 48, ("product",)),
        (1, 4, 2, 1376, ("product", "moves")),
        (2, 51, 3, 64, ("product", "moves")),
        (3, 12, 4, 96, ("moves",)),
        (3, 15, 1, 96, ("product", "read")),
        (2, 15, 5, 96, ("moves", "read")),
    ],
)
def test_a_hidden_layer(
    heads: int,
    rows: int,
    share: int,
    width: int,
    parts: tuple[str, ...],
    dtype: th.dtype,
    pairs: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sb3_mbdpo import triton_kernels
    from sb3_mbdpo.triton_kernels import normed_mish

    monkeypatch.setattr(triton_kernels, "MOST_UNPAIRED", 0 if pairs else 10_000)
    n_actions = 6
    product, shared = normal(0, heads, rows, width).to(dtype), (5 * normal(1, heads, share, width)).to(dtype)
    gain, shift = normal(2, heads, width), 10 * normal(3, heads, width)
    moves, move_weight = normal(4, rows, 3, n_actions).to(dtype).float(), normal(5, heads, n_actions + 2, width)
    read_weight, read_bias = normal(6, width), normal(7, 1)
    x = shared.float().repeat_interleave(rows // share, 1)
    x = x + product.float() if "product" in parts else x
    x = x + moves[:, 2] @ move_weight[:, :n_actions] if "moves" in parts else x
    expected = F.mish(F.layer_norm(x, (width,)) * gain[:, None] + shift[:, None])
    found, read = normed_mish(
        product if "product" in parts else None,
        shared,
        gain,
        shift,
        1e-5,
        *((moves, 2, move_weight) if "moves" in parts else (None, 0, None)),
        *((read_weight, read_bias) if "read" in parts else ()),
    )
    if "read" in parts:
        outputs = expected[-1] @ read_weight + read_bias
        th.testing.assert_close(read.squeeze(1), outputs, rtol=1e-4, atol=1e-3)
        expected = expected[:-1]
    assert len(read) == ("read" in parts) * rows
    assert_close(found, expected, dtype)


@needs_triton
@DTYPES
@pytest.mark.parametrize(("width", "rows"), [(512, 6), (48, 3), (96, 21)])
def test_the_end_of_the_dynamics(width: int, rows: int, dtype: th.dtype) -> None:
    from sb3_mbdpo.triton_kernels import simplicial_norm

    x = normal(0, rows, width).to(dtype)
    bias, gain, shift = (normal(seed, width) for seed in (2, 3, 4))
    found = simplicial_norm(x, bias, gain, shift, 8, 1e-5)
    assert_close(found, SimNorm(8)(F.layer_norm(x.float() + bias, (width,), gain, shift, 1e-5)), dtype)


@needs_triton
@DTYPES
@pytest.mark.parametrize(("heads", "rows", "bins"), [(2, 7, 101), (1, 3, 21)])
def test_scalars_of_distributions(heads: int, rows: int, bins: int, dtype: th.dtype) -> None:
    from sb3_mbdpo.triton_kernels import decoded

    two_hot = TwoHot(bins).to(DEVICE)
    # From next to nothing to thousands, of both signs
    peaks = th.linspace(-9, 9, heads * rows, device=DEVICE).view(heads, rows, 1)
    logits = (-0.5 * (two_hot.bins - peaks) ** 2 + 0.01 * normal(0, heads, rows, bins)).to(dtype)
    bias = 0.1 * normal(1, heads, bins + 3)
    expected = two_hot.decode(logits.float() + bias[:, None, :bins])
    found = decoded(F.pad(logits, (0, 3), value=9.0), bias, two_hot.bins)
    th.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@needs_triton
@pytest.mark.parametrize(("batch", "count", "n_elites"), [(3, 40, 7), (1, 512, 64), (2, 9, 9), (1, 700, 1)])
def test_weights_of_elites(batch: int, count: int, n_elites: int) -> None:
    from sb3_mbdpo.triton_elites import elite_weights

    def check(values: th.Tensor, temperature: float = 0.5) -> th.Tensor:
        weights, value, std = elite_weights(values, n_elites, temperature, MIN_STD)
        first = values.sort(dim=1, descending=True, stable=True).indices[:, :n_elites]
        spread = values.double().std(1)
        scale = temperature * spread.where(spread >= MIN_STD, 1.0)[:, None]
        expected = (values.gather(1, first).double() / scale).softmax(1).float()
        th.testing.assert_close(weights, th.zeros_like(values).scatter(1, first, expected), rtol=1e-4, atol=1e-5)
        th.testing.assert_close(value, (weights * values).sum(1), rtol=1e-5, atol=1e-5)
        th.testing.assert_close(std, spread.float(), rtol=1e-5, atol=1e-5)
        assert (weights > 0).sum(1).max() <= n_elites
        return weights

    values = normal(1, batch, count)
    weights = check(values)
    plans = normal(2, batch, count, 3, 2)
    expected = combine_elites(plans, values, n_elites, 0.5)[0]
    th.testing.assert_close((weights[:, :, None, None] * plans).sum(1), expected, rtol=1e-4, atol=1e-5)
    check(100 + values)
    # Equal ones, of which only some are chosen
    values[:, ::4] = values[:, 2:3]
    assert ((check(values) > 0).sum(1) == n_elites).all()
    check(th.full_like(values, -3.0))
    # One that leads by far
    values[:, 5] = 1e6
    assert (check(values, 1e-3)[:, 5] == 1).all()


@needs_triton
@DTYPES
@pytest.mark.parametrize(
    ("kwargs", "stacked", "few_rows"),
    [
        ({}, None, 2048),
        ({}, None, 0),
        ({}, False, 2048),
        ({"tasks": TaskSpec(action_dims=[2, 1, 2], embedding_dim=5)}, None, 2048),
        ({"hidden": (24,), "num_bins": 16}, None, 2048),
        ({"activation_fn": th.nn.ReLU}, None, 0),
        ({"action_dim": MOST_ACTIONS + 1, "horizon": 1}, None, 2048),
    ],
    ids=["few rows", "many rows", "apart", "tasks", "one layer", "relu", "many actions"],
)
@th.no_grad()
def test_a_denoising_step_of_kernels(
    kwargs: dict[str, object], stacked: bool | None, few_rows: int, dtype: th.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole returns of plans, and the mean of the best: with and without kernels, in the layout of accelerators."""
    model = make_model(**kwargs).to(DEVICE)
    for parameter in model.parameters():
        parameter += 0.3 * normal(parameter.numel(), *parameter.shape)
    config = make_config(energy_coef=0.5, dtype=dtype, stacked=stacked)
    task = th.tensor([2, 0, 1], device=DEVICE) if "tasks" in kwargs else None
    z, plans = normal(0, 3, 16).softmax(-1), normal(1, 3, 9, model.horizon, model.action_dim).clamp(-1, 1)
    plans = plans.to(dtype).float()
    for module in (evaluator, head_stacks, search):
        monkeypatch.setattr(module, "on_accelerator", lambda x: True)
    monkeypatch.setattr(evaluator, "FEW_ROWS", few_rows)

    def returns() -> th.Tensor:
        return Evaluator(model, config, z, th.tensor([1, 0], device=DEVICE), task, episodic=stacked is None)(plans)

    expected = returns()
    best = combine_elites(plans, expected, 5, 0.5)
    for module in (evaluator, head_stacks, search):
        monkeypatch.setattr(module, "uses_kernels", lambda x: True)
    assert expected.std() > 0.01
    assert (returns() - expected).abs().mean() < (1e-5 if dtype == th.float32 else 0.05) * expected.std()
    for a, b in zip(combine_elites(plans, expected, 5, 0.5), best, strict=True):
        th.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    # Who is not chosen does not count, whatever it is
    plans[0, expected[0].argmin()] = th.nan
    th.testing.assert_close(combine_elites(plans, expected, 5, 0.5)[0], best[0], rtol=1e-4, atol=1e-5)


@needs_triton
@pytest.mark.parametrize(
    "kwargs", [{}, {"tasks": TaskSpec(action_dims=[2, 1, 2], embedding_dim=5)}], ids=["plain", "tasks"]
)
def test_a_compiled_search_of_kernels(kwargs: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are part of what is compiled: what it is told of their outputs is what they return."""
    model = make_model(**kwargs).to(DEVICE)
    with th.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * normal(parameter.numel(), *parameter.shape)
    config = make_config(energy_coef=0.5, n_samples=12, n_prior_trajectories=3)
    task = th.tensor([2, 0], device=DEVICE) if "tasks" in kwargs else None
    z, start, restart = normal(0, 2, 16).softmax(-1), th.zeros(2, 3, 2, device=DEVICE), th.ones(2, device=DEVICE) > 0
    noise = search.draw_noise(config, model, th.Generator(DEVICE).manual_seed(0), 2, th.device(DEVICE))
    expected = search.search(model, config, z, start, restart, noise, task)
    for module in (evaluator, head_stacks, search):
        monkeypatch.setattr(module, "on_accelerator", lambda x: True)
        monkeypatch.setattr(module, "uses_kernels", lambda x: True)
    found = search.search(model, config, z, start, restart, noise, task, prepare=lambda f: th.compile(f, dynamic=False))
    for a, b in zip(found, expected, strict=True):
        th.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
