"""What an agent collected, or fresh episodes by it, as a Minari data set: nothing in it is normalised or scaled."""

import json
import numbers
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from stable_baselines3.common.base_class import maybe_make_env
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from sb3_mbdpo.env_facts import NOT_MADE, spec_of, without_monitor
from sb3_mbdpo.minari_episodes import Actor, Episode, buffer_episodes, mean_return, play, random_actor
from sb3_mbdpo.minari_sources import check_same_spaces, import_minari, minari_root
from sb3_mbdpo.minari_tasks import TaskUnits, task_units

if TYPE_CHECKING:
    from minari import MinariDataset

    from sb3_mbdpo.mbdpo import MBDPO

SOURCES = ("replay_buffer", "agent")
DATASET_ID = re.compile(r"([-\w]{2,}/)*[-\w]+-v\d+")
# What HDF5 takes for a path, for the group itself, or for the end of a name
NO_HDF5_NAME = re.compile(r"\.?|.*[/\0].*", re.DOTALL)


def export_minari(
    model: "MBDPO",
    dataset_id: str,
    source: str = "replay_buffer",
    n_episodes: int = 100,
    env: GymEnv | str | None = None,
    deterministic: bool = True,
    ref_min_score: float | None = None,
    ref_max_score: float | None = None,
    n_ref_episodes: int = 0,
    task: str | None = None,
    **metadata: Any,
) -> "MinariDataset":
    """
    Make a Minari data set.

    Its metadata name the algorithm, the version of this package, the number of updates, and the reference scores. An
    episode that the buffer holds in part (it was going on, or its beginning has been overwritten) is cut there, as by
    a time limit. The environment can be recovered from the data set where its spec alone makes it.

    :param model: Model
    :param dataset_id: Id of the new data set, "namespace/name-v0"
    :param source: "replay_buffer": what was collected while learning; "agent": fresh episodes
    :param n_episodes: Episodes to play, for "agent"
    :param env: Environment for them and for reference scores; None: the model's own, which is reset afterwards
    :param deterministic: Whether the agent acts without exploration noise, for "agent"
    :param ref_min_score: Return that counts as 0; None with ``n_ref_episodes``: a random policy's, measured
    :param ref_max_score: Return that counts as 1; None with ``n_ref_episodes``: the agent's own, measured
    :param n_ref_episodes: Episodes for each reference score that is not given; 0 measures none
    :param task: Of a multi-task model, the task to export, in the units of its own environment; ``env`` is then that
        environment, its id or a function that makes it, by default what the task names. Reference scores that are not
        given are the task's
    :param metadata: Further arguments of ``minari.create_dataset_from_buffers``: author, author_email, code_permalink,
        description, data_format, eval_env, requirements
    :return: The data set
    :raises ValueError: if there is nothing to export, the id is malformed or taken, or the format has no names for the
        observation's keys; nothing half-written stays
    """
    minari = import_minari()
    if source not in SOURCES:
        raise ValueError(f'source must be "replay_buffer" or "agent", got {source!r}.')
    for name, count, least in (("n_episodes", n_episodes, 1), ("n_ref_episodes", n_ref_episodes, 0)):
        if not isinstance(count, numbers.Integral) or count < least:
            raise ValueError(f"{name} must be a whole number of at least {least}, got {count!r}.")
    if ref_min_score is not None and ref_max_score is not None and not ref_min_score < ref_max_score:
        raise ValueError(f"ref_min_score must be lower than ref_max_score, got {ref_min_score} and {ref_max_score}.")
    if metadata.get("data_format") in (None, "hdf5"):
        _check_keys(model.observation_space)
    path = _free_path(dataset_id)
    units = task_units(model.tasks, task, env)
    if units is not None and ref_min_score is None and ref_max_score is None:
        ref_min_score, ref_max_score = units.task.ref_min_score, units.task.ref_max_score
    buffer = model.replay_buffer
    if source == "replay_buffer" and (buffer is None or buffer.size() == 0):
        raise ValueError('The replay buffer is empty: learn() first, load_replay_buffer(), or pass source="agent".')
    playing = _environment(model, env) if units is None else _task_environment(units)
    if playing is None and (source == "agent" or n_ref_episodes > 0):
        raise ValueError("The model has no environment to play in: pass env=..., or give it one with set_env().")
    if playing is model.env and (source == "agent" or n_ref_episodes > 0):
        # It is played in: the next learn() resets it
        model._last_obs = None
    if n_ref_episodes > 0 and playing is not None:
        if ref_min_score is None:
            ref_min_score = mean_return(playing, random_actor(playing), n_ref_episodes)
        if ref_max_score is None:
            ref_max_score = mean_return(playing, _agent(model, True), n_ref_episodes)
        if not ref_min_score < ref_max_score:
            warnings.warn(
                f"The data set gets no reference scores: {ref_max_score:.4g}, which would count as 1, is not above "
                f"{ref_min_score:.4g}, which would count as 0. Pass both, or measure a better agent.",
                stacklevel=3,
            )
            ref_min_score = ref_max_score = None
    if source == "agent" and playing is not None:
        episodes = play(playing, _agent(model, deterministic), n_episodes)
    else:
        assert buffer is not None
        episodes = buffer_episodes(buffer, model.policy.to_env)
    if units is not None:
        episodes = _of_task(episodes, units, dataset_id)
    pair = (model.observation_space, cast(spaces.Box, model.action_space))
    pair = pair if units is None else (units.observation_space, units.action_space)
    values = {
        "env": None if playing is None else _spec(playing, pair, model, units),
        "algorithm_name": type(model).__name__,
        "description": f"{'Replay buffer' if source == 'replay_buffer' else 'Episodes'} of {type(model).__name__} "
        f"after {model._n_updates} updates.",
        "observation_space": pair[0],
        "action_space": pair[1],
        "jpeg_encoding": False,
    } | metadata
    try:
        with warnings.catch_warnings():
            # Minari asks for every field that is left out; that is for the caller to decide
            warnings.filterwarnings("ignore", r"`\w+` is set to None|env_spec is None", UserWarning)
            created = minari.create_dataset_from_buffers(dataset_id, (_recorded(e, pair) for e in episodes), **values)
        created.storage.update_metadata(_own_metadata(model, source, ref_min_score, ref_max_score))
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        raise
    return cast("MinariDataset", minari.load_dataset(dataset_id))


def _check_keys(space: spaces.Space) -> None:
    """Of observations that go into HDF5, which writes what it cannot read again."""
    for key in space if isinstance(space, spaces.Dict) else ():
        if NO_HDF5_NAME.fullmatch(key):
            raise ValueError(
                f'HDF5 has no name for the observation key {key!r}: pass data_format="arrow", or call it otherwise in '
                "the environment."
            )


def _agent(model: "MBDPO", deterministic: bool) -> Actor:
    return lambda obs, state, starts: model.predict(obs, state, starts, deterministic)


def _of_task(episodes: Iterator[Episode], units: TaskUnits, dataset_id: str) -> Iterator[Episode]:
    """The episodes of one task, in its own units."""
    found = False
    for episode in episodes:
        if units.is_of_task(episode.observations):
            found = True
            observations, actions = units.own(episode.observations, episode.actions)
            yield episode._replace(observations=observations, actions=actions)
    if not found:
        raise ValueError(
            f"The replay buffer holds nothing of task {units.task.name!r}: {dataset_id} would be empty. Pass "
            'source="agent" to play it.'
        )


def _recorded(episode: Episode, pair: tuple[spaces.Space, spaces.Box]) -> Any:
    """An ``EpisodeBuffer`` in the shapes and types of these spaces."""
    from minari.data_collector import EpisodeBuffer

    length, (space, action_space) = len(episode.rewards), pair

    def fitted(values: np.ndarray, part: spaces.Space) -> np.ndarray:
        return np.asarray(values, part.dtype).reshape(-1, *(part.shape or ()))

    if isinstance(space, spaces.Dict):
        observations: Any = {key: fitted(episode.observations[key], part) for key, part in space.items()}
    else:
        observations = fitted(episode.observations, space)
    ends = np.zeros((2, length), dtype=bool)
    ends[0 if episode.terminated else 1, -1] = True
    return EpisodeBuffer(
        observations=observations,
        actions=cast(Any, fitted(episode.actions, action_space)),
        rewards=cast(Any, np.asarray(episode.rewards, np.float64)),
        terminations=cast(Any, ends[0]),
        truncations=cast(Any, ends[1]),
    )


def _own_metadata(model: "MBDPO", source: str, low: float | None, high: float | None) -> dict[str, Any]:
    from sb3_mbdpo import __version__

    scores = {"ref_min_score": low, "ref_max_score": high}
    values = {"sb3_mbdpo_version": __version__, "sb3_mbdpo_source": source, "n_updates": model._n_updates}
    return values | {name: float(value) for name, value in scores.items() if value is not None}


def _free_path(dataset_id: str) -> Path:
    """Where the data set will lie. What an interrupted export left there is removed."""
    if not DATASET_ID.fullmatch(dataset_id):
        raise ValueError(
            f'dataset_id must look like "namespace/name-v0", namespaces of two letters or more, got {dataset_id!r}.'
        )
    path = minari_root() / dataset_id
    if path.exists():
        if not _left_over(path):
            raise ValueError(f"{dataset_id} exists already: raise its version, or `minari delete {dataset_id}` first.")
        shutil.rmtree(path)
    return path


def _left_over(path: Path) -> bool:
    """Whether a folder is what an export that was killed leaves: a data set that counts no episode yet."""
    if [entry.name for entry in path.iterdir()] not in ([], ["data"]):
        return False
    file = path / "data" / "metadata.json"
    if not file.is_file():
        return not any(file.parent.glob("*"))
    found = json.loads(file.read_text())
    ours = found.get("algorithm_name", "MBDPO") == "MBDPO" and "sb3_mbdpo_version" not in found
    return bool(ours and found.get("total_episodes") == 0)


def _environment(model: "MBDPO", env: GymEnv | str | None) -> VecEnv | None:
    if env is None:
        return model.env
    return model._as_seen(model._wrap_env(maybe_make_env(env, model.verbose), model.verbose))


def _task_environment(units: TaskUnits) -> VecEnv | None:
    env = units.env
    return None if env is None else DummyVecEnv([lambda: env])


def _spec(
    env: VecEnv, pair: tuple[spaces.Space, spaces.Box], model: "MBDPO", units: TaskUnits | None
) -> EnvSpec | None:
    """The environment's spec, if it alone makes an environment of these spaces and can be written down."""
    spec = units.spec if units is not None else spec_of(env)
    if spec is None:
        return None
    spec = without_monitor(spec)
    try:
        spec.to_json()
        made = gym.make(spec) if units is not None else model._wrap_env(gym.make(spec))
        made.close()
        check_same_spaces((made.observation_space, cast(spaces.Box, made.action_space)), *pair)
    except NOT_MADE as error:
        warnings.warn(
            f"The data set will not name its environment, which its spec alone does not make ({error}).", stacklevel=4
        )
        return None
    return spec
