"""The RL Zoo integration and the quickstart's report, on one tiny run."""

import inspect
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import yaml

pytest.importorskip("rl_zoo3")

import optuna
import rl_zoo3
from gymnasium.wrappers import FlattenObservation
from PIL import Image
from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER
from stable_baselines3.common.monitor import Monitor

from sb3_mbdpo import MBDPO, quickstart, zoo
from sb3_mbdpo.wrappers import ActionRepeat
from sb3_mbdpo.zoo_checks import ZOO_KEYS

ENV_ID = "Pendulum-v1"
N_TIMESTEPS = 420


@pytest.fixture(scope="module")
def log_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run trained through the command line, shared by the tests below."""
    folder = tmp_path_factory.mktemp("logs")
    command = f"train --env {ENV_ID} -n {N_TIMESTEPS} --seed 0 --num-threads 1 --device cpu -f {folder}"
    command += " --eval-freq 200 --eval-episodes 2 --n-eval-envs 2 --verbose 0"
    zoo.main([*command.split(), "-params", "preset:'debug'", "learning_starts:300", "warmup_updates:20"])
    return folder


@pytest.fixture(scope="module")
def run(log_folder: Path) -> quickstart.Run:
    return quickstart.Run.find(ENV_ID, str(log_folder))


def test_registered():
    assert rl_zoo3.ALGOS["mbdpo"] is MBDPO
    assert HYPERPARAMS_SAMPLER["mbdpo"] is zoo.sample_mbdpo_params
    assert HYPERPARAMS_CONVERTER["mbdpo"] is zoo.convert_mbdpo_params


def test_config_names_arguments_of_mbdpo():
    entries = yaml.safe_load(zoo.default_config().read_text())
    assert ENV_ID in entries
    accepted = set(inspect.signature(MBDPO.__init__).parameters) | ZOO_KEYS
    for env_id, hyperparams in entries.items():
        assert {"n_timesteps", "policy", "preset"} <= set(hyperparams), env_id
        assert set(hyperparams) <= accepted, env_id


def test_search_space_names_arguments_of_mbdpo():
    accepted = set(inspect.signature(MBDPO.__init__).parameters)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(50):
        trial = study.ask()
        hyperparams = zoo.sample_mbdpo_params(trial, n_actions=1, n_envs=1, additional_args={})
        assert set(hyperparams) <= accepted
        assert 2 <= hyperparams["n_elites"] <= hyperparams["n_samples"]
        # What is stored with a trial turns into the same arguments again.
        assert HYPERPARAMS_CONVERTER["mbdpo"](trial.params) == hyperparams


@pytest.mark.parametrize(
    ("command", "given", "added"),
    [
        ("train", ["--env", ENV_ID], ["--algo", "mbdpo", "-conf", str(zoo.default_config())]),
        ("train", ["--algo", "mbdpo", "-conf", "mine.yml"], []),
        ("train", ["--algo=mbdpo", "--conf-file=mine.yml"], []),
        ("train", ["--algo", "sac"], []),
        ("enjoy", [], ["--algo", "mbdpo", "-f", "logs"]),
        ("enjoy", ["-f", "elsewhere"], ["--algo", "mbdpo"]),
        ("plot_train", ["-a", "mbdpo"], []),
    ],
)
def test_missing_arguments_are_filled_in(command: str, given: list[str], added: list[str]):
    assert zoo.complete_arguments(command, given) == given + added


def test_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        zoo.main(["push_to_hub"])
    assert "push_to_hub" in capsys.readouterr().err


def test_training_writes_a_run(log_folder: Path):
    folder = log_folder / "mbdpo" / f"{ENV_ID}_1"
    assert (folder / f"{ENV_ID}.zip").is_file()
    assert (folder / "0.monitor.csv").is_file()
    with np.load(folder / "evaluations.npz") as evaluations:
        assert evaluations["results"].shape == (2, 2)
    saved = yaml.unsafe_load((folder / ENV_ID / "config.yml").read_text())
    assert saved["preset"] == "debug"


def test_enjoy_loads_with_a_small_buffer(log_folder: Path, monkeypatch: pytest.MonkeyPatch):
    loaded = []
    original = MBDPO.load.__func__

    def load(cls: type, *args: object, **kwargs: object) -> object:
        loaded.append((cls, kwargs["buffer_size"]))
        return original(cls, *args, **kwargs)

    monkeypatch.setattr(MBDPO, "load", classmethod(load))
    zoo.main(["enjoy", "--env", ENV_ID, "-f", str(log_folder), "-n", "10", "--no-render", "--device", "cpu"])
    assert loaded == [(zoo.ActingMBDPO, 1)]
    # The substitute is gone again afterwards.
    assert rl_zoo3.ALGOS["mbdpo"] is MBDPO


def test_report(run: quickstart.Run, capsys: pytest.CaptureFixture[str]):
    quickstart.report(run, n_episodes=2, device="cpu", gif=False)
    output = capsys.readouterr().out
    for word in ("MBDPO", "random", "improvement", f"{N_TIMESTEPS} steps", "learning_curve.png"):
        assert word in output
    with Image.open(run.folder / "learning_curve.png") as image:
        assert image.width > image.height > 500


def test_random_policy_plays_the_same_episodes_again(run: quickstart.Run):
    first, second = (quickstart.episode_returns(None, run, n_episodes=3) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert len(set(first)) == 3
    assert not np.allclose(first, quickstart.episode_returns(None, run, n_episodes=3, seed=1))


def test_gif(run: quickstart.Run, tmp_path: Path):
    pytest.importorskip("pygame")
    env = run.make_env(1, seed=0)
    n_frames = quickstart.record_gif(quickstart.RandomPolicy(env, 0), run, tmp_path / "policy.gif", max_seconds=1)
    with Image.open(tmp_path / "policy.gif") as image:
        assert image.is_animated
        assert image.n_frames <= n_frames == 15
        assert image.width == 240


def test_repeats_within_and_around_the_monitor():
    inner = gym.make("Pendulum-v1")
    assert quickstart._count_repeats(Monitor(inner)) == (1, 1)
    assert quickstart._count_repeats(ActionRepeat(FlattenObservation(Monitor(inner)), 3)) == (1, 3)
    assert quickstart._count_repeats(ActionRepeat(Monitor(ActionRepeat(inner, 2)), 3)) == (2, 3)
    inner.unwrapped.action_repeat = 5
    assert quickstart._count_repeats(Monitor(inner)) == (5, 1)


def test_missing_zoo_says_what_to_install():
    code = "import sys; sys.modules['rl_zoo3'] = None; import sb3_mbdpo.zoo"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode != 0
    assert 'ImportError: the RL Zoo is not installed: run `pip install "sb3-mbdpo[zoo]"`' in result.stderr
