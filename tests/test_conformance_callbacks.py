"""What people watch while an algorithm of Stable-Baselines3 learns, with MBDPO: callbacks, logs, warnings."""

import csv
import json
import os
import subprocess
import sys
import textwrap
from collections import defaultdict
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.callbacks import (
    CallbackList,
    CheckpointCallback,
    ConvertCallback,
    EvalCallback,
    EveryNTimesteps,
    LogEveryNTimesteps,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnNoModelImprovement,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import VecMonitor, VecNormalize
from torch.utils._python_dispatch import TorchDispatchMode

from sb3_mbdpo import MBDPO
from tests.fakes import BOXES, counters, flat_parameters, toy_envs
from tests.test_mbdpo import VARIANTS, Recorder, make
from tests.test_resume import logged

# --- callbacks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("threshold", "steps"), [(-100.0, 6), (100.0, 20)])
def test_stop_at_a_reward(threshold: float, steps: int, tmp_path: Path) -> None:
    stop = StopTrainingOnRewardThreshold(threshold)
    callback = EvalCallback(
        VecMonitor(toy_envs(2)),
        callback_on_new_best=stop,
        n_eval_episodes=3,
        eval_freq=6,
        log_path=str(tmp_path),
        best_model_save_path=str(tmp_path),
        verbose=0,
    )
    model = make(VecMonitor(toy_envs()))
    rows = logged(model)
    model.learn(20, callback=callback)
    assert model.num_timesteps == steps
    found = np.load(tmp_path / "evaluations.npz")
    assert found["timesteps"].tolist() == list(range(6, steps + 1, 6)) and found["results"].shape[1] == 3
    assert set(found["ep_lengths"].flatten()) <= {5, 6}
    assert MBDPO.load(tmp_path / "best_model").num_timesteps <= steps
    means = [row["eval/mean_reward"] for row in rows if "eval/mean_reward" in row]
    assert means == pytest.approx(found["results"].mean(axis=1))


def test_stop_without_improvement() -> None:
    """Every evaluation finds the same return: the first is an improvement, the third in a row without one too many."""
    stop = StopTrainingOnNoModelImprovement(max_no_improvement_evals=2, min_evals=0)
    callback = EvalCallback(
        VecMonitor(counters(1)), callback_after_eval=stop, n_eval_episodes=1, eval_freq=5, verbose=0
    )
    assert make(VecMonitor(toy_envs())).learn(100, callback=callback).num_timesteps == 4 * 5
    assert callback.best_mean_reward == 8


def test_stop_after_episodes_and_every_n_steps() -> None:
    seen: list[int] = []
    every = EveryNTimesteps(5, callback=Recorder())
    model = make(toy_envs(2, lengths=(6,)))
    model.learn(
        100, callback=[every, StopTrainingOnMaxEpisodes(2), ConvertCallback(lambda local, _: seen.append(1) or True)]
    )
    assert model.num_timesteps == 24, "two episodes of six steps in each of two environments"
    assert len(every.callback.steps) == 4, "at 6, 12, 18 and 24 steps"
    assert len(seen) == 12


@pytest.mark.parametrize("n_envs", [1, 3])
def test_a_function_stops_training(n_envs: int) -> None:
    model = make(toy_envs(n_envs))
    model.learn(100, callback=lambda local, _: local["self"].num_timesteps < 21)
    assert model.num_timesteps == 21 and model.replay_buffer.size() * n_envs == 21 - n_envs


def test_checkpoints_hold_all_that_is_needed(tmp_path: Path) -> None:
    callback = CheckpointCallback(6, str(tmp_path), save_replay_buffer=True, save_vecnormalize=True)
    model = make(VecNormalize(toy_envs(2)))
    model.learn(24, callback=CallbackList([callback]))
    names = {f"rl_model_{kind}{steps}_steps" for kind in ("", "replay_buffer_", "vecnormalize_") for steps in (12, 24)}
    assert {path.stem for path in tmp_path.iterdir()} == names
    env = VecNormalize.load(str(tmp_path / "rl_model_vecnormalize_12_steps.pkl"), toy_envs(2))
    loaded = MBDPO.load(tmp_path / "rl_model_12_steps", env=env)
    loaded.load_replay_buffer(tmp_path / "rl_model_replay_buffer_12_steps")
    assert loaded.num_timesteps == 12 and loaded.replay_buffer.size() == 5, "the callback comes before the storing"
    np.testing.assert_array_equal(loaded.replay_buffer.observations[:5], model.replay_buffer.observations[:5])
    loaded.learn(6, reset_num_timesteps=False)
    assert loaded.num_timesteps == 18 and loaded._n_updates > 0


def test_watching_changes_nothing(tmp_path: Path) -> None:
    """Evaluations and checkpoints amid a run leave its random numbers, its plans and its networks alone."""
    plain = make(VecMonitor(toy_envs(2))).learn(40)
    watched = make(VecMonitor(toy_envs(2)))
    evaluation = EvalCallback(VecMonitor(toy_envs(3)), n_eval_episodes=3, eval_freq=4, verbose=0)
    watched.learn(40, callback=[evaluation, CheckpointCallback(3, str(tmp_path), save_replay_buffer=True)])
    assert evaluation.n_calls == 20 and len(list(tmp_path.iterdir())) == 12
    assert th.equal(flat_parameters(plain.policy), flat_parameters(watched.policy))
    np.testing.assert_array_equal(plain.replay_buffer.actions, watched.replay_buffer.actions)


@pytest.mark.filterwarnings("ignore:rich is experimental")
def test_progress_bar(capfd: pytest.CaptureFixture[str]) -> None:
    model = make().learn(14, progress_bar=True)
    assert model.num_timesteps == 14 and "14/14" in "".join(capfd.readouterr())


# --- logs -----------------------------------------------------------------------------------------------------------


class Writer:
    """What tensorboard's own writer would have been told, by folder."""

    scalars: ClassVar[dict[str, dict[str, list[int]]]] = {}

    def __init__(self, log_dir: str):
        Path(log_dir).mkdir(parents=True, exist_ok=True)
        self.mine = self.scalars.setdefault(Path(log_dir).name, defaultdict(list))

    def add_scalar(self, key: str, value: float, step: int) -> None:
        assert np.isfinite(value)
        self.mine[key].append(step)

    def flush(self) -> None: ...

    def close(self) -> None: ...


def test_tensorboard_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("logger", "utils"):
        monkeypatch.setattr(f"stable_baselines3.common.{module}.SummaryWriter", Writer)
    monkeypatch.setattr(Writer, "scalars", {})
    model = make(tensorboard_log=str(tmp_path))
    model.learn(20, log_interval=1)
    model.learn(20, log_interval=1, reset_num_timesteps=False)
    model.learn(20, log_interval=1)
    model.learn(20, log_interval=1, tb_log_name="mine")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["MBDPO_1", "MBDPO_2", "mine_1"]
    assert Writer.scalars["MBDPO_1"]["rollout/ep_rew_mean"] == list(range(5, 45, 5))
    assert Writer.scalars["MBDPO_2"]["train/value_loss"][-1] == 20
    wanted = {"train/learning_rate", "train/score_loss", "train/grad_norm", "search/value", "time/fps"}
    assert wanted <= Writer.scalars["mine_1"].keys()
    assert "train/n_updates" not in Writer.scalars["mine_1"], "left out there, as by SB3"


class Reads(TorchDispatchMode):
    """Names of the operations that wait for a device to hand over a number."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero"):
            self.found.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("policy", ["MlpPolicy", "CnnPolicy", "MultiInputPolicy"])
def test_updates_read_no_number_until_the_logger_dumps(policy: str) -> None:
    # Without the discrete key: on a CPU, and only there, one_hot() reads what it encodes
    space = BOXES if policy == "MultiInputPolicy" else dict(VARIANTS)[policy]
    model = make(toy_envs(2, observation_space=space, terminates=True), policy).learn(14)
    rows = logged(model)
    model.device = th.device("cuda")  # which train() asks, while the networks stay where they are
    with Reads() as reads:
        assert th.ones(()).item() == 1
        model.train(3, 8)
    assert reads.found == ["aten::_local_scalar_dense"], "the one above"
    assert "train/value_loss" not in model.logger.name_to_value
    model.dump_logs()
    assert rows[-1]["train/n_updates"] == model._n_updates and np.isfinite(rows[-1]["train/value_loss"])


def test_tables_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(verbose=1).learn(20, log_interval=4)
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("ep_rew_mean", "n_updates", "consistency_loss", "Using cpu device"))
    model = make()
    model.set_logger(configure(str(tmp_path), ["csv", "json"]))
    model.learn(30, callback=LogEveryNTimesteps(10), log_interval=1000)
    assert not capsys.readouterr().out, "verbose=0"
    with open(tmp_path / "progress.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["time/total_timesteps"] for row in rows] == ["10", "20", "30"]
    assert float(rows[-1]["train/value_loss"]) > 0 and rows[-1]["train/n_updates"] == "19"
    last = json.loads((tmp_path / "progress.json").read_text().splitlines()[-1])
    assert last["train/value_loss"] == pytest.approx(float(rows[-1]["train/value_loss"]))


def test_no_warning_even_as_an_error() -> None:
    """Third-party imports aside, nothing warns: building, learning, evaluating, saving, loading."""
    program = """
        import io, warnings
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import stable_baselines3, sb3_contrib, torch
        from stable_baselines3.common.evaluation import evaluate_policy
        from sb3_mbdpo import MBDPO

        torch.set_num_threads(1)
        kwargs = {"learning_starts": 190, "buffer_size": 500, "batch_size": 8, "device": "cpu", "seed": 0}
        model = MBDPO("MlpPolicy", "Pendulum-v1", preset="debug", act_mode="score", **kwargs)
        model.learn(220, log_interval=1)
        evaluate_policy(model, model.get_env(), n_eval_episodes=1)
        file = io.BytesIO()
        model.save(file)
        file.seek(0)
        loaded = MBDPO.load(file, env=model.get_env())
        loaded.learn(10, reset_num_timesteps=False)
        print(loaded.num_timesteps)
    """
    finished = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert finished.returncode == 0 and finished.stdout == "230\n" and not finished.stderr, finished.stderr
