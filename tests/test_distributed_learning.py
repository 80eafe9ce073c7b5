"""Several processes that learn one model, each in environments of its own."""

import contextlib
import io
import os
import runpy
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, CheckpointCallback, EveryNTimesteps
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.noise import NormalActionNoise, VectorizedActionNoise
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize

from sb3_mbdpo import MBDPO, Task, TaskSet, make_multitask_env
from sb3_mbdpo.distributed import process_group
from sb3_mbdpo.distributed_learning import callbacks_of, ended_episodes
from sb3_mbdpo.own_draws import OwnNoise
from sb3_mbdpo.ranks import ALONE, Ranks
from sb3_mbdpo.shared_checkpoints import SharedCheckpoints
from sb3_mbdpo.updates import Learner
from tests.fakes import ToyEnv, counters, toy_envs
from tests.processes import launch, messages
from tests.test_distributed import restarting

SMALL: dict[str, Any] = {"preset": "debug", "batch_size": 8, "score_batch_size": 4, "buffer_size": 200, "seed": 0}
SMALL |= {"device": "cpu", "learning_starts": 12, "warmup_updates": 2, "gamma": 0.9}
ENVS, TOTAL = 2, 32


class Scored(ToyEnv):
    """Episodes of five steps whose end says whether they succeeded."""

    def step(self, action: np.ndarray) -> Any:
        *rest, info = super().step(action)
        if self.steps == 5:
            info["is_success"] = self.episodes % 2 == 0
        return *rest, info


def scored(n_envs: int = ENVS, **kwargs: Any) -> VecEnv:
    return DummyVecEnv([lambda: Monitor(Scored(**kwargs)) for _ in range(n_envs)])


def model_of(env: VecEnv, **kwargs: Any) -> MBDPO:
    return MBDPO("MlpPolicy", env, **(SMALL | kwargs))


class Watcher(BaseCallback):
    """What callbacks see, and when they want to stop."""

    def __init__(self, stop_at: int = 10**9):
        super().__init__()
        self.steps: list[tuple[int, int]] = []
        self.stop_at, self.events = stop_at, [0, 0, 0]

    def _on_training_start(self) -> None:
        self.events[0] += 1

    def _on_rollout_start(self) -> None:
        self.events[1] += 1

    def _on_rollout_end(self) -> None:
        self.events[2] += 1

    def _on_step(self) -> bool:
        assert self.locals["new_obs"].shape == (ENVS, 3) and self.locals["self"] is self.model
        self.steps.append((self.num_timesteps, len(self.model.ep_info_buffer)))
        return self.num_timesteps < self.stop_at


# --- one model --------------------------------------------------------------------------------------------------------


def test_two_processes_learn_one_model_from_their_own_episodes(tmp_path: Path) -> None:
    found = launch(learning, 2, tmp_path)
    mine, theirs = found
    for name in ("weights", "generator", "num_timesteps", "updates", "episodes", "returns", "successes", "episodic"):
        assert mine[name] == theirs[name], name
    # 8 steps of 2 environments of 2 processes; one update per transition after the random ones, and those of the start
    assert (mine["num_timesteps"], mine["updates"]) == (TOTAL, 20 + 2)
    # Each environment has ended one episode, and all are seen everywhere
    assert mine["episodes"] == len(mine["returns"]) == 4 and len(set(mine["returns"])) == 4
    assert mine["successes"] == [0.0] * 4
    # What each has done, seen and drawn is its own, from the first random action on
    for name in ("actions", "observations"):
        assert mine[name].shape == theirs[name].shape and (mine[name] != theirs[name]).all(axis=-1).all(), name
    assert mine["stored"] == theirs["stored"] == TOTAL // 4
    # Callbacks and logs are the first one's, at the count of all
    assert [steps for steps, _ in mine["seen"]] == list(range(4, TOTAL + 1, 4)) and theirs["seen"] == []
    assert [episodes for _, episodes in mine["seen"]] == [0] * 5 + [4] * 3
    assert mine["events"] == [1, 8, 8] and theirs["events"] == [0, 0, 0]
    assert "rollout/" in mine["said"] and "Warm-up" in mine["said"] and theirs["said"] == ""
    assert MBDPO.load(tmp_path / "model_20_steps", device="cpu").num_timesteps == 20


def learning(folder: Path) -> dict[str, Any]:
    with process_group(1) as ranks:
        noise = NormalActionNoise(np.zeros(2), np.full(2, 0.1))
        model, watcher = model_of(scored(terminates=True), action_noise=noise, verbose=1), Watcher()
        before, saving = np.random.get_state()[1].copy(), CheckpointCallback(5, str(folder), "model")
        with contextlib.redirect_stdout(io.StringIO()) as said:
            model.learn(TOTAL, [CallbackList([watcher]), saving], log_interval=2, ranks=ranks)
        assert (np.random.get_state()[1] == before).all(), "the global generator was used"
        assert model.learner.ranks is ALONE and not model._custom_logger
        buffer = model.replay_buffer
        assert buffer is not None
        return {
            "weights": {name: value.numpy().tobytes() for name, value in model.policy.state_dict().items()},
            "generator": model.policy.generator.get_state().numpy().tobytes(),
            "num_timesteps": model.num_timesteps,
            "updates": model._n_updates,
            "episodes": model._episode_num,
            "returns": [info["r"] for info in model.ep_info_buffer or ()],
            "successes": list(model.ep_success_buffer or ()),
            "episodic": model.policy.episodic,
            "actions": buffer.actions[: buffer.pos],
            "observations": buffer.observations[: buffer.pos],
            "stored": buffer.pos,
            "seen": watcher.steps,
            "events": watcher.events,
            "said": said.getvalue(),
        }


def test_one_process_is_as_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(**kwargs: Any) -> dict[str, th.Tensor]:
        return model_of(toy_envs(ENVS)).learn(TOTAL, **kwargs).policy.state_dict()

    def no_contact(*_: Any) -> None:
        raise AssertionError("a process that is alone has nobody to talk to")

    plain = run()
    monkeypatch.setattr("torch.distributed.all_reduce", no_contact)
    alone = run(ranks=ALONE)
    assert all(th.equal(plain[name], alone[name]) for name in plain)


def test_counts_are_those_of_one_process_with_all_environments() -> None:
    mine, theirs = launch(counting, 2)
    assert mine[:4] == theirs[:4] == (TOTAL, 20, 4, 0.5)
    alone = model_of(counters(2 * ENVS, 5), warmup_updates=0).learn(TOTAL)
    assert (alone.num_timesteps, alone._n_updates, alone._episode_num) == (TOTAL, 20, 4)
    # In the same situations, with the same model, each process has acted by its own noise: at random first, then not
    assert mine[4].shape == (8, ENVS, 2) and (mine[4] != theirs[4]).all()


def counting() -> tuple[int, int, int, float, np.ndarray]:
    with process_group(1) as ranks:
        rates: list[float] = []
        model = model_of(counters(ENVS, 5), warmup_updates=0, learning_rate=lambda left: 1e-3 * left)
        update = model.learner.update

        def spy(samples: Any, index: int = 0) -> Any:
            assert samples.actions.shape[1] == 4, "half of the batch"
            rates.append(model._current_progress_remaining)
            return update(samples, index)

        model.learner.update = spy  # type: ignore[method-assign]
        model.learn(TOTAL, ranks=ranks)
        assert model.replay_buffer is not None
        actions = model.replay_buffer.actions[: model.replay_buffer.pos]
        return model.num_timesteps, model._n_updates, model._episode_num, rates[0], actions


def test_a_callback_stops_all_and_a_termination_is_known_to_all(tmp_path: Path) -> None:
    assert launch(stopping, 2) == [(16, True), (16, True)]


def stopping() -> tuple[int, bool]:
    with process_group(1) as ranks:
        # Episodes end by termination in the second process alone, and there is no seed
        env = DummyVecEnv([lambda: ToyEnv(lengths=(2,), terminates=ranks.rank == 1) for _ in range(ENVS)])
        model = model_of(env, seed=None, learning_starts=4)
        model.learn(TOTAL, Watcher(stop_at=16), ranks=ranks)
        return model.num_timesteps, model.policy.episodic


def test_what_goes_on_after_a_stop_crosses_no_episode() -> None:
    assert launch(going_on, 2) == [11, 11]


def going_on() -> int:
    with process_group(1) as ranks:
        model = model_of(counters(ENVS, length=8), learning_starts=1000)
        # At the end of all episodes, a step that is not stored
        model.learn(2 * TOTAL, Watcher(stop_at=8 * ENVS * ranks.size), ranks=ranks)
        model.learn(4 * ENVS * ranks.size, reset_num_timesteps=False, ranks=ranks)
        buffer = model.replay_buffer
        assert buffer is not None
        before, after = buffer.observations[: buffer.pos], buffer.next_observations[: buffer.pos]
        assert (before[..., :2] == after[..., :2]).all() and (before[-4:, :, 2] == np.arange(4)[:, None]).all()
        return buffer.size()


def test_tasks_are_told_apart_in_every_process() -> None:
    assert launch(several_tasks, 2) == [{"one": 6, "two": 2}] * 2


def several_tasks() -> dict[str, int]:
    with process_group(1) as ranks:
        tasks = TaskSet([Task(name, 3, 2, discount=0.9, episode_length=5) for name in ("one", "two")])
        names = ["one", "two"] if ranks.is_main else ["one", "one"]
        lengths = {"one": (2,), "two": (2,)}
        envs = {name: lambda name=name: Monitor(ToyEnv(lengths=lengths[name])) for name in lengths}
        model = MBDPO("MultiInputPolicy", make_multitask_env(tasks, envs, names), **SMALL | {"gamma": None})
        model.learn(4 * 4, ranks=ranks)
        return {name: len(returns) for name, returns in sorted(model._task_returns.items())}


# --- going on after a process has died --------------------------------------------------------------------------------


def test_a_killed_process_costs_the_steps_since_the_checkpoint(tmp_path: Path) -> None:
    """Under torchrun's own agent: one of two is killed at its 15th update, after the checkpoint at step 24."""
    found = restarting(2, resuming, tmp_path)
    assert (tmp_path / "died").read_text() == "15"
    begun, stored, windows = zip(*(found[rank] for rank in range(2)), strict=True)
    # The second attempt began at the checkpoint, with what each had collected until then
    assert begun == (24, 24) and stored == (10, 10)
    # No window crosses the restart
    assert windows == (True, True)
    assert [path.name for path in tmp_path.glob("*step*")] == ["step-000000000040"]
    model = MBDPO.load(tmp_path / "step-000000000040" / "model.zip", device="cpu")
    assert (model.num_timesteps, model._n_updates) == (40, 28 + 2)


def resuming(folder: Path) -> tuple[int, int, bool]:
    th.set_num_threads(1)
    update, died = Learner.update, folder / "died"

    def dying(self: Learner, samples: Any, index: int = 0) -> Any:
        if index == 15 and os.environ["RANK"] == "1" and not died.exists():
            died.write_text(str(index))
            os.kill(os.getpid(), signal.SIGKILL)
        return update(self, samples, index)

    Learner.update = dying  # type: ignore[method-assign]
    with process_group(1) as ranks:
        checkpoints, env = SharedCheckpoints(folder, every=10), toy_envs(ENVS)
        model = checkpoints.resume(MBDPO, env, ranks, device="cpu") or model_of(env)
        begun = model.num_timesteps
        model.learn(40 - begun, checkpoints, reset_num_timesteps=begun == 0, ranks=ranks)
        buffer = model.replay_buffer
        assert buffer is not None
        return begun, buffer.pos, bool(buffer.window_ends[begun // 4 - 1].all())


def test_checkpoints_of_a_single_process(tmp_path: Path) -> None:
    checkpoints = SharedCheckpoints(tmp_path / "run", every=8, keep=2)
    assert checkpoints.resume(MBDPO, toy_envs(ENVS)) is None
    model_of(toy_envs(ENVS)).learn(TOTAL, checkpoints)
    assert [path.name[-2:] for path in sorted((tmp_path / "run").iterdir())] == ["24", "32"]
    model = checkpoints.resume(MBDPO, toy_envs(ENVS), device="cpu")
    assert model is not None and model.replay_buffer is not None
    assert model.num_timesteps == TOTAL and model.replay_buffer.pos == TOTAL // ENVS
    with pytest.raises(ValueError, match="beyond this model's step 0: go on from it with resume"):
        model_of(toy_envs(ENVS)).learn(TOTAL, checkpoints)
    with pytest.raises(ValueError, match="was saved by 1 processes, these are 2: start as many"):
        _alone_as_two(checkpoints)
    with pytest.raises(ValueError, match="every must be at least 1"):
        SharedCheckpoints(tmp_path, every=0)


def test_the_example_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = Path(__file__).parents[1] / "hub" / "learn_host.py"
    for steps in (20, 36):
        arguments = ["Pendulum-v1", str(tmp_path), str(steps), "--n-envs", "2", "--every", "8", "--preset", "debug"]
        monkeypatch.setattr("sys.argv", [str(program), *arguments])
        runpy.run_path(str(program), run_name="__main__")
        assert MBDPO.load(tmp_path / "model.zip", device="cpu").num_timesteps == steps
    model = SharedCheckpoints(tmp_path, every=8).resume(MBDPO, make_vec_env("Pendulum-v1", 2), device="cpu")
    assert model is not None and model.replay_buffer is not None and model.replay_buffer.pos == 18


def _alone_as_two(checkpoints: SharedCheckpoints) -> None:
    class Two(Ranks):
        """The first of two whose other one agrees with everything."""

        def together(self) -> Any:
            return ALONE.together()

        def agree(self, facts: Any) -> None:
            assert facts["last checkpoint"].startswith("step-")

    checkpoints.resume(MBDPO, toy_envs(ENVS), Two(0, 2))


# --- what cannot work -------------------------------------------------------------------------------------------------


def test_what_is_refused_in_every_process(tmp_path: Path) -> None:
    told = launch(messages, 2, REFUSED, tmp_path)
    for found in told:
        assert len(found) == len(REFUSED)
        for message, case in zip(found, REFUSED, strict=True):
            assert (case.__doc__ or "") in message, message


def other_number_of_environments(ranks: Ranks, folder: Path) -> None:
    """number of environments (1 in process 0, 2 in process 1)"""
    model_of(toy_envs(1 + ranks.rank)).learn(TOTAL, ranks=ranks)


def other_totals(ranks: Ranks, folder: Path) -> None:
    """total_timesteps (32 in process 0, 33 in process 1)"""
    model_of(toy_envs(ENVS)).learn(TOTAL + ranks.rank, ranks=ranks)


def other_arguments(ranks: Ranks, folder: Path) -> None:
    """energy_coef (0.0 in process 0, 1.0 in process 1)"""
    model_of(toy_envs(ENVS), energy_coef=float(ranks.rank)).learn(TOTAL, ranks=ranks)


def uneven(ranks: Ranks, folder: Path) -> None:
    """batch_size (7) must be a multiple of the number of processes (2)"""
    model_of(toy_envs(ENVS), batch_size=7).learn(TOTAL, ranks=ranks)


def uneven_parts(ranks: Ranks, folder: Path) -> None:
    """score_batch_size (4) must be a multiple of the number of processes (2) times gradient_accumulation (4)"""
    model_of(toy_envs(ENVS), gradient_accumulation=4).learn(TOTAL, ranks=ranks)


def by_episode(ranks: Ranks, folder: Path) -> None:
    """train_freq counts episodes"""
    model_of(toy_envs(1), train_freq=(1, "episode")).learn(TOTAL, ranks=ranks)


def normalized(ranks: Ranks, folder: Path) -> None:
    """VecNormalize would keep other statistics in each process"""
    model_of(VecNormalize(toy_envs(ENVS))).learn(TOTAL, ranks=ranks)


def broken_env(ranks: Ranks, folder: Path) -> None:
    """OSError: no more disk"""

    class Broken(ToyEnv):
        def step(self, action: np.ndarray) -> Any:
            if ranks.rank == 1 and self.episodes == 2:
                raise OSError("no more disk")
            return super().step(action)

    model_of(DummyVecEnv([Broken] * ENVS)).learn(TOTAL, ranks=ranks)


def broken_observation(ranks: Ranks, folder: Path) -> None:
    """not finite in its reward"""

    class Broken(ToyEnv):
        def step(self, action: np.ndarray) -> Any:
            obs, _, *rest = super().step(action)
            return obs, float("nan") if ranks.rank == 1 else 0.0, *rest

    model_of(DummyVecEnv([Broken] * ENVS)).learn(TOTAL, ranks=ranks)


def broken_callback(ranks: Ranks, folder: Path) -> None:
    """OSError: no room"""

    def full(*_: Any) -> bool:
        raise OSError("no room")

    model_of(toy_envs(ENVS)).learn(TOTAL, full, ranks=ranks)


def drift(ranks: Ranks, folder: Path) -> None:
    """same weights ("""

    def change(local: dict[str, Any], _: dict[str, Any]) -> bool:
        local["self"].policy.world_model.energy_mean.add_(1)
        return True

    model_of(toy_envs(ENVS)).learn(TOTAL, change, ranks=ranks)


def other_checkpoints(ranks: Ranks, folder: Path) -> None:
    """shared callbacks ("""
    checkpoints = SharedCheckpoints(folder / "here", every=4 + ranks.rank)
    model_of(toy_envs(ENVS)).learn(TOTAL, checkpoints, ranks=ranks)


def nested(ranks: Ranks, folder: Path) -> None:
    """SharedCheckpoints has to run in every process: pass it to learn() itself"""
    inside = EveryNTimesteps(4, SharedCheckpoints(folder / "nested", every=4))
    model_of(toy_envs(ENVS)).learn(TOTAL, inside, ranks=ranks)


def unwritable(ranks: Ranks, folder: Path) -> None:
    """a_file"""
    (folder / "a_file").write_text("no folder")
    model_of(toy_envs(ENVS)).learn(TOTAL, SharedCheckpoints(folder / "a_file" / "x", every=4), ranks=ranks)


REFUSED = [
    other_number_of_environments,
    other_totals,
    other_arguments,
    uneven,
    uneven_parts,
    by_episode,
    normalized,
    broken_env,
    broken_observation,
    broken_callback,
    drift,
    other_checkpoints,
    nested,
    unwritable,
]


def test_those_who_lose_a_process_end_too() -> None:
    codes = launch(leaving, 2)
    assert codes[1] is None and "lost contact with the others" in codes[0]


def leaving() -> str:
    class Leaving(ToyEnv):
        def step(self, action: np.ndarray) -> Any:
            if os.environ["RANK"] == "1" and self.episodes == 2:
                os._exit(7)
            return super().step(action)

    def learn(ranks: Ranks) -> None:
        model_of(DummyVecEnv([Leaving] * ENVS)).learn(TOTAL, ranks=ranks)

    return messages([learn])[0]


# --- parts ------------------------------------------------------------------------------------------------------------


def test_own_noise_leaves_the_global_generator_alone() -> None:
    noise = VectorizedActionNoise(NormalActionNoise(np.zeros(2), np.ones(2)), 3)
    one, other, again = OwnNoise(noise, 1), OwnNoise(noise, 2), OwnNoise(noise, 1)
    before = np.random.get_state()[1].copy()
    draws = [one(), one(), other(), again(), again()]
    assert (np.random.get_state()[1] == before).all()
    assert (draws[0] == draws[3]).all() and (draws[1] == draws[4]).all()
    assert (draws[0] != draws[1]).all() and (draws[0] != draws[2]).all()


def test_what_is_told_of_episodes() -> None:
    model = model_of(scored())
    infos = [{"episode": {"r": np.float32(1.5), "l": 5, "odd": [1]}, "is_success": np.True_}, {"is_success": False}]
    assert ended_episodes(model, infos, np.array([True, False])) == [{"episode": {"r": 1.5, "l": 5}, "is_success": 1.0}]


def test_callbacks_one_by_one() -> None:
    one, two = Watcher(), Watcher()
    assert callbacks_of(None) == [] and callbacks_of(one) == [one]
    assert callbacks_of([one, CallbackList([two])]) == [one, two]
    assert len(callbacks_of(lambda *_: True)) == 1
