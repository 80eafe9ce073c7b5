import json
from pathlib import Path

import gymnasium as gym
import imageio.v2 as imageio
import numpy as np
import pytest
from gymnasium.wrappers import RescaleAction, TransformReward

from sb3_mbdpo import MBDPO
from sb3_mbdpo.hub_evaluation import evaluate_model, evaluation_sources, record_video
from tests.checkpoint_fakes import QUICK, trained
from tests.fakes import LEANING_ENVS, ToyEnv


def pendulum() -> MBDPO:
    return MBDPO("MlpPolicy", "CheckpointPendulum-v0", **QUICK)


def test_episodes_of_a_single_task_are_those_of_its_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = pendulum()
    first = evaluate_model(model, 3, seed=5)
    assert "episode" in capsys.readouterr().err
    (task,) = first["tasks"]
    assert task["name"] == "CheckpointPendulum-v0" and task["lengths"] == [12, 12, 12]
    assert task["mean"] == pytest.approx(np.mean(task["returns"])) and len(set(task["returns"])) == 3
    again = evaluate_model(model, 2, "CheckpointPendulum-v0", seed=6, progress=False)
    assert again["tasks"][0]["returns"] == task["returns"][1:]
    assert capsys.readouterr().err == ""
    model.save_pretrained(tmp_path, n_eval_episodes=3, eval_seed=5, progress_bar=False)
    assert json.loads((tmp_path / "results.json").read_text()) == first
    # Loaded without an environment, it is evaluated in the one that it names
    assert evaluate_model(MBDPO.from_pretrained(tmp_path, device="cpu"), 3, seed=5, progress=False) == first


def test_each_task_is_evaluated() -> None:
    model = trained("tasks", steps=1)
    found = evaluate_model(model, 2, LEANING_ENVS, progress=False)
    assert [task["name"] for task in found["tasks"]] == ["up", "down", "wide"]
    assert [task["lengths"] for task in found["tasks"]] == [[6, 6], [6, 6], [7, 7]]
    assert found["tasks"][1]["normalized"] is not None
    only = evaluate_model(model, 1, {"down": LEANING_ENVS["down"]}, progress=False)
    assert [task["name"] for task in only["tasks"]] == ["down"]


def test_one_environment_for_several_tasks_is_refused(tmp_path: Path) -> None:
    model = trained("tasks", steps=1)
    for source in ("Nonsense-v0", LEANING_ENVS["up"], ToyEnv()):
        with pytest.raises(ValueError, match=r"evaluated task by task: pass eval_envs as a dict, \{task: environment"):
            evaluate_model(model, 1, source, progress=False)
        for wanted in ({"n_eval_episodes": 1}, {"video": True}, {}):
            with pytest.raises(ValueError, match="evaluated task by task"):
                model.save_pretrained(tmp_path / "model", eval_envs=source, **wanted)
    assert not (tmp_path / "model").exists()


def test_normalised_models_see_normalised_observations_and_report_plain_rewards() -> None:
    model = trained("normalized", steps=10)
    mean = model.get_vec_normalize_env().obs_rms.mean.copy()
    seen = []
    predict = model.predict
    model.predict = lambda obs, *args, **kwargs: seen.append(obs.copy()) or predict(obs, *args, **kwargs)  # type: ignore[method-assign]
    env = ToyEnv()
    env.reset = lambda **kwargs: (np.full(3, 0.5, np.float32), {})  # type: ignore[method-assign]
    found = evaluate_model(model, 1, env, progress=False)
    wanted = model.get_vec_normalize_env().normalize_obs(np.full((1, 3), 0.5))
    assert (seen[0] == wanted).all() and -5 <= found["tasks"][0]["mean"] <= 0
    # Neither the statistics nor the training environment have moved
    assert (model.get_vec_normalize_env().obs_rms.mean == mean).all()


def test_without_an_environment_there_is_nothing_to_evaluate_in() -> None:
    model = trained("vector", steps=1)
    assert evaluation_sources(model) == {}
    with pytest.raises(ValueError, match="No environment is known"):
        evaluate_model(model, 1)


@pytest.mark.parametrize("wrapped", ["arguments", "actions", "reward"])
def test_an_environment_that_its_id_does_not_make_is_made_as_the_models_own(wrapped: str, tmp_path: Path) -> None:
    plain = gym.make("CheckpointPendulum-v0")
    env: gym.Env = {
        "arguments": lambda: gym.make("CheckpointPendulum-v0", max_episode_steps=5),
        "actions": lambda: RescaleAction(plain, -1, 1),
        "reward": lambda: TransformReward(plain, lambda _: 1.0),
    }[wrapped]()
    model = MBDPO("MlpPolicy", env, **QUICK)
    (task,) = evaluate_model(model, 1, progress=False)["tasks"]
    (own,) = evaluate_model(model, 1, env, progress=False)["tasks"]
    assert task == own and task["name"] == "environment"
    assert task["lengths"] == [5 if wrapped == "arguments" else 12]
    assert wrapped != "reward" or task["returns"] == [12.0]
    assert record_video(model, tmp_path / "replay.mp4") is None
    # A folder names what its readers can make, and nothing else
    model.save_pretrained(tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["env"] is None
    assert evaluation_sources(MBDPO.from_pretrained(tmp_path / "model", device="cpu")) == {}


def test_an_environment_with_other_spaces_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = pendulum()
    for env in (RescaleAction(gym.make("Pendulum-v1"), -1, 1), "MountainCarContinuous-v0"):
        with pytest.raises(ValueError, match=r"cannot be evaluated in this environment\. .*space: the model's is Box"):
            model.save_pretrained(tmp_path / "model", n_eval_episodes=1, eval_envs=env, progress_bar=False)
    assert not (tmp_path / "model").exists()


def test_a_video_of_one_episode(tmp_path: Path) -> None:
    assert record_video(pendulum(), tmp_path / "replay.mp4") is None
    frames = imageio.mimread(tmp_path / "replay.mp4", memtest=False)
    assert len(frames) == 12 and frames[0].shape == (64, 64, 3) and abs(int(frames[0].mean()) - 100) < 10


def test_what_cannot_be_drawn_is_said_and_costs_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trained("vector", steps=1)
    assert "no environment is known" in str(record_video(model, tmp_path / "replay.mp4"))
    assert "render_mode" in str(record_video(model, tmp_path / "replay.mp4", ToyEnv()))

    def broken(*_: object) -> None:
        raise RuntimeError("no display\nat all")

    monkeypatch.setattr(gym.envs.registration.registry["CheckpointPendulum-v0"].entry_point, "render", broken)
    pendulum().save_pretrained(tmp_path / "m", video=True)
    said = capsys.readouterr().out
    assert "without a video (no video: RuntimeError: no display)" in said and "at all" not in said
    assert not (tmp_path / "m" / "replay.mp4").exists() and (tmp_path / "m" / "model.safetensors").exists()
    assert "Not checked: how it looks" in (tmp_path / "m" / "README.md").read_text()
