"""Pretraining and fine-tuning from a shell."""

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize
from torch.nn.utils import parameters_to_vector

from sb3_mbdpo import MBDPO, convert_minari
from sb3_mbdpo.finetune_command import finetune
from sb3_mbdpo.learning_commands import StopWhenAsked
from sb3_mbdpo.offline import OfflineAlgorithm
from sb3_mbdpo.offline_commands import main, pretrain
from tests.fakes import flat_parameters
from tests.processes import run_module
from tests.recordings import record, recorded
from tests.test_offline import PENDULUM, TORQUE

pytestmark = pytest.mark.usefixtures("minari_cache")
CHUNK = Path(__file__).parent / "data" / "chunks" / "chunk_mt30.pt"
SMALL = ["--preset", "debug", "--batch-size", "8", "--device", "cpu", "--verbose", "0"]
NAMED = ["slow=test/slow-v0", "fast=test/fast-v0"]


@pytest.fixture(autouse=True)
def data(minari_cache: Path) -> None:
    for seed, name in enumerate(("slow", "fast")):
        episodes = recorded((6, 9), PENDULUM, TORQUE, terminates=(False, False), seed=seed)
        record(f"test/{name}-v0", episodes, PENDULUM, TORQUE, env="Pendulum-v1")


def settings(*lines: str) -> list[str]:
    """Tiny, and acting without search: what takes time here is evaluation."""
    return [*SMALL, "--seed", "0", "--set", "buffer_size=1000", "act_mode=prior", *lines]


def trained(path: Path, steps: int = 4, data: list[str] | None = None) -> Path:
    assert pretrain([*(data or NAMED), "--steps", str(steps), "--save", str(path), *settings()]) == 0
    return path.with_suffix(".zip")


def parameters_of(path: Path) -> th.Tensor:
    return parameters_to_vector(MBDPO.load(path, device="cpu").policy.parameters()).detach()


# --- as a process of its own ----------------------------------------------------------------------------------------


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return run_module("sb3_mbdpo.offline_commands", *arguments, timeout=120)


def test_pretraining_and_fine_tuning_from_a_shell(tmp_path: Path) -> None:
    saved = tmp_path / "pretrained"
    done = run("pretrain", *NAMED, "--steps", "5", "--save", str(saved), *settings())
    assert done.returncode == 0, done.stderr
    assert f"Done at step 5: saved {saved}.zip" in done.stdout
    tuned = tmp_path / "tuned.zip"
    arguments = ["--model", str(saved), "--env", "Pendulum-v1", "--name", "new", "--like", "slow", "--steps", "204"]
    done = run("finetune", *arguments, "--save", str(tuned), "--eval-episodes", "1", "--verbose", "0")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "Task 'new' starts from slow" in lines
    table = lines[lines.index(next(line for line in lines if line.startswith("task "))) :]
    assert table[0].split() == ["task", "before", "after", "change"]
    assert [line.split()[0] for line in table[1:]] == ["slow", "fast", "new"]
    for line in table[1:]:
        _, before, after, change = line.split()
        assert float(change) == pytest.approx(float(after) - float(before), abs=0.11)
    model = MBDPO.load(tuned, device="cpu")
    assert model.tasks is not None and model.tasks.names == ("slow", "fast", "new")
    assert model.num_timesteps == 204 and model._n_updates > 5


def test_help_reads_well(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (pretrain, finetune):
        assert command(["--help"]) == 0
        shown = capsys.readouterr().out
        assert f"usage: mbdpo {command.__name__}" in shown and "--steps" in shown
    assert main(["pretrain", "--help"]) == 0


# --- what comes out -------------------------------------------------------------------------------------------------


def test_arguments_reach_the_model(tmp_path: Path) -> None:
    path = tmp_path / "model.zip"
    more = ["--model-size", "0.05", "--task-sampling", "balanced", "--observation-dim", "5", "--action-dim", "2"]
    more += ["--set", "learning_rate=1e-4", "bootstrap=score", "policy_kwargs={'n_critics': 3}"]
    assert pretrain([*NAMED, "--steps", "2", "--save", str(path), *SMALL, *more]) == 0
    model = MBDPO.load(path, device="cpu")
    assert (model.model_size, model.batch_size, model.task_sampling) == (0.05, 8, "balanced")
    assert (model.learning_rate, model.bootstrap, model.policy_kwargs) == (1e-4, "score", {"n_critics": 3})
    assert model.tasks is not None and (model.tasks.observation_dim, model.tasks.action_dim) == (5, 2)


@pytest.mark.parametrize(
    ("more", "rate"),
    [
        ([], 1e-3),
        # The debug preset's rate belongs to its 32 windows, this run has 8
        (["--scale-learning-rate", "sqrt"], 1e-3 / 2),
        (["--scale-learning-rate", "linear", "--reference-batch-size", "4"], 1e-3 * 2),
        (["--scale-learning-rate", "sqrt", "--reference-batch-size", "2", "--set", "learning_rate=1e-4"], 1e-4 * 2),
    ],
)
def test_the_learning_rate_can_follow_the_batch(tmp_path: Path, more: list[str], rate: float) -> None:
    path = tmp_path / "model.zip"
    command = [*NAMED, "--save", str(path), *SMALL, *more]
    assert pretrain([*command, "--steps", "1"]) == 0
    assert MBDPO.load(path, device="cpu").learning_rate == pytest.approx(rate)
    assert pretrain([*command, "--steps", "2", "--resume"]) == 0, "the same words go on with the same rate"


@pytest.mark.parametrize("kind", ["id", "pooled", "shards", "chunks"])
def test_kinds_of_data(kind: str, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    given = {
        "id": ["test/slow-v0"],
        "pooled": ["one=test/slow-v0", "one=test/fast-v0"],
        "shards": [str(convert_minari({"slow": "test/slow-v0"}, tmp_path))],
        "chunks": [str(CHUNK), "--shards-dir", str(shards)],
    }[kind]
    model = MBDPO.load(trained(tmp_path / "model", 2, given), device="cpu")
    names = {"id": None, "pooled": ("one",), "shards": ("slow",)}
    wanted = names.get(kind, ("cheetah-run", "pendulum-swingup", "cup-catch"))
    assert (None if model.tasks is None else model.tasks.names) == wanted
    assert shards.exists() == (kind == "chunks")


def test_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    def learn_offline(self: MBDPO, data: Any, steps: int, *arguments: Any, **kwargs: Any) -> MBDPO:
        seen.append(kwargs)
        return self

    monkeypatch.setattr(OfflineAlgorithm, "learn_offline", learn_offline)
    trained(tmp_path / "a")
    evaluated = [*NAMED, "--save", str(tmp_path / "b"), "--eval-every", "3", "--eval-episodes", "2", *settings()]
    assert pretrain(evaluated) == 0
    assert "eval_env" not in seen[0]
    assert (seen[1]["eval_env"], seen[1]["eval_freq"], seen[1]["n_eval_episodes"]) == (True, 3, 2)


def test_fine_tuning_on_a_known_task_and_of_a_single_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    several = trained(tmp_path / "several")
    more = [
        "--save",
        str(tmp_path / "tuned"),
        "--overwrite",
        "--eval-episodes",
        "1",
        "--device",
        "cpu",
        "--verbose",
        "0",
    ]
    known = ["--model", str(several), "--task", "fast", "--steps", "6", "--trainable", "heads", "policies", *more]
    assert finetune(known) == 0
    table = capsys.readouterr().out.splitlines()[-3:]
    assert [line.split()[0] for line in table] == ["task", "slow", "fast"]
    model = MBDPO.load(tmp_path / "tuned", device="cpu")
    # It acts for itself at once, and learns when there is an episode to learn from, or as many steps as are asked for
    assert (model.num_timesteps, model._trainable, model._acts_from_start) == (6, ["heads", "policies"], True)
    assert (model._n_updates, model.learning_starts) == (4, 200)
    assert finetune([*known, "--set", "learning_starts=2"]) == 0
    model = MBDPO.load(tmp_path / "tuned", device="cpu")
    assert (model._n_updates, model.learning_starts) == (8, 2)
    # Now it was in an environment, and comes with no data from there
    assert finetune(["--model", str(tmp_path / "tuned"), *known[2:]]) == 0
    model = MBDPO.load(tmp_path / "tuned", device="cpu")
    assert (model.num_timesteps, model._n_updates, model.learning_starts) == (6, 8, 200)
    one = trained(tmp_path / "one", 4, ["test/slow-v0"])
    assert finetune(["--model", str(one), "--env", "Pendulum-v1", "--steps", "6", *more]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[-2:]] == ["task", "Pendulum-v1"]
    model = MBDPO.load(tmp_path / "tuned", device="cpu")
    assert (model.num_timesteps, model._n_updates, model.learning_starts) == (6, 4, 200)


@pytest.mark.parametrize("n_envs", [1, 4])
def test_fine_tuning_of_what_was_trained_in_environments(n_envs: int, tmp_path: Path) -> None:
    envs = make_vec_env("Pendulum-v1", n_envs)
    settings: dict[str, Any] = {"preset": "debug", "act_mode": "prior", "batch_size": 8, "buffer_size": 100}
    online = MBDPO("MlpPolicy", envs, learning_starts=16, warmup_updates=0, seed=0, device="cpu", **settings)
    online.learn(8).save(tmp_path / "new")
    updates = online.learn(24)._n_updates
    assert updates > 0
    online.save(tmp_path / "online")

    def tuned(name: str, *more: str) -> MBDPO:
        arguments = ["--model", str(tmp_path / name), "--env", "Pendulum-v1", "--steps", "20", "--verbose", "0"]
        arguments += ["--save", str(tmp_path / "tuned"), "--overwrite", "--eval-episodes", "1", "--device", "cpu"]
        assert finetune([*arguments, *more]) == 0
        return MBDPO.load(tmp_path / "tuned", device="cpu")

    model = tuned("online", "--set", "learning_starts=15")
    assert (model.num_timesteps, model.n_envs, model._acts_from_start) == (20, 1, True)
    assert (model._n_updates, model.learning_starts) == (updates + 5, 15)
    model = tuned("online")
    assert (model._n_updates, model.learning_starts) == (updates, 200), "an episode"
    model = tuned("new")
    assert (model._n_updates, model.learning_starts, model._acts_from_start) == (4, 16, False), "nothing to act by yet"


def test_fine_tuning_of_a_model_saved_with_its_replay_goes_on(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"preset": "debug", "act_mode": "prior", "batch_size": 8, "buffer_size": 100}
    model = MBDPO("MlpPolicy", "Pendulum-v1", learning_starts=16, warmup_updates=0, device="cpu", **settings).learn(20)
    model.save(tmp_path / "whole", include=["replay_buffer"])
    arguments = ["--model", str(tmp_path / "whole"), "--env", "Pendulum-v1", "--steps", "10", "--verbose", "0"]
    assert finetune([*arguments, "--save", str(tmp_path / "on"), "--eval-episodes", "1", "--device", "cpu"]) == 0
    model = MBDPO.load(tmp_path / "on", device="cpu")
    assert (model.num_timesteps, model._n_updates, model.learning_starts) == (30, 14, 16)


def test_fine_tuning_beside_the_data_of_pretraining(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    several, shares = trained(tmp_path / "several"), []
    arguments = ["--model", str(several), "--task", "fast", "--steps", "6", "--save", str(tmp_path / "tuned")]
    arguments += ["--overwrite", "--eval-episodes", "1", "--device", "cpu", "--verbose", "0"]
    sample = MBDPO._sample

    def spy(self: MBDPO, batch_size: int) -> Any:
        shares.append(self._rehearsal_share)
        return sample(self, batch_size)

    monkeypatch.setattr(MBDPO, "_sample", spy)
    arguments += ["--set", "learning_starts=2"]
    data = ["--rehearse", "slow=test/slow-v0", "fast=test/fast-v0", "--rehearse-share", "0.25"]
    assert finetune([*arguments, *data]) == 0
    assert set(shares) == {0.25}
    # Without the option a model that had data beside it has none
    shares.clear()
    assert finetune([*arguments[:1], str(tmp_path / "tuned"), *arguments[2:]]) == 0
    assert set(shares) == {0.0}
    assert finetune([*arguments, *data[:-1], "2"]) == 2
    assert finetune([*arguments, *data[-2:]]) == 2


def test_fine_tuning_of_a_folder_or_a_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "folder"
    MBDPO.load(trained(tmp_path / "several"), device="cpu").save_pretrained(folder)
    rest = ["--task", "fast", "--steps", "6", "--device", "cpu", "--verbose", "0", "--eval-episodes", "0"]
    assert finetune(["--model", str(folder), *rest, "--save", str(tmp_path / "tuned")]) == 0
    model = MBDPO.load(tmp_path / "tuned", device="cpu")
    assert (model.num_timesteps, model._n_updates, model._acts_from_start) == (6, 4, True)
    assert "before" not in capsys.readouterr().out, "no episodes, no scores"
    found = MBDPO.from_pretrained
    monkeypatch.setattr(MBDPO, "from_pretrained", lambda name, **kwargs: found({"me/several": folder}[name], **kwargs))
    assert finetune(["--model", "me/several", *rest, "--save", str(tmp_path / "other")]) == 0
    assert parameters_of(tmp_path / "other.zip").shape == parameters_of(tmp_path / "tuned.zip").shape


def test_fine_tuning_does_not_replace_a_file_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    several, kept = trained(tmp_path / "several"), tmp_path / "kept.zip"
    kept.write_text("something else")
    assert finetune(["--model", str(several), "--task", "fast", "--save", str(kept), "--device", "cpu"]) == 2
    assert "--overwrite" in capsys.readouterr().err and kept.read_text() == "something else"


def test_scores_of_what_was_learned_from_normalised_observations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = VecNormalize(make_vec_env("Pendulum-v1", 1), norm_reward=False, clip_obs=0.5)
    settings: dict[str, Any] = {"preset": "debug", "act_mode": "prior", "batch_size": 8, "buffer_size": 100}
    MBDPO("MlpPolicy", env, learning_starts=16, warmup_updates=0, device="cpu", **settings).learn(20).save(
        tmp_path / "m"
    )
    largest: list[float] = []
    predict = MBDPO.predict

    def spy(self: MBDPO, observation: np.ndarray, *args: Any, **kwargs: Any) -> Any:
        largest.append(float(np.abs(observation).max()))
        return predict(self, observation, *args, **kwargs)

    monkeypatch.setattr(MBDPO, "predict", spy)
    arguments = ["--model", str(tmp_path / "m"), "--env", "Pendulum-v1", "--steps", "2", "--eval-episodes", "1"]
    assert finetune([*arguments, "--save", str(tmp_path / "tuned"), "--device", "cpu", "--verbose", "0"]) == 0
    assert largest and max(largest) <= 0.5


def test_fine_tuning_can_end_with_an_average(tmp_path: Path) -> None:
    several = trained(tmp_path / "several")
    start = parameters_of(several)
    arguments = ["--model", str(several), "--task", "fast", "--steps", "6", "--save", str(tmp_path / "tuned")]
    arguments += ["--overwrite", "--eval-episodes", "0", "--device", "cpu", "--verbose", "0"]
    arguments += ["--set", "learning_starts=2"]
    moved = []
    for more in ([], ["--average-weights", "0.9999"]):
        assert finetune([*arguments, *more]) == 0
        moved.append(float((parameters_of(tmp_path / "tuned.zip") - start).abs().max()))
    assert 0 < 100 * moved[1] < moved[0]


# --- stopping and going on ------------------------------------------------------------------------------------------


def test_ctrl_c_saves_what_goes_on_as_if_undisturbed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = MBDPO.load(trained(tmp_path / "whole", 9), device="cpu")
    before = signal.getsignal(signal.SIGINT)
    step = StopWhenAsked._on_step

    def pressed(self: StopWhenAsked) -> bool:
        if self.num_timesteps == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self)

    path = tmp_path / "stopped.zip"
    command = [*NAMED, "--steps", "9", "--save", str(path), *settings()]
    with monkeypatch.context() as patch:
        patch.setattr(StopWhenAsked, "_on_step", pressed)
        assert pretrain(command) == 130
    assert "Interrupted at step 4: saved" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) == before
    assert pretrain([*command, "--resume"]) == 0
    resumed = MBDPO.load(path, device="cpu")
    assert resumed.num_timesteps == 9
    assert th.equal(flat_parameters(whole.policy), flat_parameters(resumed.policy))


def test_checkpoints_stand_when_something_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = StopWhenAsked._on_step

    def full(self: StopWhenAsked) -> bool:
        if self.num_timesteps == 5:
            raise OSError("the disk\nis full")
        return step(self)

    monkeypatch.setattr(StopWhenAsked, "_on_step", full)
    path = tmp_path / "model.zip"
    assert pretrain([*NAMED, "--steps", "9", "--save", str(path), "--checkpoint-every", "2", *settings()]) == 1
    assert MBDPO.load(path, device="cpu").num_timesteps == 4


@pytest.mark.parametrize("more", [[], ["--average-weights", "0.9"]])
def test_fine_tuning_leaves_checkpoints_to_go_on_from(
    more: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    several, path, step = trained(tmp_path / "several"), tmp_path / "tuned.zip", StopWhenAsked._on_step
    seen = []

    def full(self: StopWhenAsked) -> bool:
        if self.num_timesteps == 7:
            raise OSError("the disk is full")
        seen.append(flat_parameters(self.model.policy).clone())
        return step(self)

    arguments = ["--steps", "9", "--eval-episodes", "0", "--device", "cpu", "--verbose", "0", "--save", str(path)]
    arguments += ["--checkpoint-every", "3", "--set", "learning_starts=2"]
    new = ["--env", "Pendulum-v1", "--name", "third", "--like", "fast"]
    with monkeypatch.context() as patch:
        patch.setattr(StopWhenAsked, "_on_step", full)
        assert finetune(["--model", str(several), *new, *arguments, *more]) == 1
    model = MBDPO.load(path, device="cpu")
    assert model.num_timesteps == 6 and model.tasks is not None and "third" in model.tasks
    assert th.equal(flat_parameters(model.policy), seen[5]), "what acted then"
    assert finetune(["--model", str(path), "--task", "third", "--overwrite", *arguments]) == 0
    assert MBDPO.load(path, device="cpu").num_timesteps == 9


# --- what cannot work -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "DATA"),
        (["test/slow-v0", "--steps", "0", "--save", "x"], 2, "at least 1"),
        (["test/slow-v0", "--save", "x", "--set", "learning_rat=1"], 2, "learning_rate"),
        (["test/slow-v0", "--save", "x", "--set", "learning_rate"], 2, "NAME=VALUE"),
        (["test/slow-v0", "--save", "x", "--model-size", "7"], 2, "invalid choice"),
        (["slow=test/slow-v0", "test/fast-v0", "--save", "x"], 2, "all data sets as TASK=ID"),
        (["test/slow-v0", "a.pt", "--save", "x"], 2, "one kind"),
        (["test/slow-v0", "--save", "x", "--resume"], 2, "nothing to --resume"),
        (["test/none-v0", "--save", "x"], 2, "minari download test/none-v0"),
        (["none.pt", "--save", "x"], 2, "download the chunk first"),
        (["test/slow-v0", "--save", "x", "--set", "horizon=0"], 2, "horizon must be"),
        (["test/slow-v0", "--save", "x", "--set", "learning_rate=abc"], 2, "learning_rate must be"),
        (["test/slow-v0", "--save", "x", "--device", "foo"], 2, "foo"),
        (["test/slow-v0", "--save", "file/x"], 2, "is no folder"),
        (["test/slow-v0", "--save", "new/"], 2, "is a folder: name the file"),
        (["test/slow-v0", "--save", "."], 2, "is a folder: name the file"),
        (["test/slow-v0", "--save", "x", "--reference-batch-size", "8"], 2, "pass sqrt or linear"),
        (
            ["test/slow-v0", "--save", "x", "--scale-learning-rate", "sqrt", "--set", "learning_rate=fast"],
            2,
            "needs a number as learning_rate, got 'fast'",
        ),
        (
            ["test/slow-v0", "--save", "x", "--scale-learning-rate", "sqrt", "--set", "batch_size=abc"],
            2,
            "needs a whole number as batch_size, got 'abc'",
        ),
    ],
)
def test_what_pretraining_refuses(
    arguments: list[str],
    code: int,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert pretrain(arguments) == code
    said = capsys.readouterr().err
    assert words in said and said.count("mbdpo pretrain: error:") == 1
    assert code == 2 or len(said.splitlines()) == 1
    assert [entry.name for entry in tmp_path.iterdir() if entry.is_file()] == ["file"]


def test_nothing_is_converted_for_arguments_that_are_refused(tmp_path: Path) -> None:
    shards, saved = tmp_path / "shards", tmp_path / "saved.zip"
    saved.touch()
    command = [str(CHUNK), "--shards-dir", str(shards), "--save"]
    for more in (
        [str(tmp_path / "new"), "--device", "foo"],
        [str(saved)],
        [str(tmp_path / "new"), "--resume"],
        [str(tmp_path / "new"), "--reference-batch-size", "4"],
        [str(tmp_path / "new"), "--eval-every", "5", "--eval-episodes", "0"],
    ):
        assert pretrain([*command, *more]) == 2
    assert not shards.exists()


def test_evaluating_without_an_environment_is_refused_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record("test/nameless-v0", recorded((6, 9), PENDULUM, TORQUE, terminates=(False, False)), PENDULUM, TORQUE)
    command = ["slow=test/slow-v0", "other=test/nameless-v0", "--save", str(tmp_path / "model"), *SMALL]
    assert pretrain([*command, "--eval-every", "5"]) == 2
    assert "leave it out: There is no environment for ['other']" in capsys.readouterr().err


def test_what_is_there_already(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = trained(tmp_path / "model")
    before = path.read_bytes()
    command = [*NAMED, "--steps", "4", "--save", str(tmp_path / "model"), *settings()]
    for more, words in (
        ([], "pass --resume"),
        (["--resume"], "learned for 4 steps already"),
        (["--resume", "--model-size", "0.5"], "leave it out with --resume"),
    ):
        assert pretrain([*command, *more]) == 2
        assert words in capsys.readouterr().err
    assert path.read_bytes() == before


def test_what_fine_tuning_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    several, one = trained(tmp_path / "several"), trained(tmp_path / "one", 2, ["test/slow-v0"])
    capsys.readouterr()
    for arguments, code, words in (
        (["--model", "none", "--env", "Pendulum-v1"], 2, "does not exist"),
        (["--model", several], 2, "--env ID"),
        (["--model", several, "--task", "fats"], 2, "did you mean one of ['fast'"),
        (["--model", several, "--env", "Pendulum-v1", "--like", "fats"], 2, "did you mean"),
        (["--model", several, "--env", "Pendulum-v1", "--like", "fast", "--task", "fast"], 2, "not allowed with"),
        (["--model", several, "--env", "Pendulum-v1", "--trainable", "all"], 2, "invalid choice"),
        (["--model", several, "--env", "Nothing-v0"], 2, "There is no environment 'Nothing-v0'; "),
        (["--model", several, "--env", "nothing.here:Nothing-v0"], 2, "nothing"),
        (["--model", several, "--env", "Nothing-v0", "--rehearse", "none.pt"], 2, "Nothing"),
        (["--model", several, "--env", "LunarLander-v3"], 2, "mbdpo finetune: error"),
        (["--model", several, "--env", "CartPole-v1"], 2, "has Discrete(2) actions"),
        (["--model", several, "--env", "Pendulum-v1", "--name", "fast"], 2, "fast"),
        (["--model", several, "--env", "Pendulum-v1", "--set", "horizon=0"], 2, "horizon must be"),
        (["--model", several, "--env", "Pendulum-v1", "--set", "learning_rate=abc"], 2, "learning_rate must be"),
        (["--model", several, "--env", "Pendulum-v1", "--rehearse", "none.pt"], 2, "download the chunk"),
        (["--model", several, "--env", "Pendulum-v1", "--device", "foo"], 2, "foo"),
        (["--model", several, "--env", "Pendulum-v1", "--device", "cuda"], 2, "finds no such device"),
        (["--model", several, "--env", "Pendulum-v1", "--set", "device=cpu"], 2, "an option of its own: --device"),
        (["--model", several, "--env", "Pendulum-v1", "--steps", "1e3"], 2, "must be a whole number, got '1e3'"),
        (["--model", str(tmp_path / "me" / "model"), "--env", "Pendulum-v1"], 2, "does not exist"),
        (["--model", one, "--env", "Pendulum-v1", "--like", "fast"], 2, "leave out --like"),
        (["--model", one, "--env", "Pendulum-v1", "--average-weights", "1"], 2, "between 0 and 1"),
    ):
        assert finetune(["--save", str(tmp_path / "x"), "--device", "cpu", *map(str, arguments)]) == code
        said = capsys.readouterr().err
        assert words in said and said.count("mbdpo finetune: error:") == 1
    assert not (tmp_path / "x.zip").exists()
