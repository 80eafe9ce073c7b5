from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces

from sb3_mbdpo.buffers import SequenceSamples
from sb3_mbdpo.losses import LossCoefficients, draw_update_noise
from sb3_mbdpo.policies import MBDPOPolicy
from sb3_mbdpo.ranks import ALONE
from sb3_mbdpo.updates import Learner
from tests.fakes import VECTOR, ending, flat_parameters, make_policy

IMAGE = spaces.Box(0, 255, (3, 36, 36), np.uint8)


def learner_for(policy: MBDPOPolicy, kind: type[Learner] = Learner, **kwargs: Any) -> Learner:
    policy.set_training_mode(True)
    arguments: dict[str, Any] = {
        "coefficients": LossCoefficients(),
        "tau": 0.01,
        "bootstrap": "prior",
        "target_horizon": 0,
        "prior_horizon": 0,
        "policy_delay": 1,
        "energy_interval": 1,
        "score_coef": 1.0,
        "score_batch_size": 4,
        "score_samples": 8,
        "score_interval": 1,
        "max_grad_norm": 20.0,
    }
    return kind(policy, **(arguments | kwargs))


def samples(seed: int = 0, size: int = 8, space: spaces.Box = VECTOR, repeat: int = 1) -> SequenceSamples:
    """Windows of three steps; ``repeat`` draws fewer different ones."""
    draw = np.random.default_rng(seed)
    if space.dtype == np.uint8:
        observations = th.as_tensor(draw.integers(0, 256, (4, size, *space.shape), dtype=np.uint8))
    else:
        observations = th.as_tensor(draw.uniform(-1, 1, (4, size, *space.shape)), dtype=th.float32)
    numbers = [th.as_tensor(draw.uniform(-1, 1, (3, size, width)), dtype=th.float32) for width in (2, 1)]
    return SequenceSamples(observations, *numbers, th.zeros(3, size, 1), th.ones(3, size, 1))


def modules_that_changed(policy: MBDPOPolicy, before: dict[str, th.Tensor]) -> set[str]:
    after = policy.world_model.state_dict()
    return {name.split(".")[0] for name, value in after.items() if not th.equal(value, before[name])}


def snapshot(policy: MBDPOPolicy) -> dict[str, th.Tensor]:
    return {name: value.clone() for name, value in policy.world_model.state_dict().items()}


def test_an_update_moves_every_module_and_reports() -> None:
    policy = make_policy(episodic=True)
    before = snapshot(policy)
    metrics = learner_for(policy).update(samples())
    trained = {"encoder", "dynamics", "reward", "termination", "critics", "target_critics", "prior", "energy", "score"}
    assert modules_that_changed(policy, before) >= trained | {"energy_mean", "energy_std"}
    losses = {
        f"train/{name}_loss" for name in ("consistency", "reward", "value", "termination", "energy", "prior", "score")
    }
    assert losses | {"train/grad_norm", "train/prior_grad_norm", "train/score_grad_norm"} <= metrics.keys()
    assert all(value.numel() == 1 and value.isfinite() and not value.requires_grad for value in metrics.values())


def test_each_step_moves_its_own_modules() -> None:
    policy = make_policy()
    learner = learner_for(policy)
    batch = learner.encode(samples())
    noise = draw_update_noise(policy.world_model, batch.actions, policy.generator)
    before = snapshot(policy)
    _, z = learner.update_world_model(batch, noise)
    statistics = {"energy_mean", "energy_std"}
    assert modules_that_changed(policy, before) == {"encoder", "dynamics", "reward", "critics", "energy"} | statistics
    before = snapshot(policy)
    learner.update_prior(z.detach(), batch, noise)
    assert modules_that_changed(policy, before) - {"prior_scale"} == {"prior"}
    before = snapshot(policy)
    learner.update_score(z[0].detach(), batch)
    assert modules_that_changed(policy, before) == {"score"}


def test_targets_follow_by_tau() -> None:
    policy = make_policy()
    before = snapshot(policy)
    learner_for(policy, tau=0.25).update(samples())
    for name, value in policy.world_model.target_critics.named_parameters():
        online = policy.world_model.critics.get_parameter(name)
        expected = 0.75 * before[f"target_critics.{name}"] + 0.25 * online
        th.testing.assert_close(value.detach(), expected.detach(), rtol=1e-5, atol=1e-7)


def test_gradient_norms_are_clipped() -> None:
    """With plain gradient descent the step is at most the learning rate times the clip."""
    policy = make_policy(optimizer_class=th.optim.SGD, encoder_lr_scale=1.0)
    for optimizer in (policy.optimizer, policy.prior_optimizer, policy.score_optimizer):
        for group in optimizer.param_groups:
            group["lr"] = 1.0
    before = snapshot(policy)
    metrics = learner_for(policy, max_grad_norm=1e-3, tau=0.0).update(samples())
    after = policy.world_model.state_dict()
    groups = {"grad_norm": ("encoder.", "dynamics.", "reward.", "critics.", "energy."), "prior_grad_norm": ("prior.",)}
    for name, prefixes in (groups | {"score_grad_norm": ("score.",)}).items():
        moved = [after[key] - before[key] for key in after if key.startswith(prefixes)]
        norm = th.cat([value.flatten() for value in moved]).norm()
        assert metrics[f"train/{name}"] > 1e-3, "the reported norm is the one before clipping"
        assert norm.item() == pytest.approx(1e-3, rel=0.02)


def test_score_coef_scales_the_step_only() -> None:
    reports = []
    for coef in (1.0, 10.0):
        policy = make_policy()
        reports.append(learner_for(policy, score_coef=coef, max_grad_norm=1e9).update(samples()))
    assert th.equal(reports[0]["train/score_loss"], reports[1]["train/score_loss"])
    th.testing.assert_close(10 * reports[0]["train/score_grad_norm"], reports[1]["train/score_grad_norm"])


def test_score_interval() -> None:
    policy = make_policy()
    learner = learner_for(policy, score_interval=3)
    assert ["train/score_loss" in learner.update(samples(), index) for index in range(4)] == [True, False, False, True]


def test_policy_delay() -> None:
    policy = make_policy()
    learner = learner_for(policy, policy_delay=2)
    before, moved = flat_parameters(policy.world_model.prior), []
    for index in range(4):
        metrics = learner.update(samples(), index)
        after = flat_parameters(policy.world_model.prior)
        moved.append(not th.equal(before, after))
        assert ("train/prior_loss" in metrics) == moved[-1]
        before = after
    assert moved == [True, False, True, False]


def test_energy_interval() -> None:
    policy = make_policy()
    learner = learner_for(policy, energy_interval=3)
    statistics, reported = [], []
    for index in range(4):
        reported.append("train/energy_loss" in learner.update(samples(), index))
        statistics.append(policy.world_model.energy_mean.item())
    assert reported == [True, False, False, True]
    assert statistics[0] == statistics[1] == statistics[2] != statistics[3]


def test_small_batches() -> None:
    policy = make_policy()
    learner = learner_for(policy, score_batch_size=64)
    for size in (1, 3):
        assert all(value.isfinite() for value in learner.update(samples(size=size)).values())
    assert flat_parameters(policy).isfinite().all()


def test_updates_are_reproducible_and_leave_global_state_alone() -> None:
    state, numpy_state = th.get_rng_state(), np.random.get_state()[1].copy()
    results = []
    for seed in (0, 0, 1):
        policy = make_policy(dropout=0.3)
        policy.seed(seed)
        th.set_rng_state(state)
        learner = learner_for(policy)
        learner.update(samples())
        learner.update(samples(1), 1)
        results.append(flat_parameters(policy))
        assert th.equal(state, th.get_rng_state())
    assert th.equal(results[0], results[1]) and not th.equal(results[0], results[2])
    np.testing.assert_array_equal(numpy_state, np.random.get_state()[1])


@pytest.mark.parametrize("bootstrap", ["prior", "score"])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_bootstrap_plan(bootstrap: str, steps: int) -> None:
    """One noisy action of the prior, or the score network's noisy plan as far as it reaches and is wanted."""
    policy = make_policy(exploration_noise=0.5)
    learner = learner_for(policy, bootstrap=bootstrap)
    batch = learner.encode(samples())
    noise = draw_update_noise(policy.world_model, batch.actions, policy.generator, steps - 1)
    plan = learner.bootstrap_plan(batch.targets, noise.target)
    count = min(steps, 3) if bootstrap == "score" else 1
    assert plan.shape == (count, 3, 8, 2) and plan.abs().max() <= 1 and not plan.requires_grad
    if bootstrap == "prior":
        expected = policy.world_model.prior_action(batch.targets, noise.target[0]).detach()[None]
    else:
        own = th.stack([learner.cold_plan(z) for z in batch.targets]).permute(2, 0, 1, 3)
        expected = (own[:count] + 0.5 * noise.target[:count]).clamp(-1, 1)
    th.testing.assert_close(plan, expected, rtol=1e-5, atol=1e-5)
    before = snapshot(policy)
    learner.update_world_model(batch, noise)
    assert not {"prior", "score"} & modules_that_changed(policy, before)


def test_learning_knows_where_episodes_end() -> None:
    policy = ending(make_policy())
    learner = learner_for(policy, target_horizon=2, prior_horizon=2)
    batch = learner.encode(samples())
    noise = draw_update_noise(policy.world_model, batch.actions, policy.generator, 2)
    found: list[dict[str, th.Tensor]] = []
    for policy.episodic in (False, True):
        policy.seed(0)
        _, z, metrics = learner.loss_of_world_model(batch, noise, 1)
        _, of_prior = learner.loss_of_prior(z.detach(), batch, noise, 0.0, ALONE)
        _, of_score = learner.loss_of_score(z[0].detach(), batch)
        found.append(metrics | of_prior | of_score)
    endless, ended = found
    for name in ("value", "prior", "score"):
        assert not th.allclose(endless[f"train/{name}_loss"], ended[f"train/{name}_loss"]), name


def test_the_score_network_learns_from_first_latents_and_what_was_done_there() -> None:
    learner = learner_for(make_policy(), score_batch_size=4)
    score_loss, seen = learner._score_loss, []
    learner._score_loss = lambda *arguments: seen.append(arguments[2:4]) or score_loss(*arguments)
    batch = learner.encode(samples())
    learner.update(samples())
    z, behaviour = seen[0]
    assert th.equal(z, batch.first[:4].detach())
    assert th.equal(behaviour, batch.actions[:, :4].transpose(0, 1))


def test_targets_beyond_the_bins_are_counted_like_rewards() -> None:
    policy = make_policy()
    learner = learner_for(policy)
    learner._td_target = lambda model, batch, *_: th.full_like(batch.rewards, 1e6)
    batch = learner.encode(samples())
    noise = draw_update_noise(policy.world_model, batch.actions, policy.generator)
    _, _, metrics = learner.loss_of_world_model(batch, noise)
    assert metrics["train/clipped_targets"] == 0.5, "all targets, and no reward"


def test_encoding_keeps_time_and_batch_apart() -> None:
    policy = make_policy()
    learner, windows = learner_for(policy), samples()
    batch = learner.encode(windows)
    th.testing.assert_close(batch.first, policy.world_model.encode(windows.observations[0]))
    for t in range(3):
        th.testing.assert_close(batch.targets[t], policy.world_model.encode(windows.observations[t + 1]).detach())
    assert batch.first.requires_grad and not batch.targets.requires_grad


def test_images_are_shifted_while_training() -> None:
    policy = make_policy(IMAGE)
    learner, windows = learner_for(policy), samples(size=4, space=IMAGE)
    with th.no_grad():
        plain = policy.world_model.encode(policy.preprocess(windows.observations[0]))
    first, second = learner.encode(windows).first, learner.encode(windows).first
    assert not th.allclose(first, second) and not th.allclose(first, plain)
    assert windows.observations.dtype == th.uint8
    assert all(value.isfinite() for value in learner.update(windows).values())


def test_repeated_updates_fit_one_batch() -> None:
    """Thirty updates on the same windows: the model comes to predict them."""
    policy = make_policy()
    for optimizer in (policy.optimizer, policy.prior_optimizer):
        for group in optimizer.param_groups:
            group["lr"] *= 10
    learner, windows = learner_for(policy), samples(size=16)
    history = [learner.update(windows, index) for index in range(30)]
    for name in ("consistency", "reward"):
        early, late = (sum(m[f"train/{name}_loss"].item() for m in part) for part in (history[:3], history[-3:]))
        assert late < 0.7 * early, name
