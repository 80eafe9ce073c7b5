"""What the commands that learn share: arguments of the model, data by name, Ctrl-C, saving, and exit codes."""

import argparse
import ast
import difflib
import inspect
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gymnasium as gym
from stable_baselines3.common.callbacks import BaseCallback

from sb3_mbdpo.chunks import convert_chunks
from sb3_mbdpo.gym_packages import add_packages_argument, import_packages
from sb3_mbdpo.mbdpo import MBDPO
from sb3_mbdpo.offline import OfflineData
from sb3_mbdpo.ranks import ALONE, Ranks
from sb3_mbdpo.shard_format import DESCRIPTION
from sb3_mbdpo.shards import ShardedDataset
from sb3_mbdpo.zoo_checks import BadInputError

FAILURES = (ValueError, ImportError, OSError, RuntimeError, gym.error.Error)
# What arguments are refused with where models, data and environments are opened; a package that is missing, or a disk
# that is full, is no mistake in them
REFUSALS = (
    *(ValueError, TypeError, AssertionError, RuntimeError, gym.error.Error),
    *(FileExistsError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError),
)
INTERRUPTED = 130
# Arguments of MBDPO that the commands decide themselves
OWN = ("policy", "env", "tasks", "device", "verbose", "_init_setup_model")


class ArgumentsError(ValueError):
    """Arguments that turn out not to work."""


@contextmanager
def before_learning() -> Iterator[None]:
    """
    A block in which nothing is learned yet: what is refused there is a mistake in the arguments.

    :raises ArgumentsError: in place of what was raised
    """
    try:
        yield
    except ArgumentsError:
        raise
    except REFUSALS as error:
        raise ArgumentsError(str(error) or type(error).__name__) from error


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


def offline_data(entries: Sequence[str], shards_dir: str | None) -> OfflineData:
    """
    What is meant by arguments that name data.

    :param entries: Minari ids, as ID or TASK=ID; or a folder of shards; or chunk files
    :param shards_dir: Where converted chunks go, None: beside them
    :return: Data as ``learn_offline`` takes it
    :raises ArgumentsError: if kinds are mixed
    """
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


def add_shared_arguments(parser: argparse.ArgumentParser, steps: int, steps_are: str) -> None:
    """
    Arguments of both commands.

    :param parser: Parser to add them to
    :param steps: How long to learn by default
    :param steps_are: What is counted
    """
    parser.add_argument("--steps", type=positive, default=steps, help=f"{steps_are} (default: {steps:,})")
    parser.add_argument("--save", required=True, metavar="PATH", help="where the model goes")
    parser.add_argument("--checkpoint-every", type=positive, metavar="STEPS", help="save it every so many steps too")
    parser.add_argument(
        "--eval-episodes", type=not_negative, default=5, metavar="N", help="episodes of each task (5); 0: no evaluation"
    )
    parser.add_argument("--seed", type=not_negative, help="seed of everything random")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... (default: auto)")
    add_packages_argument(parser)
    parser.add_argument(
        "--set",
        nargs="+",
        type=setting,
        default=[],
        metavar="NAME=VALUE",
        help="further arguments of MBDPO, e.g. learning_rate=1e-4 energy_coef=0.1",
    )
    parser.add_argument("--progress", action="store_true", help="show a progress bar")
    parser.add_argument("--verbose", type=int, choices=(0, 1, 2), default=1, help="0: no logs; 1: logs; 2: more")


def positive(text: str) -> int:
    """
    :param text: An argument
    :return: The whole number that it is, at least 1
    :raises argparse.ArgumentTypeError: if it is smaller
    """
    return _at_least(text, 1)


def not_negative(text: str) -> int:
    """
    :param text: An argument
    :return: The whole number that it is, at least 0
    :raises argparse.ArgumentTypeError: if it is smaller
    """
    return _at_least(text, 0)


def _at_least(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from error
    if value < least:
        raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
    return value


def setting(text: str) -> tuple[str, Any]:
    """
    :param text: ``name=value``; the value as Python writes it, or a word
    :return: Name of an argument of ``MBDPO``, value
    :raises argparse.ArgumentTypeError: if it is something else
    """
    name, equals, value = text.partition("=")
    if name in ("device", "verbose"):
        raise argparse.ArgumentTypeError(f"{name} has an option of its own: --{name}")
    known = [parameter for parameter in inspect.signature(MBDPO.__init__).parameters if parameter not in (*OWN, "self")]
    if not equals or name not in known:
        near = difflib.get_close_matches(name, known, n=3) or known[:3]
        raise argparse.ArgumentTypeError(f"{text!r} is no NAME=VALUE of an argument of MBDPO, e.g. {', '.join(near)}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def model_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """
    :param args: Arguments of a command
    :return: What was given of MBDPO's arguments, by name
    """
    names = ("preset", "model_size", "batch_size", "task_sampling", "seed")
    flags = {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}
    return flags | dict(args.set)


def model_file(path: str) -> Path:
    """
    :param path: Path as it was given
    :return: The model's file, with the suffix that saving adds
    """
    return Path(path) if Path(path).suffix else Path(f"{path}.zip")


def target_file(path: str) -> Path:
    """
    :param path: Where a model is to be saved, as it was given
    :return: The file
    :raises ArgumentsError: if it cannot be written there, before any work
    """
    file = model_file(path)
    if path.endswith(("/", os.sep)) or Path(path).name in ("", "..") or file.is_dir():
        raise ArgumentsError(f"--save {path} is a folder: name the file that the model goes to.")
    folder = next(parent for parent in file.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise ArgumentsError(f"--save {path} cannot be written: {folder} is no folder.")
    if not os.access(folder, os.W_OK):
        raise ArgumentsError(f"--save {path} cannot be written: there is no permission to write to {folder}.")
    return file


def learn_and_save(
    model: MBDPO, learn: Callable[[], Any], stop: StopWhenAsked, path: Path, ranks: Ranks = ALONE
) -> int:
    """
    Learn until done or asked to stop, and save.

    :param model: Model that learns
    :param learn: Its learning
    :param stop: Callback of that learning
    :param path: File to save to
    :param ranks: Processes that learn together
    :return: Exit code
    """
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


def run_command(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, command: Callable[[argparse.Namespace], int]
) -> int:
    """
    Run a command; what goes wrong becomes one line on stderr.

    :param parser: Its parser
    :param argv: Arguments; those of the process by default
    :param command: What it does with them
    :return: Exit code
    """
    try:
        args = parser.parse_args(argv)
        import_packages(args.gym_packages)
        return command(args)
    except SystemExit as stop:
        # argparse has said what is wrong, or has printed its help
        return int(stop.code or 0)
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted, nothing was saved", file=sys.stderr)
        return INTERRUPTED
    except FAILURES as error:
        print(f"{parser.prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, (ArgumentsError, BadInputError)) else 1
