"""Going on with a saved model in an environment, from a shell: ``mbdpo finetune``."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import gymnasium as gym
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv

from sb3_mbdpo.adaptation import PARTS
from sb3_mbdpo.env_facts import episode_length_of
from sb3_mbdpo.learning_commands import (
    ArgumentsError,
    StopWhenAsked,
    add_shared_arguments,
    before_learning,
    learn_and_save,
    model_arguments,
    model_file,
    offline_data,
    run_command,
    target_file,
)
from sb3_mbdpo.mbdpo import MBDPO
from sb3_mbdpo.multitask_env import make_env, make_multitask_env
from sb3_mbdpo.tasks import NEAREST, Task, TaskSet
from sb3_mbdpo.weight_averaging import WeightAveraging
from sb3_mbdpo.zoo_checks import check_actions, check_device, check_environment, import_environments

# Seeds of the evaluation episodes, away from the small numbers people train with
EVALUATION_SEED = 10_000
FRESH = "fresh"
Scores = dict[str, float]


def _finetune_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mbdpo finetune",
        description="Go on learning in an environment: as a new task of a multi-task model, as one that it knows, or "
        "as the task of a single-task model. Updates begin after an episode, or after the steps of `--set "
        "learning_starts=N`. Prints the scores of all tasks with an environment before and after. A checkpoint of an "
        "interrupted run goes on as a model that knows its task, --model CHECKPOINT --task NAME.",
    )
    parser.add_argument(
        "--model",
        required=True,
        help="zip of save() (of your own: a zip can run code), folder of save_pretrained(), or repository user/name",
    )
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
    parser.add_argument(
        "--average-weights",
        type=_averaging,
        metavar="DECAY",
        help="act with a moving average of the weights, and save it: 0.998 averages over the last 500 updates",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what --save holds, once something is saved")
    add_shared_arguments(parser, steps=40_000, steps_are="environment steps")
    return parser


def _averaging(text: str) -> WeightAveraging:
    try:
        return WeightAveraging(float(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def finetune(argv: Sequence[str] | None = None) -> int:
    """
    Go on learning in an environment.

    :param argv: Arguments; those of the process by default
    :return: Exit code
    """
    return run_command(_finetune_parser(), argv, _finetune)


def _finetune(args: argparse.Namespace) -> int:
    path, source = target_file(args.save), _source(args.model)
    if path.exists() and not args.overwrite:
        raise ArgumentsError(
            f"{path} exists: pass another --save, or --overwrite to replace it once something is saved."
        )
    with before_learning():
        check_device(args.device)
        model = _opened(source, args)
        is_new = _give_env(model, args)
    before = _scores(model, args)
    fresh_start = is_new or _begin_anew(model, args)
    stop = StopWhenAsked(str(path), args.checkpoint_every)
    callbacks: list[BaseCallback] = [stop] if args.average_weights is None else [stop, args.average_weights]

    def learn() -> None:
        try:
            model.learn(args.steps, callbacks, reset_num_timesteps=fresh_start, progress_bar=args.progress)
        finally:
            # Ctrl-C may have come where the average is not in place
            if args.average_weights is not None:
                args.average_weights.on_training_end()

    code = learn_and_save(model, learn, stop, path)
    if code == 0 and args.eval_episodes > 0:
        print(compare(before, _scores(model, args)))
    return code


def _source(given: str) -> Path | str:
    """File, folder or repository of a model."""
    file, folder = model_file(given), Path(given).expanduser()
    if file.is_file():
        return file
    if folder.is_dir():
        return folder
    if given.count("/") == 1 and not given.startswith((".", "~")) and not folder.parent.is_dir():
        return given
    raise ArgumentsError(
        f"{given} does not exist: --model takes the zip of save(), the folder of save_pretrained(), or a repository "
        "user/name."
    )


def _opened(source: Path | str, args: argparse.Namespace) -> MBDPO:
    """The saved model, with the data to rehearse."""
    given = {"buffer_size": max(args.steps, 1_000)} | model_arguments(args)
    is_zip = isinstance(source, Path) and source.is_file()
    open_model = MBDPO.load if is_zip else MBDPO.from_pretrained
    model = open_model(source, device=args.device, verbose=args.verbose, **given)
    _check(model, args)
    if args.rehearse is None and args.rehearse_share is not None:
        raise ArgumentsError("--rehearse-share is for --rehearse: pass the data there.")
    if args.rehearse is None and model._rehearsal_share > 0:
        print("The model was learning beside recorded data; without --rehearse it goes on without.")
    data = None if args.rehearse is None else offline_data(args.rehearse, args.shards_dir)
    return model.rehearse(data, args.rehearse_share, args.shards_dir)


def _check(model: MBDPO, args: argparse.Namespace) -> None:
    """Refuse what does not go with the model, before data is converted."""
    tasks = model.tasks
    if args.task is None and args.env is None:
        raise ArgumentsError("Pass the environment, --env ID.")
    if args.env is not None:
        _check_environment(args.env)
    if tasks is None:
        given = [name for name in ("task", "like", "name", "trainable") if getattr(args, name) is not None]
        if given:
            raise ArgumentsError(f"{args.model} is a model of a single task: leave out --{' and --'.join(given)}.")
    elif args.task is not None and _known(tasks, args.task).env_id is None and args.env is None:
        raise ArgumentsError(f"Task {args.task!r} names no environment: pass it, --env ID.")
    elif args.like not in (None, NEAREST, FRESH):
        _known(tasks, args.like)


def _check_environment(env_id: str) -> None:
    import_environments(env_id)
    try:
        # An id without its version, or behind a module's name, is one too
        env = gym.make(env_id)
    except (ImportError, gym.error.Error) as error:
        # What is mistyped, or has to be installed
        if ":" not in env_id:
            check_environment(env_id)
        raise ArgumentsError(str(error)) from error
    env.close()
    check_actions(env_id, env.action_space, other_algorithms=False)


def _give_env(model: MBDPO, args: argparse.Namespace) -> bool:
    """Give the model its environment; returns whether that is a new task's."""
    tasks = model.tasks
    if tasks is None:
        model.set_env(Monitor(gym.make(args.env)))
        return False
    if args.task is None:
        like = args.like or NEAREST
        added = model.add_task(
            args.env,
            args.name,
            None if like == FRESH else like,
            trainable=args.trainable,
            learning_starts=dict(args.set).get("learning_starts"),
        )
        print(f"Task {added.task.name!r} starts from {added.source or 'a fresh embedding'}")
        return True
    model.set_env(make_multitask_env(tasks, {args.task: args.env} if args.env else None, [args.task]))
    model.set_trainable(args.trainable)
    return False


def _begin_anew(model: MBDPO, args: argparse.Namespace) -> bool:
    """Whether steps are counted from zero: with those so far, of either kind, no update would wait for data."""
    assert model.replay_buffer is not None
    if model.replay_buffer.size() > 0 and not model._counts_offline_steps:
        # Saved with what it has collected
        return False
    # What has learned nothing yet begins with random steps, as it would have
    if model._n_updates > 0:
        tasks = model.tasks
        length = episode_length_of(cast(VecEnv, model.env)) if tasks is None else tasks[args.task].episode_length
        model._begin_finetuning(length, dict(args.set).get("learning_starts"))
    return True


def _known(tasks: TaskSet, name: str) -> Task:
    try:
        return tasks[name]
    except ValueError as error:
        raise ArgumentsError(str(error)) from error


def _scores(model: MBDPO, args: argparse.Namespace) -> Scores:
    """Mean return of each task that has an environment; none where no episodes are wanted."""
    tasks = model.tasks
    if args.eval_episodes == 0:
        return {}
    if tasks is None:
        env = model._as_seen(model._wrap_env(Monitor(gym.make(args.env))))
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
