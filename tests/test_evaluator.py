import dataclasses

import pytest
import torch as th

from sb3_mbdpo import evaluator, head_stacks
from sb3_mbdpo.activations import Mish
from sb3_mbdpo.ensemble import EnsembleMLP
from sb3_mbdpo.evaluator import STACKED_ON_CPU, Evaluator
from sb3_mbdpo.world_model import TaskSpec, WorldModel
from tests.fakes import Apply, PlainEvaluator, hand_set, make_config, make_model

PAIR = th.tensor([0, 1])


def generator(seed: int = 0) -> th.Generator:
    return th.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> th.Tensor:
    return th.randn(*shape, generator=generator(seed))


def trained(**kwargs: object) -> WorldModel:
    """A model with no parameter at its initial value: heads that start at zero would agree on anything."""
    model = make_model(**kwargs)
    with th.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * th.randn(parameter.shape, generator=generator(parameter.numel()))
    model.energy_mean.fill_(0.3)
    model.energy_std.fill_(0.7)
    return model


TASKS = TaskSpec(action_dims=[2, 1, 2], embedding_dim=5)


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"hidden": (24,)},
        {"hidden": (24, 24, 24)},
        {"tasks": TASKS},
        {"n_critics": 2},
        {"activation_fn": th.nn.ReLU},
    ],
    ids=["plain", "one layer", "three layers", "tasks", "two critics", "relu"],
)
@pytest.mark.parametrize(("energy_coef", "unit"), [(0.0, "reward"), (0.5, "reward"), (0.5, "value_range")])
@th.no_grad()
def test_stacked_heads_compute_what_the_modules_do(
    stacked: bool, kwargs: dict[str, object], energy_coef: float, unit: str
) -> None:
    model, batch = trained(**kwargs), 3
    config = make_config(energy_coef=energy_coef, energy_unit=unit, stacked=stacked)
    model.prior_scale.fill_(3.0)
    task = th.tensor([2, 0, 1]) if "tasks" in kwargs else None
    z, actions = normal(batch, 16).softmax(-1), normal(batch, 7, 3, 2, seed=1).clamp(-1, 1)
    # Some energies beyond the clip, and some candidates that end
    model.energy_std.fill_(0.1)
    for episodic in (False, True):
        arguments = (model, config, z, th.tensor([1, 0]), task, None, episodic)
        if episodic:
            latents, _ = PlainEvaluator(*arguments).roll_out(actions)
            rows = None if task is None else task.repeat_interleave(7, 0)
            model.termination[-1].bias -= model.termination(model.join(th.stack(latents), None, rows)).quantile(0.8)
            ended = PlainEvaluator(*arguments)._alive(latents, 7)
            assert 0 < ended[-1].mean() < 1
        found, expected = Evaluator(*arguments)(actions), PlainEvaluator(*arguments)(actions)
        assert found.std() > 0.01
        th.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("few_rows", [0, 2048], ids=["many rows", "few rows"])
@pytest.mark.parametrize("kwargs", [{}, {"tasks": TASKS}, {"num_bins": 16}], ids=["plain", "tasks", "aligned bins"])
@th.no_grad()
def test_the_layout_of_accelerators_computes_the_same(
    kwargs: dict[str, object], few_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Widths padded to multiples of eight, biases apart from products, outputs of all steps at once."""
    model, config = trained(**kwargs), make_config(energy_coef=0.5)
    task = th.tensor([2, 0, 1]) if "tasks" in kwargs else None
    arguments = (model, config, normal(3, 16).softmax(-1), th.tensor([1, 0]), task)
    actions = normal(3, 7, 3, 2, seed=1).clamp(-1, 1)
    expected = Evaluator(*arguments)(actions)
    for module in (evaluator, head_stacks):
        monkeypatch.setattr(module, "on_accelerator", lambda x: True)
    monkeypatch.setattr(evaluator, "FEW_ROWS", few_rows)
    padded = Evaluator(*arguments)
    assert all(stack.action.shape[-2] == 8 for stack in padded.steps)
    th.testing.assert_close(padded(actions), expected, rtol=1e-5, atol=1e-5)


@th.no_grad()
def test_bfloat16_is_close_and_leaves_the_model_alone() -> None:
    model, config = trained(), make_config(energy_coef=0.5)
    before = [parameter.clone() for parameter in model.parameters()]
    z, actions = normal(2, 16).softmax(-1), normal(2, 50, 3, 2, seed=1).clamp(-1, 1)
    exact = Evaluator(model, config, z, PAIR)(actions)
    rounded = Evaluator(model, dataclasses.replace(config, dtype=th.bfloat16), z, PAIR)(actions)
    assert rounded.dtype == th.float32
    assert 0 < (rounded - exact).abs().mean() < 0.05 * exact.std()
    assert all(th.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@th.no_grad()
def test_weights_are_read_anew_by_each_evaluator() -> None:
    model, config = trained(), make_config()
    z, actions = normal(2, 16).softmax(-1), normal(2, 5, 3, 2).clamp(-1, 1)
    before = Evaluator(model, config, z, PAIR)(actions)
    model.reward[-1].bias += th.linspace(0, 1, model.two_hot.num_bins)
    assert (Evaluator(model, config, z, PAIR)(actions) > before).all()


def test_small_heads_are_stacked_on_a_cpu_and_wide_ones_are_not() -> None:
    model = make_model()
    width = model.dynamics[0].linear.out_features
    for n_samples, groups in ((8, 1), (2 * STACKED_ON_CPU // width, 3)):
        config = make_config(n_samples=n_samples, n_elites=2, n_prior_trajectories=2)
        assert len(Evaluator(model, config, th.zeros(1, 16), PAIR).steps) == groups


class Loud(Mish):
    """Another activation than what it is made of."""

    def forward(self, x: th.Tensor) -> th.Tensor:
        return 2 * super().forward(x) + 1


@pytest.mark.parametrize("activation_fn", [Mish, Loud])
@pytest.mark.parametrize("stacked", [True, False])
def test_activations_are_the_models_own_and_gradients_pass(activation_fn: type[Mish], stacked: bool) -> None:
    model = trained(activation_fn=activation_fn)
    z, actions = normal(2, 16).softmax(-1), normal(2, 5, 3, 2, seed=1).clamp(-1, 1).requires_grad_()
    found, _ = Evaluator(model, make_config(stacked=stacked), z, PAIR).roll_out(actions)
    expected = model.next(z[:, None].expand(-1, 5, -1), actions[:, :, 0])
    th.testing.assert_close(found[0].view(2, 5, -1), expected)
    slopes = [th.autograd.grad(latents.pow(2).sum(), actions)[0] for latents in (found[0], expected)]
    assert slopes[0].any()
    th.testing.assert_close(*slopes)


def test_layers_of_chosen_members() -> None:
    ensemble = EnsembleMLP(3, 4, [6], 2)
    layers = ensemble.layers(th.tensor([2, 0]))
    assert [[tuple(t.shape) for t in layer] for layer in layers] == [
        [(2, 4, 6), (2, 1, 6), (2, 1, 6), (2, 1, 6)],
        [(2, 6, 2), (2, 1, 2)],
    ]
    assert th.equal(layers[0][0][0], ensemble.weights[0][2])
    assert len(ensemble.layers()[0][0]) == 3


@th.no_grad()
def test_returns_are_discounted_sums() -> None:
    model, config = hand_set(lambda action: 1 + action[..., :1], value=10.0), make_config(energy_coef=0.0, discount=0.5)
    actions = th.rand(2, 7, 3, 2, generator=generator()) * 2 - 1
    found = PlainEvaluator(model, config, normal(2, 16).softmax(-1), PAIR)(actions)
    rewards = 1 + actions[..., 0]
    expected = rewards[:, :, 0] + rewards[:, :, 1] / 2 + rewards[:, :, 2] / 4 + 10 / 8
    th.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    # A discount of each row's own
    found = PlainEvaluator(model, config, normal(2, 16).softmax(-1), PAIR, discount=th.tensor([[0.5], [0.0]]))(actions)
    th.testing.assert_close(found[0], expected[0], rtol=1e-3, atol=1e-3)
    th.testing.assert_close(found[1], rewards[1, :, 0], rtol=1e-3, atol=1e-3)


@th.no_grad()
def test_ends_are_told_by_each_rows_task() -> None:
    model = make_model(TaskSpec([2, 2], 8))
    # The last part of what the head reads says which task it is
    model.task_embedding.weight.copy_(th.tensor([0.3, -0.3])[:, None].expand(2, 8))
    model.termination = Apply(lambda joined: joined[..., -1:])
    z, actions, tasks = normal(2, 16).softmax(-1), normal(2, 5, 3, 2, seed=1).clamp(-1, 1), th.tensor([0, 1])
    evaluate, endless = (Evaluator(model, make_config(), z, PAIR, tasks, episodic=flag) for flag in (True, False))
    found, uncut = evaluate(actions), endless(actions)
    first_reward = evaluate.roll_out(actions)[1][0].view(2, 5)
    th.testing.assert_close(found, th.stack([first_reward[0], uncut[1]]))
    assert not th.isclose(found[0], uncut[0]).any()


@th.no_grad()
def test_termination_cuts_what_comes_after() -> None:
    """The reward of the step that ends the episode still counts; later ones and the value beyond do not."""
    model = hand_set(lambda action: 0 * action[..., :1] + 1, value=10.0)
    # The first latent unit counts the steps: a step adds the action's first number
    model.dynamics = Apply(lambda joined: th.cat([joined[..., :1] + joined[..., 16:17], joined[..., 1:16]], -1))
    model.termination = Apply(lambda z: z[..., :1] - 0.5)
    config = make_config(energy_coef=0.0, discount=1.0)
    steps = th.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [1.0, -1.0, 0.0]])
    actions = th.stack([steps, th.zeros_like(steps)], dim=-1)[None]
    z = th.zeros(1, 16)
    found = PlainEvaluator(model, config, z, PAIR, episodic=True)(actions)
    th.testing.assert_close(found, th.tensor([[13.0, 3.0, 2.0, 1.0, 1.0]]), rtol=1e-3, atol=1e-3)
    found = PlainEvaluator(model, config, z, PAIR, episodic=False)(actions)
    th.testing.assert_close(found, th.full((1, 5), 13.0), rtol=1e-3, atol=1e-3)


@th.no_grad()
@pytest.mark.parametrize(("unit", "scale"), [("reward", 1.0), ("value_range", 40.0)])
def test_energy_is_scaled_clipped_and_weighted(unit: str, scale: float) -> None:
    model = hand_set()
    model.prior_scale.fill_(40.0)
    model.energy = Apply(lambda joined: 3 + 100 * joined[..., 16:17])
    model.energy_mean.fill_(3.0)
    model.energy_std.fill_(10.0)
    config = make_config(horizon=1, energy_coef=0.5, energy_unit=unit)
    actions = th.tensor([-1.0, -0.2, 0.0, 0.3, 1.0])[None, :, None, None].expand(-1, -1, 1, 2)
    found = PlainEvaluator(model, config, th.zeros(1, 16), PAIR)(actions)
    th.testing.assert_close(found, 0.5 * scale * th.tensor([[-5.0, -2.0, 0.0, 3.0, 5.0]]))
    found = PlainEvaluator(model, dataclasses.replace(config, energy_coef=0.0), th.zeros(1, 16), PAIR)(actions)
    assert found.abs().max() < 1e-5


@th.no_grad()
def test_only_the_two_critics_of_the_draw_count() -> None:
    model, config = make_model(), make_config()
    z, actions = normal(2, 16).softmax(-1), th.zeros(2, 4, 3, 2)
    before = Evaluator(model, config, z, th.tensor([2, 0]))(actions)
    model.critics.biases[-1][1] += th.randn(21, generator=generator())
    assert th.equal(before, Evaluator(model, config, z, th.tensor([2, 0]))(actions))
    assert not th.equal(before, Evaluator(model, config, z, th.tensor([2, 1]))(actions))


@th.no_grad()
def test_nan_counts_as_zero() -> None:
    model = hand_set(lambda action: th.where(action[..., :1] > 0.5, th.nan, 1 + 0 * action[..., :1]))
    actions = th.tensor([0.0, 0.9])[None, :, None, None].expand(1, 2, 3, 2)
    found = PlainEvaluator(model, make_config(energy_coef=0.0, discount=1.0), th.zeros(1, 16), PAIR)(actions)
    th.testing.assert_close(found, th.tensor([[3.0, 0.0]]), rtol=1e-3, atol=1e-3)
