"""One task more for a trained model: where it starts from, what then learns, and what stays."""

import copy
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.noise import NormalActionNoise, VectorizedActionNoise

from sb3_mbdpo import MBDPO, make_multitask_env
from sb3_mbdpo.adaptation import PARTS, episode_windows, extend_embedding, random_episodes, set_trainable
from sb3_mbdpo.multitask_env import MultiTaskEnv
from sb3_mbdpo.tasks import Task, TaskSet
from tests.fakes import LEANING, LEANING_ENVS, Leaning, Scaled, ToyEnv, flat_parameters, leaning_env, leaning_model

EXTENDED = LEANING.with_task(Task("new", 3, 1))


class Recorded(NamedTuple):
    observations: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learned what its tasks pay."""
    path = tmp_path_factory.mktemp("adaptation") / "model"
    model = leaning_model(buffer_size=2000, learning_starts=1000, seed=3).learn(390)
    model.train(300, 64)
    model.save(path)
    return path


def load(path: Path) -> MBDPO:
    return MBDPO.load(path, env=leaning_env(), device="cpu")


def parts_of(model: MBDPO) -> dict[str, th.Tensor]:
    world = model.policy.world_model
    return {
        part: th.cat([flat_parameters(getattr(world, name)) for name in names if getattr(world, name) is not None])
        for part, names in PARTS.items()
    }


@pytest.mark.parametrize("sign, alike, unlike", [(1.0, ("up", "wide"), "down"), (-1.0, ("down",), "up")])
def test_the_nearest_task_is_one_that_pays_alike(
    sign: float, alike: tuple[str, ...], unlike: str, pretrained: Path
) -> None:
    added = load(pretrained).add_task(lambda: Leaning(sign=sign), "new", n_episodes=8)
    errors = added.errors
    assert errors is not None and errors.keys() == set(LEANING.names)
    assert added.source in alike and errors[added.source].total == min(error.total for error in errors.values())
    assert errors[unlike].reward > errors[added.source].reward + 0.5, errors


def test_given_episodes_decide(pretrained: Path) -> None:
    """In the environment's own units; what the environment itself would pay does not matter then."""
    episodes = random_episodes(Leaning(sign=-1.0), 8, np.random.default_rng(0))
    added = load(pretrained).add_task(Leaning(sign=1.0), "new", episodes=episodes)
    assert added.source == "down"


def test_a_copied_row_acts_like_its_source(pretrained: Path) -> None:
    model = load(pretrained)
    state, numpy_state = th.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]
    before = flat_parameters(model.policy.world_model.critics)
    added = model.add_task(Leaning(), "new", like="down", discount=0.5, ref_min_score=0.0, ref_max_score=1.0)
    assert th.equal(state, th.get_rng_state()) and (numpy_state == np.random.get_state()[1]).all()  # type: ignore[index]
    assert (added.task_index, added.source, added.errors) == (3, "down", None)
    assert model.tasks is not None and model.tasks.names == (*LEANING.names, "new") and model.tasks["new"] == added.task
    assert added.task.ref_max_score == 1.0 and model.policy.discounts[3] == 0.5
    weight = model.policy.world_model.task_embedding.weight  # type: ignore[union-attr]
    assert th.equal(weight[3], weight[1]) and weight.shape == (4, 96)
    np.testing.assert_array_equal(model.policy.world_model.action_masks[3], [1, 0, 0])
    assert th.equal(before, flat_parameters(model.policy.world_model.critics))
    vector = np.zeros(5, np.float32)
    pair = [model.predict({"observation": vector, "task": task}, deterministic=True)[0] for task in (1, 3)]
    np.testing.assert_array_equal(*pair)


def test_a_fresh_row_is_drawn_from_the_models_own_generator(pretrained: Path) -> None:
    rows = []
    for _ in range(2):
        model = load(pretrained)
        th.rand(1)
        assert model.add_task(Leaning(), "new", like=None).source is None
        rows.append(model.policy.world_model.task_embedding.weight[3].detach())  # type: ignore[union-attr]
    assert th.equal(*rows) and 0.015 < rows[0].abs().max() <= 0.02


def test_names_come_from_ids() -> None:
    model = leaning_model()
    assert model.add_task("Pendulum-v1", like=None).task == Task("Pendulum-v1", 3, 1, "Pendulum-v1", 1, 200)
    assert model.learning_starts == 200 and model.n_envs == 1


@pytest.mark.parametrize(
    "env, kwargs, words",
    [
        (Leaning(6, 4), {}, r"6 observation entries where this model has room for 5 and 4 actions .* room for 3"),
        (ToyEnv(gym.spaces.Box(0, 1, (2, 2))), {}, "FlattenObservation"),
        (Leaning(), {"name": "up"}, "another name"),
        (Leaning(), {"name": "nearest"}, "nearest"),
        (Leaning(), {"like": "dwn"}, "did you mean"),
        (Leaning(), {"n_envs": 2}, "n_envs=2"),
        (Leaning(), {"n_episodes": 0}, "n_episodes"),
        (Leaning(), {"trainable": ("head",)}, "trainable"),
        (Leaning(), {"trainable": "heads"}, "trainable"),
        (Leaning(), {"trainable": ()}, "trainable"),
        (Leaning(), {"colour": "red"}, "colour"),
        (leaning_env(("up",)), {}, "DummyVecEnv"),
        (Leaning(), {"episodes": []}, "horizon"),
        (Leaning(), {"episodes": "test/toy-v0"}, "must hold observations, actions and rewards"),
        (Leaning(), {"learning_starts": "a"}, "learning_starts"),
        (Leaning(), {"learning_starts": -5}, "learning_starts"),
        (Leaning, {"like": "up", "n_envs": 10_000}, "buffer_size"),
    ],
)
def test_what_cannot_be_added_changes_nothing(env: Any, kwargs: dict[str, Any], words: str) -> None:
    model = leaning_model()
    before, buffer, training = flat_parameters(model.policy), model.replay_buffer, model.env
    with pytest.raises((ValueError, TypeError), match=words):
        model.add_task(env, **({"name": "new"} | kwargs))
    assert model.tasks == LEANING and model.replay_buffer is buffer and model.env is training
    assert th.equal(before, flat_parameters(model.policy))
    assert all(p.requires_grad for p in model.policy.world_model.prior.parameters())


def test_a_task_of_a_given_environment_is_evaluated_in_another_like_it(tmp_path: Path) -> None:
    model = leaning_model()
    envs = {"up": Leaning, "down": Leaning, "wide": LEANING_ENVS["wide"]}
    with pytest.raises(ValueError, match=r"no environment for \['up', 'down', 'wide'\]"):
        model.evaluate_tasks(1)
    given = gym.make("Pendulum-v1", g=7.0, max_episode_steps=5)
    model.add_task(given, name="light", like="up", learning_starts=4)
    model.learn(6)
    before = model._last_obs
    scores = model.evaluate_tasks(1, names=["light"])
    assert scores[0].name == "light" and scores[0].lengths == (5,)
    # The training environment is in the middle of an episode, and stays there
    assert model._last_obs is before and given.get_wrapper_attr("_elapsed_steps") == 1
    assert [score.name for score in model.evaluate_tasks(1, envs)] == ["up", "down", "wide"]
    model.save(tmp_path / "model")
    with pytest.raises(ValueError, match="no environment for"):
        MBDPO.load(tmp_path / "model", device="cpu").evaluate_tasks(1, names=["light"])


def test_a_given_environment_is_made_again_without_its_monitor_or_not_at_all() -> None:
    model = leaning_model()
    light = gym.make("Pendulum-v1", g=7.0, max_episode_steps=5)
    model.add_task(Monitor(light), name="light", like="up", learning_starts=4)
    assert model.evaluate_tasks(1, names=["light"])[0].lengths == (5,)
    model.add_task(Scaled(gym.make("Pendulum-v1", max_episode_steps=5), 0.1), name="scaled", like="up")
    with pytest.raises(ValueError, match=r"There is no environment for \['scaled'\]: pass envs="):
        model.evaluate_tasks(1, names=["scaled"])


def test_action_noise_follows_the_number_of_environments() -> None:
    noise = NormalActionNoise(np.zeros(3), np.full(3, 0.1))
    model = leaning_model(action_noise=noise).learn(12)
    model.add_task("Pendulum-v1", like="up", learning_starts=2)
    model.learn(6)
    assert model.action_noise is noise
    model.add_task("Pendulum-v1", name="two", like="up", learning_starts=2, n_envs=2)
    assert isinstance(model.learn(6).action_noise, VectorizedActionNoise)


@pytest.mark.parametrize(
    "wrong, words",
    [
        (Recorded(np.zeros((5, 3)), np.zeros((5, 1)), np.zeros(5)), r"shape \(6, 3\)"),
        (Recorded(np.zeros((6, 3)), np.zeros((5, 2)), np.zeros(5)), r"shape \(5, 1\)"),
        (Recorded(np.zeros((6, 3)), np.zeros((5, 1)), np.full(5, np.nan)), "not finite"),
        (Recorded(np.zeros((3, 3)), np.zeros((2, 1)), np.zeros(2)), "at least 3 steps"),
    ],
)
def test_episodes_that_do_not_fit(wrong: Recorded, words: str) -> None:
    env = MultiTaskEnv(Leaning(), EXTENDED, "new")
    with pytest.raises(ValueError, match=words):
        episode_windows([wrong], env, 3, th.device("cpu"))


def test_windows_are_padded_scaled_and_thinned() -> None:
    env = MultiTaskEnv(Leaning(), EXTENDED, "new")
    step = np.arange(7.0)
    episode = Recorded(step[:, None].repeat(3, 1), step[:6, None] / 3 - 1, step[:6] * 10)
    observations, actions, rewards = episode_windows([episode], env, 3, th.device("cpu"))
    assert observations.shape == (4, 4, 5) and actions.shape == (3, 4, 3) and rewards.shape == (3, 4, 1)
    starts = th.arange(4.0)
    th.testing.assert_close(observations[..., 2], starts + th.arange(4.0)[:, None])
    assert not observations[..., 3:].any() and not actions[..., 1:].any()
    th.testing.assert_close(actions[..., 0], ((starts + th.arange(3.0)[:, None]) / 3 - 1) / 2)
    th.testing.assert_close(rewards[..., 0], 10 * (starts + th.arange(3.0)[:, None]))
    many = [Recorded(np.zeros((1001, 3)), np.zeros((1000, 1)), np.zeros(1000))] * 2
    assert episode_windows(many, env, 3, th.device("cpu")).rewards.shape[1] == 1024


def test_fine_tuning_learns_the_new_task(pretrained: Path, tmp_path: Path) -> None:
    """Acts by its own policy at once, learns from the new task's data alone, and goes on after saving."""
    model = load(pretrained)
    envs = LEANING_ENVS | {"new": LEANING_ENVS["down"]}
    added = model.add_task(LEANING_ENVS["down"], "new", like="up", n_envs=2, episode_length=6, learning_starts=10)
    before = model.evaluate_tasks(2, envs, seed=0).by_name()
    updates, old_rows = model._n_updates, model.policy.world_model.task_embedding.weight[:3].clone()  # type: ignore
    model.learn(10)
    assert model._n_updates == updates and model._plans is not None, "acts by plans, and does not learn yet"
    assert model.n_envs == model.replay_buffer.n_envs == 2  # type: ignore[union-attr]
    model.learn(190, reset_num_timesteps=False)
    assert model._n_updates > updates + 150
    assert (model.replay_buffer.observations["task"][:100] == added.task_index).all()  # type: ignore[union-attr]
    weight = model.policy.world_model.task_embedding.weight.detach()  # type: ignore[union-attr]
    assert th.equal(weight[:3], old_rows) and not th.equal(weight[3], old_rows[0])
    after = model.evaluate_tasks(2, envs, seed=0).by_name()
    assert after["new"].mean > before["new"].mean + 5, (before, after)

    model.save(tmp_path / "model")
    with pytest.raises(ValueError, match="other sizes"):
        load(pretrained).set_parameters(str(tmp_path / "model"))
    tasks = model.tasks
    assert tasks is not None
    again = MBDPO.load(tmp_path / "model", device="cpu")
    assert again.tasks == tasks and again.evaluate_tasks(2, envs, seed=0).by_name() == after
    again.set_env(leaning_env_of(tasks, 2))
    again.learn(6)
    assert again._n_updates > model._n_updates - 1


def leaning_env_of(tasks: TaskSet, copies: int) -> Any:
    return make_multitask_env(tasks, {"new": LEANING_ENVS["down"]}, ["new"], copies)


@pytest.mark.parametrize("trainable", [("embedding",), ("encoder", "heads"), ("policies",), ("dynamics",), None])
def test_parts_by_choice(trainable: tuple[str, ...] | None, pretrained: Path, tmp_path: Path) -> None:
    model = load(pretrained)
    model.add_task(Leaning(), "new", like="up", trainable=trainable, learning_starts=2)
    before = parts_of(model)
    model.learn(12)
    model.save(tmp_path / "model")
    model = MBDPO.load(tmp_path / "model", env=model.env, device="cpu")
    model.learn(8)
    changed = {part for part, values in parts_of(model).items() if not th.equal(values, before[part])}
    assert changed == set(trainable or PARTS)
    model.set_trainable(None)
    model.learn(8)
    assert {part for part, values in parts_of(model).items() if not th.equal(values, before[part])} == set(PARTS)


def test_a_resumed_fine_tuning_is_the_uninterrupted_one(pretrained: Path, tmp_path: Path) -> None:
    def start() -> MBDPO:
        model = load(pretrained)
        model.add_task(Leaning(), "new", like="up", trainable=("embedding", "heads", "policies"), learning_starts=7)
        return model

    whole, stopped = start().learn(30), start().learn(15)
    stopped.save(tmp_path / "model")
    stopped.save_replay_buffer(tmp_path / "buffer")
    env = copy.deepcopy(stopped.env)
    resumed = MBDPO.load(tmp_path / "model", env=env, device="cpu", force_reset=False)
    resumed.load_replay_buffer(tmp_path / "buffer")
    resumed.learn(15, reset_num_timesteps=False)
    assert th.equal(flat_parameters(whole.policy), flat_parameters(resumed.policy))


def test_trainable_words_name_every_module() -> None:
    model = leaning_model().policy.world_model
    named = {name for names in PARTS.values() for name in names}
    assert {name for name, module in model.named_children() if list(module.parameters())} == named | {"target_critics"}
    set_trainable(model, ["heads"])
    set_trainable(model, None)
    assert not any(p.requires_grad for p in model.target_critics.parameters())


def test_an_extended_embedding_keeps_its_rows() -> None:
    model = leaning_model().policy.world_model
    assert model.task_embedding is not None
    before, masks = model.task_embedding.weight.detach().clone(), model.action_masks.clone()
    extend_embedding(model, 2, None, th.Generator().manual_seed(0))
    assert th.equal(model.task_embedding.weight[:3], before) and model.task_embedding.weight.requires_grad
    assert th.equal(model.action_masks, th.cat([masks, th.tensor([[1.0, 1.0, 0.0]])]))
    assert "action_masks" in model.state_dict() and model.embed(th.tensor([3])) is not None
    pickle.loads(pickle.dumps(model))
