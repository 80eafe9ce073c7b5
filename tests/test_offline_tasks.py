"""Learning from recorded data of several tasks: from the data sets to a model that is fine-tuned on one more."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.monitor import Monitor

from sb3_mbdpo import MBDPO, MultiTaskEnv, Task, TaskSet, convert_chunks, convert_minari, make_multitask_env
from sb3_mbdpo.minari_sources import open_tasks
from sb3_mbdpo.offline_tasks import TaskWindows
from sb3_mbdpo.presets import discount_for
from sb3_mbdpo.shard_format import TaskData
from sb3_mbdpo.shard_writer import ShardWriter
from sb3_mbdpo.shards import ShardedDataset
from tests.fakes import Leaning, ToyEnv, flat_parameters
from tests.recordings import minari, record, recorded
from tests.test_offline import DEBUG, PENDULUM, TORQUE, logged

pytestmark = pytest.mark.usefixtures("minari_cache")
CHUNK = Path(__file__).parent / "data" / "chunks" / "chunk_mt30.pt"
UP, WIDE = "tests/LeaningUp-v0", "tests/LeaningWide-v3"
NARROW_ACTIONS, WIDE_ACTIONS = (spaces.Box(-2.0, 2.0, (n,), np.float32) for n in (1, 2))
DATA = {"up": "test/up-v0", "wide": "test/wide-v0"}


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = dict(gym.registry)
    monkeypatch.setattr(gym.envs.registration, "registry", registry)
    monkeypatch.setattr(gym, "registry", registry)
    gym.register(UP, "tests.fakes:Leaning", max_episode_steps=50)
    gym.register(WIDE, "tests.fakes:Leaning", kwargs={"width": 4, "n_actions": 2, "length": 7})


def played(env: gym.Env, episodes: int, seed: int = 0) -> list[Any]:
    """Episodes of random actions; the first entry of an observation is replaced by the mean of the action before."""
    rng, found = np.random.default_rng(seed), []
    space = env.action_space
    assert isinstance(space, spaces.Box)
    for episode in range(episodes):
        observations, actions, rewards, ended = [env.reset(seed=seed + episode)[0]], [], [], False
        while not ended:
            actions.append(rng.uniform(space.low, space.high).astype(np.float32))
            observation, reward, _, ended, _ = env.step(actions[-1])
            observations.append(observation)
            rewards.append(reward)
        stops = np.arange(len(rewards)) == len(rewards) - 1
        arrays = np.stack(observations), np.stack(actions), np.array(rewards), np.zeros_like(stops), stops
        names = "observations", "actions", "rewards", "terminations", "truncations"
        found.append(minari.data_collector.EpisodeBuffer(**dict(zip(names, arrays, strict=True))))
    return found


def record_task(name: str, env_id: str | None, episodes: int = 6, seed: int = 0, **settings: Any) -> Any:
    env = gym.make(env_id or UP, **settings)
    space = env.observation_space
    given: dict[str, Any] = {} if env_id is None else {"env": env}
    assert isinstance(env.action_space, spaces.Box)
    return record(name, played(env, episodes, seed), space, env.action_space, **given)


@pytest.fixture
def two_tasks(minari_cache: Path) -> list[str]:
    record_task("test/up-v0", UP).storage.update_metadata({"ref_min_score": -3.0, "ref_max_score": 9.0})
    record_task("test/wide-v0", WIDE, 4)
    return ["test/up-v0", "test/wide-v0"]


# --- building a model ----------------------------------------------------------------------------------------------


def test_a_list_of_ids_is_a_model_of_their_tasks(two_tasks: list[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = MBDPO.from_minari(two_tasks, observation_dim=6, action_dim=4, **DEBUG)
    tasks = model.tasks
    assert tasks is not None and (tasks.observation_dim, tasks.action_dim) == (6, 4)
    # By the environment's name; the limit of the one, the longest episode of the other
    assert tasks.tasks == (
        Task("LeaningUp", 3, 1, UP, episode_length=50, ref_min_score=-3.0, ref_max_score=9.0),
        Task("LeaningWide", 4, 2, WIDE, episode_length=7),
    )
    assert tasks.discounts == [discount_for(50), discount_for(7)]
    assert model.gamma is None and type(model.policy).__name__ == "MultiInputPolicy"
    assert model.env is not None and model.env.reset()["task"].tolist() == [0, 1]
    model.env.close()


def test_names_and_environments_by_name() -> None:
    record_task("test/a-v0", UP)
    record_task("test/b-v0", UP, seed=1)
    record_task("test/c-v0", None, seed=2)
    given = {"first": ["test/a-v0", "test/b-v0"], "second": "test/c-v0"}
    model = MBDPO.from_minari(given, **DEBUG)
    assert model.tasks is not None and model.tasks.names == ("first", "second") and model.env is None
    assert [task.env_id for task in model.tasks] == [UP, None]
    model = MBDPO.from_minari(given, {"second": UP, "first": lambda: Leaning()}, **DEBUG)
    assert [task.env_id for task in model.tasks or ()] == [None, UP]
    assert model.env is not None and model.env.num_envs == 2
    model = MBDPO.from_minari(given, {"second": Leaning()}, **DEBUG)
    assert model.env is not None and model.env.reset()["task"].tolist() == [1]
    # The same environment is one task, a data set without environment one of its own
    assert MBDPO.from_minari(["test/a-v0", "test/b-v0"], **DEBUG).tasks is None
    names = MBDPO.from_minari(["test/a-v0", "test/b-v0", "test/c-v0"], **DEBUG).tasks
    assert names is not None and names.names == ("LeaningUp", "test/c-v0")
    one = MBDPO.from_minari({"only": "test/a-v0"}, **DEBUG).tasks
    assert one is not None and one.names == ("only",)
    with pytest.raises(ValueError, match="did you mean"):
        MBDPO.from_minari(given, {"secnod": UP}, **DEBUG)


def test_how_an_environment_is_drawn_and_checked_makes_no_other_task() -> None:
    def pendulum(**settings: Any) -> gym.Env:
        return gym.make("Pendulum-v1", **settings)

    same = {
        "plain": pendulum(),
        "drawn": pendulum(render_mode="rgb_array", disable_env_checker=True),
        "watched": Monitor(pendulum()),
    }
    others = {
        "clipped": gym.wrappers.ClipReward(pendulum(), 0.0),
        "mild": gym.wrappers.ClipReward(pendulum(), -1.0),
        "light": pendulum(g=7.0),
        "short": pendulum(max_episode_steps=5),
    }
    episodes = recorded((5,), PENDULUM, TORQUE)
    for name, env in (same | others).items():
        record(f"test/{name}-v0", episodes, PENDULUM, TORQUE, env=env)
    assert MBDPO.from_minari([f"test/{name}-v0" for name in same], **DEBUG).tasks is None
    for first, second in (*(("plain", name) for name in others), ("mild", "clipped")):
        with pytest.raises(ValueError, match="same name that are not the same: say"):
            open_tasks([f"test/{first}-v0", f"test/{second}-v0"])


def test_ids_that_do_not_make_the_recorded_environment_are_left_out(two_tasks: list[str]) -> None:
    record_task("test/changed-v0", UP, sign=-1.0)
    with pytest.raises(ValueError, match="same name that are not the same: say"):
        MBDPO.from_minari(["test/up-v0", "test/changed-v0"], **DEBUG)
    model = MBDPO.from_minari({"up": "test/up-v0", "changed": "test/changed-v0"}, **DEBUG)
    assert [task.env_id for task in model.tasks or ()] == [UP, None] and model.env is None
    env = gym.wrappers.TransformReward(gym.make(UP), float)
    record("test/wrapped-v0", played(env, 2), env.observation_space, NARROW_ACTIONS, env=env)
    record("test/flat-v0", played(env, 2), env.observation_space, NARROW_ACTIONS, env=Monitor(gym.make(UP)))
    model = MBDPO.from_minari({"wrapped": "test/wrapped-v0", "flat": "test/flat-v0"}, **DEBUG)
    assert [task.env_id for task in model.tasks or ()] == [None, UP]
    data = ShardedDataset(convert_minari({"wrapped": "test/wrapped-v0", "flat": "test/flat-v0"}))
    gym.registry[UP].entry_point = "tests.fakes:Nothing"
    with pytest.warns(UserWarning, match=r"LeaningUp-v0 is not the environment of task 'flat' here .*Nothing"):
        model = MBDPO.from_minari(data, **DEBUG)
    assert [task.env_id for task in model.tasks or ()] == [None, None]


def test_released_chunks_are_tasks_of_the_suite(tmp_path: Path) -> None:
    data = ShardedDataset(convert_chunks([CHUNK], tmp_path / "set"))
    model = MBDPO.from_minari(data, {"cheetah-run": lambda: Leaning(17, 6)}, **DEBUG)
    tasks = model.tasks
    # Those that the chunk has episodes of, with their own sizes
    assert tasks is not None and tasks.names == ("cheetah-run", "pendulum-swingup", "cup-catch")
    assert [(task.observation_dim, task.action_dim, task.episode_length) for task in tasks] == [
        (17, 6, 500),
        (3, 1, 500),
        (8, 2, 500),
    ]
    assert tasks.discounts == [0.99] * 3
    assert model.learn_offline(data, 3)._n_updates == 3
    assert data.horizon == model.policy.search_config.horizon


# --- batches --------------------------------------------------------------------------------------------------------


def numbered(path: Path, sizes: tuple[int, ...] = (3, 1, 2)) -> ShardedDataset:
    """Three tasks, "a" of width 2, "b" of 3, "c" of 1; rewards say which. Episodes lie sorted by task."""
    entries = [TaskData(name, width, 1) for name, width in zip("abc", (2, 3, 1), strict=True)]
    space, actions = spaces.Box(-9, 9, (3,), np.float32), spaces.Box(-1, 1, (2,), np.float32)
    with ShardWriter(path, space, actions, tasks=entries) as writer:
        for task, (count, entry) in enumerate(zip(sizes, entries, strict=True)):
            for _ in range(10 * count):
                obs = np.zeros((9, 3), np.float32)
                obs[:, : entry.observation_size] = task + 1
                writer.add(obs, np.full((8, 2), 0.5), np.full(8, 10.0 * task), False, task)
    return ShardedDataset(path, seed=0)


def test_batches_are_in_the_models_terms(tmp_path: Path) -> None:
    data = numbered(tmp_path / "set")
    tasks = TaskSet([Task("c", 1, 1), Task("x", 4, 3), Task("b", 3, 1), Task("a", 2, 1)], 5, 4)
    windows = TaskWindows(data, tasks)
    samples = windows.sample(400)
    assert samples.observations.shape == (4, 400, 5) and samples.actions.shape == (3, 400, 4)
    assert samples.task is not None
    assert samples.task.dtype == th.int64 and set(samples.task.tolist()) == {0, 2, 3}
    reward_of = th.tensor([20.0, -1.0, 10.0, 0.0])
    th.testing.assert_close(samples.rewards[0, :, 0], reward_of[samples.task])
    widths = th.tensor([task.observation_dim for task in tasks])[samples.task]
    assert isinstance(samples.observations, th.Tensor)
    assert ((samples.observations != 0).sum(-1) == widths).all()
    # Actions that a task does not have are 0 whatever the data says
    th.testing.assert_close(samples.actions[0], th.tensor([0.5, 0.0, 0.0, 0.0]).expand(400, 4))
    # First rows are of all tasks: the score network learns from those alone
    assert len(set(samples.task[:16].tolist())) == 3
    narrow = TaskWindows(data, TaskSet([Task("c", 1, 1), Task("a", 2, 1), Task("b", 3, 1)]))
    assert narrow.sample(5).actions.shape == (3, 5, 1)


@pytest.mark.parametrize("task_sampling", ["proportional", "balanced"])
def test_the_models_task_sampling_decides(task_sampling: str, tmp_path: Path) -> None:
    data = numbered(tmp_path / "set")
    model = MBDPO.from_minari(data, task_sampling=task_sampling, **DEBUG | {"batch_size": 64})
    seen: list[int] = []

    def look(local: dict[str, Any], _: dict[str, Any]) -> bool:
        seen.extend(local["samples"].task.tolist())
        return True

    model.learn_offline(data, 8, look)
    shares = np.bincount(seen, minlength=3) / len(seen)
    wanted = [1 / 3] * 3 if task_sampling == "balanced" else [3 / 6, 1 / 6, 2 / 6]
    np.testing.assert_allclose(shares, wanted, atol=0.07)


def test_task_sampling_changes_while_learning(tmp_path: Path) -> None:
    data = numbered(tmp_path / "set")
    model = MBDPO.from_minari(data, **DEBUG | {"batch_size": 64})
    seen: list[int] = []

    def balance(local: dict[str, Any], _: dict[str, Any]) -> bool:
        if model.task_sampling == "balanced":
            seen.extend(local["samples"].task.tolist())
        model.task_sampling = "balanced"
        return True

    model.learn_offline(data, 9, balance)
    np.testing.assert_allclose(np.bincount(seen, minlength=3) / len(seen), 1 / 3, atol=0.07)


def test_observations_are_normalised_by_each_tasks_data(two_tasks: list[str], tmp_path: Path) -> None:
    model = MBDPO.from_minari(DATA, normalize_observations=True, **DEBUG)
    assert model.tasks is not None and not model.tasks.normalizes
    with pytest.raises(ValueError, match="call learn_offline first"):
        model.learn(10)
    model.learn_offline(DATA, 3)
    for name, task in zip(DATA, model.tasks, strict=True):
        episodes = minari.load_dataset(DATA[name]).iterate_episodes()
        values = np.concatenate([episode.observations[:-1] for episode in episodes]).astype(np.float64)
        np.testing.assert_allclose(task.observation_mean, values.mean(0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(task.observation_std, values.std(0), rtol=1e-5, atol=1e-6)
    seen = model.tasks
    # What was taken stays, whatever the data that comes later, and is saved
    model.learn_offline({"wide": "test/wide-v0"}, 2)
    assert model.tasks == seen
    model.save(tmp_path / "model")
    loaded = MBDPO.load(tmp_path / "model", device="cpu")
    assert loaded.tasks == seen
    obs = {"observation": np.full((2, 4), 0.3, np.float32), "task": np.array([0, 1])}
    np.testing.assert_array_equal(*(m.predict(obs, deterministic=True)[0] for m in (model, loaded)))
    # A task more is normalised like the one that it starts from, or by its own episodes
    same = model.add_task(UP, "same", like="up").task
    assert (same.observation_mean, same.observation_std) == (seen["up"].observation_mean, seen["up"].observation_std)
    other = loaded.add_task(UP, "other", like="wide", n_episodes=2).task
    assert other.observation_mean is not None and len(other.observation_mean) == 3
    loaded.learn(60)


def test_a_model_that_has_learned_without_cannot_be_normalised(two_tasks: list[str], tmp_path: Path) -> None:
    model = MBDPO.from_minari(DATA, **DEBUG).learn_offline(DATA, 2)
    assert model.tasks is not None and not model.tasks.normalizes
    model.save(tmp_path / "model")
    loaded = MBDPO.load(tmp_path / "model", device="cpu", normalize_observations=True)
    with pytest.raises(ValueError, match="begin a new one"):
        loaded.learn_offline(DATA, 2)
    assert loaded.tasks == model.tasks


def test_an_update_is_that_of_the_replay_buffer(two_tasks: list[str]) -> None:
    """The same windows, padded, scaled and told apart as the multi-task environments do it."""
    model = MBDPO.from_minari(DATA, **DEBUG)
    tasks = model.tasks
    assert tasks is not None
    data = ShardedDataset(convert_minari(DATA), seed=0)
    samples = TaskWindows(data, tasks).sample(6)
    batch = model.learner.encode(samples)
    assert samples.task is not None and batch.task is not None
    for row, index in enumerate(samples.task.tolist()):
        name = tasks.names[index]
        env = MultiTaskEnv(gym.make({"up": UP, "wide": WIDE}[name]), tasks, name)
        assert isinstance(samples.observations, th.Tensor)
        for episode in minari.load_dataset(DATA[name]).iterate_episodes():
            start = samples.observations[0, row].numpy()
            found = [
                t
                for t, obs in enumerate(episode.observations)
                if np.allclose(env.observation(obs)["observation"], start)
            ]
            if found:
                break
        t, valid = found[0], int(samples.masks[:, row].sum())
        for step in range(valid):
            sent = env.action(samples.actions[step, row].numpy())
            np.testing.assert_allclose(sent, episode.actions[t + step], atol=1e-5)
            assert samples.rewards[step, row, 0] == pytest.approx(episode.rewards[t + step], abs=1e-6)
    assert batch.task.tolist() == samples.task.tolist()
    assert model.policy.row_discounts(batch.task).flatten().tolist() == pytest.approx(  # type: ignore[union-attr]
        [tasks.discounts[index] for index in batch.task]
    )


# --- learning -------------------------------------------------------------------------------------------------------


def test_some_of_the_models_tasks_are_learned_by_name(two_tasks: list[str]) -> None:
    tasks = TaskSet([Task("new", 2, 1), Task("LeaningWide", 4, 2), Task("LeaningUp", 3, 1)], 6, 2)
    model = MBDPO("MultiInputPolicy", None, tasks=tasks, **DEBUG)
    assert model.policy.world_model.task_embedding is not None
    before = model.policy.world_model.task_embedding.weight.detach().clone()
    seen: set[int] = set()

    def look(local: dict[str, Any], _: dict[str, Any]) -> bool:
        seen.update(local["samples"].task.tolist())
        return True

    model.learn_offline("test/up-v0", 2, look)
    assert seen == {2}
    model.learn_offline(two_tasks, 6, look, reset_num_timesteps=False)
    assert seen == {1, 2}
    after = model.policy.world_model.task_embedding.weight
    changed = (after != before).any(1).tolist()
    assert changed == [False, True, True]


def test_a_single_task_model_learns_what_is_called_one_task(two_tasks: list[str]) -> None:
    record_task("test/again-v0", UP, seed=5)
    model = MBDPO.from_minari("test/up-v0", **DEBUG)
    assert model.learn_offline({"any": ["test/up-v0", "test/again-v0"]}, 2)._n_updates == 2
    assert model.learn_offline(["test/up-v0", "test/again-v0"], 2)._n_updates == 4


def test_interrupted_training_goes_on_as_if_it_had_not_been(two_tasks: list[str], tmp_path: Path) -> None:
    def build() -> MBDPO:
        return MBDPO.from_minari(two_tasks, task_sampling="balanced", **DEBUG)

    whole, stopped = build().learn_offline(two_tasks, 10), build()

    def stop(local: dict[str, Any], _: dict[str, Any]) -> bool:
        if local["self"].num_timesteps == 4:
            local["self"].save(tmp_path / "model")
        return bool(local["self"].num_timesteps < 6)

    stopped.learn_offline(two_tasks, 10, stop)
    loaded = MBDPO.load(tmp_path / "model", device="cpu")
    assert loaded.tasks == whole.tasks and loaded.task_sampling == "balanced"
    loaded.learn_offline(two_tasks, 6, reset_num_timesteps=False)
    assert th.equal(flat_parameters(whole.policy), flat_parameters(loaded.policy))
    assert not th.equal(flat_parameters(whole.policy), flat_parameters(stopped.policy))


def test_evaluation_task_by_task(two_tasks: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    model = MBDPO.from_minari(two_tasks, verbose=1, **DEBUG)
    rows = logged(model)
    model.learn_offline(two_tasks, 5, eval_env=True, eval_freq=2, n_eval_episodes=2)
    evaluations = [row for row in rows if "eval/mean_reward" in row]
    assert [row["step"] for row in evaluations] == [2, 4, 5]
    scores = model.evaluate_tasks(2, seed=0)
    for score in scores:
        assert evaluations[-1][f"eval/mean_reward/{score.name}"] == pytest.approx(score.mean)
    up = scores.by_name()["LeaningUp"]
    assert evaluations[-1]["eval/normalized_score/LeaningUp"] == pytest.approx((up.mean + 3) / 12)
    assert evaluations[-1]["eval/mean_reward"] == pytest.approx(np.mean([score.mean for score in scores]))
    assert not {"eval/normalized_score/LeaningWide", "eval/normalized_score"} & evaluations[-1].keys()
    assert str(scores) in capsys.readouterr().out

    env = Leaning()
    model.learn_offline(two_tasks, 1, eval_env={"LeaningUp": env}, n_eval_episodes=3)
    assert env.episodes == 3
    last = rows[-1]
    assert last["eval/normalized_score"] == last["eval/normalized_score/LeaningUp"]


def test_reference_scores_may_come_with_the_data(two_tasks: list[str]) -> None:
    tasks = TaskSet(
        [Task("LeaningUp", 3, 1, UP, ref_min_score=0.0, ref_max_score=100.0), Task("LeaningWide", 4, 2, WIDE)]
    )
    model = MBDPO("MultiInputPolicy", None, tasks=tasks, **DEBUG)
    minari.load_dataset("test/wide-v0").storage.update_metadata({"ref_min_score": 0.0, "ref_max_score": 10.0})
    rows = logged(model)
    model.learn_offline(two_tasks, 1, eval_env=True, n_eval_episodes=1)
    last = rows[-1]
    for name, best in (("LeaningUp", 100), ("LeaningWide", 10)):
        assert last[f"eval/normalized_score/{name}"] == pytest.approx(last[f"eval/mean_reward/{name}"] / best)
    assert last["eval/normalized_score"] == pytest.approx(
        np.mean([last[f"eval/normalized_score/{name}"] for name in tasks.names])
    )


def test_long_names_alike_do_not_end_training(two_tasks: list[str], tmp_path: Path) -> None:
    """Tables on the screen cut names after some letters, and refuse two that are then the same."""
    names = [f"a-name-that-is-much-longer-than-a-table-is-wide-{k}" for k in range(2)]
    data = dict(zip(names, two_tasks, strict=True))
    model = MBDPO.from_minari(data, **DEBUG | {"verbose": 1, "learning_starts": 1, "warmup_updates": 0})
    model.learn_offline(data, 2, eval_env=True, n_eval_episodes=1)
    model.learn(60, log_interval=1)


def test_an_evaluation_changes_nothing(two_tasks: list[str]) -> None:
    weights = []
    for eval_env in (None, True):
        model = MBDPO.from_minari(two_tasks, **DEBUG)
        model.learn_offline(two_tasks, 4, eval_env=eval_env, eval_freq=2, n_eval_episodes=1)
        weights.append(flat_parameters(model.policy))
    assert th.equal(*weights)


# --- and then online ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("like", ["nearest", "LeaningWide", None])
def test_from_recordings_to_a_task_more(like: str | None, two_tasks: list[str], tmp_path: Path) -> None:
    model = MBDPO.from_minari(two_tasks, observation_dim=5, action_dim=3, learning_starts=12, **DEBUG)
    model.learn_offline(two_tasks, 20)
    before = model.evaluate_tasks(1, seed=0)
    model.save(tmp_path / "pretrained")
    model = MBDPO.load(tmp_path / "pretrained", device="cpu")
    assert model.evaluate_tasks(1, seed=0) == before
    added = model.add_task(lambda: Leaning(5, 3), "new", like=like, n_episodes=2, episode_length=6)
    assert added.task_index == 2 and (added.source in before.by_name() if like else added.source is None)
    updates = model._n_updates
    model.learn(40)
    assert model._n_updates > updates + 20
    after = model.evaluate_tasks(1, {"new": Leaning(5, 3)}, ["LeaningUp", "LeaningWide", "new"], seed=0)
    assert [score.name for score in after] == ["LeaningUp", "LeaningWide", "new"]


@pytest.mark.parametrize("steps", [3, 30])
def test_it_acts_for_itself_from_the_first_step(
    steps: int, two_tasks: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = MBDPO.from_minari(two_tasks, learning_starts=12, **DEBUG).learn_offline(two_tasks, steps)
    model.save(tmp_path / "model")
    tasks = model.tasks
    assert tasks is not None
    model = MBDPO.load(tmp_path / "model", make_multitask_env(tasks), device="cpu")
    random_steps: list[int] = []

    def count(target: Any) -> None:
        sample: Callable[[], Any] = target.action_space.sample
        monkeypatch.setattr(target.action_space, "sample", lambda: (random_steps.append(1), sample())[1])

    count(model)
    model.learn(10, reset_num_timesteps=False)
    assert (model.num_timesteps, len(random_steps)) == (steps + 10, 0)
    model.learn(8)
    assert (model.num_timesteps, len(random_steps)) == (8, 8)


# --- what cannot work -----------------------------------------------------------------------------------------------


def test_data_that_does_not_fit_the_tasks(two_tasks: list[str], minari_cache: Path, tmp_path: Path) -> None:
    tasks = TaskSet([Task("LeaningUp", 3, 1), Task("other", 4, 2)])
    model = MBDPO("MultiInputPolicy", None, tasks=tasks, **DEBUG)
    with pytest.raises(ValueError, match=r"tasks \['LeaningWide'\], which are not among this model's"):
        model.learn_offline(two_tasks, 2)
    with pytest.raises(ValueError, match=r"task 'LeaningUp' has 4 observation entries and 2 actions, .* has 3 and 1"):
        model.learn_offline({"LeaningUp": "test/wide-v0"}, 2)
    record("test/image-v0", observation_space=spaces.Box(0, 255, (36, 36, 3), np.uint8))
    with pytest.raises(ValueError, match="flat Box observations"):
        model.learn_offline({"LeaningUp": "test/image-v0"}, 2)
    with pytest.raises(ValueError, match="flat Box observations"):
        MBDPO.from_minari({"LeaningUp": "test/image-v0"}, **DEBUG)
    single = MBDPO.from_minari("test/up-v0", **DEBUG)
    with pytest.raises(ValueError, match=r"this model of a single one: .*MBDPO.from_minari"):
        single.learn_offline(two_tasks, 2)
    assert not (minari_cache / ".sb3_mbdpo_shards").exists()
    unnamed = ShardedDataset(convert_minari("test/up-v0", tmp_path))
    with pytest.raises(ValueError, match="does not say which task it is of"):
        model.learn_offline(unnamed, 2)
    with pytest.raises(ValueError, match="observation_dim=3 is too narrow"):
        MBDPO.from_minari(two_tasks, observation_dim=3, **DEBUG)
    with pytest.raises(ValueError, match=r"gamma=0\.9 is for one task"):
        MBDPO.from_minari(two_tasks, gamma=0.9, **DEBUG)
    assert model._n_updates == single._n_updates == 0


def test_environments_that_cannot_be_evaluated_in(two_tasks: list[str], minari_cache: Path) -> None:
    model = MBDPO.from_minari(DATA, **DEBUG)
    for given, words in (
        (Leaning(), "task by task: pass eval_env=True"),
        ({}, "no environment for any task"),
        ({"down": Leaning()}, "did you mean"),
        ({"up": Leaning(4, 2)}, "not the task's environment"),
        ({"up": ToyEnv(spaces.Box(0, 1, (2, 2)))}, "FlattenObservation"),
    ):
        with pytest.raises(ValueError, match=words):
            model.learn_offline(DATA, 2, eval_env=given)  # type: ignore[arg-type]
    tasks = TaskSet([Task("up", 3, 1, UP), Task("wide", 4, 2)])
    with pytest.raises(ValueError, match=r"no environment for \['wide'\]"):
        MBDPO("MultiInputPolicy", None, tasks=tasks, **DEBUG).learn_offline(DATA, 2, eval_env=True)
    assert model._n_updates == 0 and not (minari_cache / ".sb3_mbdpo_shards").exists()


@pytest.mark.parametrize(
    ("name", "index", "value", "words"),
    [
        ("rewards", 1, np.nan, "rewards that are not finite"),
        ("actions", (1, 0), 2.1, "actions outside of the bounds"),
        ("observations", (2, 3), np.inf, "observations that are not finite"),
    ],
)
def test_one_bad_episode_of_one_task_leaves_everything_as_it_was(
    name: str, index: Any, value: float, words: str, two_tasks: list[str], minari_cache: Path
) -> None:
    env = gym.make(WIDE)
    episodes = played(env, 2)
    getattr(episodes[1], name)[index] = value
    record("test/bad-v0", episodes, env.observation_space, WIDE_ACTIONS)
    model = MBDPO.from_minari(DATA, **DEBUG)
    before = flat_parameters(model.policy)
    with pytest.raises(ValueError, match=f"test/bad-v0, episode 1 has {words}") as raised:
        model.learn_offline(DATA | {"wide": ["test/wide-v0", "test/bad-v0"]}, 2)
    assert "\n" not in str(raised.value)
    assert not list((minari_cache / ".sb3_mbdpo_shards").iterdir())
    assert model._n_updates == model.num_timesteps == 0 and th.equal(before, flat_parameters(model.policy))
    with pytest.raises(ValueError, match="minari download test/none-v0"):
        MBDPO.from_minari(["test/up-v0", "test/none-v0"], **DEBUG)
    record("test/empty-v0", [], env.observation_space, WIDE_ACTIONS)
    with pytest.raises(ValueError, match="test/empty-v0 is empty"):
        MBDPO.from_minari(["test/up-v0", "test/empty-v0"], **DEBUG)
