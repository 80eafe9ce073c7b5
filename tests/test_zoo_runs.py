"""Entries of the configuration, each tried out where its package is installed, and the table of what was trained."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("rl_zoo3")

from sb3_mbdpo import zoo_checks
from tests.benchmarks import environments, learning, zoo_runs, zoo_table

ENTRIES = zoo_runs.read_entries()
# Pictures take seconds to set up where a processor draws them; `python -m tests.benchmarks.zoo_runs --smoke` has them
QUICK = [env_id for env_id in ENTRIES if "pixels" not in env_id]


@pytest.mark.parametrize("env_id", QUICK)
def test_entry_environment_and_algorithm_go_together(env_id: str):
    if not zoo_runs.can_be_made(env_id):
        pytest.skip(f"{env_id}: its package is not installed")
    zoo_runs.smoke(env_id)


def test_entries_hold_what_they_should():
    for env_id, entry in ENTRIES.items():
        zoo_checks.check_hyperparams(entry, env_id)
        assert {"n_timesteps", "policy", "preset"} <= set(entry)
        assert ("pixels" in env_id) == (entry["policy"] == "CnnPolicy")


def test_noise_of_an_entry_and_policies_reach_the_constructor():
    entry = {"noise_type": "ornstein-uhlenbeck", "noise_std": 0.5}
    noise = environments.resolve_kwargs(entry, n_actions=3)["action_noise"]
    assert noise().shape == (3,)
    assert environments.zoo_hyperparameters("mbdpo", "mbdpo/finger-spin-pixels-v0")[0]["policy"] == "CnnPolicy"
    assert "policy" not in environments.zoo_hyperparameters("mbdpo", "Pendulum-v1")[0]


def test_actions_are_held_as_an_entry_says():
    """For rivals too, whose own entries say nothing of it; a study's arguments are those of the constructor alone."""
    env = environments.make("MountainCarContinuous-v0", seed=0)
    assert env.get_wrapper_attr("action_repeat") == 8 and environments.held_for("Pendulum-v1") == 1
    env.reset(seed=0)
    _, reward, *_ = env.step(np.ones(1, np.float32))
    assert reward == pytest.approx(-0.8)
    assert "env_wrapper" not in environments.zoo_hyperparameters("mbdpo", "MountainCarContinuous-v0")[0]


def write_study(folder: Path, returns: dict[int, list[float]]) -> None:
    folder.mkdir(parents=True)
    rows = [
        {"label": "mbdpo", "algo": "mbdpo", "seed": seed, "step": 500 * (i + 1), "return_mean": value, "return_std": 7}
        for seed, values in returns.items()
        for i, value in enumerate(values)
    ]
    rows.append(rows[-1] | {"label": "sac", "return_mean": 1e6})
    pd.DataFrame(rows).assign(train_seconds=120).reindex(columns=learning.FIELDS[learning.EVALUATIONS]).to_csv(
        folder / learning.EVALUATIONS, index=False
    )


def test_the_table_tells_trained_from_tried_out(tmp_path: Path):
    results = tmp_path / "zoo"
    write_study(results / "Swimmer-v5", {0: [50, 300], 1: [250, 100]})
    write_study(results / "mbdpo-cup-catch-v0", {3: [1234, 5]})
    zoo_runs.note_smoke(results, "Hopper-v5")
    zoo_runs.note_smoke(results, "Hopper-v5")
    shutil.copy(zoo_runs.RESULTS / "published.csv", results)
    lines = {line.split("|")[1].strip(): line for line in zoo_table.table(results).splitlines()[2:]}
    assert list(lines) == list(ENTRIES)
    swimmer = "| trained, 2 seeds | 1,000 | 200 ± 100 (std over seeds) | 200 | 2 min | 346 ± 3 (Swimmer-v3, 1M) |"
    assert swimmer in lines["Swimmer-v5"]
    assert "| trained, 1 seed | 1,000 | 5 ± 7 (std over episodes) | 1,234 |" in lines["mbdpo/cup-catch-v0"]
    assert "| smoke-tested, 60 steps |" in lines["Hopper-v5"]
    assert "3,754 ± 8 (Hopper-v3, 1M)" in lines["Hopper-v5"]
    assert "| not run |" in lines["mbdpo/finger-spin-v0"]


def test_the_readme_holds_the_table_of_the_results():
    assert zoo_table.main(["--check"]) == 0, "run python -m tests.benchmarks.zoo_table"


def test_only_the_table_is_renewed():
    text = f"before\n{zoo_table.BEGIN}old\n{zoo_table.END}after\n"
    assert zoo_table.renewed(text, "new\n") == f"before\n{zoo_table.BEGIN}new\n{zoo_table.END}after\n"


def test_studies_are_handed_to_the_learning_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls = []
    monkeypatch.setattr(learning, "main", lambda argv: calls.append(argv) or 0)
    assert zoo_runs.main(["--envs", "Pendulum-v1", "--scale", "0.5", "--seeds", "1", "2", "--out", str(tmp_path)]) == 0
    words = " ".join(calls[0])
    assert f"--task Pendulum-v1 --algos mbdpo --out {tmp_path / 'Pendulum-v1'} --steps 1000 --eval-every 100" in words
    assert "--seeds 1 2 --jobs 1 --threads 1 --device cpu" in words
    with pytest.raises(SystemExit):
        zoo_runs.main(["--envs", "Pendulum-v9"])
