"""
The command ``mbdpo``: the RL Zoo's programs with MBDPO among their algorithms, and what the zoo has not::

    mbdpo train --env Pendulum-v1 -P
    mbdpo enjoy --env Pendulum-v1 --no-render
    mbdpo tasks

Exit codes: 0 when done, also after a training that was stopped by Ctrl-C and saved; 1 when something is missing or
failed; 2 for a mistake on the command line; 130 when Ctrl-C came where there was nothing to save.
"""

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

PROG = "mbdpo"


@dataclass(frozen=True)
class Command:
    """
    A command, imported only when it is run.

    :param target: ``module:function``; the function takes the arguments and returns an exit code, or None for 0
    :param summary: A line of help
    :param extra: Extra of the package to install when an import fails
    """

    target: str
    summary: str
    extra: str = "zoo"


COMMANDS = {
    "train": Command("sb3_mbdpo.zoo_commands:train", "train an agent (rl_zoo3 train)"),
    "enjoy": Command("sb3_mbdpo.zoo_commands:enjoy", "watch or evaluate a trained agent (rl_zoo3 enjoy)"),
    "tune": Command("sb3_mbdpo.zoo_commands:tune", "search hyperparameters with Optuna, from the preset's values on"),
    "plot": Command("sb3_mbdpo.plot_command:plot", "draw runs, beside the paper's curves too (rl_zoo3 plots)"),
    "video": Command("sb3_mbdpo.zoo_commands:video", "film a trained agent (rl_zoo3 record_video)"),
    "report": Command("sb3_mbdpo.zoo_commands:report", "compare a trained agent with a random policy, with a GIF"),
    "pretrain": Command("sb3_mbdpo.offline_commands:pretrain", "learn from recorded data", "minari"),
    "finetune": Command("sb3_mbdpo.finetune_command:finetune", "adapt a pretrained model to a task", "minari"),
    "push": Command("sb3_mbdpo.hub_commands:push", "put a trained agent on the Hugging Face Hub"),
    "pull": Command("sb3_mbdpo.hub_commands:pull", "fetch one from there"),
    "convert": Command("sb3_mbdpo.hub_commands:convert", "turn the authors' checkpoints into this package's"),
    "tasks": Command("sb3_mbdpo.task_commands:tasks", "list the paper's tasks, or try them out"),
    "bench": Command("sb3_mbdpo.bench:bench", "time search, update and environment of a preset here"),
}


def usage() -> str:
    """
    :return: The help text
    """
    lines = [f"  {name:<10}{command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            f"usage: {PROG} COMMAND [arguments]",
            "",
            "Model-Based Diffusion Policy Optimization, in the RL Zoo.",
            "",
            "commands:",
            *lines,
            "",
            f"{PROG} COMMAND --help lists the arguments of a command; {PROG} --version says the version.",
            f"First steps: {PROG} train --env Pendulum-v1 -P, then {PROG} report --env Pendulum-v1.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """
    :param argv: a command and its arguments; those of the process by default
    :return: exit code
    """
    name, *arguments = (sys.argv[1:] if argv is None else list(argv)) or [""]
    if name in ("-h", "--help", "help"):
        print(usage())
        return 0
    if name == "--version":
        print(f"sb3-mbdpo {importlib.import_module('sb3_mbdpo').__version__}")
        return 0
    if name not in COMMANDS:
        return _mistake("", unknown_command(name) if name else usage(), 2)
    try:
        code = load(name)(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read the output has seen enough (`| head`); nothing more may be written, not even at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return _mistake(name, "stopped by Ctrl-C; there was nothing to save yet.", 130)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("sb3_mbdpo"):
            return _mistake(name, "this installation of sb3-mbdpo has no such command.", 1)
        return _mistake(name, f'{error}: run `pip install "sb3-mbdpo[{COMMANDS[name].extra}]"`.', 1)
    except ImportError as error:
        return _mistake(name, f"{error}", 1)
    except _bad_input() as error:
        return _mistake(name, f"{error}", 2)
    return 0 if code is None else int(code)


def load(name: str) -> Callable[[list[str]], int | None]:
    """
    :param name: a key of ``COMMANDS``
    :return: what runs it
    """
    module, function = COMMANDS[name].target.split(":")
    return getattr(importlib.import_module(module), function)


def unknown_command(name: str) -> str:
    """
    :param name: what was typed
    :return: a sentence with the nearest command
    """
    import difflib

    near = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{PROG}: there is no command {name!r}; {hint}{PROG} --help lists them."


def _bad_input() -> type[BaseException]:
    from sb3_mbdpo.zoo_checks import BadInputError

    return BadInputError


def _mistake(name: str, text: str, code: int) -> int:
    print(f"{PROG} {name}: {text}" if name else text, file=sys.stderr)
    return code
