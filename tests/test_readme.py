"""The README's examples, as they stand there but with small numbers."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from sb3_mbdpo import MBDPO
from tests.hub_server import TOKEN, running_hub
from tests.processes import run_module

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
# What makes the commands of the first example small
SHORT = {
    "train": "-n 80 --eval-freq 40 --eval-episodes 1 "
    "-params preset:'debug' act_mode:'prior' learning_starts:40 warmup_updates:1",
    "report": "-n 1",
    "enjoy": "--n-timesteps 20",
    "video": "--n-timesteps 20",
    "plot": "",
}


def example(start: str, language: str) -> str:
    """The first block of code after a piece of the README's text."""
    text = README.read_text()
    block = re.search(rf"```{language}\n(.*?)```", text[text.index(start) :], re.DOTALL)
    assert block is not None
    return block[1]


def shortened(code: str, *changes: tuple[str, str]) -> str:
    for old, new in changes:
        assert old in code
        code = code.replace(old, new)
    return code


def run(folder: Path, *command: str, **variables: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"} | variables
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, (command, done.stdout[-2000:], done.stderr[-2000:])
    return done.stdout


def test_from_nothing_to_a_trained_agent_to_the_hub(tmp_path: Path) -> None:
    pytest.importorskip("rl_zoo3")
    lines = example("From nothing to a trained agent", "").splitlines()
    assert [shlex.split(line)[:2] for line in lines] == [["mbdpo", command] for command in SHORT]
    for line in lines:
        _, command, *arguments = shlex.split(line)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
        done = run_module("sb3_mbdpo", command, *arguments, *SHORT[command].split(), cwd=tmp_path, env=environment)
        assert done.returncode == 0, (command, done.stdout[-2000:], done.stderr[-2000:])
    files = {path.suffix for path in (tmp_path / "logs").rglob("*")}
    assert {".zip", ".png", ".gif", ".mp4"} <= files, files
    with running_hub() as hub:
        variables = {
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(tmp_path / "hf"),
            "NO_PROXY": "127.0.0.1",
        }
        code = example("From a trained agent to the Hub", "python")
        assert len(code.strip().splitlines()) <= 5
        run(tmp_path, "-c", code, HF_HUB_DISABLE_XET="1", **variables)
        found = hub.repos["me/mbdpo-Pendulum-v1"].files("main")
    assert found is not None and {"config.json", "model.safetensors", "README.md", "results.json"} <= set(found[1])


def test_from_the_hub_to_a_new_task() -> None:
    pytest.importorskip("dm_control")
    code = example("From the Hub to a task", "python")
    assert len(code.strip().splitlines()) <= 5
    printed = run(
        ROOT,
        "-c",
        shortened(code, ("10_000", "20"), ("{", '{"act_mode": "prior", '), ("names=", "n_eval_episodes=1, names=")),
    )
    assert "walker-run" in printed


@pytest.mark.usefixtures("minari_cache")
def test_recorded_data() -> None:
    pytest.importorskip("minari")
    text = README.read_text()
    section = text[text.index("**Learning from recorded data**") : text.index("**Several tasks in one model**")]
    code = "\n".join(re.findall(r"```python\n(.*?)```", section, re.DOTALL))
    code = shortened(
        code,
        ("seed=0", 'seed=0, preset="debug", device="cpu", act_mode="prior", buffer_size=500'),
        ("_000", "0"),
        ("n_ref_episodes=20", "n_ref_episodes=1"),
        ("eval_env=", "n_eval_episodes=1, eval_env="),
    )
    found: dict[str, MBDPO] = {}
    exec(code, found)  # a file of this repository
    model = found["model"]
    assert model.tasks is not None
    assert model.tasks.names == ("pendulum", "heavy", "MountainCarContinuous-v0")
    assert (model.tasks.observation_dim, model.num_timesteps, model._n_updates) == (8, 20, 50)
