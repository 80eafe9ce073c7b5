"""
Checkpoints from the command line::

    mbdpo push logs/mbdpo/Pendulum-v1_1/Pendulum-v1.zip me/mbdpo-Pendulum-v1
    mbdpo pull me/mbdpo-Pendulum-v1 models/pendulum
    mbdpo convert walker-run-1.pt models/walker-run --env mbdpo/walker-run-v0

Each command is a function of its arguments that returns an exit code: 0, or 1 after one line that says what is wrong.
"""

import argparse
import json
import pickle
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import gymnasium as gym
import torch as th

from sb3_mbdpo.checkpoint_config import CONFIG, CURVE, RESULTS, read_config
from sb3_mbdpo.gym_packages import add_packages_argument, import_packages
from sb3_mbdpo.hub_transfer import download_checkpoint, pull_checkpoint, upload_checkpoint
from sb3_mbdpo.learning_commands import not_negative, positive
from sb3_mbdpo.mbdpo import MBDPO
from sb3_mbdpo.onnx_export import export_onnx, export_world_model
from sb3_mbdpo.release_conversion import convert_released

# What is the user's to mend; anything else is a bug, and shows as one
USER_ERRORS = (ValueError, OSError, ImportError, gym.error.Error, pickle.UnpicklingError)


def _run(command: Callable[[argparse.Namespace], None], arguments: argparse.Namespace) -> int:
    if getattr(arguments, "num_threads", -1) > 0:
        th.set_num_threads(arguments.num_threads)
    try:
        import_packages(getattr(arguments, "gym_packages", None) or ())
        command(arguments)
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser(name: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"mbdpo {name}", description=description)
    parser.add_argument("--num-threads", type=int, default=-1, help="threads of PyTorch (-1: its default)")
    return parser


# --- push -------------------------------------------------------------------------------------------------------------


def push(argv: Sequence[str] | None = None) -> int:
    """
    Evaluate a model and upload it.

    :param argv: Arguments of the command; those of the process by default
    :return: Exit code
    """
    parser = _parser("push", "Evaluate a model, record a video, write a card and upload all of it to the Hub.")
    parser.add_argument(
        "model", help="folder of save_pretrained(), or a zip of save() of your own (a zip can run code)"
    )
    parser.add_argument("repo_id", help='repository, "user/name"')
    parser.add_argument(
        "-n",
        "--n-eval-episodes",
        type=not_negative,
        help="episodes of each task (0: none; by default 10, where an environment is known)",
    )
    parser.add_argument("--seed", type=not_negative, default=10_000, help="seed of each task's first episode")
    parser.add_argument("--env", help="environment id to evaluate in, where the model does not know it")
    add_packages_argument(parser)
    parser.add_argument("--no-video", action="store_true", help="upload without a video")
    parser.add_argument("--as-is", action="store_true", help="upload a folder as it is, without evaluating again")
    parser.add_argument("--command", help="the exact command of training; by default the one in the folder")
    parser.add_argument("--dataset", nargs="*", default=None, help="data sets that it learned from, for the card")
    parser.add_argument("--license", help="license of the weights; by default the one of the folder's card")
    parser.add_argument("--learning-curve", help="picture for the card (png); by default the one in the folder")
    parser.add_argument("--include-optimizer", action="store_true", help="with optimizers, to go on training exactly")
    parser.add_argument("--commit-message", default="Upload a model of sb3-mbdpo", help="message of the commit")
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    parser.add_argument("--revision", help="branch to commit to")
    parser.add_argument("--create-pr", action="store_true", default=None, help="open a pull request")
    parser.add_argument("--token", help="token of the Hub; by default the one of `hf auth login`")
    return _run(_push, parser.parse_args(argv))


def _push(arguments: argparse.Namespace) -> None:
    path = Path(arguments.model)
    transfer = {
        name: getattr(arguments, name) for name in ("commit_message", "private", "token", "revision", "create_pr")
    }
    if arguments.as_is:
        print(upload_checkpoint(path, arguments.repo_id, keep_card=False, **transfer))
        return
    if not path.exists():
        raise ValueError(f"There is no {path}: pass a folder of save_pretrained() or a zip of save().")
    curve = arguments.learning_curve
    if path.is_dir():
        model = MBDPO.from_pretrained(path)
        curve = curve or (path / CURVE if (path / CURVE).is_file() else None)
    else:
        model = MBDPO.load(path)
    url = model.push_to_hub(
        arguments.repo_id,
        n_eval_episodes=arguments.n_eval_episodes,
        eval_seed=arguments.seed,
        eval_envs=arguments.env,
        video=not arguments.no_video,
        command=arguments.command,
        datasets=arguments.dataset,
        license=arguments.license,
        learning_curve=curve,
        include_optimizer=arguments.include_optimizer,
        **transfer,
    )
    print(url)


# --- pull -------------------------------------------------------------------------------------------------------------


def pull(argv: Sequence[str] | None = None) -> int:
    """
    Download a checkpoint, see that it loads, and say what it is.

    :param argv: Arguments of the command; those of the process by default
    :return: Exit code
    """
    parser = _parser("pull", "Download a checkpoint from the Hub, see that it loads, and say what it is.")
    parser.add_argument("repo_id", help='repository, "user/name"')
    parser.add_argument("folder", nargs="?", help="where it goes; by default the Hub's cache")
    parser.add_argument("--revision", help="branch, tag or commit")
    parser.add_argument("--cache-dir", help="where downloads are kept")
    parser.add_argument("--token", help="token of the Hub, for private repositories")
    parser.add_argument("--no-check", action="store_true", help="download only")
    return _run(_pull, parser.parse_args(argv))


def _pull(arguments: argparse.Namespace) -> None:
    token, cache = arguments.token, arguments.cache_dir
    if arguments.folder is not None and not arguments.no_check:
        # Into the cache first: a folder of the user's is not filled with what does not load
        MBDPO.from_pretrained(download_checkpoint(arguments.repo_id, arguments.revision, token, cache), device="cpu")
    folder, _ = pull_checkpoint(arguments.repo_id, arguments.folder, arguments.revision, token, cache)
    if not arguments.no_check and arguments.folder is None:
        MBDPO.from_pretrained(folder, device="cpu")
    print(describe_folder(folder))


def describe_folder(folder: Path) -> str:
    """
    :param folder: A checkpoint
    :return: What it is, in a few lines
    """
    config = read_config(folder)
    tasks = [task["name"] for task in config.tasks["tasks"]] if config.tasks else []
    lines = [f"{folder}", f"  policy      {config.policy}, acts by {config.arguments.get('act_mode')}"]
    lines.append(f"  trained     {config.state.get('num_timesteps', 0):,} timesteps")
    if tasks:
        lines.append(f"  tasks       {', '.join(tasks)}")
    elif config.env:
        lines.append(f"  environment {config.env.get('id')}")
    if config.base_model:
        lines.append(f"  base model  {config.base_model}")
    if (folder / RESULTS).is_file():
        try:
            results = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
            shown = [f"{task['name']} {task['mean']:.1f} ± {task['std']:.1f}" for task in results["tasks"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{RESULTS} cannot be read ({error}).") from error
        lines.append(f"  returns     {', '.join(shown)}")
    return "\n".join(lines)


# --- convert ----------------------------------------------------------------------------------------------------------


def convert(argv: Sequence[str] | None = None) -> int:
    """
    Convert a released ``.pt`` file, or export a checkpoint to ONNX.

    :param argv: Arguments of the command; those of the process by default
    :return: Exit code
    """
    parser = _parser(
        "convert", "Convert a .pt file that the authors of MBDPO or TD-MPC2 released to a checkpoint, or one to ONNX."
    )
    parser.add_argument("source", help="a released .pt file; a checkpoint (folder or repository) with --onnx")
    parser.add_argument("target", help="folder of the new checkpoint; file or folder of the ONNX files")
    parser.add_argument("--task-names", nargs="*", help="tasks of a multi-task file that is neither mt30 nor mt80")
    parser.add_argument("--action-dims", nargs="*", type=int, help="actions of each task, where the file does not say")
    parser.add_argument("--episode-length", type=positive, help="longest episode in decisions, for the discount")
    parser.add_argument("--env", help="environment id of a single task")
    parser.add_argument("--simnorm-dim", type=int, default=8, help="group size of SimNorm")
    parser.add_argument("--vmin", type=float, default=-10.0, help="lowest bin of the regression")
    parser.add_argument("--vmax", type=float, default=10.0, help="highest bin of the regression")
    parser.add_argument("--license", help="license of the weights, for the card")
    parser.add_argument(
        "--onnx", action="store_true", help="export the policy of a checkpoint that acts without search"
    )
    parser.add_argument("--act-mode", choices=("score", "prior"), help="which policy; by default the checkpoint's own")
    parser.add_argument("--parts", nargs="*", help="export these parts of the world model instead (none given: all)")
    return _run(_convert, parser.parse_args(argv))


def _convert(arguments: argparse.Namespace) -> None:
    target = Path(arguments.target)
    if arguments.onnx or arguments.parts is not None:
        model = MBDPO.from_pretrained(arguments.source, device="cpu")
        if arguments.parts is None:
            print(export_onnx(model, target, arguments.act_mode))
        else:
            print("\n".join(str(path) for path in export_world_model(model, target, arguments.parts or None).values()))
        return
    if not Path(arguments.source).is_file():
        raise ValueError(f"There is no file {arguments.source}: pass a released .pt file.")
    if (target / CONFIG).exists():
        raise ValueError(f"{target} holds a checkpoint already: pass another folder.")
    converted = convert_released(
        arguments.source,
        arguments.task_names,
        None if arguments.action_dims is None else tuple(arguments.action_dims),
        arguments.episode_length,
        arguments.env,
        simnorm_dim=arguments.simnorm_dim,
        vmin=arguments.vmin,
        vmax=arguments.vmax,
    )
    converted.save_pretrained(
        target, license=arguments.license, command=f"converted from {Path(arguments.source).name}"
    )
    print(describe_folder(target))


COMMANDS = {"push": push, "pull": pull, "convert": convert}


def main(argv: Sequence[str] | None = None) -> int:
    """
    :param argv: Command and its arguments; those of the process by default
    :return: Exit code
    """
    given = list(sys.argv[1:] if argv is None else argv)
    if not given or given[0] not in COMMANDS:
        print(f"usage: python -m sb3_mbdpo.hub_commands {{{','.join(COMMANDS)}}} ...", file=sys.stderr)
        return 0 if given[:1] in (["-h"], ["--help"]) else 2
    return COMMANDS[given[0]](given[1:])


if __name__ == "__main__":
    sys.exit(main())
