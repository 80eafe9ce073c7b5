from pathlib import Path

import numpy as np
import pytest
import torch as th
from gymnasium import spaces

from sb3_mbdpo import MBDPO
from sb3_mbdpo.imagination import imagine, plan
from sb3_mbdpo.plots import plot_plan
from tests.fakes import MIXED, UNEVEN, VECTOR, ToyEnv, make_policy

SPACES: dict[str, spaces.Space] = {"vector": VECTOR, "dict": MIXED, "image": spaces.Box(0, 255, (3, 36, 36), np.uint8)}
SHAPED = spaces.Box(-2.0, 1.0, (2, 1), np.float32)


def observations(space: spaces.Space, count: int) -> np.ndarray | dict[str, np.ndarray]:
    space.seed(0)
    samples = [space.sample() for _ in range(count)]
    if isinstance(space, spaces.Dict):
        # Channels first, as a policy's own spaces are
        stacked = {key: np.stack([np.asarray(sample[key]) for sample in samples]) for key in space.spaces}
        return stacked | {"camera": stacked["camera"].transpose(0, 3, 1, 2)}
    return np.stack(samples)


def policy_space(space: spaces.Space) -> spaces.Space:
    if not isinstance(space, spaces.Dict):
        return space
    return spaces.Dict({**space.spaces, "camera": spaces.Box(0, 255, (3, 36, 36), np.uint8)})


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("length", [1, 3, 7])
def test_imagination_is_the_models_own_rollout(name: str, length: int) -> None:
    policy = make_policy(policy_space(SPACES[name]), SHAPED, episodic=True)
    obs = observations(SPACES[name], 4)
    actions = np.stack([SHAPED.sample() for _ in range(4 * length)]).reshape(4, length, 2, 1)
    found = imagine(policy, obs, actions)
    model = policy.world_model
    assert found.latents.shape == (4, length + 1, model.latent_dim) and found.values.shape == (4, length + 1)
    assert all(x.shape == (4, length) for x in (found.rewards, found.energies, found.terminations))
    with th.no_grad():
        z = model.encode(policy.preprocess(policy.obs_to_tensor(obs)[0]))
        for t in range(length):
            np.testing.assert_allclose(found.latents[:, t], z, atol=1e-6)
            action = th.as_tensor((actions[:, t].reshape(4, 2) + 2) / 1.5 - 1, dtype=th.float32)
            joined = model.join(z, action)
            np.testing.assert_allclose(found.rewards[:, t], model.predict_reward(z, action)[:, 0], atol=1e-4)
            np.testing.assert_allclose(found.values[:, t], model.value(z, action).mean(0)[:, 0], atol=1e-4)
            np.testing.assert_allclose(
                found.energies[:, t], model.scale_energy(model.require_energy()(joined))[:, 0], atol=1e-4
            )
            z = model.next(z, action)
            assert model.termination is not None
            np.testing.assert_allclose(found.terminations[:, t], model.termination(z).sigmoid()[:, 0], atol=1e-5)
        last = model.value(z, model.prior_action(z)).mean(0)[:, 0]
    np.testing.assert_allclose(found.values[:, -1], last, atol=1e-4)


def test_one_observation_or_many() -> None:
    policy = make_policy()
    obs = observations(VECTOR, 3)
    actions = np.random.default_rng(0).uniform(-1, 1, (3, 5, 2))
    many = imagine(policy, obs, actions)
    for row in range(3):
        for single, batch in zip(imagine(policy, obs[row], actions[row]), many, strict=True):
            np.testing.assert_allclose(single, batch[row], atol=1e-5)
    assert not many.terminations.any(), "a task that was never seen to end"


@pytest.mark.parametrize("shape", [(3, 5, 1), (5, 2), (2, 5, 2), (3, 0, 2), (3, 5, 2, 1)])
def test_a_plan_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"actions must be a plan of shape \(3, 'T', 2\)"):
        imagine(make_policy(), observations(VECTOR, 3), np.zeros(shape))


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_what_is_not_finite_is_refused(value: float) -> None:
    policy, obs, actions = make_policy(), observations(VECTOR, 3), np.zeros((3, 5, 2))
    broken, leap = obs.copy(), actions.copy()
    broken[1, 0], leap[2, 4, 1] = value, value
    with pytest.raises(ValueError, match=r"imagine\(\) got a value that is not finite in its actions"):
        imagine(policy, obs, leap)
    with pytest.raises(ValueError, match=r"imagine\(\) got a value that is not finite in its observation"):
        imagine(policy, broken, actions)
    with pytest.raises(ValueError, match=r"plan\(\) got a value that is not finite in its observation"):
        plan(policy, broken)


@pytest.mark.parametrize("act_mode", ["search", "score", "prior"])
def test_plan_is_what_predict_begins(act_mode: str) -> None:
    policy = make_policy(VECTOR, UNEVEN, act_mode=act_mode)
    obs = observations(VECTOR, 4)
    action, state = policy.predict(obs, deterministic=True)
    found = plan(policy, obs)
    assert isinstance(found, np.ndarray) and found.shape == (4, 3, 2) and found.dtype == np.float32
    np.testing.assert_allclose(found[:, 0], action, atol=1e-6)
    later, _ = policy.predict(obs, state, np.array([False, True, False, False]), deterministic=True)
    warm = plan(policy, obs, state, np.array([False, True, False, False]))
    np.testing.assert_allclose(warm[:, 0], later, atol=1e-6)
    single = plan(policy, obs[1])
    assert isinstance(single, np.ndarray) and single.shape == (3, 2)
    np.testing.assert_allclose(single, found[1], atol=1e-5)


def test_trace_is_the_path_of_the_search() -> None:
    policy = make_policy(denoising_steps=5)
    obs = observations(VECTOR, 4)
    found, trace = plan(policy, obs, return_trace=True)
    assert trace.candidates.shape == (4, 4, 16, 3, 2) and trace.returns.shape == (4, 4, 16)
    assert trace.centres.shape == trace.plans.shape == (4, 4, 3, 2) and trace.sigmas.shape == (4,)
    np.testing.assert_array_equal(found, plan(policy, obs))
    last = policy.search_config.schedule.alpha_bars[0] ** 0.5
    np.testing.assert_allclose(last * trace.plans[-1], found, atol=1e-6)
    # Each step lays its candidates around what the step before found, more closely every time
    np.testing.assert_allclose(trace.centres[1:], trace.plans[:-1], atol=1e-5)
    assert (np.diff(trace.sigmas) < 0).all() and not trace.centres[0].any()
    imagined = imagine(policy, obs, trace.candidates[0, :, 5])
    discounts = policy.search_config.discount ** np.arange(4)
    rewards = imagined.rewards + policy.search_config.energy_coef * imagined.energies
    expected = (discounts[:3] * rewards).sum(1) + discounts[3] * imagined.values[:, -1]
    np.testing.assert_allclose(trace.returns[0, :, 5], expected, rtol=1e-3, atol=1e-3)


def test_only_a_search_leaves_a_trace() -> None:
    with pytest.raises(ValueError, match="return_trace"):
        plan(make_policy(act_mode="score"), observations(VECTOR, 1), return_trace=True)


def test_the_algorithm_offers_both_and_a_picture(tmp_path: Path) -> None:
    model = MBDPO("MlpPolicy", ToyEnv(action_space=UNEVEN), preset="debug", buffer_size=50, device="cpu", seed=0)
    obs = observations(VECTOR, 2)
    found, trace = model.plan(obs, return_trace=True)
    assert model.imagine(obs, found).rewards.shape == (2, 3)
    figure = plot_plan(trace, row=1)
    assert len(figure.axes) == trace.plans.shape[-1] * len(trace.sigmas)
    figure.savefig(tmp_path / "plan.png")
    assert (tmp_path / "plan.png").stat().st_size > 5000
    with pytest.raises(IndexError, match="row"):
        plot_plan(trace, row=2)
