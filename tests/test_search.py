import dataclasses

import pytest
import torch as th

from sb3_mbdpo.schedule import NoiseSchedule
from sb3_mbdpo.score import score_plan
from sb3_mbdpo.search import (
    SearchNoise,
    SearchResult,
    SearchStep,
    combine_elites,
    draw_noise,
    prior_rollouts,
    random_pair,
    search,
)
from sb3_mbdpo.search_config import SearchConfig, with_samples
from sb3_mbdpo.world_model import TaskSpec, WorldModel
from tests.fakes import hand_set, make_config, make_model

CPU = th.device("cpu")
PAIR = th.tensor([0, 1])


def generator(seed: int = 0) -> th.Generator:
    return th.Generator().manual_seed(seed)


def latents(model: WorldModel, size: int, seed: int = 0) -> th.Tensor:
    tasks = None if model.task_embedding is None else th.arange(size) % model.task_embedding.num_embeddings
    with th.no_grad():
        return model.encode(th.randn(size, 5, generator=generator(seed)), tasks)


def run(
    model: WorldModel,
    config: SearchConfig,
    z: th.Tensor,
    noise: SearchNoise | None = None,
    previous: th.Tensor | None = None,
    restart: th.Tensor | None = None,
    **kwargs: object,
) -> SearchResult:
    noise = draw_noise(config, model, generator(), None, CPU) if noise is None else noise
    previous = th.zeros(len(z), config.horizon, model.action_dim) if previous is None else previous
    restart = th.zeros(len(z), dtype=th.bool) if restart is None else restart
    return search(model, config, z, previous, restart, noise, **kwargs)


# --- elites ---------------------------------------------------------------------------------------------------------


def test_elites_by_hand() -> None:
    values = th.tensor([[1.0, 4.0, 2.0, 3.0], [0.0, 0.0, 0.0, 8.0]])
    plans = th.randn(2, 4, 3, 2, generator=generator())
    plan, value, std = combine_elites(plans, values, n_elites=2, temperature=0.5)
    for row, best in enumerate(([1, 3], [3, 0])):
        deviation = values[row].std()
        weights = ((values[row, best] - values[row].mean()) / deviation / 0.5).softmax(0)
        if row == 0:
            th.testing.assert_close(plan[row], (weights[:, None, None] * plans[row, best]).sum(0))
        th.testing.assert_close(value[row], (weights * values[row, best]).sum())
        th.testing.assert_close(std[row], deviation)


def test_colder_is_greedier_and_scale_does_not_matter() -> None:
    values, plans = th.randn(3, 16, generator=generator()), th.randn(3, 16, 2, 2, generator=generator(1))
    best = plans[th.arange(3), values.argmax(1)]
    th.testing.assert_close(combine_elites(plans, values, 1, 0.5)[0], best)
    th.testing.assert_close(combine_elites(plans, values, 16, 1e-3)[0], best)
    th.testing.assert_close(combine_elites(plans, values, 16, 1e6)[0], plans.mean(1), rtol=1e-4, atol=1e-4)
    plain, shifted = combine_elites(plans, values, 6, 0.5)[0], combine_elites(plans, 50 * values - 700, 6, 0.5)[0]
    th.testing.assert_close(plain, shifted, rtol=1e-3, atol=1e-3)


def test_close_returns_of_a_large_value_are_weighted_precisely_and_row_by_row() -> None:
    generator = th.Generator().manual_seed(0)
    plans = th.rand(64, 64, 3, 1, generator=generator) * 2 - 1
    values = 0.01 * th.randn(64, 64, generator=generator) - 50
    together = combine_elites(plans, values, 12, 0.5)
    exact = combine_elites(plans.double(), values.double(), 12, 0.5)[0]
    th.testing.assert_close(together[0].double(), exact, atol=1e-5, rtol=0)
    for row in range(64):
        alone = combine_elites(plans[row : row + 1], values[row : row + 1], 12, 0.5)
        assert all(th.equal(one[0], many[row]) for one, many in zip(alone, together, strict=True))


def test_equal_values_weigh_alike() -> None:
    """A spread below 1e-4 counts as one: differences of rounding's size must not decide."""
    plans = th.randn(1, 8, 3, 2, generator=generator())
    values = 5 + 1e-6 * th.randn(1, 8, generator=generator())
    plan, _, _ = combine_elites(plans, values, 8, 0.5)
    th.testing.assert_close(plan, plans.mean(1), rtol=1e-4, atol=1e-4)


# --- search ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_prior", [0, 4])
@pytest.mark.usefixtures("plain")
def test_search_finds_the_best_action(n_prior: int) -> None:
    """One best action at (0.6, -0.3), whatever the latent: plans move there, and closer with every step."""
    best = th.tensor([0.6, -0.3])
    model = hand_set(lambda action: -(action - best).pow(2).sum(-1, keepdim=True))
    errors = []
    for steps in (2, 4, 8):
        config = SearchConfig(NoiseSchedule(steps, 1e-3, 0.3), 3, 256, 16, n_prior, 0.3, 0.0, 0.99)
        plan = run(model, config, latents(model, 4)).plan
        errors.append((plan - best).abs().max().item())
    assert errors[-1] < 0.1 and errors[-1] < errors[0]


@pytest.mark.usefixtures("plain")
def test_warm_start_and_restart() -> None:
    """A warm start is shifted by one step; rows that restart ignore theirs altogether."""
    model = hand_set()  # nothing to gain: the search stays around its start
    config = dataclasses.replace(make_config(n_prior_trajectories=0), schedule=NoiseSchedule(3, 1e-5, 1e-5))
    previous = th.rand(2, 3, 2, generator=generator()) - 0.5
    plan = run(model, config, latents(model, 2), previous=previous, restart=th.tensor([False, True])).plan
    assert (plan[0, :2] - previous[0, 1:]).abs().max() < 0.02 and plan[0, 2].abs().max() < 0.02
    assert plan[1].abs().max() < 0.02
    model = make_model()
    z = latents(model, 2)
    cold = run(model, make_config(), z, restart=th.ones(2, dtype=th.bool)).plan
    poisoned = th.full((2, 3, 2), th.nan)
    assert th.equal(cold, run(model, make_config(), z, previous=poisoned, restart=th.ones(2, dtype=th.bool)).plan)


@pytest.mark.parametrize("tasks", [None, TaskSpec([2, 1], 8)])
def test_rows_do_not_see_each_other(tasks: TaskSpec | None) -> None:
    model, config = make_model(tasks), make_config()
    z, task = latents(model, 5), None if tasks is None else th.tensor([0, 1, 0, 1, 0])
    noise = draw_noise(config, model, generator(), 5, CPU)
    previous = th.rand(5, 3, 2, generator=generator()) * 2 - 1
    restart = th.tensor([False, True, False, False, True])
    together = run(model, config, z, noise, previous, restart, task=task, episodic=True)
    # Bit for bit: row 2's own inputs and noise are unchanged while all others change
    others = th.tensor([0, 1, 3, 4])
    changed = [value.clone() for value in (z, previous, restart, noise.candidates, noise.prior)]
    changed[0][others] = changed[0][others].flip(1)
    changed[1][others] = th.nan
    changed[2][others] = ~changed[2][others]
    changed[3][:, others] = th.inf
    changed[4][:, others] *= -3
    other_noise = SearchNoise(changed[3], changed[4], noise.critics)
    moved = run(model, config, changed[0], other_noise, changed[1], changed[2], task=task, episodic=True)
    assert th.equal(together.plan[2], moved.plan[2]) and th.equal(together.value[2], moved.value[2])
    for row in range(5):
        rows = slice(row, row + 1)
        own = SearchNoise(noise.candidates[:, rows], noise.prior[:, rows], noise.critics)
        row_task = None if task is None else task[rows]
        alone = run(model, config, z[rows], own, previous[rows], restart[rows], task=row_task, episodic=True)
        th.testing.assert_close(alone.plan, together.plan[rows], rtol=1e-5, atol=1e-5)
        th.testing.assert_close(alone.value_std, together.value_std[rows], rtol=1e-4, atol=1e-5)


def test_shared_noise_gives_equal_rows_equal_plans() -> None:
    model, config = make_model(), make_config()
    z = latents(model, 1).expand(3, -1)
    plan = run(model, config, z).plan
    th.testing.assert_close(plan[0], plan[1], rtol=1e-6, atol=1e-6)
    own = run(model, config, z, draw_noise(config, model, generator(), 3, CPU)).plan
    assert not th.allclose(own[0], own[1])


@pytest.mark.parametrize("fill", [th.nan, th.inf, 1e30])
def test_broken_weights_give_bounded_plans_or_nan_alone(fill: float) -> None:
    """Whatever one head answers, the other heads' candidates still make a plan within bounds."""
    model, config = make_model(), make_config()
    with th.no_grad():
        for parameter in (*model.reward.parameters(), *model.critics.parameters(), *model.energy.parameters()):
            parameter.fill_(fill)
    plan = run(model, config, latents(model, 3), restart=th.ones(3, dtype=th.bool)).plan
    assert plan.isfinite().all() and plan.abs().max() <= 1


def test_other_actions_of_a_task_stay_zero() -> None:
    model, config = make_model(TaskSpec([1, 2], 8)), make_config()
    task = th.tensor([0, 1, 0])
    plan = run(model, config, latents(model, 3), task=task).plan
    assert not plan[task == 0, :, 1].any() and plan[task == 1, :, 1].all() and plan[:, :, 0].all()
    assert not score_plan(
        model, config.schedule, latents(model, 3), th.zeros(3, 3, 2), th.ones(3, dtype=th.bool), task
    )[task == 0, :, 1].any()


@pytest.mark.usefixtures("plain")
def test_without_prior_rollouts_the_prior_proposes_nothing() -> None:
    model, config = hand_set(), make_config(n_prior_trajectories=0, energy_coef=0.0)
    noise = draw_noise(config, model, generator(), None, CPU)
    assert noise.prior.shape == (3, 0, 2) and noise.candidates.shape == (3, 32, 3, 2)
    before = run(model, config, latents(model, 2), noise).plan
    with th.no_grad():
        model.prior[-1].bias.fill_(7.0)
    assert th.equal(before, run(model, config, latents(model, 2), noise).plan)


def test_a_plan_must_beat_the_prior_by_a_margin() -> None:
    """The prior's rollouts gain a share of the value range, the other candidates nothing; a large one decides."""
    model, config = make_model(), make_config(n_elites=4)
    model.prior_scale.fill_(5.0)
    z = latents(model, 2)
    traces: dict[float, list[SearchStep]] = {0.0: [], 0.5: [], 100.0: []}
    for margin, trace in traces.items():
        run(model, dataclasses.replace(config, prior_margin=margin), z, trace=trace)
    gained = traces[0.5][0].returns - traces[0.0][0].returns
    th.testing.assert_close(gained[:, :4], th.full((2, 4), 2.5))
    assert not gained[:, 4:].any()
    for step in traces[100.0]:
        prior_plans = step.candidates[:, :4]
        assert (step.plan >= prior_plans.amin(1)).all() and (step.plan <= prior_plans.amax(1)).all()
    assert not th.allclose(traces[0.0][-1].plan, traces[100.0][-1].plan)


def test_warm_rows_take_the_last_steps_only() -> None:
    """A row that continues a plan is searched as by a shorter schedule, whatever the other rows do."""
    model, config = make_model(), make_config(warm_steps=2)
    z, previous = latents(model, 3), th.rand(3, 3, 2, generator=generator(1)) * 2 - 1
    noise = draw_noise(config, model, generator(), None, CPU)
    restart = th.tensor([False, True, False])
    trace: list[SearchStep] = []
    mixed = run(model, config, z, noise, previous, restart)
    warm = run(model, config, z, noise, previous, trace=trace, all_warm=True)
    full = run(model, dataclasses.replace(config, warm_steps=None), z, noise, previous, restart)
    assert len(trace) == 2 and config.schedule.denoising_steps - 1 > 2
    th.testing.assert_close(mixed.plan[[0, 2]], warm.plan[[0, 2]])
    th.testing.assert_close(mixed.plan[1], full.plan[1])
    assert not th.allclose(mixed.plan[0], full.plan[0])


@pytest.mark.parametrize("warm_steps", [0, 4, 1.5])
def test_warm_steps_must_fit_the_schedule(warm_steps: int) -> None:
    with pytest.raises(
        ValueError, match="warm_denoising_steps must be a whole number between 1 and denoising_steps - 1"
    ):
        make_config(warm_steps=warm_steps)


def test_all_steps_are_the_same_as_no_warm_steps() -> None:
    model, config = make_model(), make_config()
    z, previous = latents(model, 3), th.rand(3, 3, 2, generator=generator(1)) * 2 - 1
    every = run(model, dataclasses.replace(config, warm_steps=3), z, previous=previous)
    assert th.equal(every.plan, run(model, config, z, previous=previous).plan)


@pytest.mark.usefixtures("plain")
def test_prior_rollouts_take_part() -> None:
    """Candidates that noise cannot reach, but the prior proposes, win."""
    model = hand_set(lambda action: action.sum(-1, keepdim=True))
    with th.no_grad():
        model.prior[-1].weight.zero_()
        model.prior[-1].bias.copy_(th.tensor([4.0, 4.0, -9.0, -9.0]))
    config = SearchConfig(NoiseSchedule(3, 1e-6, 1e-6), 3, 32, 2, 4, 0.5, 0.0, 0.99)
    assert run(model, config, latents(model, 2)).plan.min() > 0.9


@th.no_grad()
def test_prior_rollouts_follow_the_dynamics() -> None:
    model, noise = make_model(), th.randn(3, 4, 2, generator=generator())
    z = latents(model, 2)
    plans = prior_rollouts(model, z, noise)
    for m in range(4):
        state = z
        for t in range(3):
            action = model.prior_action(state, noise[t, m])
            th.testing.assert_close(plans[:, m, t], action, rtol=1e-5, atol=1e-6)
            state = model.next(state, action)


# --- randomness -----------------------------------------------------------------------------------------------------


def test_noise_is_a_function_of_the_generator() -> None:
    model, config = make_model(), make_config()
    global_state, first = th.get_rng_state(), generator(3)
    draws = [draw_noise(config, model, first, 2, CPU), draw_noise(config, model, generator(3), 2, CPU)]
    assert all(th.equal(a, b) for a, b in zip(*draws, strict=True))
    following = draw_noise(config, model, first, 2, CPU)
    assert not th.equal(draws[0].candidates, following.candidates)
    run(model, config, latents(model, 2), draws[0])
    assert th.equal(global_state, th.get_rng_state())
    assert draws[0].candidates.shape == (3, 2, 28, 3, 2) and draws[0].prior.shape == (3, 2, 4, 2)
    assert draw_noise(config, model, first, 2, CPU, steps=1).candidates.shape[0] == 1
    assert abs(following.candidates.std().item() - 1) < 0.1


def test_pairs_of_critics_are_distinct_and_uniform() -> None:
    source, counts = generator(), th.zeros(4, 4)
    for _ in range(1200):
        first, second = random_pair(4, source).tolist()
        counts[first, second] += 1
    assert not counts.diagonal().any()
    assert counts[~th.eye(4, dtype=th.bool)].min() > 60 and counts.max() < 140


# --- configuration --------------------------------------------------------------------------------------------------


def test_with_samples_keeps_the_shares() -> None:
    config = with_samples(make_config(), 16)
    assert (config.n_samples, config.n_elites, config.n_prior_trajectories) == (16, 3, 2)
    config = with_samples(make_config(), 2)
    assert (config.n_samples, config.n_elites, config.n_prior_trajectories) == (2, 1, 0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("horizon", 0),
        ("n_samples", 1),
        ("n_elites", 0),
        ("n_elites", 33),
        ("n_prior_trajectories", -1),
        ("n_prior_trajectories", 32),
        ("temperature", 0.0),
        ("temperature", -1.0),
    ],
)
def test_wrong_budgets_are_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        make_config(**{name: value})


def test_score_plan_needs_a_score_network() -> None:
    model = make_model(with_score=False)
    with pytest.raises(ValueError, match="score network"):
        score_plan(model, make_config().schedule, latents(model, 1), th.zeros(1, 3, 2), th.ones(1, dtype=th.bool))
