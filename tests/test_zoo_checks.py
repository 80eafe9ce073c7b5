"""Bad input on the command line: one sentence that says what to do, exit code 2, before any work."""

import importlib.util
import json
import sys
import zipfile
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3 import SAC

pytest.importorskip("rl_zoo3")

from sb3_mbdpo import MBDPO, MlpPolicy, cli, zoo, zoo_checks


@pytest.fixture(autouse=True)
def headless(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MUJOCO_GL", "off")  # nothing is drawn here
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")


def said(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 2) -> str:
    """What a command says on its way out: a line, after its name."""
    assert cli.main(arguments) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    name, _, text = lines[0].partition(": ")
    assert name == f"mbdpo {arguments[0]}"
    assert text.endswith((".", "?", ")"))
    return text


@pytest.mark.parametrize("command", ["train", "tune"])
def test_an_environment_that_is_not_registered(command: str, capsys: pytest.CaptureFixture[str]):
    assert "did you mean Pendulum-v1" in said(capsys, command, "--env", "Pendlum-v1")
    assert "did you mean Hopper-v5" in said(capsys, command, "--env", "Hopper-v9")
    assert "did you mean mbdpo/walker-walk-v0" in said(capsys, command, "--env", "walker-walk")
    assert "`mbdpo tasks` lists" in said(capsys, command, "--env", "zzzz")


def test_the_extra_to_install_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    find_spec = zoo_checks.importlib.util.find_spec
    hidden = {"dm_control", "metaworld", "Box2D", "gymnasium_robotics"}
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: None if name in hidden else find_spec(name, *rest)
    )
    assert '`pip install "sb3-mbdpo[dmc]"`' in said(capsys, "train", "--env", "mbdpo/walker-walk-v0")
    assert '`pip install "sb3-mbdpo[metaworld]"`' in said(capsys, "train", "--env", "mbdpo/mw-reach-v0")
    assert '`pip install "sb3-mbdpo[metaworld]"`' in said(capsys, "train", "--env", "Meta-World/MT1")
    assert '`pip install "sb3-mbdpo[box2d]"`' in said(capsys, "train", "--env", "BipedalWalker-v3")
    text = said(capsys, "train", "--env", "mbdpo/walker-wlak-v0")
    assert "did you mean mbdpo/walker-walk-v0" in text
    assert '(It needs `pip install "sb3-mbdpo[dmc]"`.)' in text


def test_discrete_actions(capsys: pytest.CaptureFixture[str]):
    text = said(capsys, "train", "--env", "CartPole-v1")
    assert "Discrete(2) actions" in text
    assert "--algo" in text


def test_unknown_hyperparameters(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    config = tmp_path / "mine.yml"
    config.write_text("Pendulum-v1:\n  n_timesteps: 100\n  policy: 'MlpPolicy'\n  denoising_step: 4\n")
    text = said(capsys, "train", "--env", "Pendulum-v1", "-conf", str(config))
    assert f"{config}, Pendulum-v1: MBDPO has no hyperparameter 'denoising_step'" in text
    assert "did you mean 'denoising_steps'?" in text
    text = said(capsys, "train", "--env", "Pendulum-v1", "-params", "horizn:4")
    assert "did you mean 'horizon'?" in text
    assert "strings in quotes" in said(capsys, "train", "--env", "Pendulum-v1", "-params", "preset:debug")
    assert "no configuration file" in said(capsys, "train", "--env", "Pendulum-v1", "-conf", str(tmp_path / "no.yml"))
    config.write_text("Pendulum-v1: [")
    assert "is not YAML" in said(capsys, "train", "--env", "Pendulum-v1", "-conf", str(config))
    config.write_text("Hopper-v5: {}")
    assert "no entry for Pendulum-v1" in said(capsys, "train", "--env", "Pendulum-v1", "-conf", str(config))


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Programs of the zoo that were entered, none of which runs."""
    programs: list[str] = []
    monkeypatch.setattr(zoo, "hand_over", lambda program, *rest: programs.append(program))
    return programs


@pytest.mark.parametrize(
    ("hyperparam", "words"),
    [
        ("horizon:0", "horizon must be a whole number of at least 1, got 0."),
        ("preset:'nope'", "nope"),
        ("learning_rate:'abc'", "'lin_1e-3', got 'abc'."),
        ("learning_rate:'lin_x'", "'lin_1e-3', got 'lin_x'."),
        ("learning_rate:-1e-3", "learning_rate must be"),
        ("policy:'CnnPolicy'", "CnnPolicy needs image observations"),
        ("policy:'nope.Nope'", "policy='nope.Nope' does not work: No module named 'nope'."),
        ("policy_kwargs:{'widht': 5}", "widht"),
        ("n_envs:0", "n_envs must be a whole number of at least 1, got 0."),
        ("n_timesteps:-1", "n_timesteps must be at least 1, got -1."),
        ("normalize:'x'", "normalize='x' does not work: name 'x' is not defined."),
        ("normalize:'5'", "normalize must be True, False or keywords, got '5'."),
        ("callback:'sb3_mbdpo.Foo'", "callback='sb3_mbdpo.Foo' does not work: module 'sb3_mbdpo' has no"),
        ("env_wrapper:'nope.Nope'", "env_wrapper='nope.Nope' does not work: No module named 'nope'."),
        ("env_wrapper:{'sb3_mbdpo.wrappers.ActionRepeat': {'repeta': 2}}", "unexpected keyword argument 'repeta'."),
        ("env_kwargs:{'gravity': 5}", "Pendulum-v1 cannot be made"),
        ("noise_type:'foo'", "noise_type must be 'normal' or 'ornstein-uhlenbeck', got 'foo'."),
        ("noise_type:'normal'", "needs noise_std, a number of at least 0, got None."),
        ("noise_std:0.1", "noise_std is for noise_type"),
    ],
)
def test_values_that_cannot_work(
    hyperparam: str, words: str, begun: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    where = ("--env", "Pendulum-v1", "-f", str(tmp_path / "logs"), "--device", "cpu")
    assert words in said(capsys, "train", *where, "-params", hyperparam)
    assert not begun
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "-n", "0"], "--n-timesteps must be at least 1, got 0."),
        (["train", "-n", "-5"], "--n-timesteps must be at least 1, got -5."),
        (["train", "--log-interval", "0"], "--log-interval must be at least 1, got 0."),
        (["train", "--n-eval-envs", "0"], "--n-eval-envs must be at least 1, got 0."),
        (["train", "--eval-episodes", "0"], "--eval-episodes must be at least 1, got 0."),
        (["tune", "--n-evaluations", "0"], "--n-evaluations must be at least 1, got 0."),
        (["tune", "--n-jobs", "0"], "--n-jobs must be at least 1, got 0."),
        (["train", "--seed", "5000000000"], "--seed must be between -1 and 4294967295, got 5000000000."),
        (["enjoy", "--no-render", "--seed", "-1"], "--seed must be between 0 and 4294967295, got -1."),
        (["enjoy", "--no-render", "-n", "-5"], "-n must be at least 1, got -5."),
        (["enjoy", "--no-render", "--n-envs", "0"], "--n-envs must be at least 1, got 0."),
        (["report", "-n", "0"], "-n must be at least 1, got 0."),
    ],
    ids=" ".join,
)
def test_numbers_that_cannot_be_meant(
    arguments: list[str], words: str, begun: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    command, *rest = arguments
    assert words in said(capsys, command, "--env", "Pendulum-v1", "-f", str(tmp_path / "logs"), *rest)
    assert not begun and not list(tmp_path.iterdir())


def test_tensorboard_has_to_be_there(
    begun: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorboard" else found(name))
    text = said(capsys, "train", "--env", "Pendulum-v1", "-f", str(tmp_path), "--tensorboard-log", str(tmp_path / "tb"))
    assert "--tensorboard-log needs tensorboard" in text and not begun


def test_an_id_is_proposed_once(capsys: pytest.CaptureFixture[str]):
    text = said(capsys, "bench", "--env", "mbdpo/cartpole-swingup-v9")
    assert text.count("mbdpo/cartpole-swingup-v0") == 1


def test_devices_and_folders_that_cannot_be_used(begun: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert "--device foo cannot be used" in said(capsys, "train", "--env", "Pendulum-v1", "--device", "foo")
    for command in (["enjoy", "--no-render"], ["report"]):
        assert "--device foo cannot be used" in said(capsys, *command, "--env", "Pendulum-v1", "--device", "foo")
    (tmp_path / "file").touch()
    for folder in ("file", "file/logs"):
        text = said(capsys, "train", "--env", "Pendulum-v1", "--device", "cpu", "-f", str(tmp_path / folder))
        assert "cannot be written" in text
    assert not begun


def test_values_that_work(begun: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path):
    where = ("train", "--env", "Pendulum-v1", "-f", str(tmp_path), "--device", "cpu", "-params")
    for hyperparams in (
        ("learning_rate:'lin_1e-3'", "normalize:True", "n_envs:2"),
        ("noise_type:'normal'", "noise_std:0.1", "normalize:'dict(norm_obs=False)'", "gamma:0.99"),
        ("env_wrapper:'gymnasium.wrappers.FlattenObservation'", "frame_stack:2", "model_size:19"),
        ("policy:'sb3_mbdpo.MlpPolicy'", "policy_kwargs:'dict(n_critics=3)'", "env_kwargs:{'g': 5.0}"),
    ):
        assert cli.main([*where, *hyperparams]) == 0
    assert capsys.readouterr().out == ""
    assert begun == ["train"] * 4
    assert not list(tmp_path.iterdir())


def test_the_check_leaves_random_numbers_alone(begun: list[str], tmp_path: Path):
    """Training without a seed draws one from NumPy's: it would always be the same."""
    before, torch_before = np.random.get_state(legacy=False)["state"], th.get_rng_state()
    assert cli.main(["train", "--env", "Pendulum-v1", "-f", str(tmp_path), "--device", "cpu"]) == 0
    after = np.random.get_state(legacy=False)["state"]
    assert np.array_equal(before["key"], after["key"]) and before["pos"] == after["pos"]
    assert begun == ["train"] and th.equal(torch_before, th.get_rng_state())


def test_an_entry_with_wrappers_works(begun: list[str], tmp_path: Path):
    pytest.importorskip("shimmy")
    pytest.importorskip("dm_control")
    # Observations are dicts before they are wrapped, for a policy that takes none
    assert cli.main(["train", "--env", "dm_control/cartpole-swingup-v0", "-f", str(tmp_path), "--device", "cpu"]) == 0
    assert begun == ["train"]


def test_runs_that_are_not_there(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    where = ("--env", "Pendulum-v1", "-f", str(tmp_path), "--no-render")
    assert "no log folder" in said(capsys, "enjoy", *where[:3], str(tmp_path / "nowhere"))
    assert "train one: mbdpo train --env Pendulum-v1" in said(capsys, "enjoy", *where)
    (tmp_path / "sac" / "Pendulum-v1_1").mkdir(parents=True)
    assert "there are runs of sac: add --algo" in said(capsys, "enjoy", *where)
    (tmp_path / "mbdpo" / "Pendulum-v1_1").mkdir(parents=True)
    assert "No model found" in said(capsys, "enjoy", *where)
    assert "was evaluated" in said(capsys, "plot", *where[:4])


def test_a_model_of_another_algorithm(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    run = tmp_path / "mbdpo" / "Pendulum-v1_1"
    run.mkdir(parents=True)
    SAC("MlpPolicy", "Pendulum-v1", buffer_size=10, device="cpu").save(run / "Pendulum-v1.zip")
    where = ("--env", "Pendulum-v1", "-f", str(tmp_path), "--no-render")
    assert "is a model of another algorithm" in said(capsys, "enjoy", *where)
    agent = str(run / "Pendulum-v1.zip")
    assert "is a model of another algorithm" in said(capsys, "train", "--env", "Pendulum-v1", "-i", agent)
    Path(agent).write_text("nothing")
    assert "not a model that Stable-Baselines3 saved" in said(capsys, "enjoy", *where)
    assert "takes the path" in said(capsys, "train", "--env", "Pendulum-v1", "-i", "nowhere.zip")


class OwnPolicy(MlpPolicy):
    """A policy from another module, as the zoo's files may name one."""


def test_a_policy_of_ones_own_is_no_other_algorithm(tmp_path: Path):
    env = gym.make("Pendulum-v1")
    MBDPO(OwnPolicy, env, preset="debug", buffer_size=10, device="cpu").save(tmp_path / "model")
    zoo_checks.check_saved_model(str(tmp_path / "model.zip"), "mbdpo")


def test_a_model_is_looked_at_without_unpickling(tmp_path: Path):
    path = tmp_path / "model.zip"
    content = {
        "policy_class": {":type:": "<class 'abc.ABCMeta'>", ":serialized:": "gASVAA==", "__module__": "elsewhere"}
    }
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data", json.dumps(content))
    with pytest.raises(zoo_checks.BadInputError, match="from elsewhere"):
        zoo_checks.check_saved_model(str(path), "mbdpo")
    zoo_checks.check_saved_model(str(path), "sac")


def test_no_display(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(zoo_checks.BadInputError, match="--no-render"):
        zoo_checks.check_display()
    text = said(capsys, "plot", "train", "-a", "mbdpo", "-e", "Pendulum-v1", "-f", "logs")
    assert "add --save FILE" in text


def test_no_ffmpeg(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/nowhere/ffmpeg")
    assert "Videos need ffmpeg" in said(capsys, "video", "--env", "Pendulum-v1")
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    monkeypatch.delenv("IMAGEIO_FFMPEG_EXE")
    assert "pip install imageio-ffmpeg" in said(capsys, "video", "--env", "Pendulum-v1")


def test_references_that_are_not_there(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    text = said(capsys, "plot", "--env", "mbdpo/walker-wlak-v0", "--against", "paper", "-f", str(tmp_path))
    assert "walker-walk" in text
    text = said(capsys, "plot", "--env", "mbdpo/walker-walk-v0", "--against", "paper", "--methods", "ppo")
    assert "no method 'ppo'" in text


def test_unknown_tasks(capsys: pytest.CaptureFixture[str]):
    assert "walker-walk" in said(capsys, "tasks", "walker-wlak")


def test_checks_pass_where_nothing_is_wrong():
    before = set(gym.registry)
    zoo_checks.check_environment("Pendulum-v1")
    zoo_checks.check_environment("Pendulum-v1", {"g": 5.0})
    zoo_checks.check_environment("CartPole-v1", continuous=False)
    with pytest.raises(zoo_checks.BadInputError, match="cannot be made"):
        zoo_checks.check_environment("Pendulum-v1", {"gravity": 5.0})
    assert set(gym.registry) == before
