"""What is measured before a model is shared: deterministic episodes of each task, and a video of one."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv
from tqdm.auto import tqdm

from sb3_mbdpo.checkpoint_config import make_source_env
from sb3_mbdpo.env_facts import differing_spaces, make_again, spec_to_make_again
from sb3_mbdpo.multitask_env import EnvSource, MultiTaskEnv, make_env
from sb3_mbdpo.normalization import Normalization
from sb3_mbdpo.task_scores import evaluate_tasks
from sb3_mbdpo.tasks import TaskSet

if TYPE_CHECKING:
    from sb3_mbdpo.mbdpo import MBDPO

EVALUATION_SEED = 10_000
MAX_VIDEO_STEPS = 1000
VIDEO_FPS = 30
# Name under which a single task without an id is reported
UNNAMED = "environment"


def evaluation_sources(model: MBDPO, envs: Mapping[str, EnvSource] | EnvSource | None = None) -> dict[str, EnvSource]:
    """
    Environments in which a model can be evaluated.

    :param model: Model
    :param envs: By task; or one for a model of a single task. The others are made by their ids; that of a single task
        which its id alone does not make, as the model's own was made
    :return: Environments, ids or functions that make one, by task; those that are not known here are left out
    :raises ValueError: for one environment where there are several tasks
    """
    if model.tasks is not None and envs is not None and not isinstance(envs, Mapping):
        raise ValueError(
            "A model of several tasks is evaluated task by task: pass eval_envs as a dict, {task: environment, id or "
            "function that makes it}."
        )
    given = dict(envs) if isinstance(envs, Mapping) else {}
    if model.tasks is not None:
        for task in model.tasks:
            if task.name not in given and task.env_id is not None and _is_known(task.env_id):
                given[task.name] = task.env_id
        return given
    if given:
        return given
    name = model._env_source["id"] if model._env_source else UNNAMED
    own = envs if envs is not None and not isinstance(envs, Mapping) else _maker_of(model)
    return {} if own is None else {name: own}


def _is_known(env_id: str) -> bool:
    return env_id in gym.registry


def _maker_of(model: MBDPO) -> Callable[..., gym.Env] | None:
    """What makes the environment of a single-task model: its id, or what made the one that the model has."""
    source = model._env_source
    if source is not None:
        return partial(make_source_env, source) if _is_known(source["id"]) else None
    spec = spec_to_make_again(model.env)
    return None if spec is None else partial(make_again, spec)


def evaluate_model(
    model: MBDPO,
    n_episodes: int = 10,
    envs: Mapping[str, EnvSource] | EnvSource | None = None,
    seed: int = EVALUATION_SEED,
    progress: bool = True,
) -> dict[str, Any]:
    """
    Deterministic episodes of each task.

    :param model: Model
    :param n_episodes: Episodes of each task
    :param envs: Environments, see :func:`evaluation_sources`
    :param seed: Seed of each task's first episode; the following count on
    :param progress: Show a progress bar
    :return: Content of ``results.json``: returns of each task, and how they were taken
    :raises ValueError: if no environment is known, for one with other spaces than the model's, or for one where there
        are several tasks
    """
    sources = evaluation_sources(model, envs)
    if not sources:
        raise ValueError("No environment is known to evaluate in: pass one, or a dict of them by task.")
    with tqdm(total=n_episodes * len(sources), unit="episode", disable=not progress, file=sys.stderr) as bar:

        def on_episode(name: str, value: float) -> None:
            bar.set_description(f"{name} {value:.1f}")
            bar.update()

        if model.tasks is not None:
            scores = evaluate_tasks(model, model.tasks, sources, list(sources), n_episodes, True, seed, on_episode)
            tasks = [
                _result(score.name, score.returns, score.lengths, score.normalized, score.success) for score in scores
            ]
        else:
            tasks = [
                _evaluate_one(model, name, source, n_episodes, seed, on_episode) for name, source in sources.items()
            ]
    return {
        "n_episodes": n_episodes,
        "seed": seed,
        "act_mode": model.policy.act_mode,
        "deterministic": True,
        "num_timesteps": model.num_timesteps,
        "tasks": tasks,
    }


def _result(
    name: str, returns: Any, lengths: Any, normalized: float | None = None, success: float | None = None
) -> dict[str, Any]:
    numbers = [float(value) for value in returns]
    result = {"name": name, "mean": float(np.mean(numbers)), "std": float(np.std(numbers)), "returns": numbers}
    result["lengths"] = [int(length) for length in lengths]
    return result | {"normalized": normalized, "success": success}


def _evaluate_one(
    model: MBDPO, name: str, source: EnvSource, n_episodes: int, seed: int, on_episode: Callable[[str, float], None]
) -> dict[str, Any]:
    """Episodes one after another, each from a seed of its own."""
    vector = _acting_env(model, source)
    returns: list[float] = []
    lengths: list[int] = []
    try:
        for episode in range(n_episodes):
            vector.seed(seed + episode)
            found, steps = evaluate_policy(model, vector, 1, deterministic=True, return_episode_rewards=True)
            returns, lengths = [*returns, float(found[0])], [*lengths, int(steps[0])]  # type: ignore[index]
            on_episode(name, returns[-1])
    finally:
        if not isinstance(source, gym.Env):
            vector.close()
    return _result(name, returns, lengths)


def _acting_env(model: MBDPO, source: EnvSource) -> VecEnv:
    """An environment as the model sees it while it acts: statistics stand still, rewards are as they are."""
    vector: VecEnv = model._wrap_env(DummyVecEnv([lambda: Monitor(make_single(source))]), verbose=0)
    statistics = Normalization.of(model._vec_normalize_env) or model._normalization
    vector = vector if statistics is None else statistics.acting(vector)
    wanted: dict[str, Any] = {"observation_space": model.observation_space, "action_space": model.action_space}
    if differing := differing_spaces(vector, wanted):
        raise ValueError(
            f"The model cannot be evaluated in this environment. {differing}: pass eval_envs=..., made and wrapped as "
            "in training."
        )
    return vector


def make_single(source: EnvSource) -> gym.Env:
    """
    :param source: An environment, its id, or a function that makes one
    :return: The environment as it is, without flattening
    """
    return gym.make(source) if isinstance(source, str) else make_env(source)


# --- video ------------------------------------------------------------------------------------------------------------


def record_video(
    model: MBDPO,
    path: Path,
    envs: Mapping[str, EnvSource] | EnvSource | None = None,
    task: str | None = None,
    seed: int = EVALUATION_SEED,
    max_steps: int = MAX_VIDEO_STEPS,
) -> str | None:
    """
    Write a video of one deterministic episode.

    :param model: Model
    :param path: File to write, an mp4
    :param envs: Environments made with ``render_mode="rgb_array"``; those made by ids are made so
    :param task: Task of a multi-task model; None: the first one
    :param seed: Seed of the episode
    :param max_steps: Decisions after which it ends
    :return: None; or why there is no video, where nothing here can draw the environment or write a video
    """
    _draw_without_screen()
    env: gym.Env | None = None
    try:
        env = _drawn_env(model, envs, task)
        frames, fps = _frames(model, env, seed, max_steps)
        _write_video(path, frames, fps)
    except Exception as error:  # noqa: BLE001 (renderers fail in ways of their own, and must not cost the push)
        path.unlink(missing_ok=True)
        return f"no video: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"
    finally:
        if env is not None and not isinstance(envs, gym.Env):
            env.close()
    return None


def _draw_without_screen() -> None:
    """Choices of libraries that look for a screen when they are imported; those that were made stand."""
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    if sys.platform.startswith("linux") and not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")


def _drawn_env(model: MBDPO, envs: Mapping[str, EnvSource] | EnvSource | None, task: str | None) -> gym.Env:
    tasks: TaskSet | None = model.tasks
    if tasks is None:
        if envs is not None and not isinstance(envs, Mapping):
            return make_single(envs) if not isinstance(envs, str) else gym.make(envs, render_mode="rgb_array")
        maker = _maker_of(model)
        if maker is None:
            raise ValueError("no environment is known to play in")
        return maker(render_mode="rgb_array")
    name = task or tasks.names[0]
    given = envs.get(name) if isinstance(envs, Mapping) else envs
    entry = tasks[name]
    if given is None and entry.env_id is None:
        raise ValueError(f"no environment is known for {name!r}")
    if given is None or isinstance(given, str):
        env_id = given or entry.env_id
        inner = make_env(lambda: gym.make(str(env_id), render_mode="rgb_array"))
        flat = make_env(lambda: inner) if len(inner.observation_space.shape or ()) == 1 else None
        inner = flat or gym.wrappers.FlattenObservation(inner)
        if entry.action_repeat > 1:
            from sb3_mbdpo.wrappers import ActionRepeat

            inner = ActionRepeat(inner, entry.action_repeat)
    else:
        inner = make_env(given)
    return MultiTaskEnv(inner, tasks, name)


def _frames(model: MBDPO, env: gym.Env, seed: int, max_steps: int) -> tuple[list[np.ndarray], float]:
    """Pictures of one episode, and how many of them make a second."""
    if env.render_mode != "rgb_array":
        raise ValueError('the environment was not made with render_mode="rgb_array"')
    vector = _acting_env(model, env) if model.tasks is None else DummyVecEnv([lambda: env])
    vector.seed(seed)
    observation, state, starts = vector.reset(), None, np.ones(1, dtype=bool)
    frames: list[np.ndarray] = []
    for _ in range(max_steps):
        frames.append(np.asarray(env.render(), dtype=np.uint8))
        action, state = model.predict(observation, state, starts, deterministic=True)  # type: ignore[arg-type]
        observation, _, starts, _ = vector.step(action)
        if starts[0]:
            break
    fps = float(env.metadata.get("render_fps") or VIDEO_FPS)
    return frames, min(fps, 2.0 * VIDEO_FPS)


def _write_video(path: Path, frames: list[np.ndarray], fps: float) -> None:
    try:
        import imageio.v2 as imageio
        import imageio_ffmpeg  # noqa: F401  (what imageio writes an mp4 with)
    except ImportError as error:
        raise ImportError('videos need imageio: run `pip install "sb3-mbdpo[video]"`') from error
    with imageio.get_writer(path, format="FFMPEG", fps=fps, codec="libx264", pixelformat="yuv420p") as writer:
        for frame in frames:
            writer.append_data(frame)  # type: ignore[attr-defined]
