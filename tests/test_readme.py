"""The README's examples of recorded data, as they stand there but with small numbers."""

import re
from pathlib import Path

import pytest

from sb3_mbdpo import MBDPO

README = Path(__file__).parents[1] / "README.md"
pytest.importorskip("minari")


@pytest.mark.usefixtures("minari_cache")
def test_recorded_data() -> None:
    text = README.read_text()
    section = text[text.index("**Learning from recorded data**") : text.index("**Several tasks in one model**")]
    code = "\n".join(re.findall(r"```python\n(.*?)```", section, re.DOTALL))
    for old, new in (
        ("seed=0", 'seed=0, preset="debug", device="cpu", act_mode="prior", buffer_size=500'),
        ("_000", "0"),
        ("n_ref_episodes=20", "n_ref_episodes=1"),
        ("eval_env=", "n_eval_episodes=1, eval_env="),
    ):
        assert old in code
        code = code.replace(old, new)
    found: dict[str, MBDPO] = {}
    exec(code, found)  # a file of this repository
    model = found["model"]
    assert model.tasks is not None
    assert model.tasks.names == ("pendulum", "heavy", "MountainCarContinuous-v0")
    assert (model.tasks.observation_dim, model.num_timesteps, model._n_updates) == (8, 20, 50)
