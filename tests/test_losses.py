import dataclasses
import math
from collections.abc import Callable

import pytest
import torch as th
from torch.nn import functional as F

from sb3_mbdpo.losses import (
    LatentBatch,
    LossCoefficients,
    UpdateNoise,
    cross_td_error,
    draw_update_noise,
    energy_loss,
    td_target,
    update_energy_statistics,
    world_model_loss,
)
from sb3_mbdpo.prior_loss import imagined_return, percentile_range, prior_loss
from sb3_mbdpo.world_model import TaskSpec, WorldModel
from tests.fakes import make_batch, make_model

COEFFICIENTS = LossCoefficients(20.0, 0.1, 0.2, 0.5, 0.7, 1e-2, 0.5)
Gradients = dict[str, th.Tensor]


def generator(seed: int = 0) -> th.Generator:
    return th.Generator().manual_seed(seed)


def noise_for(model: WorldModel, batch: LatentBatch, seed: int = 0) -> UpdateNoise:
    return draw_update_noise(model, batch.actions, generator(seed))


def prior_of(model: WorldModel, batch: LatentBatch) -> Callable[[th.Tensor, th.Tensor], th.Tensor]:
    return lambda z, noise: model.prior_action(z, noise[:1], batch.task)


def losses_and_gradients(
    model: WorldModel, batch: LatentBatch, noise: UpdateNoise
) -> tuple[dict[str, th.Tensor], Gradients]:
    """All losses of an update and the gradient of every parameter; running statistics start anew."""
    model.zero_grad()
    for statistic, value in ((model.energy_mean, 0.0), (model.energy_std, 1.0), (model.prior_scale, 1.0)):
        statistic.fill_(value)
    target = td_target(model, batch, prior_of(model, batch), noise, 0.9, episodic=True)
    total, z, losses = world_model_loss(model, batch, target, noise, COEFFICIENTS, episodic=True)
    prior, _ = prior_loss(model, z.detach(), batch, noise, COEFFICIENTS, 0.01)
    total.backward(retain_graph=True)
    prior.backward(inputs=list(model.prior.parameters()))
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    statistics = {"energy_mean": model.energy_mean.clone(), "energy_std": model.energy_std.clone()}
    return {**losses, "total": total.detach(), "prior": prior.detach()} | statistics, gradients


# --- masks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tasks", [None, TaskSpec([2, 1], 8)])
def test_masked_transitions_contribute_nothing(tasks: TaskSpec | None) -> None:
    """Whatever stands in a masked step, no loss, no running statistic and no gradient is another."""
    model = make_model(tasks)
    batch = make_batch(model)
    masks = th.ones(3, 6, 1)
    masks[1:, 0], masks[2:, 1], masks[2:, 4] = 0, 0, 0
    batch = batch._replace(masks=masks)
    noise = noise_for(model, batch)
    losses, gradients = losses_and_gradients(model, batch, noise)
    assert losses.keys() >= {"consistency", "reward", "value", "termination", "energy", "prior"}

    out = masks == 0
    other = batch._replace(
        targets=th.where(out, th.rand(batch.targets.shape), batch.targets),
        actions=th.where(out, th.rand(batch.actions.shape) - 0.5, batch.actions),
        rewards=th.where(out, 70.0, batch.rewards),
        terminations=th.where(out, 1 - batch.terminations, batch.terminations),
    )
    other_losses, other_gradients = losses_and_gradients(model, other, noise)
    assert {key for key in losses if not th.equal(losses[key], other_losses[key])} == set()
    assert gradients.keys() == other_gradients.keys()
    for name, gradient in gradients.items():
        th.testing.assert_close(gradient, other_gradients[name], rtol=1e-6, atol=1e-8, msg=name)

    # And the test can see a difference: the same change in a step that counts
    visible = batch._replace(rewards=th.where(~out, 70.0, batch.rewards))
    assert not th.equal(losses["reward"], losses_and_gradients(model, visible, noise)[0]["reward"])


def test_masked_steps_are_averaged_as_zeros() -> None:
    """A masked step neither counts nor makes the others count for more."""
    model = make_model()
    batch, noise = make_batch(model), None
    noise = noise_for(model, batch)
    masks = th.ones(3, 6, 1)
    masks[1:] = 0
    full, half = (losses_and_gradients(model, batch._replace(masks=m), noise)[0] for m in (th.ones(3, 6, 1), masks))
    only_first = F.mse_loss(model.next(batch.first, batch.actions[0], None), batch.targets[0])
    th.testing.assert_close(half["consistency"], only_first.detach() / 3)
    assert half["reward"] < full["reward"]


# --- world model ----------------------------------------------------------------------------------------------------


def test_losses_by_hand() -> None:
    model = make_model()
    batch = make_batch(model)
    noise, horizon = noise_for(model, batch), 3
    target = th.randn(3, 6, 1, generator=generator(5))
    total, z, losses = world_model_loss(model, batch, target, noise, COEFFICIENTS, episodic=True)
    expected = dict.fromkeys(("consistency", "reward", "value", "termination"), 0.0)
    state = batch.first
    for t in range(horizon):
        action, rho = batch.actions[t], 0.5**t
        joined = th.cat([state, action], -1)
        expected["reward"] += rho * model.two_hot.cross_entropy(model.reward(joined), batch.rewards[t]).mean() / horizon
        for logits in model.critics(joined):
            expected["value"] += rho * model.two_hot.cross_entropy(logits, target[t]).mean() / (3 * horizon)
        state = model.dynamics(joined)
        expected["consistency"] += rho * F.mse_loss(state, batch.targets[t]) / horizon
        ended = model.termination(state)
        expected["termination"] += F.binary_cross_entropy_with_logits(ended, batch.terminations[t]) / horizon
        th.testing.assert_close(z[t + 1], state)
    for name, value in expected.items():
        th.testing.assert_close(losses[name], value.detach(), rtol=1e-4, atol=1e-6)
        assert not losses[name].requires_grad
    weights = {"consistency": 20.0, "reward": 0.1, "value": 0.2, "termination": 0.5, "energy": 0.7}
    th.testing.assert_close(total, sum(weights[name] * losses[name] for name in weights), rtol=1e-5, atol=1e-6)


def test_critics_learn_with_dropout() -> None:
    model = make_model(dropout=0.5).train()
    batch = make_batch(model)
    noise, target = noise_for(model, batch), th.zeros(3, 6, 1)
    assert noise.dropped is not None
    draws = noise, noise._replace(dropped=None)
    dropped, whole = (world_model_loss(model, batch, target, draw, COEFFICIENTS)[2]["value"] for draw in draws)
    assert not th.equal(dropped, whole)


def test_rho_zero_looks_one_step_ahead() -> None:
    model = make_model()
    batch = make_batch(model)
    noise, target = noise_for(model, batch), th.zeros(3, 6, 1)
    one_step = LossCoefficients(rho=0.0)
    later = batch._replace(rewards=batch.rewards.clone())
    later.rewards[1:] += 5
    for rho, same in ((one_step, True), (LossCoefficients(rho=0.5), False)):
        first, second = (world_model_loss(model, b, target, noise, rho)[2]["reward"] for b in (batch, later))
        assert th.equal(first, second) == same


def test_no_gradient_into_targets_or_the_prior() -> None:
    model = make_model()
    batch = make_batch(model)
    noise = noise_for(model, batch)
    total, z, _ = world_model_loss(model, batch, th.zeros(3, 6, 1), noise, COEFFICIENTS, episodic=True)
    total.backward()
    with_gradient = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {"encoder", "dynamics", "reward", "termination", "critics", "energy"}
    model.zero_grad()
    prior_loss(model, z.detach(), batch, noise, COEFFICIENTS, 0.01)[0].backward()
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None} == {"prior"}


def test_losses_that_are_switched_off() -> None:
    model = make_model()
    batch = make_batch(model)
    args = model, batch, th.zeros(3, 6, 1), noise_for(model, batch)
    _, _, losses = world_model_loss(*args, LossCoefficients(energy=0.0))
    assert "energy" not in losses and model.energy_mean.item() == 0.0
    assert "termination" not in world_model_loss(*args, COEFFICIENTS, episodic=False)[2]


@pytest.mark.parametrize("steps", [0, 2])
@th.no_grad()
def test_td_target_by_hand(steps: int) -> None:
    """Without imagined steps the paper's target; with them, predicted rewards until the model says it is over."""
    model = make_model()
    model.target_critics.biases[-1].add_(th.randn(3, 1, 21, generator=generator()))
    batch = make_batch(model, size=20)
    model.termination[-1].bias.sub_(model.termination(batch.targets).median())
    noise = draw_update_noise(model, batch.actions, generator(), steps)
    noise = noise._replace(target_critics=th.tensor([2, 0]))
    assert noise.target.shape == (steps + 1, 3, 20, 2)
    found = td_target(model, batch, prior_of(model, batch), noise, 0.9, episodic=True)
    expected, ended_at = th.zeros(3, 20, 1), []
    for t in range(3):
        for row in range(20):
            z, total, weight = batch.targets[t, row], batch.rewards[t, row], 0.9 * (1 - batch.terminations[t, row])
            for step in range(steps):
                action = model.prior_action(z, noise.target[step, t, row])
                total = total + weight * model.predict_reward(z, action)
                z, weight = model.next(z, action), 0.9 * weight
                if model.termination(z) > 0:
                    weight = 0 * weight
                    ended_at.append(step)
            values = model.value(z, model.prior_action(z, noise.target[steps, t, row]), None, model.target_critics)
            expected[t, row] = total + weight * th.minimum(values[0], values[2])
    th.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert found[-1, 0] == batch.rewards[-1, 0], "a termination has no future"
    assert steps == 0 or 0 < len(ended_at) < 120, "some imagined episodes end and some go on"


@th.no_grad()
def test_td_target_follows_a_plan_until_it_is_used_up() -> None:
    """A policy that answers with two actions is asked at every other imagined step, with the noise that remains."""
    model = make_model()
    model.target_critics.biases[-1].add_(th.randn(3, 1, 21, generator=generator()))
    batch = make_batch(model)
    noise = draw_update_noise(model, batch.actions, generator(), 3)
    asked = []

    def policy(z: th.Tensor, remaining: th.Tensor) -> th.Tensor:
        asked.append((z, len(remaining)))
        return remaining[:2].tanh()

    found = td_target(model, batch, policy, noise, 0.9)
    z, expected, weight = batch.targets, batch.rewards, 0.9 * (1 - batch.terminations)
    latents = [z]
    for step in range(3):
        expected = expected + weight * model.predict_reward(z, noise.target[step].tanh())
        z, weight = model.next(z, noise.target[step].tanh()), 0.9 * weight
        latents.append(z)
    critics = model.target_critics.select(noise.target_critics)
    expected = expected + weight * model.value(z, noise.target[3].tanh(), None, critics).amin(0)
    th.testing.assert_close(found, expected)
    assert [remaining for _, remaining in asked] == [4, 2]
    th.testing.assert_close(asked[1][0], latents[2])


@th.no_grad()
def test_td_target_by_task() -> None:
    model = make_model()
    batch = make_batch(model)
    noise, discount = noise_for(model, batch), th.linspace(0, 1, 6)[:, None]
    found = td_target(model, batch, prior_of(model, batch), noise, discount)
    assert th.equal(found[:, 0], batch.rewards[:, 0])
    whole = td_target(model, batch, prior_of(model, batch), noise, 1.0)
    th.testing.assert_close(found[:, 5], whole[:, 5])


# --- energy ---------------------------------------------------------------------------------------------------------


def test_energy_pairs_a_latent_with_its_own_action() -> None:
    """The energy's gradient at the data is that of these latents with these actions, step by step and row by row."""
    model = make_model()
    batch = make_batch(model)
    z = th.rand(3, 6, 16, generator=generator())
    noise = noise_for(model, batch)
    seen = []
    model.energy.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    energy_loss(model, z, batch, noise)
    negatives, both = seen
    assert negatives.shape == (3, 3, 6, 18) and both.shape == (2, 3, 6, 18)
    assert th.equal(both[0], th.cat([z, batch.actions], -1))
    assert th.equal(both[1, ..., :16], z)


def test_energy_takes_the_hardest_negative() -> None:
    model = make_model()
    batch = make_batch(model)
    z, noise = th.rand(3, 6, 16, generator=generator()), noise_for(model, batch)
    loss = energy_loss(model, z, batch, noise)
    proposed = model.prior_action(z, noise.energy)
    candidates = [proposed, (proposed + 0.5 * noise.jitter).clamp(-1, 1), noise.uniform]
    energies = th.stack([model.energy(th.cat([z, action], -1)) for action in candidates])
    assert len(energies.argmax(0).unique()) > 1, "not always the same kind of negative is the hardest"
    positive = model.energy(th.cat([z, batch.actions], -1))
    expected = 0.5 * (F.softplus(-positive).mean() + F.softplus(energies.amax(0)).mean())
    th.testing.assert_close(loss, expected)


def test_negatives_are_actions_that_the_task_has() -> None:
    model = make_model(TaskSpec([2, 1], 8))
    batch, seen = make_batch(model), []
    noise = noise_for(model, batch)
    # So far that unbounded ones would leave [-1, 1]
    noise = noise._replace(jitter=100 * noise.jitter)
    model.energy.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    energy_loss(model, th.rand(3, 6, 16, generator=generator()), batch, noise)
    negatives = seen[0][..., -2:]
    assert negatives.abs().max() <= 1
    assert not negatives[:, :, batch.task == 1, 1].any() and negatives[:, :, batch.task == 0, 1].all()


def test_energy_learns_to_tell_data_from_noise() -> None:
    """Behaviour that depends on the latent: the energy ends up higher there than at the mirrored action."""
    model = make_model()
    optimizer = th.optim.Adam(model.energy.parameters(), 1e-2)
    draw = generator()
    side = th.cat([th.ones(8), th.zeros(8)])
    for step in range(150):
        left = th.rand(1, 64, 1, generator=draw) < 0.5
        z = th.where(left, side, 1 - side) / 8
        actions = th.where(left, 0.8, -0.8).expand(-1, -1, 2)
        batch = make_batch(model, 1, 64)._replace(actions=actions, first=z[0], targets=z)
        loss = energy_loss(model, z, batch, noise_for(model, batch, step))
        optimizer.zero_grad()
        loss.backward(inputs=list(model.energy.parameters()))
        optimizer.step()
    with th.no_grad():
        data, mirrored = (model.energy(th.cat([z, sign * actions], -1)) for sign in (1, -1))
    assert (data > mirrored).all()


def test_energy_statistics_move_by_a_hundredth() -> None:
    model = make_model()
    energies, masks = th.tensor([1.0, 3.0, 99.0]), th.tensor([1.0, 1.0, 0.0])
    update_energy_statistics(model, energies, masks)
    assert model.energy_mean.item() == pytest.approx(0.01 * 2.0)
    assert model.energy_std.item() == pytest.approx(0.99 + 0.01 * 1.0)


# --- prior ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("saturation", [0.0, 0.1])
def test_prior_loss_by_hand(saturation: float) -> None:
    model = make_model()
    batch = make_batch(model)
    noise = noise_for(model, batch)
    z = th.rand(4, 6, 16, generator=generator())
    coefficients = dataclasses.replace(COEFFICIENTS, saturation=saturation)
    loss, metrics = prior_loss(model, z, batch, noise, coefficients, 0.25)
    expected = th.zeros(())
    for t in range(4):
        sample = model.prior_sample(z[t], noise.prior[t])
        value = model.value(z[t], sample.action)[noise.prior_critics].mean(0)
        if t == 0:
            low, high = (float(value.detach().flatten().quantile(q)) for q in (0.05, 0.95))
            scale = 0.75 * 1.0 + 0.25 * max(high - low, 1.0)
        barrier = (1 - sample.action.pow(2) + 1e-6).log().sum(-1, keepdim=True)
        objective = value / scale + 1e-2 * sample.scaled_entropy + saturation * barrier
        expected = expected - 0.5**t * objective.mean() / 4
    th.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert metrics["prior_scale"].item() == pytest.approx(scale) == model.prior_scale.item()
    assert all(not value.requires_grad for value in metrics.values())


def test_the_range_of_values_leaves_out_a_twentieth_at_each_end() -> None:
    values = 10 * th.randn(97, generator=generator())
    th.testing.assert_close(percentile_range(values), values.quantile(0.95) - values.quantile(0.05))


def test_prior_loss_through_the_model_by_hand() -> None:
    model = make_model()
    for head in (model.reward[-1], model.critics.weights[-1]):
        th.nn.init.normal_(head.weight if isinstance(head, th.nn.Linear) else head, std=0.3)
    batch = make_batch(model)
    noise = noise_for(model, batch)
    start = th.rand(4, 6, 16, generator=generator())
    loss, _ = prior_loss(model, start, batch, noise, COEFFICIENTS, 1.0, prior_horizon=2, discount=0.9)
    z, total, entropy = start[0], th.zeros(6, 1), []
    for t in range(3):
        sample = model.prior_sample(z, noise.prior[t])
        entropy.append(sample.scaled_entropy)
        if t < 2:
            total = total + 0.9**t * model.predict_reward(z, sample.action)
            z = model.next(z, sample.action)
        else:
            total = total + 0.81 * model.value(z, sample.action)[noise.prior_critics].mean(0)
    expected = -(total / model.prior_scale).mean() - 1e-2 * th.stack(entropy).mean()
    th.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    ours, by_hand = (th.autograd.grad(x, [*model.prior.parameters()], retain_graph=True) for x in (loss, expected))
    for a, b in zip(ours, by_hand, strict=True):
        th.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
    # The paper's objective does not see the rewards of the model
    assert not th.allclose(loss, prior_loss(model, start, batch, noise, COEFFICIENTS, 0.0)[0])


@pytest.mark.parametrize("prior_horizon", [0, 2])
def test_distance_from_the_behaviour_by_hand(prior_horizon: int) -> None:
    """It is added where the data knows what was done: along the rollout, in imagination at the first step."""
    model = make_model()
    batch = make_batch(model)
    masks = batch.masks.clone()
    masks[2:, 0] = 0
    batch = batch._replace(masks=masks)
    noise = noise_for(model, batch)
    z = th.rand(4, 6, 16, generator=generator())
    near = dataclasses.replace(COEFFICIENTS, behaviour=2.0)
    losses = [prior_loss(model, z, batch, noise, c, 0.0, prior_horizon)[0] for c in (COEFFICIENTS, near)]
    expected = th.zeros(())
    for t in range(1 if prior_horizon else 3):
        distance = (model.prior_sample(z[t], noise.prior[t]).action - batch.actions[t]).pow(2).sum(-1)
        weight = 1.0 if prior_horizon else 0.5**t / 4
        expected = expected + 2.0 * weight * (distance * masks[t, :, 0]).mean()
    th.testing.assert_close(losses[1] - losses[0], expected, rtol=1e-4, atol=1e-5)


def test_imagined_steps_of_the_prior_end_where_the_model_says_so() -> None:
    model = make_model()
    assert model.termination is not None
    batch = make_batch(model)
    noise = noise_for(model, batch)
    th.nn.init.normal_(model.critics.weights[-1], std=0.3)
    z = th.rand(4, 6, 16, generator=generator())
    th.nn.init.constant_(model.termination[-1].bias, 100.0)
    critics = model.critics.select(noise.prior_critics)
    samples, ended = imagined_return(model, z[0], None, critics, noise.prior[:2], 0.9, episodic=True)
    th.testing.assert_close(ended, model.predict_reward(z[0], samples.action[0]))
    _, endless = imagined_return(model, z[0], None, critics, noise.prior[:2], 0.9, episodic=False)
    assert not th.allclose(ended, endless)


def test_prior_learns_the_better_action() -> None:
    model = make_model()
    for parameter in (*model.critics.biases[:2], *model.critics.weights):
        parameter.requires_grad_(False)
    model.critics.select = lambda members, detach=False: (
        lambda x: (
            (model.two_hot.encode(1 - (x[..., 16:] - 0.5).pow(2).sum(-1, keepdim=True)) + 1e-6)
            .log()
            .expand(2, *x.shape[:-1], -1)
        )
    )
    model.two_hot.decode = lambda logits: (logits.softmax(-1) @ model.two_hot.bins).unsqueeze(-1)
    optimizer = th.optim.Adam(model.prior.parameters(), 1e-2)
    batch = make_batch(model, size=32)
    z = th.rand(4, 32, 16, generator=generator())
    for step in range(60):
        loss, _ = prior_loss(model, z, batch, noise_for(model, batch, step), LossCoefficients(), 0.01)
        optimizer.zero_grad()
        loss.backward(inputs=list(model.prior.parameters()))
        optimizer.step()
    assert (model.prior_action(z) - 0.5).abs().mean() < 0.15


# --- figures to watch, and noise ------------------------------------------------------------------------------------


@pytest.mark.parametrize("discount", [0.9, th.linspace(0.1, 0.9, 6)[:, None]], ids=["one", "by row"])
@th.no_grad()
def test_cross_td_error_by_hand(discount: float | th.Tensor) -> None:
    model = make_model()
    batch = make_batch(model)
    terminations, masks = th.zeros(3, 6, 1), th.ones(3, 6, 1)
    terminations[0, 1] = 1
    masks[1:, 1] = 0  # ended: known all the same
    masks[1:, 2] = 0  # cut short: the next action is unknown
    batch = batch._replace(terminations=terminations, masks=masks)
    pair = th.tensor([0, 2])
    z = th.rand(4, 6, 16, generator=generator())
    found = cross_td_error(model, z, batch, pair, discount)
    now = model.value(z[0], batch.actions[0])[pair].mean(0)
    after = model.value(batch.targets[0], batch.actions[1], None, model.target_critics.select(pair)).mean(0)
    error = (batch.rewards[0] + discount * (1 - terminations[0]) * after - now).abs().flatten()
    th.testing.assert_close(found, error[[0, 1, 3, 4, 5]].mean())
    nothing = batch._replace(terminations=0 * terminations, masks=th.cat([th.ones(1, 6, 1), th.zeros(2, 6, 1)]))
    assert cross_td_error(model, z, nothing, pair, discount) == 0


def test_targets_and_the_prior_draw_critics_of_their_own() -> None:
    model, actions = make_model(), th.zeros(1, 1, 2)
    draws = [draw_update_noise(model, actions, generator(seed)) for seed in range(10)]
    assert any(not th.equal(draw.target_critics, draw.prior_critics) for draw in draws)


def test_update_noise_is_seeded_and_of_the_right_kind() -> None:
    model, actions, state = make_model(), th.zeros(3, 500, 2), th.get_rng_state()
    first, again, other = (draw_update_noise(model, actions, generator(seed)) for seed in (1, 1, 2))
    assert first.dropped is None, "this model has no dropout"
    assert all(th.equal(a, b) for a, b in zip(first[:-1], again[:-1], strict=True))
    assert not th.equal(first.target, other.target) and th.equal(state, th.get_rng_state())
    assert first.prior.shape == (4, 500, 2) and first.target.shape == (1, 3, 500, 2)
    for name in ("target", "energy", "jitter", "prior"):
        assert getattr(first, name).std().item() == pytest.approx(1, abs=0.06)
    assert first.uniform.abs().max() <= 1 and first.uniform.std().item() == pytest.approx(1 / math.sqrt(3), abs=0.03)
    drawn = [first.target[0], first.energy, first.jitter, first.prior[:3]]
    assert all(not th.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])
    assert len(first.target_critics.unique()) == len(first.prior_critics.unique()) == 2
