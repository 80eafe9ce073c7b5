"""Minari data sets by id, and what can be told of them without reading an episode: tasks, spaces, limits, scores."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, cast

import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec, WrapperSpec, parse_env_id
from stable_baselines3.common.preprocessing import is_image_space, is_image_space_channels_first
from stable_baselines3.common.vec_env import VecTransposeImage

from sb3_mbdpo.arguments import check_spaces
from sb3_mbdpo.env_facts import MONITOR, has_settings_of_id, settings_of
from sb3_mbdpo.shard_format import DESCRIPTION, TaskData

if TYPE_CHECKING:
    from minari import MinariDataset

# Wrappers that change nothing, or that environments made from ids for several tasks get too
HARMLESS_WRAPPERS = (MONITOR, "FlattenObservation")
MinariSource: TypeAlias = "str | MinariDataset"
# A data set, several of them (those of one environment are of one task), or data sets by the names of their tasks
Dataset: TypeAlias = "MinariSource | Sequence[MinariSource] | Mapping[str, MinariSource | Sequence[MinariSource]]"


def import_minari() -> Any:
    """
    :return: The package ``minari``
    :raises ImportError: saying how to install it
    """
    try:
        import minari
    except ImportError as error:
        raise ImportError(
            'Minari data sets need the package minari: pip install "sb3-mbdpo[minari]" installs it.'
        ) from error
    return minari


class DataTask(NamedTuple):
    """
    Data sets of one task.

    :param name: Its name, None where there is only one
    :param datasets: The data sets
    :param observation_space: Their observation space as Stable-Baselines3 has it, images channels first
    :param action_space: Their action space
    """

    name: str | None
    datasets: "list[MinariDataset]"
    observation_space: spaces.Space
    action_space: spaces.Box


def open_tasks(dataset: Dataset, named: bool = False) -> list[DataTask]:
    """
    Open Minari data sets and check that those of a task belong together.

    :param dataset: An id or ``MinariDataset``, several of them, or a dict of them by the names of tasks. In a list,
        those that recorded the same environment are of one task
    :param named: Name a single task too. Tasks that were not given by name are called as their environment, without
        namespace and version, or as their data set where it names none
    :return: The tasks
    :raises ValueError: for an unknown id, an empty data set, or spaces that cannot be used or differ in a task
    """
    if isinstance(dataset, Mapping):
        groups = {name: _open_all(group, f" for task {name}") for name, group in dataset.items()}
    else:
        groups = _by_environment(_open_all(dataset))
    if not groups:
        raise ValueError("No data set was given: pass at least one.")
    keep = named or isinstance(dataset, Mapping) or len(groups) > 1
    return [_data_task(name if keep else None, datasets) for name, datasets in groups.items()]


def _open_all(group: Any, where: str = "") -> "list[MinariDataset]":
    several = isinstance(group, Sequence) and not isinstance(group, str)
    datasets = [_open(entry) for entry in (group if several else [group])]
    if not datasets:
        raise ValueError(f"No data set was given{where}: pass at least one.")
    return datasets


def _by_environment(datasets: "list[MinariDataset]") -> "dict[str, list[MinariDataset]]":
    """Data sets by the name of their task; one without an environment is a task of its own."""
    groups: dict[str, list[MinariDataset]] = {}
    for dataset in datasets:
        spec = dataset.env_spec
        group = groups.setdefault(dataset.id if spec is None else str(parse_env_id(spec.id)[1]), [])
        if group and not _same_environment(group[0].env_spec, spec):
            raise ValueError(
                f"{group[0].id} and {dataset.id} recorded environments of the same name that are not the same: say "
                'which task each is of, {"name": data sets, "other name": data sets}.'
            )
        group.append(dataset)
    return groups


def _same_environment(first: EnvSpec | None, second: EnvSpec | None) -> bool:
    if first is None or second is None:
        return first is second
    return first.id == second.id and settings_of(first) == settings_of(second) and _wrappers(first) == _wrappers(second)


def _data_task(name: str | None, datasets: "list[MinariDataset]") -> DataTask:
    pairs = [_stored_spaces(entry) for entry in datasets]
    for entry, pair in zip(datasets, pairs, strict=True):
        if not (alike(pair[0], pairs[0][0]) and same_actions(pair[1], pairs[0][1])):
            raise ValueError(
                f"{entry.id} has the spaces {pair[0]} and {pair[1]}, {datasets[0].id} has {pairs[0][0]} and "
                f"{pairs[0][1]}: data sets of one task need the same ones."
            )
    return DataTask(name, datasets, *pairs[0])


def common_spaces(tasks: list[DataTask]) -> tuple[spaces.Space, spaces.Box]:
    """
    Spaces that hold the observations and actions of all tasks.

    :param tasks: Tasks
    :return: Their spaces where they have the same ones, otherwise vectors of the widest task's sizes
    :raises ValueError: if they differ and are no vectors
    """
    first = tasks[0]
    if all(alike(t.observation_space, first.observation_space) for t in tasks):
        observation_space = first.observation_space
    else:
        widths = []
        for task in tasks:
            space = task.observation_space
            if not isinstance(space, spaces.Box) or len(space.shape) != 1 or space.dtype.kind != "f":
                raise ValueError(
                    f"Task {task.name} observes {space}, task {first.name} {first.observation_space}: only vectors of "
                    "floats can be padded to a common size."
                )
            widths.append(space.shape[0])
        observation_space = spaces.Box(-np.inf, np.inf, (max(widths),), np.float32)
    if all(same_actions(t.action_space, first.action_space) for t in tasks):
        return observation_space, first.action_space
    return observation_space, spaces.Box(-1.0, 1.0, (max(size_of(t.action_space) for t in tasks),), np.float32)


def _open(dataset: Any) -> "MinariDataset":
    minari = import_minari()
    if isinstance(dataset, minari.MinariDataset):
        opened = dataset
    elif isinstance(dataset, str):
        plain = _without_address(dataset)
        if Path(dataset, DESCRIPTION).is_file():
            raise ValueError(f"{dataset} is a folder of shards: pass ShardedDataset({dataset!r}).")
        try:
            opened = minari.load_dataset(plain)
        except FileNotFoundError as error:
            raise ValueError(
                f"Minari has no data set {plain!r} in {minari_root()}: run `minari download {dataset}` first, or see "
                "`minari list local` for those that are there."
            ) from error
        except ImportError as error:
            raise ImportError(
                f'{plain} needs a package that is missing ({error}): pip install "sb3-mbdpo[minari]" installs it.'
            ) from error
    else:
        raise ValueError(f"A data set is an id or a MinariDataset, got {type(dataset).__name__}.")
    if len(opened) == 0 or opened.total_steps == 0:
        raise ValueError(f"{opened.id} is empty ({len(opened)} episodes, 0 steps): record or download it again.")
    return cast("MinariDataset", opened)


def _without_address(name: str) -> str:
    """A full address downloads; what it downloads is found by the plain id."""
    return re.sub(r"^\w+://[^/]+/", "", name)


def minari_ids(dataset: Dataset) -> list[str]:
    """
    :param dataset: As for :func:`open_tasks`
    :return: Ids of the data sets, in order
    """
    groups: list[Any] = list(dataset.values()) if isinstance(dataset, Mapping) else [dataset]
    several = (group if isinstance(group, Sequence) and not isinstance(group, str) else [group] for group in groups)
    sources = (entry for group in several for entry in group)
    return [_without_address(entry) if isinstance(entry, str) else entry.id for entry in sources]


def minari_root() -> Path:
    """Folder that holds Minari's data sets."""
    from minari.storage import get_dataset_path

    return Path(get_dataset_path())


def _stored_spaces(dataset: "MinariDataset") -> tuple[spaces.Space, spaces.Box]:
    """The data set's spaces as Stable-Baselines3 would hand them on: images channels first."""
    observation_space, action_space = dataset.observation_space, dataset.action_space
    if not isinstance(action_space, spaces.Box) or action_space.dtype.kind != "f":
        raise ValueError(f"{dataset.id} has the action space {action_space}: MBDPO needs a Box of floats.")
    leaves = observation_space.values() if isinstance(observation_space, spaces.Dict) else [observation_space]
    for space in leaves:
        if not isinstance(space, (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)):
            raise ValueError(
                f"{dataset.id} has observations in {space}: MBDPO reads Box, Discrete, MultiDiscrete, MultiBinary, and "
                "a Dict of them; flatten others when recording."
            )
    try:
        check_spaces(observation_space, action_space)
    except ValueError as error:
        raise ValueError(f"{dataset.id} cannot be used. {error}") from error
    if isinstance(observation_space, spaces.Dict):
        turned = {key: _turned_space(space) for key, space in observation_space.items()}
        return spaces.Dict(turned), action_space
    return _turned_space(observation_space), action_space


def channels_last(space: spaces.Space) -> bool:
    """Whether Stable-Baselines3 would turn these images."""
    return is_image_space(space) and not is_image_space_channels_first(cast(spaces.Box, space))


def _turned_space(space: spaces.Space) -> spaces.Space:
    return VecTransposeImage.transpose_space(cast(spaces.Box, space)) if channels_last(space) else space


def alike(first: spaces.Space, second: spaces.Space) -> bool:
    """Whether observations of one space can be taken for those of the other: bounds of floats do not matter."""
    if isinstance(first, spaces.Dict) and isinstance(second, spaces.Dict):
        return first.keys() == second.keys() and all(alike(first[key], second[key]) for key in first)
    if isinstance(first, spaces.Box) and isinstance(second, spaces.Box) and first.dtype.kind == "f":
        return first.shape == second.shape and second.dtype.kind == "f"
    return first == second


def same_actions(first: spaces.Box, second: spaces.Box) -> bool:
    """Whether two action spaces have the same shape and, but for rounding, the same bounds."""
    if first.shape != second.shape:
        return False
    return np.allclose(first.low, second.low) and np.allclose(first.high, second.high)


def check_same_spaces(
    dataset_spaces: tuple[spaces.Space, spaces.Box], observation_space: spaces.Space, action_space: spaces.Box
) -> None:
    """
    Refuse data for a model or an environment with other spaces.

    :param dataset_spaces: Spaces of the data
    :param observation_space: The model's
    :param action_space: The model's
    :raises ValueError: naming both
    """
    for name, found, wanted, same in (
        ("observation", dataset_spaces[0], observation_space, alike(dataset_spaces[0], observation_space)),
        ("action", dataset_spaces[1], action_space, same_actions(dataset_spaces[1], action_space)),
    ):
        if not same:
            raise ValueError(
                f"The data's {name} space is {found}, the model's {wanted}: use data that was recorded with the same "
                "wrappers, or build the model with MBDPO.from_minari()."
            )


def size_of(space: spaces.Space) -> int:
    """Number of entries of a Box."""
    return int(np.prod(space.shape or (), dtype=np.int64))


def task_data(task: DataTask) -> TaskData:
    """What the description of a set says of a task, its episodes not counted yet."""
    vector = isinstance(task.observation_space, spaces.Box) and len(task.observation_space.shape) == 1
    limits = [d.env_spec.max_episode_steps for d in task.datasets if d.env_spec is not None]
    known = [limit for limit in limits if limit is not None]
    # Reference scores are the task's: those of its first data set that has both, in order
    scores = [tuple(d.storage.metadata.get(f"ref_{end}_score") for end in ("min", "max")) for d in task.datasets]
    known_scores = ((low, high) for low, high in scores if low is not None and high is not None and low < high)
    low, high = next(known_scores, (None, None))
    return TaskData(
        task.name,
        observation_size=size_of(task.observation_space) if vector else None,
        action_size=size_of(task.action_space),
        max_episode_length=max(known, default=None),
        ref_min_score=None if low is None else float(low),
        ref_max_score=None if high is None else float(high),
        env_id=plain_id(task.datasets[0].env_spec),
    )


def plain_id(spec: EnvSpec | None) -> str | None:
    """
    :param spec: Spec of a recorded environment
    :return: The id that makes the same environment, None if it alone does not
    """
    return spec.id if spec is not None and not _wrappers(spec) and has_settings_of_id(spec) else None


def _wrappers(spec: EnvSpec) -> list[WrapperSpec]:
    """Wrappers that make an environment another one."""
    return [
        wrapper
        for wrapper in spec.additional_wrappers
        if wrapper.name not in HARMLESS_WRAPPERS and wrapper.entry_point not in HARMLESS_WRAPPERS
    ]


def episode_limit(tasks: list[DataTask]) -> int:
    """
    :param tasks: Opened tasks
    :return: Longest time limit of their environments, or their longest episode where none is known
    """
    limits = []
    for task in tasks:
        limit = task_data(task).max_episode_length
        for source in task.datasets if limit is None else []:
            for metadata in source.storage.get_episode_metadata(source.episode_indices):
                limit = max(limit or 0, int(metadata["total_steps"]))
        limits.append(limit or 0)
    return max(limits)
