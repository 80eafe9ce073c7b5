"""
Pretraining from recorded data and fine-tuning on an environment, from a shell::

    python -m sb3_mbdpo.offline_commands pretrain me/walker/mixed-v0 me/cheetah/mixed-v0 --steps 50000 --save multi
    python -m sb3_mbdpo.offline_commands finetune --model multi --env mbdpo/walker-run-v0 --steps 40000 --save tuned

Both return 0 when done, 2 for arguments that cannot work, 1 with one line on stderr for what fails later, and 130 after
Ctrl-C, having saved what there is. Pretraining can be shared by several processes::

    torchrun --nproc-per-node 8 --max-restarts 3 -m sb3_mbdpo.offline_commands pretrain ... --checkpoint-every 1000
"""

import argparse
import ast
import difflib
import inspect
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gymnasium as gym
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.utils import get_device

from sb3_mbdpo.adaptation import PARTS
from sb3_mbdpo.chunks import convert_chunks
from sb3_mbdpo.distributed import ALONE, TIMEOUT_MINUTES, Ranks, is_restarted, process_group
from sb3_mbdpo.mbdpo import MBDPO
from sb3_mbdpo.multitask_env import make_env, make_multitask_env
from sb3_mbdpo.offline import OfflineData
from sb3_mbdpo.presets import MODEL_SIZES, PRESETS, RATE_RULES, resolve_preset, scaled_learning_rate
from sb3_mbdpo.shard_format import DESCRIPTION
from sb3_mbdpo.shards import ShardedDataset
from sb3_mbdpo.task_replay import TASK_SAMPLINGS
from sb3_mbdpo.tasks import NEAREST, Task, TaskSet

FAILURES = (ValueError, ImportError, OSError, RuntimeError, gym.error.Error)
INTERRUPTED = 130
# Seeds of the evaluation episodes, away from the small numbers people train with
EVALUATION_SEED = 10_000
FRESH = "fresh"
# Arguments of MBDPO that the commands decide themselves
OWN = ("policy", "env", "tasks", "_init_setup_model")
Scores = dict[str, float]


class ArgumentsError(ValueError):
    """Arguments that turn out not to work."""


class StopWhenAsked(BaseCallback):
    """
    Stops after the step in which Ctrl-C was pressed, so that what is saved goes on as if nothing had happened; saves
    every so many steps.

    :param path: Where to save
    :param every: Steps between saves, None for none
    """

    def __init__(self, path: str, every: int | None = None):
        super().__init__()
        self.path, self.every, self.asked = path, every, False

    def _on_step(self) -> bool:
        if self.every is not None and self.num_timesteps % self.every == 0:
            self.model.save(self.path)
        return not self.asked

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take Ctrl-C as a wish to stop; pressed again, it interrupts at once."""

        def ask(number: int, frame: Any) -> None:
            if self.asked or self.n_calls == 0:
                raise KeyboardInterrupt
            self.asked = True

        previous = signal.signal(signal.SIGINT, ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)


# --- pretrain ---------------------------------------------------------------------------------------------------------


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
    _shared_arguments(parser, steps=100_000, steps_are="gradient steps, counted from the very first")
    parser.add_argument("--preset", choices=[*PRESETS, "auto"], default="auto", help="model size and search budget")
    parser.add_argument("--model-size", type=float, choices=sorted(MODEL_SIZES), help="millions of parameters")
    parser.add_argument("--batch-size", type=_positive, help="windows per gradient step")
    parser.add_argument(
        "--scale-learning-rate",
        choices=list(RATE_RULES),
        default="none",
        help="let the learning rate, that of the preset or of --set, follow the batch size: sqrt suits Adam",
    )
    parser.add_argument(
        "--reference-batch-size",
        type=_positive,
        metavar="WINDOWS",
        help="batch size that the learning rate belongs to (default: the preset's)",
    )
    parser.add_argument("--task-sampling", choices=TASK_SAMPLINGS, help="how tasks share a batch")
    parser.add_argument("--observation-dim", type=_positive, help="width of observations, with room for later tasks")
    parser.add_argument("--action-dim", type=_positive, help="number of actions, with room for later tasks")
    parser.add_argument("--checkpoint-every", type=_positive, metavar="STEPS", help="save every so many steps")
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
        type=_positive,
        default=round(TIMEOUT_MINUTES),
        metavar="MINUTES",
        help=f"under torchrun: how long a process waits for the others, longer than an evaluation takes "
        f"({TIMEOUT_MINUTES:.0f})",
    )
    parser.add_argument("--eval-every", type=_positive, metavar="STEPS", help="evaluate in the tasks' environments")
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
    return _run(_pretrain_parser(), argv, _pretrain)


def _pretrain(args: argparse.Namespace) -> int:
    path = _target(args.save)
    with process_group(args.timeout) as ranks:
        with ranks.together():
            data = _data(args.data, args.shards_dir)
            model, resumed = _pretrained_so_far(args, path, data, ranks)
            left = args.steps - model.num_timesteps
            if left < 1 and not _begun_before(args):
                raise ArgumentsError(f"{path} has learned for {model.num_timesteps} steps already: raise --steps.")
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

        return _learn_and_save(model, learn, stop, path, ranks)


def _begun_before(args: argparse.Namespace) -> bool:
    """Whether this may be the continuation of a job that was started in the same words."""
    return args.resume_if_saved or is_restarted()


def _pretrained_so_far(args: argparse.Namespace, path: Path, data: OfflineData, ranks: Ranks) -> tuple[MBDPO, bool]:
    """The model to go on with, and whether it has learned before."""
    given = _model_arguments(args) | _scaled_rate(args)
    saved, verbose = path.exists(), args.verbose if ranks.is_main else 0
    if args.resume and not saved:
        raise ArgumentsError(f"{path} does not exist: there is nothing to --resume.")
    if saved and not args.resume and not _begun_before(args):
        raise ArgumentsError(f"{path} exists: pass --resume to go on from it, or another --save.")
    if saved:
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
    given = _model_arguments(args)
    _, values = resolve_preset(given.get("preset", "auto"), get_device(args.device))
    rate, batch_size = (given.get(name, values[name]) for name in ("learning_rate", "batch_size"))
    if isinstance(rate, bool) or not isinstance(rate, (int, float)):
        raise ArgumentsError(f"--scale-learning-rate needs a number as learning_rate, got {rate!r}.")
    reference = args.reference_batch_size or values["batch_size"]
    return {"learning_rate": scaled_learning_rate(rate, batch_size, reference, args.scale_learning_rate)}


def _data(entries: Sequence[str], shards_dir: str | None) -> OfflineData:
    """What is meant by the arguments: Minari ids, a folder of shards, or chunk files."""
    chunks = [entry for entry in entries if entry.endswith(".pt")]
    folders = [entry for entry in entries if Path(entry, DESCRIPTION).is_file()]
    if chunks:
        if len(chunks) < len(entries):
            raise ArgumentsError(f"{entries} are chunk files and other data: pass one kind.")
        return ShardedDataset(convert_chunks(chunks, shards_dir or Path(chunks[0]).parent / "shards"))
    if folders:
        if len(entries) > 1:
            raise ArgumentsError(f"{folders[0]} is a folder of shards: pass it alone.")
        return ShardedDataset(folders[0])
    named = [entry.partition("=") for entry in entries if "=" in entry]
    if not named:
        return list(entries)
    if len(named) < len(entries):
        raise ArgumentsError("Give either all data sets as TASK=ID or none.")
    tasks: dict[str, list[str]] = {}
    for task, _, name in named:
        tasks.setdefault(task, []).append(name)
    return tasks


def _check_resumed(model: MBDPO, given: dict[str, Any]) -> None:
    """A resumed model keeps its own settings."""
    for name, value in given.items():
        if (name, value) != ("preset", "auto") and getattr(model, name) != value:
            raise ArgumentsError(
                f"The saved model has {name}={getattr(model, name)!r}, not {value!r}: leave it out with --resume."
            )


# --- finetune ---------------------------------------------------------------------------------------------------------


def _finetune_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mbdpo finetune",
        description="Go on learning in an environment: as a new task of a multi-task model, as one that it knows, or "
        "as the task of a single-task model. Prints the scores of all tasks with an environment before and after.",
    )
    parser.add_argument("--model", required=True, metavar="PATH", help="saved model")
    parser.add_argument("--env", metavar="ID", help="Gymnasium id of the environment")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--task", metavar="NAME", help="task that the model knows; --env may then be left out")
    which.add_argument(
        "--like",
        metavar="NAME",
        help=f'known task that the new one starts from; "{NEAREST}", the default: the one whose dynamics and rewards '
        f'are most alike; "{FRESH}": none',
    )
    parser.add_argument("--name", help="name of the new task; default: the environment's id")
    parser.add_argument("--trainable", nargs="+", choices=list(PARTS), help="parts that go on learning; default: all")
    parser.add_argument(
        "--rehearse",
        nargs="+",
        metavar="DATA",
        help="data that is part of each batch, as for `mbdpo pretrain`: what the model was pretrained on, for example",
    )
    parser.add_argument("--rehearse-share", type=float, metavar="SHARE", help="part of each batch (default: a half)")
    parser.add_argument("--shards-dir", help="where converted data goes; default: beside Minari's, or the chunks")
    _shared_arguments(parser, steps=40_000, steps_are="environment steps")
    return parser


def finetune(argv: Sequence[str] | None = None) -> int:
    """
    Go on learning in an environment.

    :param argv: Arguments; those of the process by default
    :return: Exit code
    """
    return _run(_finetune_parser(), argv, _finetune)


def _finetune(args: argparse.Namespace) -> int:
    path, source = _target(args.save), _target(args.model)
    if not source.is_file():
        raise ArgumentsError(f"{source} does not exist: pass the file of a saved model as --model.")
    given = {"buffer_size": max(args.steps, 1_000)} | _model_arguments(args)
    model = MBDPO.load(source, device=args.device, verbose=args.verbose, **given)
    if args.rehearse is None and args.rehearse_share is not None:
        raise ArgumentsError("--rehearse-share is for --rehearse: pass the data there.")
    if args.rehearse is None and model._rehearsal_share > 0:
        print("The model was learning beside recorded data; without --rehearse it goes on without.")
    data = None if args.rehearse is None else _data(args.rehearse, args.shards_dir)
    model.rehearse(data, args.rehearse_share, args.shards_dir)
    before, fresh_start = _prepare(model, args)
    stop = StopWhenAsked(str(path))

    def learn() -> None:
        model.learn(args.steps, stop, reset_num_timesteps=fresh_start, progress_bar=args.progress)

    code = _learn_and_save(model, learn, stop, path)
    if code == 0:
        print(compare(before, _scores(model, args)))
    return code


def _prepare(model: MBDPO, args: argparse.Namespace) -> tuple[Scores, bool]:
    """Give the model its environment; returns scores, and whether steps are counted from zero."""
    tasks = model.tasks
    if args.task is None and args.env is None:
        raise ArgumentsError("Pass the environment, --env ID.")
    if tasks is None:
        given = [name for name in ("task", "like", "name", "trainable") if getattr(args, name) is not None]
        if given:
            raise ArgumentsError(f"{args.model} is a model of a single task: leave out --{' and --'.join(given)}.")
        model.set_env(Monitor(gym.make(args.env)))
        return _scores(model, args), False
    if args.task is None:
        like = args.like or NEAREST
        if like not in (NEAREST, FRESH):
            _known(tasks, like)
        added = model.add_task(args.env, args.name, None if like == FRESH else like, trainable=args.trainable)
        print(f"Task {added.task.name!r} starts from {added.source or 'a fresh embedding'}")
        return _scores(model, args), True
    known = _known(tasks, args.task)
    if args.env is None and known.env_id is None:
        raise ArgumentsError(f"Task {args.task!r} names no environment: pass it, --env ID.")
    model.set_env(make_multitask_env(tasks, {args.task: args.env} if args.env else None, [args.task]))
    model.set_trainable(args.trainable)
    return _scores(model, args), False


def _known(tasks: TaskSet, name: str) -> Task:
    try:
        return tasks[name]
    except ValueError as error:
        raise ArgumentsError(str(error)) from error


def _scores(model: MBDPO, args: argparse.Namespace) -> Scores:
    """Mean return of each task that has an environment."""
    tasks = model.tasks
    if tasks is None:
        env = model._wrap_env(Monitor(gym.make(args.env)))
        env.seed(EVALUATION_SEED)
        mean, _ = evaluate_policy(model, env, args.eval_episodes, warn=False)
        env.close()
        return {args.env: float(mean)}  # type: ignore[arg-type]
    names = [task.name for task in tasks if task.env_id is not None or task.name == args.task]
    envs = {args.task: make_env(args.env, tasks[args.task].action_repeat)} if args.task and args.env else None
    scores = model.evaluate_tasks(args.eval_episodes, envs, names, seed=EVALUATION_SEED)
    return {score.name: score.mean for score in scores}


def compare(before: Scores, after: Scores) -> str:
    """
    Scores side by side.

    :param before: Mean returns by task
    :param after: Mean returns by task, of the same ones
    :return: A table

    >>> print(compare({"run": 10.0, "hop": 4.0}, {"run": 12.5, "hop": 1.0}))
    task    before     after    change
    run       10.0      12.5      +2.5
    hop        4.0       1.0      -3.0
    """
    width = max(len("task"), *(len(name) for name in after))
    lines = [f"{'task':<{width}} {'before':>9} {'after':>9} {'change':>9}"]
    for name, score in after.items():
        lines.append(f"{name:<{width}} {before[name]:>9.1f} {score:>9.1f} {score - before[name]:>+9.1f}")
    return "\n".join(lines)


# --- both -------------------------------------------------------------------------------------------------------------


def _shared_arguments(parser: argparse.ArgumentParser, steps: int, steps_are: str) -> None:
    parser.add_argument("--steps", type=_positive, default=steps, help=f"{steps_are} (default: {steps:,})")
    parser.add_argument("--save", required=True, metavar="PATH", help="where the model goes")
    parser.add_argument("--eval-episodes", type=_positive, default=5, metavar="N", help="episodes of each task (5)")
    parser.add_argument("--seed", type=int, help="seed of everything random")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... (default: auto)")
    parser.add_argument(
        "--set",
        nargs="+",
        type=_setting,
        default=[],
        metavar="NAME=VALUE",
        help="further arguments of MBDPO, e.g. learning_rate=1e-4 energy_coef=0.1",
    )
    parser.add_argument("--progress", action="store_true", help="show a progress bar")
    parser.add_argument("--verbose", type=int, choices=(0, 1, 2), default=1, help="0: no logs; 1: logs; 2: more")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _setting(text: str) -> tuple[str, Any]:
    """``name=value``; the value as Python writes it, or a word."""
    name, equals, value = text.partition("=")
    known = [parameter for parameter in inspect.signature(MBDPO.__init__).parameters if parameter not in (*OWN, "self")]
    if not equals or name not in known:
        near = difflib.get_close_matches(name, known, n=3) or known[:3]
        raise argparse.ArgumentTypeError(f"{text!r} is no NAME=VALUE of an argument of MBDPO, e.g. {', '.join(near)}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _model_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """What was given of MBDPO's arguments."""
    names = ("preset", "model_size", "batch_size", "task_sampling", "seed")
    flags = {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}
    return flags | dict(args.set)


def _target(path: str) -> Path:
    """A model's file, with the suffix that saving adds."""
    return Path(path) if Path(path).suffix else Path(f"{path}.zip")


def _learn_and_save(
    model: MBDPO, learn: Callable[[], Any], stop: StopWhenAsked, path: Path, ranks: Ranks = ALONE
) -> int:
    interrupted = False
    try:
        with stop.listening() if ranks.is_main else _left_to_main():
            learn()
    except KeyboardInterrupt:
        interrupted = True
        # The others are in the middle of an update
        if model._n_updates == 0 or ranks.size > 1:
            raise
    with ranks.together() as outcome:
        outcome.stop = interrupted or stop.asked
        if ranks.is_main:
            model.save(path)
    if ranks.is_main:
        print(f"{'Interrupted' if outcome.stop else 'Done'} at step {model.num_timesteps}: saved {path}")
    return INTERRUPTED if outcome.stop else 0


@contextmanager
def _left_to_main() -> Iterator[None]:
    """Ctrl-C reaches all processes: the first one decides for all after which step they stop."""
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _run(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, command: Callable[[argparse.Namespace], int]
) -> int:
    try:
        return command(parser.parse_args(argv))
    except SystemExit as stop:
        # argparse has said what is wrong, or has printed its help
        return int(stop.code or 0)
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted, nothing was saved", file=sys.stderr)
        return INTERRUPTED
    except FAILURES as error:
        print(f"{parser.prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, ArgumentsError) else 1


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
