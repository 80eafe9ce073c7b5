import json
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from sb3_mbdpo.typed_spaces import space_from_json, space_to_json

SPACES = [
    spaces.Box(-1.0, 1.0, (3,), np.float32),
    spaces.Box(-np.inf, np.inf, (2, 4), np.float64),
    spaces.Box(np.array([-np.inf, 0.1], np.float32), np.array([2.5, np.inf], np.float32)),
    spaces.Box(0, 255, (3, 8, 8), np.uint8),
    spaces.Box(0.0, 1.0, (), np.float32),
    spaces.Discrete(4),
    spaces.Discrete(4, start=2),
    spaces.MultiDiscrete([2, 3]),
    spaces.MultiBinary(5),
    spaces.MultiBinary([2, 3]),
    spaces.Dict({"b": spaces.Discrete(2), "a": spaces.Box(0, 1, (2,))}),
]


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_spaces_survive_json(space: spaces.Space) -> None:
    back = space_from_json(json.loads(json.dumps(space_to_json(space), allow_nan=False)))
    assert back == space
    assert back.dtype == space.dtype
    if isinstance(space, spaces.Dict):
        assert list(back) == list(space)


@pytest.mark.parametrize("space", [spaces.Text(3), spaces.Tuple([spaces.Discrete(2)])])
def test_other_spaces_are_refused(space: spaces.Space) -> None:
    with pytest.raises(ValueError, match="cannot be described"):
        space_to_json(space)


@pytest.mark.parametrize(
    "description",
    [None, [], {}, {"type": "Text"}, {"type": "Discrete", "n": 3}, {"type": "Discrete", "n": 3, "start": 0, "x": 1}],
)
def test_what_describes_no_space(description: Any) -> None:
    with pytest.raises(ValueError, match="describes no space"):
        space_from_json(description)


BOX = {"type": "Box", "dtype": "float32", "shape": [3], "low": 0.0, "high": 1.0}


@pytest.mark.parametrize(
    ("description", "message"),
    [
        (BOX | {"shape": [10**6, 10**6]}, "absurd"),
        (BOX | {"dtype": "O"}, "dtype of a Box"),
        (BOX | {"dtype": "V99999"}, "dtype of a Box"),
        (BOX | {"shape": [-1]}, "whole numbers"),
        (BOX | {"shape": 3}, "whole numbers"),
        (BOX | {"low": [0.0, 1.0]}, "needs 1 or 3 numbers, got 2"),
        ({"type": "Discrete", "n": 2.5, "start": 0}, "whole numbers"),
        ({"type": "Discrete", "n": 10**9, "start": 0}, "absurd"),
        ({"type": "MultiDiscrete", "nvec": [10**7, 10**7]}, "absurd"),
        ({"type": "MultiBinary", "n": [10**5, 10**5]}, "absurd"),
        ({"type": "Dict", "spaces": {"a": {"type": "Dict", "spaces": {}}}}, "none of which is a Dict"),
        ({"type": "Dict", "spaces": [BOX]}, "none of which is a Dict"),
        ({"type": "Dict", "spaces": {key: BOX | {"shape": [4 * 10**6]} for key in "abc"}}, "Dict space of 12,000,000"),
        ({"type": "Dict", "spaces": {"a": {"type": "Text"}}}, "describes no space"),
    ],
)
def test_what_would_be_no_space_or_an_absurd_one(description: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        space_from_json(description)
