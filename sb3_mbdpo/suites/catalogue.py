"""
The paper's tasks as a table: sizes, sets, and which package each needs, all known without building an environment.

>>> from sb3_mbdpo.suites import task_set
>>> task_set("mt30")["walker-walk"].env_id, len(task_set("mt80"))
('mbdpo/walker-walk-v0', 80)
"""

import difflib
import importlib.util
from dataclasses import dataclass

from sb3_mbdpo.suites.registration import (
    DMCONTROL,
    DMCONTROL_DECISIONS,
    MANIPULATION_DECISIONS,
    MANISKILL,
    MYOSUITE,
    VISUAL,
    env_id,
)
from sb3_mbdpo.task_names import META_WORLD, MT30, MT80, sizes_by_name
from sb3_mbdpo.tasks import Task, TaskSet


@dataclass(frozen=True)
class Suite:
    """
    Where tasks come from.

    :param title: Name to print
    :param package: Module that has to be there
    :param extra: Extra of this package that installs it
    """

    title: str
    package: str
    extra: str

    @property
    def installed(self) -> bool:
        """Whether the package is there; it is not imported."""
        return importlib.util.find_spec(self.package) is not None

    @property
    def install_command(self) -> str:
        """What installs it."""
        return f'pip install "sb3-mbdpo[{self.extra}]"'


@dataclass(frozen=True)
class SuiteEntry:
    """
    A task as the suites register it.

    :param name: The paper's name
    :param env_id: Gymnasium id
    :param suite: Where it comes from
    :param observation_dim: Width of its observation vector; None where that is not known
    :param action_dim: Number of its actions; None where that is not known
    :param decisions: Decisions in an episode
    :param pixels_id: Gymnasium id of its variant that is seen; None where it has none
    """

    name: str
    env_id: str
    suite: Suite
    observation_dim: int | None
    action_dim: int | None
    decisions: int
    pixels_id: str | None = None


SUITES = {
    "dmcontrol": Suite("DMControl", "dm_control", "dmc"),
    "metaworld": Suite("Meta-World", "metaworld", "metaworld"),
    "myosuite": Suite("MyoSuite", "myosuite", "myosuite"),
    "maniskill": Suite("ManiSkill", "mani_skill", "maniskill"),
}

TASK_SETS: dict[str, tuple[str, ...]] = {
    "mt30": MT30,
    "mt80": MT80,
    "dmcontrol": tuple(DMCONTROL),
    "metaworld": META_WORLD,
    "myosuite": tuple(MYOSUITE),
    "maniskill": tuple(MANISKILL),
    "locomotion": tuple(task for task in DMCONTROL if task.startswith(("dog-", "humanoid-"))),
    "visual": tuple(VISUAL),
}


def suite_of(task: str) -> Suite:
    """
    :param task: The paper's name of a task
    :return: The suite it comes from
    :raises ValueError: for a name that none of them has
    """
    for name in SUITES:
        if task in TASK_SETS[name]:
            return SUITES[name]
    known = [task for name in SUITES for task in TASK_SETS[name]]
    near = difflib.get_close_matches(task, known, n=3, cutoff=0.4) or known[:3]
    raise ValueError(f"There is no task {task!r} in the suites; did you mean one of {near}? `mbdpo tasks` lists them.")


def suite_entry(task: str) -> SuiteEntry:
    """
    :param task: The paper's name of a task
    :return: What the suites know about it
    :raises ValueError: for a name that none of them has
    """
    suite = suite_of(task)
    observations, actions = sizes_by_name(task) or (None, None)
    decisions = DMCONTROL_DECISIONS if suite is SUITES["dmcontrol"] else MANIPULATION_DECISIONS
    pixels_id = env_id(task, pixels=True) if task in VISUAL else None
    return SuiteEntry(task, env_id(task), suite, observations, actions, decisions, pixels_id)


def task_set_names(name: str) -> tuple[str, ...]:
    """
    :param name: A key of ``TASK_SETS``
    :return: The paper's names of its tasks, in its order
    :raises ValueError: for another name
    """
    if name not in TASK_SETS:
        near = difflib.get_close_matches(name, TASK_SETS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"There is no task set {name!r}; {hint}There are {', '.join(TASK_SETS)}.")
    return TASK_SETS[name]


def task_set(name: str) -> TaskSet:
    """
    A named set for multi-task models, its sizes from the table: no environment is built.

    :param name: A key of ``TASK_SETS``
    :return: The set, each task with its Gymnasium id, sizes and episode length; of the visual tasks the state variants
    :raises ValueError: for another name, or a set with tasks of unknown size
    """
    tasks = []
    for entry in map(suite_entry, task_set_names(name)):
        if entry.observation_dim is None or entry.action_dim is None:
            raise ValueError(
                f"The sizes of {entry.suite.title}'s tasks are not known without building them: use describe_tasks("
                "{name: id for each task})."
            )
        # The ids repeat their actions themselves
        sizes = (entry.observation_dim, entry.action_dim)
        tasks.append(Task(entry.name, *sizes, env_id=entry.env_id, episode_length=entry.decisions))
    return TaskSet(tasks)
