from collections.abc import Callable

import pytest
import torch as th
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

from sb3_mbdpo import activations, layers, products
from sb3_mbdpo import ensemble as ensemble_module
from sb3_mbdpo.activations import Mish, SimNorm
from sb3_mbdpo.ensemble import EnsembleMLP
from sb3_mbdpo.layers import NormedLinear, mlp
from sb3_mbdpo.products import Joined, of_parts, standardised


def generator(seed: int = 0) -> th.Generator:
    return th.Generator().manual_seed(seed)


def ensemble(dropout: float = 0.0, activation_fn: type[nn.Module] = Mish) -> EnsembleMLP:
    th.manual_seed(0)
    net = EnsembleMLP(4, 6, [10, 8], 3, activation_fn, dropout)
    with th.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.3 * th.randn(parameter.shape))
    return net


def member(net: EnsembleMLP, index: int, x: th.Tensor) -> th.Tensor:
    """One member, layer by layer as PyTorch's own functions compute it."""
    for i, (weight, bias) in enumerate(zip(net.norm_weights, net.norm_biases, strict=True)):
        x = F.linear(x, net.weights[i][index].T, net.biases[i][index, 0])
        x = net.activation(F.layer_norm(x, x.shape[-1:], weight[index, 0], bias[index, 0]))
    return F.linear(x, net.weights[-1][index].T, net.biases[-1][index, 0])


# --- Mish -----------------------------------------------------------------------------------------------------------


def test_mish_far_from_zero() -> None:
    x = th.tensor([-1e10, -1e4, -100.0, 0.0, 40.0, 100.0, 1e4, 1e10], requires_grad=True)
    value = Mish()(x)
    (slope,) = th.autograd.grad(value.sum(), x)
    th.testing.assert_close(value, F.mish(x), rtol=1e-6, atol=1e-6)
    assert slope.isfinite().all()
    th.testing.assert_close(slope, th.tensor([0.0, 0.0, 0.0, 0.6, 1.0, 1.0, 1.0, 1.0]), rtol=1e-6, atol=1e-6)
    assert th.equal(Mish()(x.detach()), value.detach()), "with and without gradient the same numbers"


def test_mish_leaves_its_input_alone_and_passes_nan_on() -> None:
    x = th.tensor([0.5, th.nan], requires_grad=True)
    value = Mish()(x)
    assert x[0] == 0.5 and value[1].isnan()
    (slope,) = th.autograd.grad(value[0], x)
    assert slope[0].isfinite()


def test_mish_gradient_against_finite_differences() -> None:
    x = th.linspace(-6, 6, 25, dtype=th.float64, requires_grad=True)
    assert th.autograd.gradcheck(Mish(), (x,))


@pytest.fixture(params=["groups fill a register", "groups are narrower"])
def vector_width(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both of SimNorm's ways, whatever the CPU at hand has."""
    monkeypatch.setattr("sb3_mbdpo.activations.VECTOR_WIDTH", 8 if "fill" in request.param else 16)


@pytest.mark.usefixtures("vector_width")
@pytest.mark.parametrize("scale", [1.0, 1e3, 1e30])
def test_simnorm_is_a_softmax_over_groups_however_large_its_input(scale: float) -> None:
    x = (scale * th.randn(7, 24, generator=th.Generator().manual_seed(0))).requires_grad_()
    weights = th.randn(7, 24, generator=th.Generator().manual_seed(1))
    plain = x.unflatten(-1, (-1, 8)).softmax(-1).flatten(-2)
    (expected,) = th.autograd.grad((plain * weights).sum(), x)
    value = SimNorm(8)(x)
    th.testing.assert_close(value, plain, rtol=1e-6, atol=1e-7)
    (found,) = th.autograd.grad((value * weights).sum(), x)
    th.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert th.equal(SimNorm(8)(x.detach()), value.detach()), "with and without gradient the same numbers"


@pytest.mark.usefixtures("vector_width")
def test_simnorm_gradient_against_finite_differences() -> None:
    x = th.randn(3, 16, dtype=th.float64, generator=th.Generator().manual_seed(0), requires_grad=True)
    assert th.autograd.gradcheck(SimNorm(8), (x,))


# --- SimNorm and MLPs -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("vector_width")
def test_simnorm_is_a_softmax_over_each_group() -> None:
    x = th.randn(3, 5, 24, generator=generator()) * 10
    y = SimNorm(8)(x)
    assert y.shape == x.shape
    for start in (0, 8, 16):
        th.testing.assert_close(y[..., start : start + 8], x[..., start : start + 8].softmax(-1))


def test_simnorm_needs_whole_groups() -> None:
    with pytest.raises(RuntimeError):
        SimNorm(8)(th.zeros(2, 20))


def test_normed_linear_is_linear_norm_activation() -> None:
    layer, x = NormedLinear(5, 7, nn.Tanh()), th.randn(2, 3, 5, generator=generator())
    nn.init.normal_(layer.norm.weight)
    nn.init.normal_(layer.norm.bias)
    th.testing.assert_close(layer(x), layer.norm(layer.linear(x)).tanh())


def test_hooks_of_heads_and_activations_are_called() -> None:
    net, seen = mlp(5, [8], 3), []
    for module in (net, net[0].activation):
        module.register_forward_hook(lambda module, _, output: seen.append((module, output.shape)))
    net(th.zeros(2, 5))
    assert seen == [(net[0].activation, (2, 8)), (net, (2, 3))]


@pytest.mark.parametrize("gradient", [True, False])
def test_standardised_is_layer_norm_to_the_last_bit(gradient: bool) -> None:
    x = (3 + 5 * th.randn(2, 7, 96, generator=generator())).requires_grad_(gradient)
    found, expected = standardised(x), F.layer_norm(x, (96,))
    assert th.equal(found, expected) and found.requires_grad == gradient
    if gradient:
        weights = th.randn(2, 7, 96, generator=generator(1))
        slopes = [th.autograd.grad((y * weights).sum(), x)[0] for y in (found, expected)]
        th.testing.assert_close(*slopes, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [th.float64, th.float32])
def test_heads_of_other_types(dtype: th.dtype) -> None:
    """Inference mode comes first: nothing of it stays behind."""
    net, x = ensemble().to(dtype), th.randn(5, 6, generator=generator(), requires_grad=True)
    with th.inference_mode():
        inferred = net(x.to(dtype))
    out = net(x.to(dtype))
    assert out.dtype == dtype and th.equal(out, inferred)
    th.testing.assert_close(out.float(), ensemble()(x))
    out.float().pow(3).sum().backward()
    assert x.grad is not None and x.grad.any()


def test_a_default_device_for_new_tensors_is_not_that_of_heads() -> None:
    net, x = ensemble(), th.randn(5, 6, generator=generator())
    with th.device("meta"):
        found = net(x)
    assert th.equal(found, net(x))


def pruned(name: str) -> Callable[[nn.Module], object]:
    return lambda layer: prune.random_unstructured(layer, name, 2)


@pytest.mark.parametrize("change", [parametrizations.weight_norm, pruned("weight"), pruned("bias")])
def test_layers_whose_weight_is_computed(change: Callable[[nn.Module], object]) -> None:
    net, x = mlp(5, [8], 3, None, nn.ReLU), th.randn(2, 5, generator=generator())
    for layer in (net[0].linear, net[1]):
        change(layer)
    hidden = net[0].norm(F.linear(x, net[0].linear.weight, net[0].linear.bias)).relu()
    th.testing.assert_close(net(x), F.linear(hidden, net[1].weight, net[1].bias))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_heads_can_be_mapped_over_a_dimension() -> None:
    net, x = mlp(5, [8], 3), th.randn(4, 2, 5, generator=generator())
    with th.no_grad():
        th.testing.assert_close(th.func.vmap(net)(x), net(x))


def test_models_pickled_whole_find_their_activations() -> None:
    assert layers.SimNorm is SimNorm and layers.Mish is Mish


def test_mlp_layers_and_start() -> None:
    th.manual_seed(0)
    net = mlp(5, [300, 200], 4, None, nn.ReLU, zero_last=True)
    assert [type(layer).__name__ for layer in net] == ["NormedLinear", "NormedLinear", "Linear"]
    assert not net(th.randn(3, 5)).any(), "a zero last layer predicts zero everywhere"
    assert 0.019 < net[1].linear.weight.std() < 0.021 and net[1].linear.weight.abs().max() <= 2
    assert not net[1].linear.bias.any() and isinstance(net[0].activation, nn.ReLU)
    ends_in_simnorm = mlp(5, [], 16, SimNorm(8))
    th.testing.assert_close(ends_in_simnorm(th.randn(3, 5)).unflatten(-1, (2, 8)).sum(-1), th.ones(3, 2))


# --- ensembles ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lead", [(7,), (2, 3), ()])
def test_ensemble_members_are_plain_mlps(lead: tuple[int, ...]) -> None:
    net, x = ensemble(), th.randn(*lead, 6, generator=generator())
    out = net(x)
    assert out.shape == (4, *lead, 3)
    for index in range(4):
        th.testing.assert_close(out[index], member(net, index, x), rtol=1e-5, atol=1e-6)


def test_selected_members() -> None:
    net, x = ensemble(), th.randn(5, 6, generator=generator())
    th.testing.assert_close(net.select(th.tensor([2, 0]))(x), net(x)[[2, 0]])
    th.testing.assert_close(net.select(th.tensor([3]))(x), net(x)[[3]])
    out = net.select(th.arange(4))(x)
    th.testing.assert_close(out, net(x))


def test_gradients_of_selected_members() -> None:
    net, x = ensemble(), th.randn(5, 6, generator=generator(), requires_grad=True)
    net.select(th.tensor([1, 2]))(x).sum().backward()
    touched = net.weights[0].grad.abs().sum((1, 2)) > 0
    assert touched.tolist() == [False, True, True, False] and x.grad.any()
    net.zero_grad()
    x.grad = None
    net.select(th.tensor([1, 2]), detach=True)(x).sum().backward()
    assert x.grad.any() and not any(p.grad is not None and p.grad.any() for p in net.parameters())


def test_members_start_apart_and_their_last_layers_at_zero() -> None:
    net = EnsembleMLP(3, 6, [10], 4)
    assert not net(th.randn(2, 6)).any()
    assert not th.equal(net.weights[0][0], net.weights[0][1])


def test_dropout_acts_on_the_units_drawn() -> None:
    net, x = ensemble(dropout=0.5), th.randn(50, 6, generator=generator())
    assert net.eval().draw_dropout(50, generator()) is None
    assert ensemble(dropout=0.0).train().draw_dropout(50, generator()) is None
    plain, global_state = net(x), th.get_rng_state()
    assert th.equal(net.train()(x), plain) and th.equal(net.select(th.arange(4))(x), plain)
    first, again, other = (net(x, net.draw_dropout(50, generator(seed))) for seed in (1, 1, 2))
    assert th.equal(first, again) and not th.equal(first, other) and not th.equal(first, plain)
    assert th.equal(global_state, th.get_rng_state())


def test_dropped_units_are_zero_and_the_rest_is_scaled_up() -> None:
    net, x = ensemble(dropout=0.5, activation_fn=nn.Identity), th.ones(3, 6)
    # Units of member 1, row 2: all but the first; its norm then sees one number and zeros
    dropped = th.arange(1, 10) + 10 * (3 * 1 + 2)
    seen: list[th.Tensor] = []
    normed = F.layer_norm
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sb3_mbdpo.products.F.layer_norm", lambda h, *args: seen.append(h) or normed(h, *args))
        net.train()(x, dropped)
    first = x @ net.weights[0] + net.biases[0]
    expected = first / 0.5
    expected[1, 2, 1:] = 0
    th.testing.assert_close(seen[0], expected)


@pytest.mark.parametrize("rate", [0.01, 0.2, 0.5])
def test_dropout_drops_its_rate(rate: float) -> None:
    dropped = ensemble(dropout=rate).train().draw_dropout(1000, generator())
    assert dropped is not None and dropped.min() >= 0 and dropped.max() < 40_000
    assert len(dropped.unique()) / 40_000 == pytest.approx(rate, rel=0.03), "units that are drawn twice drop once"
    few = ensemble(dropout=0.01).train().draw_dropout(1, generator())
    assert few is not None and len(few) == 0, "too few units for a drop"


# --- widths of GPUs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mlp", "ensemble", "two of the ensemble", "dropout"])
def test_aligned_layers_compute_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As compiled for a GPU: Mish in its closed form, widths that are multiples of eight; gradients too."""
    net: nn.Module = mlp(6, [16, 10], 5) if kind == "mlp" else ensemble(0.5 if kind == "dropout" else 0.0)
    x = th.randn(2, 7, 6, generator=generator())
    dropped = net.draw_dropout(14, generator()) if kind == "dropout" else None

    def compute() -> list[th.Tensor]:
        if isinstance(net, EnsembleMLP):
            y = net.select(th.tensor([3, 1]))(x) if kind == "two of the ensemble" else net(x, dropped)
        else:
            y = net(x)
        return [y, *th.autograd.grad((y * y).sum(), list(net.parameters()))]

    expected = compute()
    sizes: list[int] = []
    pad = products.pad_end
    for module in (activations, ensemble_module, products):
        monkeypatch.setattr(module, "on_accelerator", lambda x: True)
    monkeypatch.setattr(th.compiler, "is_compiling", lambda: True)
    for module in (ensemble_module, products):
        monkeypatch.setattr(module, "pad_end", lambda x, missing, dim=-1: sizes.append(missing) or pad(x, missing, dim))
    for found, value in zip(compute(), expected, strict=True):
        th.testing.assert_close(found, value, rtol=1e-4, atol=1e-5)
    assert 2 in sizes and (3 in sizes or 5 in sizes)


# --- inputs in two parts ----------------------------------------------------------------------------------------------


def gradients(y: th.Tensor, *wanted: th.Tensor) -> list[th.Tensor]:
    """The output and what a loss of it passes on."""
    return [y.detach(), *th.autograd.grad((y * y).sum(), wanted)]


@pytest.mark.parametrize("actions", [(2, 7), (3, 2, 7)], ids=["one for each state", "three for each state"])
def test_a_head_reads_state_and_action_in_two_parts(actions: tuple[int, ...]) -> None:
    net = mlp(6, [16, 10], 5)
    x = Joined(
        th.randn(2, 7, 4, generator=generator(), requires_grad=True),
        th.randn(*actions, 2, generator=generator(1), requires_grad=True),
    )
    assert x.together().shape == (*actions, 6)
    found, expected = (gradients(y, *x, *net.parameters()) for y in (of_parts(net, x), net(x.together())))
    assert found[0].shape == (*actions, 5)
    th.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("in_turn", [False, True])
def test_members_read_state_and_action_in_two_parts(in_turn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sb3_mbdpo.ensemble.TURNS_FROM", 1 if in_turn else 10**9)
    net = ensemble()
    x = Joined(th.randn(2, 7, 4, generator=generator()), th.randn(2, 7, 2, generator=generator(1), requires_grad=True))
    first, second = (net.select(th.tensor([3, 1])) for _ in range(2))
    found, expected = (gradients(y, x.action, *net.parameters()) for y in (of_parts(first, x), second(x.together())))
    assert found[0].shape == (2, 2, 7, 3)
    th.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_who_knows_one_tensor_gets_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Functions of others, hooks, and mixed precision, where a sum of two products would be rounded twice."""
    net, x = mlp(6, [16], 5), Joined(th.randn(3, 4), th.randn(3, 2))
    whole = x.together()
    assert th.equal(of_parts(lambda y: y, x), whole)
    seen: list[object] = []
    forward = type(net).forward
    monkeypatch.setattr(type(net), "forward", lambda self, y: seen.append(y) or forward(self, y))
    of_parts(net, x)
    assert isinstance(seen.pop(), Joined)
    with th.autocast("cpu", th.bfloat16):
        of_parts(net, x)
    with net.register_forward_hook(lambda module, args, out: None):
        of_parts(net, x)
    with net.register_forward_pre_hook(lambda module, args: None):
        of_parts(net, x)
    assert len(seen) == 3 and all(isinstance(y, th.Tensor) and th.equal(y, whole) for y in seen)


# --- members in turn --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("activation_fn", [Mish, nn.SiLU])
def test_members_in_turn_compute_the_same(
    recompute: bool, dropout: float, activation_fn: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    net = ensemble(dropout, activation_fn)
    net.recompute = recompute
    x = th.randn(2, 7, 6, generator=generator(), requires_grad=True)
    dropped = net.draw_dropout(14, generator())
    assert (dropped is None) == (dropout == 0)
    expected = gradients(net(x, dropped), x, *net.parameters())
    products: list[int] = []
    one = ensemble_module.one_linear
    monkeypatch.setattr(ensemble_module, "TURNS_FROM", 14 * net.first_width)
    monkeypatch.setattr(ensemble_module, "one_linear", lambda *args: products.append(1) or one(*args))
    th.testing.assert_close(gradients(net(x, dropped), x, *net.parameters()), expected, rtol=1e-4, atol=1e-5)
    assert len(products) == (20 if recompute else 12), "each hidden layer once more in the backward pass"
    products.clear()
    net(x[:, :6])
    assert not products, "fewer rows are computed side by side"


def test_hooks_of_activations_see_what_is_activated() -> None:
    """Without them, the norm before Mish changes the sign: the same numbers."""
    net, x = mlp(6, [16], 5), th.randn(3, 6, generator=generator())
    plain, seen = gradients(net(x), *net.parameters()), []
    layer = net[0]
    layer.activation.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    th.testing.assert_close(gradients(net(x), *net.parameters()), plain, rtol=0, atol=0)
    ((read, out),) = seen
    expected = F.layer_norm(F.linear(x, layer.linear.weight, layer.linear.bias), (16,))
    th.testing.assert_close(read, expected)
    th.testing.assert_close(out, F.mish(expected))
