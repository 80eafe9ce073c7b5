"""The card of a checkpoint: what it is, how to use it, what it scores, and what of that was checked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from sb3_mbdpo.checkpoint_config import CARD, CURVE, TRAINING, CheckpointConfig

LIBRARY, LIBRARY_URL = "sb3-mbdpo", "https://pypi.org/project/sb3-mbdpo"
TAGS = ("reinforcement-learning", "stable-baselines3", "mbdpo", "world-model", "diffusion-policy", "deep-rl")
# The last line of a card that may be written again; one without it was edited by hand and stays
MARKER = "<!-- written by sb3-mbdpo; remove this line to keep the card as it is -->"
METRIC = "mean_reward"
# Ids that the Hub takes as data sets: one namespace and a name
REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Metadata at the head of a card: all that the Hub's own form for a new repository writes
METADATA = re.compile(r"\A\s*---\s*\n(.*?)\n---\s*(?:\n|\Z)", re.DOTALL)
LARGEST_TEXT = 1_000_000


class Stated(NamedTuple):
    """What a user has said of a checkpoint, which no model knows: ``card`` only where it was edited by hand."""

    command: str | None = None
    license: str | None = None
    card: str | None = None


def template_path() -> Path:
    """
    :return: Template of the card: inside the package when installed, in ``hub/`` next to it in a checkout
    :raises FileNotFoundError: if it is in neither
    """
    package = Path(__file__).resolve().parent
    candidates = [package / "hub_files" / "model_card.md", package.parent / "hub" / "model_card.md"]
    for path in candidates:
        if path.is_file():
            return path
    raise FileNotFoundError(f"no template of the model card at {candidates[0]} or {candidates[1]}")


def make_card(
    config: CheckpointConfig,
    source: str,
    results: Mapping[str, Any] | None = None,
    command: str | None = None,
    license: str | None = None,
    notes: tuple[str, ...] = (),
    curve: bool = False,
) -> ModelCard:
    """
    Write a card. Its metadata are checked by huggingface_hub's own classes.

    :param config: What ``config.json`` says
    :param source: Repository or folder under which the checkpoint is found, for the snippet
    :param results: Content of ``results.json``
    :param command: The exact command of training
    :param license: License of the weights
    :param notes: Further lines of what was checked and what not
    :param curve: Whether there is a picture of the learning curve
    :return: The card
    """
    tasks = config.tasks["tasks"] if config.tasks else []
    names = [task["name"] for task in tasks] or [config.env["id"] if config.env else "an environment without an id"]
    what = f"an agent of {len(names)} tasks" if len(names) > 1 else f"an agent for {names[0]}"
    card = ModelCard.from_template(
        card_data(config, source, results, license),
        template_path=str(template_path()),
        title=f"MBDPO: {names[0] if len(names) == 1 else f'{len(names)} tasks'}",
        summary=f"This is {what}.",
        library=LIBRARY,
        library_url=LIBRARY_URL,
        snippet=f"```python\n{usage_snippet(config, source)}\n```",
        source=source,
        tasks=tasks,
        results=dict(results) if results else None,
        curve=CURVE if curve else None,
        base_model=config.base_model,
        datasets=config.datasets + ([f"{config.replay_dataset} (replay)"] if config.replay_dataset else []),
        command=command,
        hyperparameters=[(name, _shown(value)) for name, value in config.arguments.items()],
        checked=[*checked_lines(config, results), *notes],
        marker=MARKER,
    )
    # Blocks that are left out leave empty lines
    text = re.sub(r"\n{3,}", "\n\n", str(card))
    return ModelCard(text)


def card_data(
    config: CheckpointConfig, source: str, results: Mapping[str, Any] | None, license: str | None
) -> ModelCardData:
    """
    :param config: What ``config.json`` says
    :param source: Repository or folder
    :param results: Content of ``results.json``
    :param license: License of the weights
    :return: Metadata of the card
    """
    tasks = config.tasks["tasks"] if config.tasks else []
    env_tags = [task["name"] for task in tasks] or ([config.env["id"]] if config.env else [])
    ids = [name for name in (*config.datasets, config.replay_dataset) if name and REPO_ID.fullmatch(name)]
    return ModelCardData(
        library_name=LIBRARY,
        pipeline_tag="reinforcement-learning",
        tags=[*TAGS, *env_tags],
        datasets=ids or None,
        base_model=config.base_model,
        license=license,
        model_name="MBDPO" if results else None,
        eval_results=eval_results(config, results) or None,
    )


def eval_results(config: CheckpointConfig, results: Mapping[str, Any] | None) -> list[EvalResult]:
    """
    :param config: What ``config.json`` says
    :param results: Content of ``results.json``
    :return: One result for each task
    """
    ids = {task["name"]: task["env_id"] for task in (config.tasks["tasks"] if config.tasks else [])}
    how = {name: results[name] for name in ("seed", "act_mode", "deterministic")} if results else {}
    return [
        EvalResult(
            task_type="reinforcement-learning",
            task_name="reinforcement-learning",
            dataset_type=ids.get(task["name"]) or task["name"],
            dataset_name=task["name"],
            metric_type=METRIC,
            metric_name=f"mean return of {len(task['returns'])} episodes",
            metric_value=f"{task['mean']:.2f} ± {task['std']:.2f}",
            metric_args={"episodes": len(task["returns"]), **how},
            verified=False,
        )
        for task in (results or {}).get("tasks", ())
    ]


def usage_snippet(config: CheckpointConfig, source: str, steps: int = 100) -> str:
    """
    A program that loads the checkpoint and acts for a while.

    :param config: What ``config.json`` says
    :param source: Repository or folder
    :param steps: Decisions
    :return: Python
    """
    tasks = config.tasks["tasks"] if config.tasks else []
    known = next((task for task in tasks if task["env_id"]), None)
    lines = ["from sb3_mbdpo import MBDPO", ""]
    env_id = known["env_id"] if known else config.env["id"] if config.env and not tasks else None
    if env_id is None:
        return "\n".join(
            [
                *lines,
                f"model = MBDPO.from_hub({source!r})",
                "observation = model.observation_space.sample()",
                "action, plan = model.predict(observation, deterministic=True)",
            ]
        )
    if env_id.startswith("dm_control/"):
        lines = ["import shimmy  # registers the dm_control environments", *lines]
    if known:
        lines.append(f"model = MBDPO.from_hub({source!r}, task={known['name']!r})  # one of its {len(tasks)} tasks")
    elif config.env and config.env.get("action_repeat", 1) > 1:
        lines = ["import gymnasium", "", *lines[:-1], "from sb3_mbdpo.wrappers import ActionRepeat", ""]
        repeat = config.env["action_repeat"]
        lines.append(f"env = ActionRepeat(gymnasium.make({env_id!r}), {repeat})")
        lines.append(f"model = MBDPO.from_hub({source!r}, env=env)")
    else:
        lines.append(f"model = MBDPO.from_hub({source!r}, env={env_id!r})")
    return "\n".join(
        [
            *lines,
            "env = model.get_env()",
            "observation, plan, starts = env.reset(), None, None",
            f"for _ in range({steps}):",
            "    action, plan = model.predict(observation, plan, starts, deterministic=True)",
            "    observation, reward, starts, info = env.step(action)",
        ]
    )


def checked_lines(config: CheckpointConfig, results: Mapping[str, Any] | None) -> list[str]:
    """
    :param config: What ``config.json`` says
    :param results: Content of ``results.json``
    :return: What was verified when the checkpoint was written, and what was not
    """
    lines = [
        "Checked when written: name, type and shape of every tensor in the file. Loading runs no code from the files."
    ]
    if results:
        lines.append(
            f"Checked: the returns above, by the program that wrote this card, with the versions in `config.json` "
            f"(act mode `{results['act_mode']}`); other act modes were not evaluated."
        )
    else:
        lines.append("Not checked: returns. No evaluation was asked for, or no environment was known.")
    lines.append(
        "Not checked: returns under other versions of the simulator, from other seeds of training, or on real hardware."
    )
    return lines


def _shown(value: Any) -> str:
    text = "`" + str(value).replace("|", "\\|").replace("`", "'") + "`"
    return text if len(text) <= 120 else f"{text[:116]}...`"


def keeps_hand_written(path: Path) -> bool:
    """
    :param path: A card, there or not
    :return: Whether it was written by hand, and is to be kept
    """
    return path.is_file() and MARKER not in path.read_text(encoding="utf-8", errors="replace")


def is_hand_written(text: str) -> bool:
    """
    :param text: A card
    :return: Whether somebody wrote it; one of metadata alone was not, and lacks everything that cards are for
    """
    return MARKER not in text and bool(METADATA.sub("", text, count=1).strip())


def stated_in(folder: Path | None) -> Stated:
    """
    :param folder: A checkpoint, or None
    :return: What its ``training.yml`` and its card say; nothing of what cannot be read
    """
    if folder is None:
        return Stated()
    card = _text(folder / CARD)
    head = METADATA.match(card)
    return Stated(
        _entry(_text(folder / TRAINING), "command"),
        _entry(head[1] if head else "", "license"),
        card if is_hand_written(card) else None,
    )


def _text(path: Path) -> str:
    if not path.is_file() or path.stat().st_size > LARGEST_TEXT:
        return ""
    return path.read_text(encoding="utf-8", errors="replace")


def _entry(text: str, name: str) -> str | None:
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError:
        return None
    value = content.get(name) if isinstance(content, dict) else None
    return value if isinstance(value, str) else None
