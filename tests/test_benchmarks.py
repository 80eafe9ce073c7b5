"""The learning study's program: its environments, its tables, and one tiny study from end to end."""

import dataclasses
import itertools
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback

from sb3_mbdpo import MBDPO
from tests.benchmarks import acting, arithmetic, clock, environments, learning, shards, speed

SETTINGS = learning.Settings("sac", "Pendulum-v1", {"learning_rate": 0.001}, 1, 100, 2, 1, "cpu")


def evaluations(label: str, seed: int, returns: list[float]) -> pd.DataFrame:
    """Made-up evaluations, 100 steps and 2 seconds apart."""
    row: dict[str, Any] = dict.fromkeys(learning.FIELDS[learning.EVALUATIONS], 1.0)
    row |= {"label": label, "algo": "sac", "task": "Pendulum-v1", "seed": seed}
    numbers = [{"step": 100 * i, "train_seconds": 2.0 * i, "cpu_seconds": 1.0 * i} for i in range(1, len(returns) + 1)]
    rows = [row | number | {"return_mean": value} for number, value in zip(numbers, returns, strict=True)]
    return pd.DataFrame(rows)


def test_gymnasium_environment() -> None:
    env = environments.make("Pendulum-v1", seed=3)
    assert env.spec is not None and env.spec.max_episode_steps == 200
    first = environments.make("Pendulum-v1", seed=3).reset()[0]
    np.testing.assert_array_equal(env.reset()[0], first)


@pytest.mark.parametrize("task", ["dmc:cartpole-swingup", "dmc:reacher-easy"])
def test_dmc_environment(task: str) -> None:
    pytest.importorskip("dm_control")
    pytest.importorskip("shimmy")
    env, twin, other = (environments.make(task, seed=seed) for seed in (0, 0, 1))
    assert env.spec is not None and env.spec.max_episode_steps == 500
    assert env.observation_space.dtype == np.float32
    assert env.action_space == spaces.Box(-1, 1, env.action_space.shape, np.float32)

    observation = env.reset()[0]
    np.testing.assert_array_equal(observation, twin.reset()[0])
    assert not np.array_equal(observation, other.reset()[0])
    np.testing.assert_array_equal(env.reset(seed=7)[0], other.reset(seed=7)[0])
    assert not np.array_equal(env.reset()[0], env.reset()[0])

    steps, done = 0, False
    while not done:
        observation, reward, terminated, truncated, _ = env.step(env.action_space.sample())
        assert env.observation_space.contains(observation) and isinstance(reward, float) and 0 <= reward <= 2
        steps, done = steps + 1, terminated or truncated
    assert (steps, terminated, truncated) == (500, False, True)


def test_dmc_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "shimmy", None)
    with pytest.raises(ImportError, match=r'pip install "sb3-mbdpo\[dmc\]"'):
        environments.make("dmc:cartpole-swingup")


def test_action_repeat_stops_at_the_end() -> None:
    env = environments.ActionRepeat(environments.make("Pendulum-v1", seed=0), repeat=3)
    env.reset()
    outcomes = [env.step(env.action_space.sample()) for _ in range(67)]
    assert [truncated for *_, truncated, _ in outcomes] == [False] * 66 + [True]


def test_zoo_hyperparameters() -> None:
    pytest.importorskip("rl_zoo3")
    assert environments.zoo_hyperparameters("sac", "Pendulum-v1")[0] == {"learning_rate": 1e-3}
    hopper, source = environments.zoo_hyperparameters("sac", "Hopper-v5")
    assert hopper == {"learning_starts": 10000} and "Hopper-v4" in source
    assert environments.zoo_hyperparameters("sac", "dmc:cartpole-swingup")[0] == {}
    with pytest.raises(ValueError, match="normalize"):
        environments.zoo_hyperparameters("sac", "CarRacing-v3")


@pytest.mark.parametrize("task", ["Pendulum-v1", "dmc:cartpole-swingup", "InvertedPendulum-v4"])
def test_own_hyperparameters(task: str) -> None:
    """Both sides of a study are tuned: MBDPO by this project's zoo file, whose wrappers `make` has applied."""
    entry, source = environments.zoo_hyperparameters("mbdpo", task)
    assert entry["preset"] == "cpu" and "env_wrapper" not in entry and "n_timesteps" not in entry
    assert source.endswith("zoo_configs/mbdpo.yml")
    MBDPO("MlpPolicy", "Pendulum-v1", **environments.resolve_kwargs(entry))


def test_zoo_notations() -> None:
    kwargs = {"learning_rate": "lin_1e-3", "policy_kwargs": "dict(net_arch=[4, 4])", "train_freq": [1, "episode"]}
    resolved = environments.resolve_kwargs(kwargs | {"ent_coef": "auto"})
    assert resolved.pop("learning_rate")(0.5) == pytest.approx(5e-4)
    assert resolved == {"policy_kwargs": {"net_arch": [4, 4]}, "train_freq": (1, "episode"), "ent_coef": "auto"}


def test_assignments() -> None:
    name, values = learning.parse_assignments("wide:learning_rate=1e-3,net_arch=[64, 64],preset=debug,compile=false")
    assert name == "wide"
    assert values == {"learning_rate": 1e-3, "net_arch": [64, 64], "preset": "debug", "compile": False}
    for text in ("wide", "wide:", "wide:key", ":key=1"):
        with pytest.raises(ValueError, match="name:key=value"):
            learning.parse_assignments(text)


def test_summary_tells_lasting_success_from_luck() -> None:
    lucky, lasting = evaluations("a", 0, [0.0, 9.0, 1.0]), evaluations("a", 1, [0.0, 9.0, 9.0])
    assert learning.first_lasting(lucky, 5.0) is None
    assert learning.first_lasting(lasting, 5.0) == (200, 4.0)
    text = learning.summarise(pd.concat([lucky, lasting]), threshold=5.0)
    assert "5.0 [1.0]" in text and "20.00 ms a training step (CPU 10.00)" in text
    assert "seed 0: never, seed 1: 200 (4.0 s)" in text


def test_resume_keeps_finished_runs_only(tmp_path: Path) -> None:
    labels = {"a": SETTINGS, "b": SETTINGS}
    everything = [("a", 0), ("b", 0), ("b", 1), ("a", 1)]
    assert learning.prepare(tmp_path, labels, [0, 1], 200) == everything
    done, started = evaluations("a", 0, [1.0, 2.0]), evaluations("b", 0, [1.0])
    pd.concat([done, started]).to_csv(tmp_path / learning.EVALUATIONS, index=False)

    assert learning.prepare(tmp_path, labels, [0, 1], 200) == everything[1:]
    rows = learning.read_table(tmp_path, learning.EVALUATIONS)
    assert list(rows["label"]) == ["a", "a"] and list(rows["step"]) == [100, 200]
    with pytest.raises(ValueError, match="other settings"):
        learning.prepare(tmp_path, {"a": learning.Settings("tqc", "Pendulum-v1", {}, 1, 100, 2, 1, "cpu")}, [0], 200)


@pytest.mark.slow
def test_tiny_study(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = "--task Pendulum-v1 --algos sac --label sac=rival --steps 250 --eval-every 100 --eval-episodes 2"
    arguments += f" --device cpu --threshold -5000 --set sac:learning_starts=1000 --out {tmp_path}"
    assert learning.main(arguments.split()) == 0
    assert "'learning_starts': 1000" in capfd.readouterr().out

    rows = learning.read_table(tmp_path, learning.EVALUATIONS)
    assert list(rows["step"]) == [100, 200, 250] and set(rows["label"]) == {"rival"}
    assert rows["train_seconds"].is_monotonic_increasing and (rows["return_mean"] < 0).all()
    episodes = learning.read_table(tmp_path, learning.EPISODES)
    assert list(episodes["step"]) == [200] and list(episodes["episode_length"]) == [200]
    assert (tmp_path / learning.PICTURE).stat().st_size > 0

    # Finished: nothing is trained again, the table comes from the files
    assert learning.main(arguments.split()) == 0
    assert "rival seed 0 step" not in capfd.readouterr().out
    assert learning.main(["--plot-only", "--out", str(tmp_path)]) == 0
    assert "mean return over seeds" in capfd.readouterr().out
    assert len(learning.read_table(tmp_path, learning.EVALUATIONS)) == 3


def test_a_study_can_average_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def learn(self: MBDPO, steps: int, callback: list[BaseCallback]) -> MBDPO:
        seen.append([type(one).__name__ for one in callback])
        return self

    monkeypatch.setattr(MBDPO, "learn", learn)
    for more in ({}, {"average_weights": 0.9}):
        settings = learning.Settings("mbdpo", "Pendulum-v1", {"preset": "debug"} | more, 1, 10, 1, 1, "cpu")
        learning.train(settings, "mbdpo", 0, 10, tmp_path)
    assert seen == [["RecordLearning"], ["WeightAveraging", "RecordLearning"]]


@pytest.mark.slow
def test_failed_worker_is_reported(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert learning.main(f"--algos sac --set sac:no_such=1 --steps 10 --out {tmp_path}".split()) == 1
    assert "sac seed 0 failed: exit code 1" in capfd.readouterr().err


@pytest.mark.slow
def test_speed_program(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # By this clock all turns are alike, whatever else the machine is doing: medians then agree to the last digit
    ticks = itertools.count()
    monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter=lambda: 1e-3 * next(ticks)))
    arguments = "--presets debug --device cpu --threads 1 --seconds 0.05 --search-batches 1 2 --update-batches 16"
    assert speed.main(f"{arguments} --loop-steps 5 --out {tmp_path}".split()) == 0
    rows = pd.read_csv(tmp_path / "speed.csv").set_index("what")
    text = capsys.readouterr().out
    for dtype in ("float32", "bfloat16"):
        assert list(rows.loc[f"search {dtype}", "batch"]) == [1, 2] and f"update {dtype}" in rows.index
    for what in ("score", "update against SAC", "predict against TQC", "training loop MBDPO"):
        assert what in rows.index and what in text
    # Times, floors and ratios belong together
    search = rows[rows.index.str.startswith("search")]
    np.testing.assert_allclose(search["ms"] / search["floor_ms"], search["ratio"], rtol=1e-6)
    assert (rows["ms"] > 0).all() and (tmp_path / "speed.png").stat().st_size > 0 and "Peak memory" in text
    # Operations over time
    model = speed.make("debug", "cpu")
    found = rows.loc["search float32"].iloc[0]
    assert found["tflops"] == pytest.approx(arithmetic.search_flops(model.policy, 1) / found["ms"] / 1e9)
    assert rows.loc["score", ["tflops"]].isna().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [("--presets cpux", "invalid choice: 'cpux'"), ("--device cuda", "PyTorch finds no CUDA device here")],
)
def test_what_the_speed_program_refuses(
    arguments: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed.th.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        speed.main(f"{arguments} --out {tmp_path / 'out'}".split())
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_arithmetic_is_counted_from_the_shapes() -> None:
    model = speed.make("debug", "cpu", buffer_size=500, learning_starts=400)
    world, config = model.policy.world_model, model.policy.search_config
    joint, latent, width, bins = 16 + 6, 16, 32, 101
    head = 2 * (joint * width + width * width)
    assert arithmetic.row_flops(world.dynamics) == head + 2 * width * latent
    assert arithmetic.row_flops(world.critics) == head + 2 * width * bins, "of one member"
    once = arithmetic.search_flops(model.policy, 1)
    assert arithmetic.search_flops(model.policy, 4) == 4 * once
    model.policy.search_config = dataclasses.replace(config, energy_coef=0.0)
    assert arithmetic.search_flops(model.policy, 1) < once
    model.policy.search_config = config
    every = arithmetic.update_flops(model, 64)
    model.policy_delay = model.energy_interval = 2
    assert 0.5 * every < arithmetic.update_flops(model, 64) < every


@pytest.mark.slow
def test_acting_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = MBDPO("MlpPolicy", "Pendulum-v1", preset="debug", seed=0, learning_starts=10, device="cpu").learn(15)
    model.save(tmp_path / "model.zip")
    arguments = f"--model {tmp_path / 'model.zip'} --episodes 1 --out {tmp_path}"
    assert acting.main(arguments.split()) == 0
    rows = pd.read_csv(tmp_path / "Pendulum-v1.csv").set_index("setting")
    assert rows.loc["search", "action_difference"] == 0
    assert {"search, bfloat16", "search, 1 of 2 steps when warm", "search, 8 candidates", "score", "prior"} < {
        *rows.index
    }
    assert (rows["return_mean"] < 0).all() and "score" in capsys.readouterr().out


def test_shards_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = f"--path {tmp_path / 'set'} --transitions 2000 --episode-length 50 --preset debug"
    assert shards.main(f"{arguments} --updates 3 --seconds 0.05".split()) == 0
    out = capsys.readouterr().out
    assert "2,000 transitions" in out
    assert "windows/s" in out
    assert "ratio" in out
    assert not (tmp_path / "set").exists()
