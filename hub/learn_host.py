"""
Learning in environments on all GPUs of this host, four environments each::

    torchrun --standalone --nproc-per-node 8 --max-restarts 3 hub/learn_host.py HalfCheetah-v5 runs/cheetah 1000000

A process that dies has all of them started again, up to three times, from the last checkpoint in the folder; a job that
is started anew in the same words goes on from there too.
"""

import argparse
from pathlib import Path

from stable_baselines3.common.env_util import make_vec_env

from sb3_mbdpo import MBDPO
from sb3_mbdpo.distributed import process_group
from sb3_mbdpo.shared_checkpoints import SharedCheckpoints


def main() -> None:
    """Train, or go on training."""
    parser = argparse.ArgumentParser(description="Learn in environments, on all GPUs of a host.")
    parser.add_argument("env", help="Gymnasium id")
    parser.add_argument("folder", type=Path, help="checkpoints and, at the end, model.zip")
    parser.add_argument("steps", type=int, help="environment steps of all processes together")
    parser.add_argument("--n-envs", type=int, default=4, help="environments of each process")
    parser.add_argument("--every", type=int, default=20_000, help="steps between checkpoints")
    parser.add_argument("--preset", default="auto", help="model size and search budget")
    args = parser.parse_args()
    with process_group() as ranks:
        env, checkpoints = make_vec_env(args.env, args.n_envs), SharedCheckpoints(args.folder, args.every)
        model = checkpoints.resume(MBDPO, env, ranks)
        if model is None:
            model = MBDPO("MlpPolicy", env, preset=args.preset, seed=0, verbose=int(ranks.is_main))
        begun = model.num_timesteps
        if begun < args.steps:
            model.learn(args.steps - begun, checkpoints, reset_num_timesteps=begun == 0, ranks=ranks)
        if ranks.is_main:
            model.save(args.folder / "model.zip")


if __name__ == "__main__":
    main()
