"""``mbdpo bench``: what a decision, an update and an environment step cost here, with a preset."""

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th

from sb3_mbdpo import MBDPO
from sb3_mbdpo.gym_packages import add_packages_argument, import_packages
from sb3_mbdpo.learning_commands import positive
from sb3_mbdpo.presets import PRESETS
from sb3_mbdpo.zoo_checks import BadInputError, check_device, check_environment, import_environments, sentence


def bench(arguments: Sequence[str]) -> int:
    """
    :param arguments: command line arguments
    :return: exit code
    """
    parser = argparse.ArgumentParser(
        prog="mbdpo bench",
        description="Time a decision, an update and an environment step: medians of repetitions, after a warm-up.",
    )
    parser.add_argument("--env", default="Pendulum-v1", help="environment id")
    parser.add_argument("--preset", default="auto", choices=["auto", *PRESETS], help="preset of MBDPO")
    parser.add_argument("--policy", default="MlpPolicy", help="policy of MBDPO")
    parser.add_argument("--repeat", type=positive, default=20, help="repetitions of each measurement")
    parser.add_argument("--num-threads", type=int, default=-1, help="threads of PyTorch (-1: its default)")
    parser.add_argument("--device", default="auto", help="PyTorch device")
    add_packages_argument(parser)
    args = parser.parse_args(list(arguments))
    import_packages(args.gym_packages)
    import_environments(args.env)
    check_environment(args.env)
    check_device(args.device)
    if args.num_threads > 0:
        th.set_num_threads(args.num_threads)

    env = gym.make(args.env)
    # As much replay as a batch of whole sequences needs, no more
    kwargs: dict[str, Any] = {"buffer_size": 1_000, "learning_starts": 500, "seed": 0}
    try:
        model = MBDPO(args.policy, env, preset=args.preset, device=args.device, **kwargs)
    except (ValueError, TypeError, AssertionError) as error:
        raise BadInputError(f"MBDPO cannot be built for {args.env}: {sentence(error)}.") from error
    model.learn(500)
    observation, plan = env.reset(seed=0)[0], None
    _, plan = model.predict(observation, deterministic=True)
    times = {
        "decision, search": median(lambda: model.predict(observation, state=plan, deterministic=True), args.repeat),
        "update": median(lambda: model.train(1, model.batch_size), args.repeat),
        "environment step": median(lambda: step(env), 5 * args.repeat),
    }
    env.close()
    print(f"{args.env}, preset {args.preset} on {model.device}, {th.get_num_threads()} threads")
    for name, seconds in times.items():
        print(f"  {name:<18}{1e3 * seconds:>9.2f} ms")
    print("One decision, one update and one environment step are what a training step costs at a ratio of one update.")
    return 0


def step(env: gym.Env) -> None:
    """
    A random step; a new episode where the last one is over.

    :param env: the environment
    """
    _, _, terminated, truncated, _ = env.step(env.action_space.sample())
    if terminated or truncated:
        env.reset()


def median(call: Callable[[], object], repeat: int) -> float:
    """
    :param call: what to time; it is called twice before
    :param repeat: how many times to time it
    :return: median of the seconds a call takes, the device's work included
    """
    seconds = []
    for index in range(repeat + 2):
        started = time.perf_counter()
        call()
        if th.cuda.is_available():
            th.cuda.synchronize()
        if index >= 2:
            seconds.append(time.perf_counter() - started)
    return float(np.median(seconds))
