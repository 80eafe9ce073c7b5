"""
Pretraining from recorded data and fine-tuning on an environment, from a shell::

    mbdpo pretrain me/walker/mixed-v0 me/cheetah/mixed-v0 --steps 50000 --save multi
    mbdpo finetune --model multi --env mbdpo/walker-run-v0 --steps 40000 --save tuned

Both return 0 when done, 2 for arguments that cannot work, 1 with one line on stderr for what fails later, and 130 after
Ctrl-C, having saved what there is. Pretraining can be shared by several processes::

    torchrun --nproc-per-node 8 --max-restarts 3 -m sb3_mbdpo pretrain ... --checkpoint-every 1000
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stable_baselines3.common.utils import get_device

from sb3_mbdpo.distributed import TIMEOUT_MINUTES, is_restarted, process_group
from sb3_mbdpo.finetune_command import finetune
from sb3_mbdpo.learning_commands import (
    ArgumentsError,
    StopWhenAsked,
    add_shared_arguments,
    before_learning,
    learn_and_save,
    model_arguments,
    offline_data,
    positive,
    run_command,
    target_file,
)
from sb3_mbdpo.mbdpo import MBDPO
from sb3_mbdpo.offline import OfflineData
from sb3_mbdpo.presets import MODEL_SIZES, PRESETS, RATE_RULES, resolve_preset, scaled_learning_rate
from sb3_mbdpo.ranks import Ranks
from sb3_mbdpo.task_replay import TASK_SAMPLINGS
from sb3_mbdpo.zoo_checks import check_device


def _pretrain_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mbdpo pretrain",
        description="Learn from recorded data, without an environment. Several data sets make one model of several "
        "tasks, one data set a model of one.",
    )
    parser.add_argument(
        "data",
        nargs="+",
        metavar="DATA",
        help="Minari ids, as ID or TASK=ID (a task's name may come more than once); or a folder of shards; or chunk "
        "files (.pt) of the released mt30 and mt80 data",
    )
    add_shared_arguments(parser, steps=100_000, steps_are="gradient steps, counted from the very first")
    parser.add_argument("--preset", choices=[*PRESETS, "auto"], default="auto", help="model size and search budget")
    parser.add_argument("--model-size", type=float, choices=sorted(MODEL_SIZES), help="millions of parameters")
    parser.add_argument("--batch-size", type=positive, help="windows per gradient step")
    parser.add_argument(
        "--scale-learning-rate",
        choices=list(RATE_RULES),
        default="none",
        help="let the learning rate, that of the preset or of --set, follow the batch size: sqrt suits Adam",
    )
    parser.add_argument(
        "--reference-batch-size",
        type=positive,
        metavar="WINDOWS",
        help="batch size that the learning rate belongs to (default: the preset's)",
    )
    parser.add_argument("--task-sampling", choices=TASK_SAMPLINGS, help="how tasks share a batch")
    parser.add_argument("--observation-dim", type=positive, help="width of observations, with room for later tasks")
    parser.add_argument("--action-dim", type=positive, help="number of actions, with room for later tasks")
    resume = parser.add_mutually_exclusive_group()
    resume.add_argument("--resume", action="store_true", help="go on from what --save holds, up to --steps")
    resume.add_argument(
        "--resume-if-saved",
        action="store_true",
        help="the same, or begin where nothing is saved yet: for jobs that may be started again. What torchrun "
        "restarts does so in any case",
    )
    parser.add_argument(
        "--timeout",
        type=positive,
        default=round(TIMEOUT_MINUTES),
        metavar="MINUTES",
        help=f"under torchrun: how long a process waits for the others, longer than an evaluation takes "
        f"({TIMEOUT_MINUTES:.0f})",
    )
    parser.add_argument("--eval-every", type=positive, metavar="STEPS", help="evaluate in the tasks' environments")
    parser.add_argument(
        "--shards-dir", help="where converted data goes; default: beside Minari's, or beside the chunks"
    )
    return parser


def pretrain(argv: Sequence[str] | None = None) -> int:
    """
    Learn from recorded data.

    :param argv: Arguments; those of the process by default
    :return: Exit code
    """
    return run_command(_pretrain_parser(), argv, _pretrain)


def _pretrain(args: argparse.Namespace) -> int:
    path = target_file(args.save)
    with process_group(args.timeout) as ranks:
        with ranks.together(), before_learning():
            _check(args, path)
            data = offline_data(args.data, args.shards_dir)
            model, resumed = _pretrained_so_far(args, path, data, ranks)
            left = args.steps - model.num_timesteps
            if left < 1 and not _begun_before(args):
                raise ArgumentsError(f"{path} has learned for {model.num_timesteps} steps already: raise --steps.")
            if args.eval_every is not None and ranks.is_main:
                _check_evaluation(model)
        if left < 1:
            print(f"Done at step {model.num_timesteps} already: {path}")
            return 0
        evaluation: dict[str, Any] = {}
        if args.eval_every is not None:
            evaluation = {"eval_env": True, "eval_freq": args.eval_every, "n_eval_episodes": args.eval_episodes}
        stop = StopWhenAsked(str(path), args.checkpoint_every)

        def learn() -> None:
            model.learn_offline(
                data,
                left,
                stop,
                reset_num_timesteps=not resumed,
                progress_bar=args.progress,
                shards_dir=args.shards_dir,
                ranks=ranks,
                **evaluation,
            )

        return learn_and_save(model, learn, stop, path, ranks)


def _check(args: argparse.Namespace, path: Path) -> None:
    """Refuse what can be refused before data is converted."""
    saved = path.exists()
    if args.resume and not saved:
        raise ArgumentsError(f"{path} does not exist: there is nothing to --resume.")
    if saved and not args.resume and not _begun_before(args):
        raise ArgumentsError(f"{path} exists: pass --resume to go on from it, or another --save.")
    if args.eval_every is not None and args.eval_episodes == 0:
        raise ArgumentsError("--eval-every needs episodes: leave out --eval-episodes 0.")
    check_device(args.device)
    _scaled_rate(args)


def _check_evaluation(model: MBDPO) -> None:
    """Make the environments of the tasks, as evaluating will."""
    try:
        envs = model._eval_envs(True)
    except ValueError as error:
        raise ArgumentsError(f"--eval-every needs an environment for each task, leave it out: {error}") from error
    for env in envs.values() if isinstance(envs, dict) else [envs]:
        if env is not None:
            env.close()


def _begun_before(args: argparse.Namespace) -> bool:
    """Whether this may be the continuation of a job that was started in the same words."""
    return args.resume_if_saved or is_restarted()


def _pretrained_so_far(args: argparse.Namespace, path: Path, data: OfflineData, ranks: Ranks) -> tuple[MBDPO, bool]:
    """The model to go on with, and whether it has learned before."""
    given = model_arguments(args) | _scaled_rate(args)
    verbose = args.verbose if ranks.is_main else 0
    if path.exists():
        model = MBDPO.load(path, device=args.device)
        _check_resumed(model, given)
        return model, True
    room = {"observation_dim": args.observation_dim, "action_dim": args.action_dim}
    return MBDPO.from_minari(data, **room, **given, device=args.device, verbose=verbose), False


def _scaled_rate(args: argparse.Namespace) -> dict[str, float]:
    """The learning rate that suits the batch size; nothing where it is not to follow it."""
    if args.scale_learning_rate == "none":
        if args.reference_batch_size is not None:
            raise ArgumentsError("--reference-batch-size is for --scale-learning-rate: pass sqrt or linear there.")
        return {}
    given = model_arguments(args)
    _, values = resolve_preset(given.get("preset", "auto"), get_device(args.device))
    rate, batch_size = (given.get(name, values[name]) for name in ("learning_rate", "batch_size"))
    if isinstance(rate, bool) or not isinstance(rate, (int, float)):
        raise ArgumentsError(f"--scale-learning-rate needs a number as learning_rate, got {rate!r}.")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ArgumentsError(f"--scale-learning-rate needs a whole number as batch_size, got {batch_size!r}.")
    reference = args.reference_batch_size or values["batch_size"]
    return {"learning_rate": scaled_learning_rate(rate, batch_size, reference, args.scale_learning_rate)}


def _check_resumed(model: MBDPO, given: dict[str, Any]) -> None:
    """A resumed model keeps its own settings."""
    for name, value in given.items():
        if (name, value) != ("preset", "auto") and getattr(model, name) != value:
            raise ArgumentsError(
                f"The saved model has {name}={getattr(model, name)!r}, not {value!r}: leave it out with --resume."
            )


def main(argv: Sequence[str] | None = None) -> int:
    """
    :param argv: A command and its arguments; those of the process by default
    :return: Exit code
    """
    commands = {"pretrain": pretrain, "finetune": finetune}
    parser = argparse.ArgumentParser(prog="python -m sb3_mbdpo.offline_commands", description=__doc__)
    parser.add_argument("command", choices=commands)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="`COMMAND --help` lists them")
    args = parser.parse_args(argv)
    return commands[args.command](args.arguments)


if __name__ == "__main__":
    sys.exit(main())
