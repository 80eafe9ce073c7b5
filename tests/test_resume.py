"""A run that was stopped, saved and taken up in a new process is, bit for bit, the run that went on."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_mbdpo import MBDPO
from tests.fakes import ACTIONS, IMAGE, MIXED, UNEVEN, VECTOR, ToyEnv, flat_parameters, toy_envs
from tests.processes import CONTEXT

TOTAL = 40
# Policy, observations, environments, whether episodes terminate, steps before the stop. Episodes last 5 to 8 steps and
# 12 steps are random, so that a stop falls amid an episode, and once amid the random steps.
CASES: dict[str, tuple[str, spaces.Space, int, bool, int]] = {
    "mlp": ("MlpPolicy", VECTOR, 1, False, 23),
    "mlp, random steps": ("MlpPolicy", VECTOR, 1, False, 8),
    "mlp, episodic": ("MlpPolicy", VECTOR, 1, True, 23),
    "mlp, 4 environments": ("MlpPolicy", VECTOR, 4, False, 24),
    "mlp, 4 environments, episodic": ("MlpPolicy", VECTOR, 4, True, 28),
    "pixels": ("CnnPolicy", IMAGE, 1, False, 23),
    "pixels, 4 environments, episodic": ("CnnPolicy", IMAGE, 4, True, 24),
    "dict": ("MultiInputPolicy", MIXED, 1, True, 23),
}


class Losses(KVWriter):
    """Every number that was logged, in order."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        self.rows.append({key: value for key, value in key_values.items() if not key.startswith("time/")})

    def close(self) -> None:
        pass


def logged(model: MBDPO) -> list[dict[str, Any]]:
    writer = Losses()
    model.set_logger(Logger(folder=None, output_formats=[writer]))
    return writer.rows


def start(case: str) -> MBDPO:
    policy, space, n_envs, terminates, _ = CASES[case]
    env = toy_envs(n_envs, observation_space=space, terminates=terminates)
    kwargs = {"preset": "debug", "buffer_size": 120, "learning_starts": 12, "batch_size": 8, "warmup_updates": 3}
    noise = NormalActionNoise(np.zeros(2), 0.2 * np.ones(2))
    return MBDPO(policy, env, seed=1, device="cpu", action_noise=noise if case == "mlp" else None, **kwargs)


def outcome(model: MBDPO, rows: list[dict[str, Any]]) -> dict[str, Any]:
    assert model.replay_buffer is not None
    return {
        "weights": flat_parameters(model.policy).numpy(),
        "moments": th.cat([s["exp_avg_sq"].flatten() for s in model.policy.optimizer.state.values()]).numpy(),
        "actions": model.replay_buffer.actions,
        "rewards": model.replay_buffer.rewards,
        "logs": rows,
        "updates": model._n_updates,
    }


def save(model: MBDPO, folder: Path) -> None:
    model.save(folder / "model")
    model.save_replay_buffer(folder / "buffer")
    # The environment is the user's; these can be pickled amid an episode
    assert model.env is not None and isinstance(model.env.unwrapped, DummyVecEnv)
    (folder / "env").write_bytes(pickle.dumps(model.env.unwrapped.envs))


def go_on(folders: dict[str, str]) -> None:
    """What the new process does."""
    th.set_num_threads(1)
    for case, name in folders.items():
        folder = Path(name)
        envs = pickle.loads((folder / "env").read_bytes())
        vector = DummyVecEnv([lambda env=env: env for env in envs])  # type: ignore[misc]
        model = MBDPO.load(folder / "model", env=vector, device="cpu", force_reset=False)
        model.load_replay_buffer(folder / "buffer")
        rows = logged(model)
        model.learn(TOTAL - CASES[case][-1], reset_num_timesteps=False, log_interval=1)
        (folder / "outcome").write_bytes(pickle.dumps(outcome(model, rows)))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, dict[str, Any]]]:
    """Each case three times: without a stop, stopped and going on at once, stopped and taken up elsewhere."""
    th.set_num_threads(1)
    results: dict[str, dict[str, dict[str, Any]]] = {}
    folders = {case: tmp_path_factory.mktemp("resume") for case in CASES}
    for case, folder in folders.items():
        whole = start(case)
        rows = logged(whole)
        whole.learn(TOTAL, log_interval=1)
        results[case] = {"whole": outcome(whole, rows)}
        stopped = start(case)
        logged(stopped)
        stopped.learn(CASES[case][-1], log_interval=1)
        save(stopped, folder)
        rows = logged(stopped)
        stopped.learn(TOTAL - CASES[case][-1], reset_num_timesteps=False, log_interval=1)
        results[case]["stopped"] = outcome(stopped, rows)
    process = CONTEXT.Process(target=go_on, args=({case: str(folder) for case, folder in folders.items()},))
    process.start()
    process.join()
    assert process.exitcode == 0
    for case, folder in folders.items():
        results[case]["resumed"] = pickle.loads((folder / "outcome").read_bytes())
    return results


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("other", ["stopped", "resumed"])
def test_a_resumed_run_is_the_uninterrupted_one(
    case: str, other: str, runs: dict[str, dict[str, dict[str, Any]]]
) -> None:
    whole, continued = runs[case]["whole"], runs[case][other]
    for name in ("weights", "moments", "actions", "rewards", "updates"):
        np.testing.assert_array_equal(whole[name], continued[name], err_msg=name)
    # The first log after the stop averages from there on, the uninterrupted run's from its own last log on
    logs = continued["logs"][1:]
    assert logs and whole["logs"][-len(logs) :] == logs
    print(f"{case}, {other}: {whole['weights'].size} weights and {len(logs)} logs are equal")


def test_a_checkpoint_between_rollouts_is_exact_too(tmp_path: Path) -> None:
    """`on_rollout_start` is where nothing is pending: the last transition is stored and learned from."""

    class Save(BaseCallback):
        model: MBDPO

        def _on_rollout_start(self) -> None:
            if self.num_timesteps == 23:
                save(self.model, tmp_path)

        def _on_step(self) -> bool:
            return True

    whole = start("mlp, episodic")
    whole.learn(TOTAL, callback=Save())
    envs = pickle.loads((tmp_path / "env").read_bytes())
    model = MBDPO.load(tmp_path / "model", DummyVecEnv([lambda: envs[0]]), device="cpu", force_reset=False)
    model.load_replay_buffer(tmp_path / "buffer")
    model.learn(TOTAL - 23, reset_num_timesteps=False)
    assert th.equal(flat_parameters(whole.policy), flat_parameters(model.policy))


@pytest.mark.parametrize("case", ["mlp, episodic", "mlp, 4 environments"])
def test_a_file_that_includes_the_buffer_is_exact_too(case: str, tmp_path: Path) -> None:
    whole = start(case).learn(TOTAL)
    stopped = start(case).learn(CASES[case][-1])
    stopped.save(tmp_path / "model", include=["replay_buffer"])
    assert stopped.env is not None and isinstance(stopped.env.unwrapped, DummyVecEnv)
    envs = pickle.loads(pickle.dumps(stopped.env.unwrapped.envs))
    vector = DummyVecEnv([lambda env=env: env for env in envs])  # type: ignore[misc]
    model = MBDPO.load(tmp_path / "model", env=vector, device="cpu", force_reset=False)
    model.learn(TOTAL - CASES[case][-1], reset_num_timesteps=False)
    assert th.equal(flat_parameters(whole.policy), flat_parameters(model.policy))
    reseeded = MBDPO.load(tmp_path / "model", device="cpu", seed=7)
    assert reseeded.replay_buffer is not None
    assert reseeded.replay_buffer.rng.bit_generator.state == np.random.default_rng(7).bit_generator.state


def test_a_new_environment_starts_without_old_plans(tmp_path: Path) -> None:
    model = start("mlp")
    model.learn(23)
    save(model, tmp_path)
    loaded = MBDPO.load(tmp_path / "model", env=toy_envs(), device="cpu")
    loaded.load_replay_buffer(tmp_path / "buffer")
    assert loaded._plans is not None, "an episode is in progress, should its environment be here"
    loaded._setup_learn(10, reset_num_timesteps=False)
    assert loaded._plans is None, "it is not: the environment was reset"
    model.set_env(ToyEnv())
    assert model._plans is None


def test_two_processes_worth_of_steps_are_the_same_run() -> None:
    first, second = start("mlp, 4 environments, episodic"), start("mlp, 4 environments, episodic")
    first.learn(TOTAL)
    np.random.rand(3)
    second.learn(TOTAL)
    np.testing.assert_array_equal(outcome(first, [])["weights"], outcome(second, [])["weights"])


@pytest.mark.parametrize("wrong", ["horizon", "n_envs", "observation_space", "action_space", "kind", "pickle"])
def test_a_buffer_that_does_not_fit_is_refused_and_the_present_one_stays(wrong: str, tmp_path: Path) -> None:
    model = start("mlp")
    model.learn(5)
    space = MIXED if wrong == "kind" else IMAGE if wrong == "observation_space" else VECTOR
    actions = UNEVEN if wrong == "action_space" else ACTIONS
    policy = {"kind": "MultiInputPolicy", "observation_space": "CnnPolicy"}.get(wrong, "MlpPolicy")
    other = MBDPO(
        policy,
        toy_envs(2 if wrong == "n_envs" else 1, observation_space=space, action_space=actions),
        preset="debug",
        horizon=2 if wrong == "horizon" else 3,
        buffer_size=50,
        device="cpu",
    )
    other.save_replay_buffer(tmp_path / "buffer")
    if wrong == "pickle":
        (tmp_path / "buffer.pkl").write_bytes(pickle.dumps({"not": "a buffer"}))
    present = model.replay_buffer
    words = {"kind": "observation_space", "pickle": "ReplayBuffer"}.get(wrong, wrong)
    with pytest.raises((ValueError, AssertionError), match=words):
        model.load_replay_buffer(tmp_path / "buffer")
    assert model.replay_buffer is present
    model.learn(20, reset_num_timesteps=False)
