"""What a set of shards looks like on disk: the description and the layout of its rows (see ``shards``)."""

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from gymnasium import spaces

from sb3_mbdpo.typed_spaces import space_from_json, space_to_json

FORMAT, VERSION = "sb3_mbdpo shards", 1
DESCRIPTION = "description.json"
# Arrays with one entry for each episode: transitions, task, whether it terminated, sum of rewards
INDEX = {"lengths": np.int32, "tasks": np.int32, "terminated": np.bool_, "returns": np.float64}
ROW_FILE = re.compile(r"rows-\d{5,}\.bin")


def row_file(index: int) -> str:
    """Name of the index-th file of rows."""
    return f"rows-{index:05d}.bin"


@dataclass(frozen=True)
class Field:
    """
    One field of a row.

    :param name: "observations", "actions" or "rewards"
    :param key: Key of a Dict observation, None otherwise
    :param dtype: Name of the NumPy type
    :param shape: Shape of an entry
    :param offset: Its first byte in the row
    """

    name: str
    key: str | None
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of an entry."""
        return int(np.dtype(self.dtype).itemsize * np.prod(self.shape, dtype=np.int64))

    @property
    def span(self) -> slice:
        """Its bytes in the row."""
        return slice(self.offset, self.offset + self.nbytes)

    def read(self, rows: np.ndarray) -> np.ndarray:
        """
        :param rows: Rows as bytes [..., row_bytes]
        :return: This field of them [..., *shape]
        """
        part = np.ascontiguousarray(rows[..., self.span])
        return part.view(self.dtype).reshape(*rows.shape[:-1], *self.shape)


@dataclass(frozen=True)
class TaskData:
    """
    What is known about one task of a set.

    :param name: Its name, or None in a set of a single task
    :param observation_size: Entries of its observations that are not padding, None if unknown
    :param action_size: The same for its actions
    :param episodes: Episodes in the set
    :param transitions: Transitions in the set
    :param max_episode_length: Time limit if known, otherwise the longest episode, in environment steps
    :param ref_min_score: Return that counts as 0, None if unknown
    :param ref_max_score: Return that counts as 1, None if unknown
    :param env_id: Gymnasium id of the environment, None where that alone does not make it
    """

    name: str | None = None
    observation_size: int | None = None
    action_size: int | None = None
    episodes: int = 0
    transitions: int = 0
    max_episode_length: int | None = None
    ref_min_score: float | None = None
    ref_max_score: float | None = None
    env_id: str | None = None

    def normalized_score(self, episode_return: float) -> float | None:
        """
        A return on the scale from ``ref_min_score`` (0) to ``ref_max_score`` (1).

        :param episode_return: Undiscounted return
        :return: None where the references are unknown, or the first one is not lower
        """
        low, high = self.ref_min_score, self.ref_max_score
        return None if low is None or high is None or low >= high else (episode_return - low) / (high - low)


@dataclass(frozen=True)
class Description:
    """
    Content of ``description.json``.

    :param observation_space: Space of the stored observations, images channels first
    :param action_space: Space of the actions before they were scaled to [-1, 1]
    :param fields: Fields of a row
    :param row_bytes: Bytes of a row
    :param rows_per_file: Rows in each file but the last
    :param checksums: CRC-32 of each file
    :param tasks: Tasks, by index
    :param episodes: Number of episodes
    :param transitions: Number of transitions
    :param fingerprint: What tells the source from another or a changed one
    :param index_checksums: CRC-32 of the per-episode arrays
    """

    observation_space: spaces.Space
    action_space: spaces.Box
    fields: tuple[Field, ...]
    row_bytes: int
    rows_per_file: int
    checksums: tuple[int, ...]
    tasks: tuple[TaskData, ...]
    episodes: int
    transitions: int
    fingerprint: str
    index_checksums: dict[str, int] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Rows in all files."""
        return self.transitions + self.episodes

    def to_json(self) -> str:
        """The file's text."""
        values = asdict(self) | {
            "observation_space": space_to_json(self.observation_space),
            "action_space": space_to_json(self.action_space),
        }
        return json.dumps({"format": FORMAT, "version": VERSION, **values}, indent=1)

    @classmethod
    def read(cls, path: str | Path) -> "Description":
        """
        :param path: Folder of the set
        :return: Its description
        :raises ValueError: if the folder holds no set of this format and version
        """
        file = Path(path, DESCRIPTION)
        if not file.is_file():
            raise ValueError(f"{path} holds no shards ({DESCRIPTION} is missing): convert a data set first.")
        try:
            values = json.loads(file.read_text())
            found = values.pop("format"), values.pop("version")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{file} cannot be read: delete the folder and convert again.") from error
        if found != (FORMAT, VERSION):
            raise ValueError(
                f"{file} is of format {found}, not {(FORMAT, VERSION)}: delete the folder and convert again."
            )
        try:
            values["fields"] = tuple(Field(**entry | {"shape": tuple(entry["shape"])}) for entry in values["fields"])
            values["checksums"] = tuple(values["checksums"])
            values["tasks"] = tuple(TaskData(**entry) for entry in values["tasks"])
            for name in ("observation_space", "action_space"):
                values[name] = space_from_json(values[name])
            return cls(**values)
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"{file} is damaged ({error}): delete the folder and convert again.") from error


def up_to_date(path: str | Path, fingerprint: str) -> bool:
    """
    Whether a set need not be written again.

    :param path: Folder of the set
    :param fingerprint: That of the source as it is now
    :return: False if there is none, it is of another source or format, or its description cannot be read
    """
    try:
        return Description.read(path).fingerprint == fingerprint
    except ValueError:
        return False
