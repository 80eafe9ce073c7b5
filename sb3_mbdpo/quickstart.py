"""
Look at a finished run: what the trained policy is worth, how it learned, what it looks like.

After ``python -m sb3_mbdpo.zoo train --env Pendulum-v1 -f logs``::

    python -m sb3_mbdpo.quickstart report --env Pendulum-v1 -f logs

compares the newest run's final model with a random policy on the same initial states, and writes
``learning_curve.png`` and ``policy.gif`` into the folder of the run. Needs neither a screen nor a GPU.
"""

import argparse
import os
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor, load_results
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from sb3_mbdpo.gym_packages import add_packages_argument, import_packages
from sb3_mbdpo.learning_commands import not_negative, positive
from sb3_mbdpo.zoo import ALGO, ActingMBDPO
from sb3_mbdpo.zoo_checks import import_environments

try:
    import pandas  # noqa: F401 (load_results reads with it)
    from matplotlib.figure import Figure
    from PIL import Image
except ImportError as error:
    raise ImportError('the report needs matplotlib, pandas and pillow: run `pip install "sb3-mbdpo[zoo]"`') from error

from rl_zoo3 import create_test_env, get_saved_hyperparams
from rl_zoo3.utils import EnvironmentName, get_model_path

# Seeds of the evaluation episodes, away from the small numbers people train with.
EVALUATION_SEED = 10_000


@dataclass
class Run:
    """
    A run that the RL Zoo wrote.

    :param env_id: the environment it was trained on
    :param folder: its folder
    :param model_path: its saved model
    :param hyperparams: the hyperparameters saved with it, wrappers of the environment included
    :param stats_path: where running statistics of its observations would be, if it has any
    """

    env_id: str
    folder: Path
    model_path: Path
    hyperparams: dict[str, Any] = field(default_factory=dict)
    stats_path: str | None = None

    @classmethod
    def find(cls, env_id: str, log_folder: str, exp_id: int = 0, load_best: bool = False) -> "Run":
        """
        :param env_id: environment id
        :param log_folder: the folder given to training with ``-f``
        :param exp_id: number of the run; 0 for the newest
        :param load_best: take the model that was best in evaluation instead of the final one
        :return: the run
        """
        env_name = EnvironmentName(env_id)
        _, model_path, folder = get_model_path(exp_id, log_folder, ALGO, env_name, load_best)
        hyperparams, stats_path = get_saved_hyperparams(os.path.join(folder, env_name), test_mode=True)
        return cls(env_id, Path(folder), Path(model_path), hyperparams, stats_path)

    def make_env(self, n_envs: int, seed: int, render_mode: str | None = None) -> VecEnv:
        """
        :param n_envs: number of environments
        :param seed: seed of the first one; the others count up from it
        :param render_mode: as for ``gymnasium.make``
        :return: the environment as it was in training, wrappers and all
        """
        env_kwargs = dict(self.hyperparams.get("env_kwargs", {}))
        if render_mode is not None:
            # Not every environment takes the argument
            env_kwargs["render_mode"] = render_mode
        return create_test_env(
            self.env_id,
            n_envs=n_envs,
            stats_path=self.stats_path,
            seed=seed,
            should_render=False,
            hyperparams=deepcopy(self.hyperparams),  # it takes entries out
            env_kwargs=env_kwargs,
            vec_env_cls=DummyVecEnv,
        )


class RandomPolicy:
    """
    Uniformly random actions, in the shape that ``evaluate_policy`` asks for.

    :param env: environment to act in
    :param seed: seed of the actions
    """

    def __init__(self, env: VecEnv, seed: int) -> None:
        self.action_space = deepcopy(env.action_space)
        self.action_space.seed(seed)
        self.n_envs = env.num_envs

    def predict(
        self,
        observation: Any,
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """
        :param observation: not looked at
        :param state: not used
        :param episode_start: not used
        :param deterministic: not used
        :return: one action per environment, and the state as it was
        """
        return np.stack([self.action_space.sample() for _ in range(self.n_envs)]), state


def episode_returns(policy: Any, run: Run, n_episodes: int, seed: int = EVALUATION_SEED) -> np.ndarray:
    """
    Play one episode in each of ``n_episodes`` environments, at the same time: the search is batched over them.

    :param policy: anything with ``predict``; None for random actions
    :param run: the run whose environment to play in
    :param n_episodes: number of episodes
    :param seed: seed of the first episode; the others count up from it
    :return: return of each episode
    """
    env = run.make_env(n_episodes, seed)
    try:
        policy = RandomPolicy(env, seed) if policy is None else policy
        returns, _ = evaluate_policy(
            policy, env, n_eval_episodes=n_episodes, deterministic=True, return_episode_rewards=True
        )
    finally:
        env.close()
    return np.asarray(returns)


def draw_learning_curve(run: Run, path: Path, random_return: float | None = None) -> None:
    """
    Draw the returns of training episodes and of evaluations over environment steps.

    :param run: the run to draw
    :param path: image to write
    :param random_return: mean return of a random policy, drawn as a line
    """
    figure = Figure(figsize=(7, 4.2), layout="constrained")  # without pyplot: no backend, no window
    axes = figure.add_subplot()

    episodes = load_results(str(run.folder))
    within, around = action_repeats(run)
    steps = episodes["l"].cumsum().to_numpy() * within
    axes.scatter(steps, episodes["r"], s=14, color="#9aa5b1", label="training episodes (exploring)", zorder=2)

    evaluations_path = run.folder / "evaluations.npz"
    if evaluations_path.is_file():
        evaluations = np.load(evaluations_path)
        mean, std = evaluations["results"].mean(axis=1), evaluations["results"].std(axis=1)
        # Evaluations are dated in decisions, episodes in steps of what the monitor is around.
        eval_steps = evaluations["timesteps"] * within * around
        axes.plot(eval_steps, mean, marker="o", ms=4, lw=2, color="#0b6e99", label="evaluation (mean ± std)", zorder=3)
        axes.fill_between(eval_steps, mean - std, mean + std, color="#0b6e99", alpha=0.18, lw=0, zorder=1)

    if random_return is not None:
        axes.axhline(random_return, color="#c0562f", ls="--", lw=1.2, label="random policy", zorder=1)

    axes.set_title(f"MBDPO on {run.env_id}")
    axes.set_xlabel("environment steps")
    axes.set_ylabel("episode return")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="best", frameon=False)
    figure.savefig(path, dpi=150)


def action_repeats(run: Run) -> tuple[int, int]:
    """
    :param run: a run
    :return: environment steps that a step of what the monitor is around lasts, and such steps that a decision lasts:
        tasks of the suites repeat actions themselves, wrappers of a configuration do so around the monitor
    """
    env = run.make_env(1, seed=0)
    try:
        return _count_repeats(cast(DummyVecEnv, env.unwrapped).envs[0])
    finally:
        env.close()


def _count_repeats(env: gym.Env) -> tuple[int, int]:
    within, around, layer = 1, 1, env
    while isinstance(layer, gym.Wrapper):
        if isinstance(layer, Monitor):
            within, around = 1, within
        # Wrappers that do not have it would pass on what is below
        within *= int(vars(layer).get("action_repeat", 1))
        layer = layer.env
    return within * int(getattr(layer, "action_repeat", 1)), around


def record_gif(
    policy: Any,
    run: Run,
    path: Path,
    seed: int = EVALUATION_SEED,
    max_seconds: float = 10.0,
    max_fps: float = 20.0,
    width: int = 240,
) -> int:
    """
    Play one episode and write it as an animated GIF.

    :param policy: anything with ``predict``
    :param run: the run whose environment to play in
    :param path: image to write
    :param seed: seed of the episode
    :param max_seconds: length, in the environment's own time, after which to stop
    :param max_fps: at most so many frames a second; frames in between are left out
    :param width: width of the images in pixels
    :return: number of frames written
    """
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame draws without a screen
    env = run.make_env(1, seed, render_mode="rgb_array")
    try:
        render_fps: Any = env.metadata.get("render_fps", 30)
        fps = float(render_fps)
        fps /= _count_repeats(cast(DummyVecEnv, env.unwrapped).envs[0])[1]
        stride = max(1, round(fps / max_fps))

        frames: list[Image.Image] = []
        observation, state, done = env.reset(), None, np.ones(1, dtype=bool)
        for step in range(int(max_seconds * fps)):
            if step % stride == 0:
                frame = Image.fromarray(np.asarray(env.render()))
                frames.append(
                    frame.resize((width, round(width * frame.height / frame.width)), Image.Resampling.BILINEAR)
                )
            action, state = policy.predict(observation, state=state, episode_start=done, deterministic=True)
            observation, _, done, _ = env.step(action)
            if done[0]:
                break
    finally:
        env.close()

    # One palette for the whole clip keeps the background still and the file small.
    palette = frames[len(frames) // 2].quantize(colors=64, method=Image.Quantize.MEDIANCUT)
    quantized = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    quantized[0].save(path, save_all=True, append_images=quantized[1:], duration=round(1000 * stride / fps), loop=0)
    return len(frames)


def format_table(model_returns: np.ndarray, random_returns: np.ndarray) -> str:
    """
    :param model_returns: returns of the trained policy
    :param random_returns: returns of the random policy
    :return: a table of both and of the difference
    """
    lines = [f"  {'policy':<14}{'mean return':>12} ± std"]
    for name, returns in (("MBDPO", model_returns), ("random", random_returns)):
        lines.append(f"  {name:<14}{returns.mean():>12,.1f} ± {returns.std():,.1f}")
    lines.append(f"  {'improvement':<14}{model_returns.mean() - random_returns.mean():>+12,.1f}")
    return "\n".join(lines)


def report(run: Run, n_episodes: int = 10, seed: int = EVALUATION_SEED, device: str = "auto", gif: bool = True) -> None:
    """
    Evaluate a run, draw it, and print what was found and where it is.

    :param run: the run
    :param n_episodes: number of evaluation episodes
    :param seed: seed of the first episode
    :param device: where to run the model
    :param gif: render the policy too
    """
    model = ActingMBDPO.load(run.model_path, device=device)
    curve_path, gif_path = run.folder / "learning_curve.png", run.folder / "policy.gif"

    print(f"Playing {n_episodes} episodes with the trained policy and {n_episodes} with random actions ...")
    model_returns = episode_returns(model, run, n_episodes, seed)
    random_returns = episode_returns(None, run, n_episodes, seed)
    draw_learning_curve(run, curve_path, random_return=float(random_returns.mean()))
    written = {"model": str(run.model_path), "learning curve": str(curve_path)}
    if gif:
        try:
            # Neither the best nor the worst episode: the one in the middle.
            middle = int(np.argsort(model_returns)[n_episodes // 2])
            record_gif(model, run, gif_path, seed + middle)
            written["policy"] = str(gif_path)
        except Exception as error:  # noqa: BLE001 (a missing renderer must not cost the rest of the report)
            written["policy"] = f"not rendered: {type(error).__name__}: {error}"

    seeds = f"{seed} to {seed + n_episodes - 1}"
    print(f"\n{run.env_id} after {model.num_timesteps:,} steps; {n_episodes} episodes, seeds {seeds}")
    print(format_table(model_returns, random_returns) + "\n")
    for name, value in written.items():
        print(f"  {name:<16}{value}")


def main(argv: Sequence[str] | None = None, prog: str = "python -m sb3_mbdpo.quickstart") -> None:
    """
    :param argv: command line arguments; those of the process by default
    :param prog: what the help calls the program
    """
    parser = argparse.ArgumentParser(prog=prog, description="Look at a finished run.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("report", help="compare with a random policy, draw the learning curve, render a GIF")
    command.add_argument("--env", default="Pendulum-v1", help="environment id")
    command.add_argument("-f", "--folder", default="logs", help="log folder given to training")
    command.add_argument("--exp-id", type=int, default=0, help="number of the run (0: the newest)")
    command.add_argument("--load-best", action="store_true", help="the best model in evaluation, not the final one")
    command.add_argument("-n", "--n-episodes", type=positive, default=10, help="number of evaluation episodes")
    command.add_argument(
        "--seed", type=not_negative, default=EVALUATION_SEED, help="seed of the first evaluation episode"
    )
    command.add_argument("--device", default="auto", help="PyTorch device")
    command.add_argument("--num-threads", type=int, default=-1, help="number of threads for PyTorch (-1: its default)")
    command.add_argument("--no-gif", action="store_true", help="do not render the policy")
    add_packages_argument(command)
    args = parser.parse_args(argv)

    if args.num_threads > 0:
        th.set_num_threads(args.num_threads)
    import_packages(args.gym_packages)
    import_environments(args.env)
    run = Run.find(args.env, args.folder, args.exp_id, args.load_best)
    report(run, args.n_episodes, args.seed, args.device, gif=not args.no_gif)


if __name__ == "__main__":
    main()
