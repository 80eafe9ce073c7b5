"""Episodes for a Minari data set: out of a replay buffer, or played."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, unwrap_vec_normalize
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn
from tqdm import tqdm

from sb3_mbdpo.buffers import SequenceReplayBuffer

# Chooses actions: observations, state, episode starts -> actions in the environment's units, next state
Actor = Callable[[Any, Any, np.ndarray], tuple[np.ndarray, Any]]


class Episode(NamedTuple):
    """T steps of one environment: observations [T + 1, ...] or a dict, actions [T, ...], rewards [T]; how it ended."""

    observations: Any
    actions: np.ndarray
    rewards: np.ndarray
    terminated: bool


def buffer_episodes(buffer: SequenceReplayBuffer, to_env: Callable[[np.ndarray], np.ndarray]) -> Iterator[Episode]:
    """
    Episodes of a replay buffer, environment by environment, oldest first.

    :param buffer: Replay buffer
    :param to_env: Turns actions in [-1, 1] into the environment's
    :return: The episodes; one without its beginning or end is what is left of it
    """
    start = buffer.pos if buffer.full else 0
    order = (start + np.arange(buffer.size())) % buffer.buffer_size

    def field(current: np.ndarray, following: np.ndarray, rows: np.ndarray, env: int) -> np.ndarray:
        return np.concatenate([current[rows, env], following[rows[-1:], env]])

    with tqdm(total=buffer.size() * buffer.n_envs, desc="Exporting", unit="steps", disable=None, delay=1) as progress:
        for env in range(buffer.n_envs):
            ends = buffer.window_ends[order, env].copy()
            ends[-1] = True
            stops = (np.flatnonzero(ends) + 1).tolist()
            for begin, stop in zip([0, *stops[:-1]], stops, strict=True):
                rows = order[begin:stop]
                current, following = buffer.observations, buffer.next_observations
                if isinstance(current, dict):
                    observations: Any = {key: field(current[key], following[key], rows, env) for key in current}
                else:
                    observations = field(current, following, rows, env)
                terminated = bool(buffer.dones[rows[-1], env] * (1 - buffer.timeouts[rows[-1], env]))
                yield Episode(observations, to_env(buffer.actions[rows, env]), buffer.rewards[rows, env], terminated)
                progress.update(len(rows))


def play(env: VecEnv, actor: Actor, n_episodes: int, description: str = "Playing") -> Iterator[Episode]:
    """
    Play episodes, each environment its share of them, so that short ones are not favoured.

    :param env: Environment; the statistics of a VecNormalize are left alone, and what it sees is taken, not what it
        makes of that
    :param actor: Chooses actions
    :param n_episodes: Episodes
    :param description: What the progress bar says
    :return: The episodes, in the order in which they end
    :raises ValueError: if something around a VecNormalize changes observations once more
    """
    normalize = unwrap_vec_normalize(env)
    training = normalize is not None and normalize.training
    below = None
    if normalize is not None:
        if normalize.observation_space != env.observation_space:
            raise ValueError(
                "Observations are changed once more after they were normalised: wrap in VecNormalize last."
            )
        normalize.training = False
        normalize.venv = below = LastObservations(normalize.venv)
    left = [(n_episodes + index) // env.num_envs for index in range(env.num_envs)]
    try:
        obs, state, starts = env.reset(), None, np.ones(env.num_envs, dtype=bool)
        raw = obs if normalize is None else normalize.get_original_obs()
        steps: list[list[Any]] = [[] for _ in left]
        with tqdm(total=n_episodes, desc=description, unit="episodes", disable=None, delay=1) as progress:
            while any(left):
                actions, state = actor(obs, state, starts)
                obs, rewards, starts, infos = env.step(actions)
                if normalize is not None:
                    rewards = normalize.get_original_reward()
                for index, ended in enumerate(starts):
                    steps[index].append((_row(raw, index), actions[index], rewards[index]))
                    if not ended:
                        continue
                    if left[index] > 0:
                        last = infos[index]["terminal_observation"] if below is None else below.last[index]
                        truncated = infos[index].get("TimeLimit.truncated", False)
                        yield _joined(steps[index], last, not truncated)
                        left[index] -= 1
                        progress.update()
                    steps[index] = []
                raw = obs if normalize is None else normalize.get_original_obs()
    finally:
        if normalize is not None and below is not None:
            normalize.training, normalize.venv = training, below.venv


class LastObservations(VecEnvWrapper):
    """
    Keeps the last observations of episodes that ended in the latest step, by environment. VecNormalize, which lies
    around it, hands them on clipped, and keeps only the first ones of the next episodes as they were.

    :param venv: Environment
    """

    last: list[Any]

    def reset(self) -> VecEnvObs:
        """:return: First observations"""
        return self.venv.reset()

    def step_wait(self) -> VecEnvStepReturn:
        """:return: Observations, rewards, which episodes ended, infos"""
        observations, rewards, ended, infos = self.venv.step_wait()
        self.last = [info.get("terminal_observation") for info in infos]
        return observations, rewards, ended, infos


def mean_return(env: VecEnv, actor: Actor, n_episodes: int) -> float:
    """
    Mean undiscounted return of some episodes.

    :param env: Environment
    :param actor: Chooses actions
    :param n_episodes: Episodes
    :return: The mean
    """
    return float(np.mean([episode.rewards.sum() for episode in play(env, actor, n_episodes, "Reference score")]))


def random_actor(env: VecEnv, seed: int = 0) -> Actor:
    """
    Uniformly random actions, from a generator of their own.

    :param env: Environment
    :param seed: Seed
    :return: The actor
    """
    space, rng = cast(spaces.Box, env.action_space), np.random.default_rng(seed)

    def act(obs: Any, state: Any, starts: np.ndarray) -> tuple[np.ndarray, Any]:
        actions = rng.uniform(space.low, space.high, (env.num_envs, *space.shape))
        return actions.clip(space.low, space.high).astype(space.dtype), None

    return act


def _row(observations: Any, index: int) -> Any:
    if isinstance(observations, dict):
        return {key: np.array(value[index]) for key, value in observations.items()}
    return np.array(observations[index])


def _joined(steps: list[Any], last: Any, terminated: bool) -> Episode:
    rows = [step[0] for step in steps] + [last]
    if isinstance(last, dict):
        observations: Any = {key: np.stack([np.asarray(row[key]) for row in rows]) for key in last}
    else:
        observations = np.stack(rows)
    return Episode(observations, np.stack([s[1] for s in steps]), np.array([s[2] for s in steps]), terminated)
