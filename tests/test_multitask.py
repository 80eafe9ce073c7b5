"""MBDPO on several tasks at once: construction, acting, learning, saving."""

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_mbdpo import MBDPO, MBDPOPolicy, MultiInputPolicy, MultiTaskEnv, MultiTaskReplayBuffer, Task, TaskSet
from sb3_mbdpo.buffers import DictSequenceReplayBuffer, SequenceSamples
from sb3_mbdpo.losses import draw_update_noise
from sb3_mbdpo.presets import learning_starts_for
from tests.fakes import (
    LEANING,
    LEANING_ENVS,
    Leaning,
    ToyEnv,
    flat_parameters,
    leaning_env,
    leaning_model,
    leaning_observations,
    randomize,
    toy_envs,
)
from tests.test_resume import Losses
from tests.test_updates import learner_for

ABSENT = LEANING.action_masks == 0


def multitask_policy(**kwargs: Any) -> MBDPOPolicy:
    arguments: dict[str, Any] = {"tasks": LEANING, "model_size": 0.02, "denoising_steps": 3, "n_samples": 16}
    arguments |= {"n_elites": 4, "n_prior_trajectories": 4, "beta_start": 1e-3, "beta_end": 0.2, "seed": 0}
    th.manual_seed(0)
    spaces = LEANING.observation_space, LEANING.action_space
    policy = MultiInputPolicy(*spaces, lambda _: 3e-4, **(arguments | kwargs))
    randomize(policy.world_model)
    with th.no_grad():
        # Tasks that differ visibly
        policy.world_model.task_embedding.weight.normal_(generator=th.Generator().manual_seed(1))
    return policy


def windows(tasks: list[int], beside: bool = False, seed: int = 0) -> SequenceSamples:
    """Windows of three steps of the given tasks, which are told in the observations or beside them."""
    steps = [leaning_observations(tasks, seed + step)["observation"] for step in range(4)]
    vectors, task = th.as_tensor(np.stack(steps)), th.tensor(tasks)
    draw = th.Generator().manual_seed(seed)
    actions = (th.rand(3, len(tasks), 3, generator=draw) * 2 - 1) * th.as_tensor(LEANING.action_masks)[task]
    rewards = th.randn(3, len(tasks), 1, generator=draw)
    rest = actions, rewards, th.zeros_like(rewards), th.ones_like(rewards)
    if beside:
        return SequenceSamples(vectors, *rest, task)
    # As the replay buffer stores a Discrete
    return SequenceSamples({"observation": vectors, "task": task.expand(4, -1)[..., None]}, *rest)


@pytest.fixture(scope="module")
def trained() -> MBDPO:
    return leaning_model(bootstrap="score").learn(40)


# --- construction -----------------------------------------------------------------------------------------------


def test_tasks_come_from_the_environments() -> None:
    model = leaning_model(learning_starts=None, warmup_updates=None)
    assert model.tasks == LEANING and model.gamma is None
    assert isinstance(model.replay_buffer, MultiTaskReplayBuffer)
    world = model.policy.world_model
    assert world.task_embedding is not None and world.task_embedding.weight.shape == (3, 96)
    np.testing.assert_array_equal(world.action_masks, LEANING.action_masks)
    assert model.policy.discounts.flatten().tolist() == pytest.approx([0.9, 0.5, 0.95])
    assert model.learning_starts == model.warmup_updates == learning_starts_for(18)
    width = world.encoder.net[0].linear.weight.shape[1]  # type: ignore[index, union-attr]
    assert width == LEANING.observation_dim + 96


def test_random_steps_are_episodes_of_the_tasks_that_are_played() -> None:
    tasks = TaskSet([Task(f"t{i}", 3, 1, episode_length=1000 * (i + 1)) for i in range(3)])
    settings: dict[str, Any] = {"preset": "debug", "device": "cpu", "buffer_size": 100}

    def starts(*names: str) -> int:
        env = DummyVecEnv([lambda name=name: MultiTaskEnv(Leaning(), tasks, name) for name in names])  # type: ignore
        return MBDPO("MultiInputPolicy", env, **settings).learning_starts

    assert (starts("t0"), starts("t0", "t1", "t0"), starts("t0", "t1", "t2")) == (5_000, 15_000, 30_000)
    alone = MBDPO("MultiInputPolicy", None, tasks=tasks, **settings)  # type: ignore[arg-type]
    assert alone.learning_starts == 15_000, "an environment of the longest"


@pytest.mark.parametrize("form", ["set", "dict", "list"])
def test_tasks_can_be_given_as_plain_data(form: str) -> None:
    tasks = TaskSet(LEANING.tasks)
    given: Any = {"set": tasks, "dict": tasks.to_plain(), "list": tasks.to_plain()["tasks"]}[form]
    env = DummyVecEnv([lambda: MultiTaskEnv(Leaning(), tasks, "up")])
    assert leaning_model(env, tasks=given).tasks == tasks


def test_a_model_of_tasks_can_wait_for_its_environments() -> None:
    kwargs = {"preset": "debug", "buffer_size": 100, "warmup_updates": 0, "device": "cpu"}
    model = MBDPO("MultiInputPolicy", None, tasks=LEANING, seed=0, **kwargs)
    observation = leaning_observations([0, 2])
    assert model.predict(observation)[0].shape == (2, 3)
    model.learner.update(windows([0, 2, 1], beside=True))
    with pytest.raises(ValueError, match="MultiTaskEnv"):
        model.set_env(Leaning())
    for n_copies in (2, 1):
        model.set_env(leaning_env(n_copies=n_copies))
        assert model.n_envs == 3 * n_copies
    model.learning_starts = 6
    model.learn(12)
    with pytest.raises(AssertionError, match="number of environments"):
        model.set_env(leaning_env(n_copies=2))
    with pytest.raises(ValueError, match="env is None"):
        MBDPO("MlpPolicy", None, preset="debug", device="cpu")


@pytest.mark.parametrize(
    "kwargs, words",
    [
        ({"gamma": 0.9}, r"Task\(discount"),
        ({"task_sampling": "even"}, "task_sampling"),
        ({"task_sampling": "balanced", "replay_buffer_class": DictSequenceReplayBuffer}, "MultiTaskReplayBuffer"),
        ({"replay_buffer_kwargs": {"task_sampling": "balanced"}}, "pass it to MBDPO"),
        ({"policy_kwargs": {"tasks": LEANING.to_plain()}}, "tasks"),
        ({"tasks": TaskSet([Task("up", 3, 1)])}, "make_multitask_env"),
        ({"tasks": [*LEANING.tasks[:2]]}, "dict of"),
        ({"normalize_observations": 1}, "True or False"),
    ],
)
def test_arguments_that_do_not_go_with_tasks(kwargs: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        leaning_model(**kwargs)


def test_environments_that_do_not_go_with_tasks() -> None:
    with pytest.raises(ValueError, match="VecNormalize"):
        leaning_model(VecNormalize(leaning_env(), norm_obs_keys=["observation"]))
    other = TaskSet([Task("left", 3, 1), *LEANING.tasks[1:]], 5, 3)
    strangers = DummyVecEnv([lambda: MultiTaskEnv(Leaning(), other, "left")])
    mixed = DummyVecEnv(
        [lambda: MultiTaskEnv(Leaning(), other, "left"), lambda: MultiTaskEnv(Leaning(), LEANING, "up")]
    )
    with pytest.raises(ValueError, match="different task sets"):
        leaning_model(mixed)
    model = leaning_model(leaning_env(("up",)))
    for env, words in ((strangers, "left"), (ToyEnv(), "MultiTaskEnv"), (mixed, "different")):
        with pytest.raises(ValueError, match=words):
            model.set_env(env)
    with pytest.raises(ValueError, match="balanced"):
        MBDPO("MlpPolicy", ToyEnv(), preset="debug", task_sampling="balanced", device="cpu")


def test_single_task_models_have_no_tasks() -> None:
    model = MBDPO("MlpPolicy", toy_envs(), preset="debug", buffer_size=50, device="cpu")
    assert model.tasks is None and not isinstance(model.replay_buffer, MultiTaskReplayBuffer)
    for method in (lambda: model.evaluate_tasks(), lambda: model.add_task(Leaning())):
        with pytest.raises(ValueError, match="single-task"):
            method()


# --- acting -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("act_mode", ["search", "score", "prior"])
def test_rows_of_different_tasks_act_as_they_would_alone(act_mode: str) -> None:
    policy = multitask_policy(act_mode=act_mode)
    observation = leaning_observations([2, 0, 1, 1, 0, 2, 2, 0, 1])
    plans = np.random.default_rng(0).uniform(-1, 1, (9, 3, 3)).astype(np.float32)
    actions, state = policy.predict(observation, plans, np.arange(9) % 2 == 0, deterministic=True)
    for row in range(9):
        one = {key: value[row] for key, value in observation.items()}
        alone, _ = policy.predict(one, plans[row : row + 1], np.array([row % 2 == 0]), deterministic=True)
        np.testing.assert_array_equal(alone, actions[row])
    as_task = {**observation, "task": np.zeros(9, np.int64)}
    same, _ = policy.predict(as_task, plans, np.arange(9) % 2 == 0, deterministic=True)
    differ = np.abs(same - actions)[:, 0] > 1e-6
    assert differ[observation["task"] > 0].all() and not differ[observation["task"] == 0].any()
    for found in (actions, *state.transpose(1, 0, 2), policy.predict(observation)[0]):
        assert not found[ABSENT[observation["task"]]].any() and np.abs(found[:, 0]).min() > 0


def test_the_search_discounts_by_task() -> None:
    """With the same embedding and actions, two tasks differ by their discount alone."""
    plans = {}
    for discounts in ((0.9, 0.9), (0.9, 0.1)):
        tasks = TaskSet([Task("a", 3, 2, discount=discounts[0]), Task("b", 3, 2, discount=discounts[1])])
        th.manual_seed(0)
        policy = MultiInputPolicy(
            tasks.observation_space, tasks.action_space, lambda _: 3e-4, tasks=tasks, model_size=0.02, seed=0
        )
        randomize(policy.world_model)
        with th.no_grad():
            policy.world_model.task_embedding.weight[1] = policy.world_model.task_embedding.weight[0]
        vector = np.random.default_rng(0).uniform(-1, 1, (1, 3)).astype(np.float32).repeat(2, 0)
        _, plans[discounts] = policy.predict({"observation": vector, "task": np.arange(2)}, deterministic=True)
    equal, uneven = plans.values()
    np.testing.assert_allclose(equal[0], equal[1], atol=1e-6)
    np.testing.assert_allclose(uneven[0], equal[0], atol=1e-6)
    assert np.abs(uneven[1] - equal[1]).max() > 1e-4


def test_observations_without_a_known_task_are_refused() -> None:
    policy = multitask_policy()
    observation = leaning_observations([0, 1])
    short = {"observation": observation["observation"][0], "task": np.array([0, 1])}
    for wrong in (
        observation["observation"],
        observation | {"task": np.array([0, 3])},
        observation | {"task": [0]},
        short,
    ):
        with pytest.raises(ValueError, match="task"):
            policy.predict(wrong)


def test_imagine_and_plan_know_the_task(trained: MBDPO) -> None:
    observation = leaning_observations([0, 2, 1])
    found = trained.plan(observation)
    assert isinstance(found, np.ndarray) and found.shape == (3, 3, 3)
    assert not found.transpose(0, 2, 1)[ABSENT[[0, 2, 1]]].any()
    imagined = trained.imagine(observation, found)
    for row in range(3):
        one = {key: value[row] for key, value in observation.items()}
        np.testing.assert_allclose(trained.imagine(one, found[row]).values, imagined.values[row], rtol=1e-4, atol=1e-5)
    other = trained.imagine({**observation, "task": np.array([2, 0, 0])}, found)
    assert (np.abs(other.rewards - imagined.rewards).max(1) > 1e-6).all()
    # What a task does not have makes no difference
    absent = np.where(ABSENT[[0, 2, 1]][:, None], 1.0, found).astype(np.float32)
    np.testing.assert_array_equal(trained.imagine(observation, absent).rewards, imagined.rewards)


# --- learning ---------------------------------------------------------------------------------------------------


def test_tasks_beside_observations_are_the_same_tasks() -> None:
    results = []
    for beside in (False, True):
        policy = multitask_policy()
        learner = learner_for(policy, bootstrap="score", target_horizon=1)
        for index in range(2):
            metrics = learner.update(windows([0, 2, 1, 1, 2, 0], beside, index), index)
            assert all(value.isfinite() for value in metrics.values())
        results.append(flat_parameters(policy))
    assert th.equal(*results)
    with pytest.raises(ValueError, match="several tasks"):
        learner_for(multitask_policy()).encode(windows([0, 1], beside=True)._replace(task=None))


def test_encoding_keeps_tasks_with_their_rows() -> None:
    policy = multitask_policy()
    tasks = [0, 2, 1, 1, 2]
    batch = learner_for(policy).encode(windows(tasks))
    assert batch.task is not None and batch.task.tolist() == tasks
    for row, task in enumerate(tasks):
        alone = policy.world_model.encode(windows(tasks).observations["observation"][:, row], th.full((4,), task))
        th.testing.assert_close(batch.first[row], alone[0])
        th.testing.assert_close(batch.targets[:, row], alone[1:].detach())


@pytest.mark.parametrize("frozen", [False, True])
def test_an_update_leaves_the_stored_embeddings_inside_their_norm(frozen: bool) -> None:
    policy = multitask_policy()
    weight = policy.world_model.task_embedding.weight
    weight.requires_grad_(not frozen)
    with th.no_grad():
        weight[0], weight[1:] = 1e-3, 5.0
    before = weight.detach().clone()
    learner_for(policy).update(windows([1, 0, 2, 0]))
    if frozen:
        assert th.equal(weight, before), "frozen ones are nobody's to change"
        return
    norms = weight.detach().norm(dim=-1)
    assert norms[1:].tolist() == pytest.approx([1.0, 1.0], abs=1e-6) and norms[0] < 0.5
    assert 0 < (weight[0] - before[0]).abs().max() < 1e-2


@pytest.mark.parametrize("bootstrap", ["prior", "score"])
@pytest.mark.parametrize("target_horizon", [0, 2])
def test_targets_take_each_rows_discount_and_policy(bootstrap: str, target_horizon: int) -> None:
    policy, tasks = multitask_policy(exploration_noise=0.3), [1, 0, 2, 0]
    learner = learner_for(policy, bootstrap=bootstrap, target_horizon=target_horizon)
    seen: list[th.Tensor] = []

    def record(model: Any, batch: Any, plan: Any, noise: Any, discount: Any, episodic: bool) -> th.Tensor:
        seen.extend([discount, plan(batch.targets, noise.target)])
        seen.append(original(model, batch, plan, noise, discount, episodic))
        return seen[-1]

    original, learner._td_target = learner._td_target, record
    batch = learner.encode(windows(tasks))
    noise = draw_update_noise(policy.world_model, batch.actions, policy.generator, target_horizon)
    learner.update_world_model(batch, noise, index=1)
    discount, plan, target = seen
    assert discount.flatten().tolist() == pytest.approx([0.5, 0.9, 0.95, 0.9])
    assert not plan[..., th.as_tensor(ABSENT)[tasks]].any() and plan[..., 0].abs().min() > 0
    policy = multitask_policy(exploration_noise=0.3)
    alone = learner_for(policy, bootstrap=bootstrap, target_horizon=target_horizon)
    for row, task in enumerate(tasks):
        one = [x[:, row : row + 1] for x in (batch.targets, batch.actions, batch.rewards, batch.terminations)]
        single = batch._replace(
            targets=one[0], actions=one[1], rewards=one[2], terminations=one[3], task=th.tensor([task])
        )
        rows = noise._replace(target=noise.target[:, :, row : row + 1])
        follow = lambda z, eps, task=task: alone.bootstrap_plan(z, eps, th.tensor([task]))  # noqa: E731
        expected = original(policy.world_model, single, follow, rows, LEANING.discounts[task], False)
        th.testing.assert_close(target[:, row], expected[:, 0], rtol=1e-4, atol=1e-5)


def test_imagined_steps_of_the_prior_take_each_rows_discount() -> None:
    policy, tasks = multitask_policy(), [1, 0, 2, 0]
    learner = learner_for(policy, prior_horizon=2)
    seen: list[Any] = []

    def record(*arguments: Any) -> Any:
        seen.extend(arguments[-4:-2])
        return original(*arguments)

    original, learner._prior_loss = learner._prior_loss, record
    learner.update(windows(tasks, beside=False), 0)
    assert seen[0] == 2
    assert seen[1].flatten().tolist() == pytest.approx([0.5, 0.9, 0.95, 0.9])


def test_the_score_network_learns_each_rows_task(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def record(model: Any, config: Any, z: th.Tensor, *arguments: Any) -> th.Tensor:
        *_, seen["task"], seen["discount"], _ = arguments
        return model.score(model.join(z, None, seen["task"]), z.new_zeros(len(z), 3, 3), 1).sum()

    monkeypatch.setattr("sb3_mbdpo.updates.score_loss", record)
    learner = learner_for(multitask_policy(), score_batch_size=2)
    learner.update(windows([2, 0, 1]))
    assert seen["task"].tolist() == [2, 0] and seen["discount"].flatten().tolist() == pytest.approx([0.95, 0.9])


def test_what_is_collected_is_masked_and_tells_its_task(trained: MBDPO) -> None:
    """Random actions, the policy's and those with additional noise: absent actions are 0."""
    model = leaning_model(action_noise=NormalActionNoise(np.zeros(3), np.ones(3))).learn(30)
    for buffer in (trained.replay_buffer, model.replay_buffer):
        assert buffer is not None
        rows = slice(0, buffer.size())
        assert buffer.observations["task"][rows].reshape(-1, 3).tolist() == [[0, 1, 2]] * buffer.size()
        assert not buffer.actions[rows][:, ABSENT].any() and buffer.actions[rows][:, ~ABSENT].all()
        samples = buffer.sample(50)
        task = samples.observations["task"]
        assert task.dtype == th.int64 and (task == task[:1]).all()
        assert not samples.actions.permute(1, 2, 0)[th.as_tensor(ABSENT)[task[0, :, 0]]].any()


def test_returns_are_logged_by_task() -> None:
    model = leaning_model(leaning_env(("up", "wide"), n_copies=2), learning_starts=1000, stats_window_size=3)
    writer = Losses()
    logged = writer.rows
    model.set_logger(Logger(folder=None, output_formats=[writer]))
    model.learn(60, log_interval=1)
    keys = {key for key in logged[-1] if key.startswith("rollout/ep_rew_mean/")}
    assert keys == {"rollout/ep_rew_mean/up", "rollout/ep_rew_mean/wide"}
    assert model.env is not None
    episodes = [env.get_wrapper_attr("get_episode_rewards")() for env in model.env.envs]  # type: ignore[attr-defined]
    # Two episodes of two environments each; of those, the latest three in the order in which they ended
    up = [reward for pair in zip(*episodes[:2], strict=True) for reward in pair]
    assert logged[-1]["rollout/ep_rew_mean/up"] == pytest.approx(np.mean(up[-3:]), abs=1e-5)
    assert len(up) == 4 and all(len(returns) == 3 for returns in model._task_returns.values())
    model.learn(8, reset_num_timesteps=True)
    assert all(len(returns) <= 2 for returns in model._task_returns.values())


def test_training_tells_the_tasks_apart() -> None:
    """What pays in the first task costs in the second; only the task's index says which it is."""
    model = leaning_model(leaning_env(("up", "down"), n_copies=2), learning_starts=100, batch_size=32, buffer_size=2000)
    model.learn(420)
    actions, _ = model.predict(leaning_observations([0] * 8 + [1] * 8), deterministic=True)
    assert actions[:8, 0].mean() > 0.25 and actions[8:, 0].mean() < -0.25, actions[:, 0]
    scores = model.evaluate_tasks(2, LEANING_ENVS, ["up", "down"], seed=0)
    assert all(score.mean > 3 for score in scores), str(scores)


# --- saving -----------------------------------------------------------------------------------------------------


def test_tasks_are_saved_as_plain_data(trained: MBDPO, tmp_path: Path) -> None:
    trained.save(tmp_path / "model")
    data = json.loads(zipfile.ZipFile(tmp_path / "model.zip").read("data"))
    assert data["_tasks"] == LEANING.to_plain() and data["task_sampling"] == "proportional"
    loaded = MBDPO.load(tmp_path / "model", device="cpu")
    assert loaded.tasks == LEANING and loaded.gamma is None
    observation = leaning_observations([1, 2, 0])
    expected, _ = trained.predict(observation, deterministic=True)
    np.testing.assert_array_equal(expected, loaded.predict(observation, deterministic=True)[0])
    trained.policy.save(tmp_path / "policy")
    policy = MultiInputPolicy.load(tmp_path / "policy", device="cpu")
    np.testing.assert_array_equal(expected, policy.predict(observation, deterministic=True)[0])
    th.testing.assert_close(policy.discounts, trained.policy.discounts)
    assert not any("discount" in name for name in trained.policy.state_dict())


def test_other_tasks_given_to_load_are_refused(tmp_path: Path) -> None:
    model = leaning_model()
    model.save(tmp_path / "model")
    assert MBDPO.load(tmp_path / "model", tasks=LEANING).tasks == model.tasks
    with pytest.raises(ValueError, match="tasks is what the weights were made for"):
        MBDPO.load(tmp_path / "model", tasks=TaskSet([*LEANING, Task("new", 2, 1)], 5, 3))


def test_task_sampling_is_set_on_the_model(tmp_path: Path) -> None:
    def pairs(model: MBDPO) -> float:
        tasks = model._sample(2000).observations["task"][0]  # type: ignore[call-overload]
        return float((tasks == tasks.min()).float().mean())

    model = leaning_model(leaning_env(("up", "wide", "wide", "wide"))).learn(40)
    assert pairs(model) == pytest.approx(0.25, abs=0.05)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    model.task_sampling = "balanced"
    model.learn(4, reset_num_timesteps=False)
    assert pairs(model) == pytest.approx(0.5, abs=0.05)
    loaded = MBDPO.load(tmp_path / "model", env=model.env, device="cpu", task_sampling="balanced")
    loaded.load_replay_buffer(tmp_path / "buffer")
    assert pairs(loaded) == pytest.approx(0.5, abs=0.05)
    model.task_sampling = "even"
    with pytest.raises(ValueError, match="task_sampling"):
        model.learn(4, reset_num_timesteps=False)


@pytest.mark.parametrize("task_sampling", ["proportional", "balanced"])
def test_a_resumed_run_is_the_uninterrupted_one(task_sampling: str, tmp_path: Path) -> None:
    def start() -> MBDPO:
        return leaning_model(leaning_env(("up", "wide", "up")), task_sampling=task_sampling)

    whole, stopped = start().learn(54), start().learn(27)
    stopped.save(tmp_path / "model")
    stopped.save_replay_buffer(tmp_path / "buffer")
    assert stopped.env is not None
    envs = pickle.loads(pickle.dumps(stopped.env.envs))  # type: ignore[attr-defined]
    vector = DummyVecEnv([lambda env=env: env for env in envs])  # type: ignore[misc]
    resumed = MBDPO.load(tmp_path / "model", env=vector, device="cpu", force_reset=False)
    resumed.load_replay_buffer(tmp_path / "buffer")
    resumed.learn(27, reset_num_timesteps=False)
    assert th.equal(flat_parameters(whole.policy), flat_parameters(resumed.policy))
    np.testing.assert_array_equal(whole.replay_buffer.actions, resumed.replay_buffer.actions)  # type: ignore[union-attr]
