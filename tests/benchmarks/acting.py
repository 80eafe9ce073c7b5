"""
What cheaper ways to act cost in return, on a trained model.

Run it from the repository's root::

    python -m tests.benchmarks.acting --task Pendulum-v1 --steps 2000 --episodes 20

Without ``--model`` one is trained first, with the zoo's hyperparameters, and kept in ``--out``. Every setting then acts
deterministically from the same initial states: the search as it was trained, with bfloat16 products, with fewer
denoising steps for decisions that continue a plan, with fewer candidates, and no search at all. Printed and written to
``<task>.csv``: return, mean absolute difference of its actions from the first setting's in the same situations (in
units of the scaled action, -1 to 1), and milliseconds a decision.
"""

import argparse
import csv
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch as th

from sb3_mbdpo import MBDPO
from sb3_mbdpo.search_config import SearchConfig, with_samples
from tests.benchmarks.environments import make, zoo_hyperparameters

FIELDS = ("setting", "return_mean", "return_std", "worst", "action_difference", "ms")


def settings(config: SearchConfig) -> dict[str, tuple[str, SearchConfig]]:
    """
    :param config: The search as it was trained
    :return: act mode and search by name, the one of all denoising steps first
    """
    steps, config = config.schedule.denoising_steps - 1, replace(config, warm_steps=None)
    found = {"search": ("search", config), "search, bfloat16": ("search", replace(config, dtype=th.bfloat16))}
    warm = [count for count in (10, 5, 3, 2, 1) if count < steps]
    found |= {f"search, {n} of {steps} steps when warm": ("search", replace(config, warm_steps=n)) for n in warm}
    for share in (2, 4):
        count = config.n_samples // share
        found[f"search, {count} candidates"] = ("search", with_samples(config, count))
    return found | {mode: (mode, config) for mode in ("score", "prior")}


def trained(task: str, steps: int, seed: int, path: Path) -> MBDPO:
    """
    Train a model as the zoo would, or take the one that is there.

    :param task: Name of the environment, see ``environments.make``
    :param steps: Environment steps
    :param seed: Seed
    :param path: File of the model
    :return: The model
    """
    if not path.exists():
        kwargs, source = zoo_hyperparameters("mbdpo", task)
        print(f"Training {steps} steps with {source}", flush=True)
        model = MBDPO(**({"policy": "MlpPolicy"} | kwargs), env=make(task, seed), seed=seed)
        model.learn(steps)
        path.parent.mkdir(parents=True, exist_ok=True)
        model.save(path)
    return MBDPO.load(path)


def act(model: MBDPO, task: str, episodes: int, reference: SearchConfig) -> dict[str, Any]:
    """
    Run episodes with the policy's present way to act.

    :param model: Model
    :param task: Name of the environment
    :param episodes: Episodes, from seeds of their own
    :param reference: The search whose actions are compared
    :return: A row
    """
    policy, returns, differences, seconds, decisions = model.policy, [], [], 0.0, 0
    own = policy.act_mode, policy.search_config
    for episode in range(episodes):
        env = make(task)
        obs, _ = env.reset(seed=10_000 + episode)
        state, done, total = None, False, 0.0
        while not done:
            before, begin = state, time.perf_counter()
            action, state = model.predict(obs, state, deterministic=True)
            seconds, decisions = seconds + time.perf_counter() - begin, decisions + 1
            if decisions % 5 == 1:
                policy.act_mode, policy.search_config = "search", reference
                expected, _ = model.predict(obs, before, deterministic=True)
                policy.act_mode, policy.search_config = own
                differences.append(np.abs(policy.scale_action(action) - policy.scale_action(expected)).mean())
            obs, reward, terminated, truncated, _ = env.step(action)
            total, done = total + float(reward), terminated or truncated
        env.close()
        returns.append(total)
    row = {"return_mean": np.mean(returns), "return_std": np.std(returns), "worst": np.min(returns)}
    return row | {"action_difference": np.mean(differences), "ms": 1e3 * seconds / decisions}


def main(argv: list[str] | None = None) -> int:
    """
    Run the command line.

    :param argv: Arguments; None takes the process's own
    :return: Exit status
    """
    parser = argparse.ArgumentParser(description="What cheaper ways to act cost in return.")
    parser.add_argument("--task", default="Pendulum-v1")
    parser.add_argument("--model", type=Path, help="a saved model; one is trained if not given")
    parser.add_argument("--steps", type=int, default=2000, help="environment steps of the training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("logs", "acting"))
    args = parser.parse_args(argv)
    if args.model and not args.model.exists():
        parser.error(f"{args.model} does not exist; leave --model out to train one")
    th.set_num_threads(args.threads)
    name = args.task.replace(":", "-").replace("/", "-")
    model = trained(args.task, args.steps, args.seed, args.model or args.out / f"{name}-{args.steps}-{args.seed}.zip")
    args.out.mkdir(parents=True, exist_ok=True)
    with open(args.out / f"{name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        print(f"{'setting':36}{'return':>18}{'worst':>10}{'difference':>12}{'ms':>8}")
        reference = model.policy.search_config
        for setting, (mode, config) in settings(reference).items():
            model.policy.act_mode, model.policy.search_config = mode, config
            model.policy.seed(args.seed)
            row = {"setting": setting, **act(model, args.task, args.episodes, reference)}
            writer.writerow(row)
            file.flush()
            returns = f"{row['return_mean']:.1f} ± {row['return_std']:.1f}"
            print(
                f"{setting:36}{returns:>18}{row['worst']:>10.1f}{row['action_difference']:>12.3f}{row['ms']:>8.2f}",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
