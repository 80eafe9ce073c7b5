import copy
from dataclasses import replace

import pytest
import torch as th

from sb3_mbdpo.distillation import draw_path, own_path, score_loss, search_target
from sb3_mbdpo.schedule import NoiseSchedule
from sb3_mbdpo.score import TABLED_STEPS, score_plan
from sb3_mbdpo.search import SearchNoise, draw_noise, search
from sb3_mbdpo.world_model import TaskSpec, WorldModel
from tests.fakes import hand_set, make_config, make_model

CPU = th.device("cpu")
TASKS = TaskSpec([2, 1], 8)


def generator(seed: int = 0) -> th.Generator:
    return th.Generator().manual_seed(seed)


def inputs(model: WorldModel, size: int = 8, seed: int = 0) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
    """Latents, executed actions and tasks."""
    draw = generator(seed)
    task = None if model.task_embedding is None else th.arange(size) % 2
    with th.no_grad():
        z = model.encode(th.randn(size, 5, generator=draw), task)
    return z, th.rand(size, 3, 2, generator=draw) * 2 - 1, task


def loss_of(model: WorldModel, seed: int = 0, size: int = 8) -> th.Tensor:
    config, draw = make_config(), generator(seed)
    z, behaviour, task = inputs(model, size, seed)
    noise = draw_noise(config, model, draw, size, CPU, steps=1)
    return score_loss(model, config, z, behaviour, noise, draw_path(config, size, draw, CPU), task)


@pytest.mark.parametrize("tasks", [None, TASKS])
def test_gradient_reaches_the_score_network_alone(tasks: TaskSpec | None) -> None:
    model = make_model(tasks)
    state = th.get_rng_state()
    loss_of(model).backward()
    for name, parameter in model.named_parameters():
        if name.startswith("score."):
            assert parameter.grad is not None and parameter.grad.any(), name
        else:
            assert parameter.grad is None, name
    assert th.equal(state, th.get_rng_state())


def test_the_generator_decides_everything() -> None:
    model = make_model()
    assert th.equal(loss_of(model, 1), loss_of(model, 1)) and not th.equal(loss_of(model, 1), loss_of(model, 2))


@pytest.mark.usefixtures("plain")
def test_loss_falls_and_the_network_learns_to_search() -> None:
    """On a frozen model with a best action at (0.7, -0.4) the distilled policy comes to plan as the search does."""
    best = th.tensor([0.7, -0.4])
    model = hand_set(lambda action: -(action - best).pow(2).sum(-1, keepdim=True))
    config = make_config(n_samples=64, n_elites=8, energy_coef=0.0)
    optimizer = th.optim.Adam(model.score.parameters(), 3e-3)
    z, behaviour, _ = inputs(model, 16)
    cold, restart = th.zeros(16, 3, 2), th.ones(16, dtype=th.bool)
    searched = search(model, config, z, cold, restart, draw_noise(config, model, generator(9), 16, CPU)).plan

    def distance() -> float:
        return (score_plan(model, config.schedule, z, cold, restart) - searched).abs().mean().item()

    before, draw, losses = distance(), generator(), []
    frozen = [p.detach().clone() for name, p in model.named_parameters() if not name.startswith("score.")]
    for _ in range(150):
        noise = draw_noise(config, model, draw, 16, CPU, steps=1)
        loss = score_loss(model, config, z, behaviour, noise, draw_path(config, len(z), draw, CPU))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-20:]) < 0.5 * sum(losses[:20])
    assert distance() < 0.3 * before
    after = [p for name, p in model.named_parameters() if not name.startswith("score.")]
    assert all(th.equal(a, b) for a, b in zip(frozen, after, strict=True))


@pytest.mark.parametrize("tasks", [None, TASKS])
@th.no_grad()
def test_paths_are_those_of_acting(tasks: TaskSpec | None) -> None:
    """From a drawn point, denoising on to the end gives the plan that acting by score gives."""
    model, config = make_model(tasks), make_config()
    schedule = config.schedule
    z, behaviour, task = inputs(model, 60)
    for layer in model.score.net:
        getattr(layer, "linear", layer).weight.mul_(20)  # so that it matters where a path starts
    condition, mask = model.join(z, None, task), model.mask(task)
    if mask is not None:
        behaviour = behaviour * mask[:, None]
    path = draw_path(config, 60, generator(), CPU)
    x, tau, alpha_bar = own_path(model, config, condition, behaviour, path, task), path.tau, path.alpha_bar
    assert sorted(tau.unique().tolist()) == [1, 2, 3]
    th.testing.assert_close(alpha_bar.flatten(), th.tensor(schedule.alpha_bars)[tau])
    previous = th.cat([th.zeros(60, 1, 2), behaviour[:, :-1]], 1)
    plans = {cold: score_plan(model, schedule, z, previous, th.full((60,), cold), task) for cold in (True, False)}
    starts = {"cold": 0, "warm": 0}
    for row in range(60):
        point, row_mask = x[row : row + 1], None if mask is None else mask[row]
        for step in range(int(tau[row]), 0, -1):
            bar = th.tensor(schedule.alpha_bars[step])
            plan = model.score.clean_plan(condition[row : row + 1], point, th.tensor(step), bar)
            point = schedule.denoise(plan if row_mask is None else plan * row_mask, step)
        distances = {cold: (point.clamp(-1, 1)[0] - plans[cold][row]).abs().max() for cold in (True, False)}
        nearest = min(distances, key=distances.__getitem__)
        assert distances[nearest] < 1e-4
        starts["cold" if nearest else "warm"] += 1
    assert min(starts.values()) > 10, "half of the rows start cold"


@pytest.mark.parametrize(("prior_margin", "discount"), [(0.0, None), (0.5, None), (0.0, 0.1)])
@th.no_grad()
def test_target_is_one_step_of_the_search(prior_margin: float, discount: float | None) -> None:
    """From the search's own start, the target is what its step computes."""
    model, config = make_model(), make_config(prior_margin=prior_margin)
    model.prior_scale.fill_(5.0)
    z, behaviour, _ = inputs(model)
    noise = draw_noise(config, model, generator(), 8, CPU)
    rows = None if discount is None else th.full((8, 1), discount)
    # A schedule of one step ends where its first step leads
    one_step = NoiseSchedule(2, 0.1, 0.1)
    warm = th.zeros(8, dtype=th.bool)
    x = one_step.start(behaviour, warm)
    target = search_target(model, config, z, x, th.full((8, 1, 1), one_step.alpha_bars[1]), noise, None, rows)
    plan = search(model, replace(config, schedule=one_step), z, behaviour, warm, noise, None, rows).plan
    th.testing.assert_close(one_step.denoise(target, 1).clamp(-1, 1), plan, rtol=1e-5, atol=1e-5)


@th.no_grad()
def test_rows_have_their_own_noise_level() -> None:
    model, config = make_model(), make_config(n_prior_trajectories=0, n_elites=32, temperature=1e6)
    z, x = inputs(model, 2)[0], th.zeros(2, 3, 2)
    noise = SearchNoise(th.full((1, 2, 32, 3, 2), 1.0), th.zeros(3, 0, 2), th.tensor([0, 1]))
    alpha_bar = th.tensor([0.99, 0.8])[:, None, None]
    target = search_target(model, config, z, x, alpha_bar, noise)
    expected = ((1 - alpha_bar) / alpha_bar).sqrt().expand(2, 3, 2)
    th.testing.assert_close(target, expected)


def test_missing_actions_cost_nothing() -> None:
    """The score network's answer for an action that a task has not got does not enter the loss."""
    model = make_model(TASKS)
    with th.no_grad():
        model.score.net[-1].weight.zero_()
        model.score.net[-1].bias.copy_(th.tensor([0.3, 9.0, 0.3, 9.0, 0.3, 9.0]))
    config, draw = make_config(), generator()
    z, behaviour, _ = inputs(model)
    task = th.ones(8, dtype=th.long)  # one action only
    noise = draw_noise(config, model, draw, 8, CPU, steps=1)
    behaviour = behaviour * model.mask(task)[:, None]
    loss = score_loss(model, config, z, behaviour, noise, draw_path(config, 8, draw, CPU), task)
    loss.backward()
    assert not model.score.net[-1].bias.grad[1::2].any() and model.score.net[-1].bias.grad[::2].all()


@pytest.mark.parametrize("tasks", [None, TASKS])
@pytest.mark.parametrize("steps", [5, TABLED_STEPS + 3])
def test_what_steps_share_is_computed_once_and_the_same(tasks: TaskSpec | None, steps: int) -> None:
    model = make_model(tasks)
    z, x, task = inputs(model, size=16)
    assert model.score is not None
    with th.no_grad():
        condition = model.join(z, None, task)
        output = model.score.along(condition, steps)
        for tau in (0, 1, steps - 1):
            th.testing.assert_close(output(x, tau), model.score(condition, x, tau), rtol=1e-5, atol=1e-6)
    with pytest.raises(IndexError):
        output(x, steps)
    double = copy.deepcopy(model).double()
    assert double.score is not None
    twice = double.score.along(condition.double(), steps)(x.double(), 1)
    th.testing.assert_close(twice.float(), output(x, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prediction", ["sample", "score"])
def test_denoising_follows_the_clean_plans(prediction: str) -> None:
    model, schedule = make_model(score_prediction=prediction), make_config().schedule
    z, x, _ = inputs(model, size=16)
    assert model.score is not None
    points = model.score.denoise(schedule, z, x)
    assert len(points) == schedule.denoising_steps and points[0] is x
    part = model.score.denoise(schedule, z, x, steps=2)
    assert len(part) == 3 and all(th.equal(a, b) for a, b in zip(part, points, strict=False))
    for tau, point, following in zip(schedule.taus, points, points[1:], strict=False):
        with th.no_grad():
            plan = model.score.clean_plan(z, point, tau, schedule.alpha_bars[tau])
        th.testing.assert_close(following, schedule.denoise(plan, tau), rtol=1e-4, atol=1e-5)


def test_a_step_that_all_rows_share_may_be_a_number() -> None:
    net = make_model().score
    assert net is not None
    condition, x = th.randn(4, 16, generator=generator()), th.randn(4, 3, 2, generator=generator())
    for tau in (0, 3, TABLED_STEPS - 1, TABLED_STEPS, 500):
        th.testing.assert_close(net(condition, x, tau), net(condition, x, th.full((4,), tau)))
