import json
from pathlib import Path

import numpy as np
import pytest

from sb3_mbdpo.shard_format import Description, Field, TaskData
from sb3_mbdpo.shards import ShardedDataset
from tests.episodes import numbered, write


def test_a_damaged_description_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", numbered())
    file = folder / "description.json"
    text = file.read_text()
    values = json.loads(text)
    fields = [values["fields"][0] | {"dtpe": 1}]
    for changed in (text[:100], "[]", json.dumps(values | {"version": 2}), json.dumps(values | {"fields": fields})):
        file.write_text(changed)
        with pytest.raises(ValueError, match=r"convert"):
            ShardedDataset(folder)


def test_descriptions_survive_a_file(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", numbered(n_tasks=3), shard_bytes=100, n_tasks=3, fingerprint="print")
    description = Description.read(folder)
    (folder / "description.json").write_text(description.to_json())
    assert Description.read(folder) == description
    assert (description.episodes, description.transitions, description.rows) == (6, 37, 43)
    # Three observations, two actions and a reward of four bytes each: four rows to a file of a hundred bytes
    assert (description.row_bytes, description.rows_per_file, len(description.checksums)) == (24, 4, 11)


def test_fields_are_read_out_of_rows() -> None:
    rows = np.arange(2 * 12, dtype=np.uint8).reshape(1, 2, 12)
    field = Field("actions", None, "int16", (2, 2), 3)
    expected = [np.frombuffer(bytes(range(start, start + 8)), np.int16).reshape(2, 2) for start in (3, 15)]
    np.testing.assert_array_equal(field.read(rows), [expected])


def test_scores_are_normalised_where_both_references_are_known() -> None:
    assert TaskData(ref_min_score=-10.0, ref_max_score=30.0).normalized_score(0.0) == 0.25
    for task in (TaskData(), TaskData(ref_min_score=1.0), TaskData(ref_min_score=1.0, ref_max_score=1.0)):
        assert task.normalized_score(0.0) is None
