import builtins
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from sb3_mbdpo.minari_data import convert_minari
from sb3_mbdpo.minari_sources import common_spaces, episode_limit, open_tasks
from sb3_mbdpo.shards import ShardedDataset
from tests.fakes import IMAGE, UNEVEN, VECTOR
from tests.recordings import minari, record, recorded

pytestmark = pytest.mark.usefixtures("minari_cache")


def test_images_of_two_tasks_are_not_padded() -> None:
    record("test/a-v0")
    record("test/b-v0", observation_space=IMAGE)
    with pytest.raises(ValueError, match=r"Task far observes Box.*only vectors"):
        convert_minari({"near": "test/a-v0", "far": "test/b-v0"})


def test_unknown_ids_say_how_to_download() -> None:
    for name, plain in (("test/none-v0", "test/none-v0"), ("hf://me/test/none-v0", "test/none-v0")):
        with pytest.raises(ValueError, match=rf"no data set '{plain}'.*`minari download {name}`"):
            convert_minari(name)
    record("test/toy-v0")
    assert ShardedDataset(convert_minari("hf://me/test/toy-v0")).n_episodes == 3


def test_empty_data_sets_are_refused() -> None:
    whole = record("test/toy-v0")
    with pytest.raises(ValueError, match="test/toy-v0 is empty"):
        convert_minari(whole.filter_episodes(lambda episode: False))
    record("test/empty-v0", [])
    with pytest.raises(ValueError, match="test/empty-v0 is empty"):
        convert_minari("test/empty-v0")
    for nothing in ([], {}, {"walker": []}):
        with pytest.raises(ValueError, match="No data set was given"):
            convert_minari(nothing)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="an id or a MinariDataset, got int"):
        convert_minari(3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("observation_space", "action_space"),
    [
        (spaces.Box(-1, 1, (4,), np.float32), UNEVEN),
        (spaces.Discrete(3), UNEVEN),
        (VECTOR, spaces.Box(-1, 1, (2,), np.float32)),
        (VECTOR, spaces.Box(-1, 1, (3,), np.float32)),
    ],
    ids=str,
)
def test_spaces_of_a_task_must_agree(observation_space: spaces.Space, action_space: spaces.Box) -> None:
    record("test/a-v0")
    record("test/b-v0", observation_space=observation_space, action_space=action_space)
    with pytest.raises(ValueError, match=r"test/b-v0 has the spaces .* test/a-v0 has .* need the same ones"):
        convert_minari({"toy": ["test/a-v0", "test/b-v0"]})


@pytest.mark.parametrize(
    ("observation_space", "action_space", "message"),
    [
        (spaces.Tuple([VECTOR]), UNEVEN, "has observations in Tuple"),
        (spaces.Dict({"a": spaces.Dict({"b": VECTOR})}), UNEVEN, "has observations in Dict"),
        (VECTOR, spaces.Discrete(2), "has the action space Discrete"),
        (VECTOR, spaces.Box(-np.inf, 1, (2,), np.float32), "low < high"),
        (spaces.Discrete(3, start=1), UNEVEN, "start at 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_spaces_that_cannot_be_used(observation_space: spaces.Space, action_space: Any, message: str) -> None:
    record("test/toy-v0", [], observation_space, action_space)
    dataset = minari.load_dataset("test/toy-v0")
    dataset.storage.update_metadata({"total_steps": 1, "total_episodes": 1})
    with pytest.raises(ValueError, match=f"test/toy-v0.*{message}"):
        convert_minari("test/toy-v0")


def test_what_is_known_without_reading_episodes() -> None:
    record("test/toy-v0", observation_space=IMAGE)
    tasks = open_tasks("test/toy-v0")
    assert common_spaces(tasks)[0].shape == (3, 36, 36)
    assert episode_limit(tasks) == 8
    record(
        "test/env-v0",
        recorded((3,), spaces.Box(-8, 8, (3,)), UNEVEN),
        env="Pendulum-v1",
        ref_max_score=2.0,
        ref_min_score=0.0,
    )
    assert episode_limit(open_tasks("test/env-v0")) == 200
    # Scores in no order are no scale
    record("test/upside-down-v0", ref_max_score=-2.0, ref_min_score=0.0)
    assert ShardedDataset(convert_minari("test/upside-down-v0")).tasks[0].ref_min_score is None
    task = ShardedDataset(convert_minari("test/env-v0")).tasks[0]
    assert (task.max_episode_length, task.ref_min_score, task.ref_max_score) == (200, 0.0, 2.0)


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any) -> Any:
        if name == "minari":
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r'pip install "sb3-mbdpo\[minari\]"'):
        convert_minari("test/toy-v0")
