"""The command: its table and help, exit codes, and the zoo's programs as subprocesses on one tiny run."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import gymnasium
import numpy as np
import optuna
import pytest
import yaml
from gymnasium.wrappers import TimeLimit
from stable_baselines3.common.monitor import Monitor

pytest.importorskip("rl_zoo3")

from sb3_mbdpo import MBDPO, cli, zoo
from sb3_mbdpo.presets import PRESETS
from tests.fakes import ToyEnv
from tests.processes import run_module

ENV_ID = "Pendulum-v1"
DEBUG = ["-params", "preset:'debug'", "learning_starts:300", "warmup_updates:10", "gradient_steps:1"]
TRAIN = ["train", "--env", ENV_ID, "--seed", "0", "--device", "cpu", "--num-threads", "1", "--verbose", "0"]


def mbdpo(*arguments: str, timeout: int = 600, **env: str) -> subprocess.CompletedProcess:
    """The command in a process of its own, without a display."""
    environment = {key: value for key, value in os.environ.items() if "DISPLAY" not in key}
    environment |= {"OMP_NUM_THREADS": "1", **env}
    return run_module("sb3_mbdpo", *arguments, timeout=timeout, env=environment)


@pytest.fixture(scope="module")
def log_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run, trained by the command."""
    folder = tmp_path_factory.mktemp("logs")
    evaluation = ["--eval-freq", "200", "--eval-episodes", "3", "--n-eval-envs", "3"]
    result = mbdpo(*TRAIN, "-n", "420", "-f", str(folder), *evaluation, *DEBUG)
    assert result.returncode == 0, result.stderr
    return folder


# --- table and help ---------------------------------------------------------------------------------------------------


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for name in cli.COMMANDS:
        assert f"\n  {name} " in text
    assert max(map(len, text.splitlines())) <= 120
    assert cli.main(["--version"]) == 0
    assert "sb3-mbdpo" in capsys.readouterr().out


@pytest.mark.parametrize(("typed", "said"), [("trian", "did you mean 'train'?"), ("", "usage: mbdpo COMMAND")])
def test_no_such_command(typed: str, said: str, capsys: pytest.CaptureFixture[str]):
    assert cli.main([typed]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]):
    module = cli.COMMANDS[name].target.split(":")[0]
    if not (Path(cli.__file__).parent / f"{module.rpartition('.')[2]}.py").is_file():
        pytest.skip(f"{module} is not part of this package yet")
    try:
        code = cli.main([name, "--help"])
    except SystemExit as ended:
        code = ended.code
    assert code == 0
    assert f"usage: mbdpo {name} " in capsys.readouterr().out


def test_a_missing_package_is_a_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setitem(cli.COMMANDS, "bench", cli.Command("no_such_package:run", "", "minari"))
    assert cli.main(["bench"]) == 1
    assert capsys.readouterr().err == (
        "mbdpo bench: No module named 'no_such_package': run `pip install \"sb3-mbdpo[minari]\"`.\n"
    )


def test_what_commands_return_is_the_exit_code(monkeypatch: pytest.MonkeyPatch):
    for outcome, code in ((None, 0), (0, 0), (3, 3)):
        monkeypatch.setattr(cli, "load", lambda name, outcome=outcome: lambda arguments: outcome)
        assert cli.main(["bench"]) == code


# --- the zoo's programs -----------------------------------------------------------------------------------------------


def test_train_leaves_all_that_is_needed_to_repeat_it(log_folder: Path):
    run = log_folder / "mbdpo" / f"{ENV_ID}_1"
    for name in (f"{ENV_ID}.zip", "best_model.zip", "evaluations.npz", "0.monitor.csv", "versions.txt"):
        assert (run / name).is_file(), name
    settings = run / ENV_ID
    assert f"train --env {ENV_ID} --seed 0" in (settings / "command.txt").read_text()
    assert yaml.unsafe_load((settings / "config.yml").read_text())["preset"] == "debug"
    assert yaml.unsafe_load((settings / "args.yml").read_text())["seed"] == 0
    assert "stable-baselines3==" in (run / "versions.txt").read_text()


def test_enjoy(log_folder: Path):
    result = mbdpo("enjoy", "--env", ENV_ID, "-f", str(log_folder), "-n", "200", "--no-render", "--device", "cpu")
    assert result.returncode == 0, result.stderr
    assert "Episode Reward: -" in result.stdout
    assert mbdpo("enjoy", "--env", ENV_ID, "-f", str(log_folder)).stderr == (
        "mbdpo enjoy: There is no display to show the agent on: add --no-render, or use `mbdpo video`.\n"
    )


def test_tune_starts_from_the_preset(tmp_path: Path):
    arguments = [*TRAIN[1:], "-n", "340", "--n-trials", "3", "-f", str(tmp_path), "--study-name", "tiny"]
    arguments += ["--eval-episodes", "1", "--no-optim-plots", *DEBUG]
    result = mbdpo("tune", *arguments)
    assert result.returncode == 0, result.stderr
    reports = list((tmp_path / "mbdpo").glob(f"report_{ENV_ID}_3-trials-340*.csv"))
    assert len(reports) == 1
    backend = optuna.storages.journal.JournalFileBackend(str(tmp_path / "mbdpo" / "tuning.log"))
    study = optuna.load_study(study_name="tiny", storage=optuna.storages.JournalStorage(backend))
    assert len(study.trials) == 3
    assert {trial.state.name for trial in study.trials} <= {"COMPLETE", "PRUNED"}
    assert study.trials[0].params == pytest.approx(zoo.default_trial({"preset": "debug"}))
    assert study.trials[1].params != study.trials[0].params


def test_tune_begins_no_study_with_arguments_that_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["tune", "--env", ENV_ID, "--device", "cpu", "-f", str(tmp_path), "--sampler", "foo", *DEBUG])
    said = capsys.readouterr()
    assert "invalid choice: 'foo'" in said.err and "go on with it" not in said.out
    assert not list(tmp_path.iterdir())


def test_plots(log_folder: Path, tmp_path: Path):
    ours, training = tmp_path / "ours.png", tmp_path / "training.png"
    assert mbdpo("plot", "--env", ENV_ID, "-f", str(log_folder), "-o", str(ours)).returncode == 0
    where = ["-f", str(log_folder)]
    result = mbdpo("plot", "train", "-a", "mbdpo", "-e", ENV_ID, *where, "-w", "2", "--save", str(training))
    assert result.returncode == 0, result.stderr
    assert min(ours.stat().st_size, training.stat().st_size) > 5_000
    results = tmp_path / "results"
    result = mbdpo("plot", "all", "-a", "mbdpo", "-e", ENV_ID, *where, "--no-display", "-o", str(results))
    assert result.returncode == 0, result.stderr
    assert results.with_suffix(".pkl").is_file()


def test_video(log_folder: Path, tmp_path: Path):
    pytest.importorskip("pygame")
    where = ["-f", str(log_folder), "-o", str(tmp_path)]
    result = mbdpo("video", "--env", ENV_ID, "-n", "10", *where)
    assert result.returncode == 0, result.stderr
    assert len(list(tmp_path.glob("*.mp4"))) == 1


def test_report(log_folder: Path):
    arguments = ["--env", ENV_ID, "-f", str(log_folder), "-n", "2", "--no-gif", "--device", "cpu"]
    result = mbdpo("report", *arguments)
    assert result.returncode == 0, result.stderr
    assert "improvement" in result.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT for a subprocess")
def test_ctrl_c_saves_what_there_is(tmp_path: Path):
    command = [sys.executable, "-m", "sb3_mbdpo", *TRAIN, "-n", "1000000", "-f", str(tmp_path), "--eval-freq", "-1"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, *DEBUG],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Where the tests run in the background the signal is ignored, and children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    monitor = tmp_path / "mbdpo" / f"{ENV_ID}_1" / "0.monitor.csv"
    deadline = time.monotonic() + 500
    # Two lines of header, then a line for each episode
    while process.poll() is None and time.monotonic() < deadline:
        if monitor.is_file() and len(monitor.read_text().splitlines()) > 3:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    try:
        _, errors = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    assert (monitor.parent / f"{ENV_ID}.zip").is_file()
    assert (monitor.parent / "versions.txt").is_file()
    assert "Traceback" not in errors


def test_bench(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["bench", "--preset", "debug", "--repeat", "2", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    times = [float(line.split()[-2]) for line in lines if line.endswith(" ms")]
    assert len(times) == 3
    assert min(times) > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--policy", "Foo"], "Foo"),
        (["--policy", "CnnPolicy"], "CnnPolicy needs image observations"),
        (["--device", "foo"], "--device foo cannot be used"),
    ],
)
def test_what_bench_refuses(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["bench", "--preset", "debug", "--device", "cpu", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("mbdpo bench: ") and words in said and len(said.splitlines()) == 1


@pytest.fixture
def own_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module that registers Own-v0."""
    (tmp_path / "own_environments.py").write_text(
        "import gymnasium\ngymnasium.register('Own-v0', 'tests.fakes:ToyEnv', max_episode_steps=20)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield "own_environments"
    gymnasium.registry.pop("Own-v0", None)
    sys.modules.pop("own_environments", None)


def test_bench_times_environments_of_ones_own(own_environment: str, capsys: pytest.CaptureFixture[str]):
    given = ["bench", "--env", "Own-v0", "--preset", "debug", "--repeat", "1", "--device", "cpu"]
    assert cli.main(given) == 2 and "There is no environment 'Own-v0'" in capsys.readouterr().err
    assert cli.main([*given, "--gym-packages", own_environment]) == 0
    assert capsys.readouterr().out.startswith("Own-v0, preset debug")


def test_a_report_of_an_environment_of_ones_own(
    own_environment: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "mbdpo" / "Own-v0_1"
    folder.mkdir(parents=True)
    env = Monitor(TimeLimit(ToyEnv(), 20), str(folder / "0"))
    MBDPO("MlpPolicy", env, preset="debug", learning_starts=100, device="cpu").learn(60).save(folder / "Own-v0")
    given = ["--env", "Own-v0", "-f", str(tmp_path), "-n", "1", "--no-gif", "--device", "cpu"]
    assert cli.main(["report", *given, "--gym-packages", own_environment]) == 0
    assert "improvement" in capsys.readouterr().out


@pytest.mark.parametrize(
    "command", ["train", "enjoy", "video", "report", "bench", "pretrain data", "finetune --model m"]
)
def test_a_package_that_is_not_there(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    learns = " " in command
    given = ["--save", str(tmp_path / "saved")] if learns else ["--env", "Own-v0"]
    assert cli.main([*command.split(), *given, "--gym-packages", "no_such_module"]) == 2
    said = capsys.readouterr().err
    assert "--gym-packages no_such_module: No module named" in said and len(said.splitlines()) == 1


def test_bench_repeats_at_least_once(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["bench", "--repeat", "0"])
    assert "at least 1" in capsys.readouterr().err


# --- the search space -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["paper", "cpu"])
def test_the_search_starts_at_the_presets_own_values(preset: str):
    trial = zoo.default_trial({"preset": preset, "n_timesteps": 5})
    values = zoo.convert_mbdpo_params(trial)
    for name in ("learning_rate", "batch_size", "tau", "horizon", "denoising_steps", "n_samples", "n_elites"):
        assert values[name] == getattr(PRESETS[preset], name), name
    assert np.isclose(values["energy_coef"], 0.01)


def test_entries_move_the_start_and_edges_hold_it():
    trial = zoo.default_trial({"preset": "cpu", "learning_rate": "lin_5e-4", "batch_size": 4096})
    assert (trial["learning_rate"], trial["batch_size"]) == (5e-4, 512)
