import copy
import json
import math
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit, TransformReward
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.vec_env import VecNormalize

from sb3_mbdpo import MBDPO
from sb3_mbdpo.acting import PlanResult
from sb3_mbdpo.buffers import DictSequenceReplayBuffer, SequenceReplayBuffer
from sb3_mbdpo.collecting import _write
from sb3_mbdpo.evaluator import Evaluator
from sb3_mbdpo.presets import PRESETS
from tests.fakes import IMAGE, MIXED, UNEVEN, VECTOR, ToyEnv, flat_parameters, toy_envs

LOSSES = ("consistency", "reward", "value", "energy", "prior", "score")
VARIANTS = [("MlpPolicy", VECTOR), ("CnnPolicy", IMAGE), ("MultiInputPolicy", MIXED)]
OBSERVATION = np.array([0.1, -0.2, 0.3], np.float32)


def make(env: Any = None, policy: str = "MlpPolicy", **kwargs: Any) -> MBDPO:
    defaults = {
        "preset": "debug",
        "buffer_size": 300,
        "learning_starts": 10,
        "batch_size": 8,
        "seed": 0,
        "device": "cpu",
    }
    return MBDPO(policy, ToyEnv() if env is None else env, **(defaults | kwargs))


class Recorder(BaseCallback):
    """Keeps what a callback sees at each step, and stops when told to."""

    def __init__(self, stop_after: int = 10**9):
        super().__init__()
        self.stop_after = stop_after
        self.steps: list[dict[str, Any]] = []

    def _on_step(self) -> bool:
        names = ("new_obs", "rewards", "dones", "infos", "actions", "buffer_actions")
        self.steps.append({name: np.copy(self.locals[name]) for name in names})
        return len(self.steps) < self.stop_after


class LastDump(KVWriter):
    """Keeps the last written log."""

    values: dict[str, Any]

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        self.values = dict(key_values)

    def close(self) -> None:
        pass


def same_optimizers(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    left, right = ours["state"], theirs["state"]
    return left.keys() == right.keys() and all(
        th.equal(value, right[index][name]) for index, entry in left.items() for name, value in entry.items()
    )


# --- collecting and learning ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize(("policy", "space"), VARIANTS, ids=[name for name, _ in VARIANTS])
def test_learns_on_every_kind_of_observation(policy: str, space: spaces.Space, n_envs: int) -> None:
    env = toy_envs(n_envs, observation_space=space, action_space=UNEVEN, terminates=True)
    model = make(env, policy)
    before = flat_parameters(model.policy)
    assert model.learn(18) is model
    assert model.num_timesteps == 18 and model._n_updates == (8 if n_envs == 1 else 9)
    assert model.replay_buffer.size() * n_envs == 18
    after = flat_parameters(model.policy)
    assert after.isfinite().all() and not th.equal(before, after)
    for name, parameter in model.policy.world_model.named_parameters():
        # Every module took part: a parameter that got no gradient would have no state in its optimizer
        owners = (model.policy.optimizer, model.policy.prior_optimizer, model.policy.score_optimizer)
        trained = any(parameter in optimizer.state for optimizer in owners)
        assert trained != name.startswith("target_critics"), name
    action, plans = model.predict(env.reset(), deterministic=True)
    assert action.shape == (n_envs, 2) and all(UNEVEN.contains(row) for row in action)
    assert plans.shape == (n_envs, 3, 2)


@pytest.mark.parametrize(
    ("n_envs", "train_freq", "total", "updates"),
    [(1, 1, 20, 10), (3, 1, 30, 21), (1, (4, "step"), 20, 12), (1, (1, "episode"), 20, 10), (2, (3, "step"), 24, 18)],
)
def test_one_update_per_collected_transition(n_envs: int, train_freq: Any, total: int, updates: int) -> None:
    """The updates follow each rollout that ends after ``learning_starts`` (10), as many as it collected."""
    model = make(toy_envs(n_envs), train_freq=train_freq)
    seen = []
    model.learner.update = lambda samples, index: seen.append(index) or {}  # type: ignore[method-assign]
    model.learn(total)
    assert seen == list(range(updates)) and model._n_updates == updates


def test_fixed_gradient_steps_and_warmup() -> None:
    model = make(gradient_steps=2, train_freq=5, warmup_updates=7)
    seen = []
    model.learner.update = lambda samples, index: seen.append(index) or {}  # type: ignore[method-assign]
    model.learn(25)
    assert seen == list(range(7 + 3 * 2)), "the warm-up happens once, before the first updates"
    model.learn(10, reset_num_timesteps=False)
    assert len(seen) == 7 + 5 * 2


def test_a_few_transitions_are_enough() -> None:
    """Training starts on a buffer that holds less than a batch, less than a window, and one-step episodes."""
    model = make(toy_envs(1, lengths=(1, 2), terminates=True), learning_starts=0).learn(4)
    assert model._n_updates == 4 and flat_parameters(model.policy).isfinite().all()


def test_shortest_plans_and_schedule() -> None:
    model = make(horizon=1, denoising_steps=2, n_prior_trajectories=0).learn(16)
    assert model._n_updates == 6 and flat_parameters(model.policy).isfinite().all()
    assert model.predict(OBSERVATION)[1].shape == (1, 1, 2)


@pytest.mark.parametrize("terminates", [False, True])
def test_only_terminations_make_a_task_episodic(terminates: bool) -> None:
    env = TimeLimit(ToyEnv(lengths=(4,) if terminates else (100,), terminates=True), 6)
    model = make(env)
    assert not model.policy.episodic
    model.learn(16)
    assert model.policy.episodic == terminates
    losses = model.logger.name_to_value
    assert ("train/termination_loss" in losses) == terminates
    samples = model.replay_buffer.sample(64)
    assert bool(samples.terminations.any()) == terminates


@pytest.mark.parametrize("episodic", [True, False])
def test_episodic_can_be_fixed(episodic: bool) -> None:
    model = make(toy_envs(1, terminates=not episodic), episodic=episodic).learn(14)
    assert model.policy.episodic == episodic
    assert (model.policy.world_model.termination is not None) == episodic


def test_callbacks_see_the_step_and_can_stop_it() -> None:
    env = toy_envs(2, action_space=UNEVEN)
    model, recorder = make(env), Recorder(stop_after=9)
    model.learn(100, callback=recorder)
    assert len(recorder.steps) == 9 and model.num_timesteps == 18
    assert model.replay_buffer.size() == 8, "the step at which the callback stopped is not stored"
    for step, stored in zip(recorder.steps[:8], model.replay_buffer.actions[:8], strict=True):
        assert step["new_obs"].shape == (2, 3) and step["rewards"].shape == step["dones"].shape == (2,)
        assert np.abs(step["buffer_actions"]).max() <= 1
        expected = UNEVEN.low + (step["buffer_actions"] + 1) / 2 * (UNEVEN.high - UNEVEN.low)
        np.testing.assert_allclose(step["actions"], expected, atol=1e-6)
        np.testing.assert_array_equal(stored, step["buffer_actions"])


def test_a_window_ends_before_the_step_at_which_a_callback_stopped() -> None:
    """Also where no observation tells that a step is missing."""
    model = make(ToyEnv(spaces.Discrete(1), lengths=(100,)))
    model.learn(100, callback=Recorder(stop_after=4))
    assert model.replay_buffer.window_ends[:5].flatten().tolist() == [False, False, True, False, False]
    model.learn(2, reset_num_timesteps=False)
    assert model.replay_buffer.window_ends[:5].flatten().tolist() == [False, False, True, False, False]


def test_running_plans_restart_where_episodes_end() -> None:
    """While collecting, each row goes on from its own last plan, and starts cold after its own episode's end."""
    model, recorder = make(toy_envs(3), learning_starts=0), Recorder()
    model.learner.update = lambda samples, index: {}  # type: ignore[method-assign]
    plan, calls = model.policy.plan, []

    def spy(obs: Any, previous: th.Tensor, restart: th.Tensor, deterministic: bool = False) -> Any:
        result = plan(obs, previous, restart, deterministic)
        calls.append((previous.clone(), restart.clone(), result.plan.clone()))
        return result

    model.policy.plan = spy  # type: ignore[method-assign]
    model.learn(45, callback=recorder)
    assert len(calls) == 15 and calls[0][1].all()
    for step, (previous, restart, _) in enumerate(calls[1:], start=1):
        assert restart.tolist() == recorder.steps[step - 1]["dones"].tolist()
        assert th.equal(previous, calls[step - 1][2])
    assert sum(int(restart.sum()) for _, restart, _ in calls[1:]) == 2 + 2 + 2
    last = calls[-1][2]
    calls.clear()
    model.learn(3, reset_num_timesteps=False)
    assert th.equal(calls[0][0], last) and not calls[0][1].all(), "episodes go on, and so do their plans"
    calls.clear()
    model.learn(3)
    assert calls[0][1].all(), "plans are dropped where learn() resets the environments"
    model.set_env(toy_envs(3))
    assert model._plans is None


@pytest.mark.parametrize("bootstrap", ["prior", "score"])
def test_drift_is_measured_now_and_then(bootstrap: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, drifts = make(toy_envs(2), bootstrap=bootstrap), []
    measure = model._action_drift

    @th.no_grad()
    def record(result: PlanResult) -> th.Tensor:
        if bootstrap == "prior":
            followed = model.policy.world_model.prior_action(result.latent)
        else:
            followed = model.learner.cold_plan(result.latent)[:, 0]
        drifts.append(measure(result))
        th.testing.assert_close(drifts[-1], (result.plan[:, 0] - followed).abs().mean())
        return drifts[-1]

    monkeypatch.setattr(model, "_action_drift", record)
    model.learn(70)
    # Decisions 7, 14, 21 and 28; random ones, up to learning_starts, have no plan
    assert len(drifts) == 4 and all(0 < drift < 2 for drift in drifts)


def test_logs() -> None:
    model, writer = make(ToyEnv(terminates=True), learning_rate=lambda left: 1e-3 * left), LastDump()
    model.set_logger(Logger(None, [writer]))
    model.learn(20, log_interval=4)
    logged = writer.values
    wanted = {f"train/{name}_loss" for name in (*LOSSES, "termination")}
    wanted |= {"train/n_updates", "train/learning_rate", "train/grad_norm", "train/prior_grad_norm"}
    wanted |= {"train/score_grad_norm", "train/cross_td_error", "search/action_drift", "search/value"}
    wanted |= {"train/clipped_targets"}
    wanted |= {"search/value_std", "rollout/ep_rew_mean", "rollout/ep_len_mean", "time/fps", "time/total_timesteps"}
    assert wanted <= logged.keys()
    assert all(math.isfinite(value) for value in logged.values())
    assert all(isinstance(logged[name], float) for name in wanted if name.endswith("_loss"))
    # The dump happens in step 20, whose rollout was preceded by the update after step 19
    assert logged["train/learning_rate"] == pytest.approx(1e-3 / 20)
    encoder, rest = (group["lr"] for group in model.policy.optimizer.param_groups)
    assert encoder == pytest.approx(0.3 * rest) and rest == model.policy.prior_optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("act_mode", ["search", "score", "prior"])
def test_act_modes(act_mode: str) -> None:
    model = make(act_mode=act_mode, bootstrap="score" if act_mode == "score" else "prior").learn(14)
    assert ("search/value" in model.logger.name_to_value) == (act_mode == "search")
    again, _ = model.predict(OBSERVATION, deterministic=True)
    np.testing.assert_array_equal(again, model.predict(OBSERVATION, deterministic=True)[0])


def test_bootstrap_changes_what_is_learned() -> None:
    by_prior, by_score = (flat_parameters(make(bootstrap=name).learn(14).policy) for name in ("prior", "score"))
    assert not th.equal(by_prior, by_score)


def test_score_coef_zero_leaves_the_network_out() -> None:
    model = make(score_coef=0.0).learn(14)
    assert model.policy.world_model.score is None and model.policy.score_optimizer is None
    assert "train/score_loss" not in model.logger.name_to_value
    assert set(model.get_parameters()) == {"policy", "policy.optimizer", "policy.prior_optimizer"}


def test_score_interval() -> None:
    model = make(score_interval=4)
    learner, steps = model.learner, []
    update = learner.update_score
    learner.update_score = lambda z, batch: steps.append(1) or update(z, batch)  # type: ignore[method-assign]
    model.learn(20)
    assert len(steps) == 3, "updates 0, 4 and 8 of 10"


def test_action_noise_is_not_a_number() -> None:
    with pytest.raises(ValueError, match=r"action_noise must be an ActionNoise, .*, got 0\.1"):
        make(action_noise=0.1)


def test_action_noise_is_added_and_clipped() -> None:
    noise = NormalActionNoise(np.full(2, 5.0), np.zeros(2))
    model, recorder = make(action_noise=noise, learning_starts=0, act_mode="prior"), Recorder()
    model.learn(3, callback=recorder)
    assert all((step["buffer_actions"] == 1).all() for step in recorder.steps)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_random_steps_with_action_noise_stay_in_the_space(dtype: type) -> None:
    """`ToyEnv` refuses actions outside of its space or of another dtype."""
    env = ToyEnv(action_space=spaces.Box(-6.0, -1.7, (2,), dtype))
    noise = NormalActionNoise(np.zeros(2), np.ones(2))
    make(env, learning_starts=1000, action_noise=noise).learn(300)


def test_exploration_noise_sets_the_spread() -> None:
    model = make(exploration_noise=0.0, act_mode="score")
    one, other = (model.predict(OBSERVATION, deterministic=flag)[0] for flag in (True, False))
    np.testing.assert_array_equal(one, other)
    model = make(exploration_noise=0.3, act_mode="score")
    mode, _ = model.predict(OBSERVATION, deterministic=True)
    draws = np.stack([model.predict(OBSERVATION)[0] for _ in range(200)])
    assert 0.25 < (draws - mode).std() < 0.35


def test_collecting_explores() -> None:
    model, plans = make(toy_envs(2), learning_starts=0, gradient_steps=0, exploration_noise=0.5), []
    plan = model.policy.plan

    def record(*arguments: Any) -> PlanResult:
        result = plan(*arguments)
        plans.append(result.plan[:, 0].numpy())
        return result

    model.policy.plan = record  # type: ignore[method-assign]
    model.learn(20)
    # Less than the mean of a normal draw's size, 0.4, by what the bounds cut off
    assert 0.2 < np.abs(model.replay_buffer.actions[:10] - np.stack(plans)).mean() < 0.45


def test_last_observations_of_whole_numbers_are_rounded() -> None:
    target = np.zeros((1, 3), np.uint8)
    _write(0, target, np.array([155.9999, 3.0001, 255.4]))
    assert target.tolist() == [[156, 3, 255]]


def test_vec_normalize() -> None:
    model = make(VecNormalize(toy_envs(2, observation_space=spaces.Box(-9.0, 9.0, (3,)))), learning_starts=8)
    model.learn(16)
    assert np.abs(model.replay_buffer.observations[:8]).max() > 3, "raw observations are stored"
    assert flat_parameters(model.policy).isfinite().all()


def test_no_warning_of_its_own(recwarn: pytest.WarningsRecorder) -> None:
    warnings.simplefilter("always")
    make(toy_envs(2, terminates=True)).learn(20)
    ours = [str(warning.message) for warning in recwarn if "sb3_mbdpo" in warning.filename]
    assert not ours


def test_evaluation_hands_the_plans_back(tmp_path: Path) -> None:
    """SB3's evaluation treats the plan as recurrent state: rows restart with their episodes and nowhere else."""
    warnings.simplefilter("ignore")  # the toy environments have no Monitor
    model, restarts = make(), []
    plan = model.policy.plan

    def spy(obs: Any, previous: th.Tensor, restart: th.Tensor, deterministic: bool = False) -> Any:
        restarts.append(restart.tolist())
        return plan(obs, previous, restart, deterministic)

    model.policy.plan = spy  # type: ignore[method-assign]
    _, lengths = evaluate_policy(model, toy_envs(2), n_eval_episodes=4, return_episode_rewards=True, warn=False)
    assert sorted(lengths) == [5, 5, 6, 6]
    del restarts[11:]  # once a row has played its episodes, the evaluation no longer looks at it
    assert [step for step, (first, _) in enumerate(restarts) if first] == [0, 5, 10]
    assert [step for step, (_, second) in enumerate(restarts) if second] == [0, 6]
    callback = EvalCallback(toy_envs(1), n_eval_episodes=1, eval_freq=6, best_model_save_path=str(tmp_path), verbose=0)
    model.learn(12, callback=callback)
    assert (tmp_path / "best_model.zip").exists()


# --- seeds and saving -----------------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_run() -> None:
    def run(seed: int) -> tuple[th.Tensor, np.ndarray]:
        model = make(toy_envs(2, terminates=True), seed=seed).learn(20)
        return flat_parameters(model.policy), model.replay_buffer.actions[:10]

    weights, actions = run(3)
    th.rand(7)
    np.random.rand(7)
    weights_again, actions_again = run(3)
    assert th.equal(weights, weights_again) and np.array_equal(actions, actions_again)
    other_weights, other_actions = run(4)
    assert not th.equal(weights, other_weights) and not np.array_equal(actions, other_actions)


@pytest.fixture(scope="module")
def trained() -> MBDPO:
    kwargs = {"net_arch": [24], "optimizer_kwargs": {"weight_decay": 1e-4}}
    return make(toy_envs(1, terminates=True), policy_kwargs=kwargs, gamma=0.9).learn(20)


def test_save_and_load(trained: MBDPO, tmp_path: Path) -> None:
    trained.save(tmp_path / "model")
    loaded = MBDPO.load(tmp_path / "model")
    ours, theirs = trained.policy.state_dict(), loaded.policy.state_dict()
    assert list(ours) == list(theirs) and all(th.equal(ours[key], theirs[key]) for key in ours)
    for name in ("optimizer", "prior_optimizer", "score_optimizer"):
        saved, found = getattr(trained.policy, name).state_dict(), getattr(loaded.policy, name).state_dict()
        assert saved["state"] and same_optimizers(saved, found), name
        assert saved["param_groups"] == found["param_groups"]
    for name in ("num_timesteps", "_n_updates", "gamma", "learning_starts", "horizon", "n_samples", "policy_kwargs"):
        assert getattr(trained, name) == getattr(loaded, name), name
    assert loaded.policy.episodic and loaded.policy_kwargs == {
        "net_arch": [24],
        "optimizer_kwargs": {"weight_decay": 1e-4},
    }
    for ours_now, theirs_now in zip(
        trained.predict(OBSERVATION, deterministic=True), loaded.predict(OBSERVATION, deterministic=True), strict=True
    ):
        np.testing.assert_array_equal(ours_now, theirs_now)


@pytest.mark.parametrize("kwargs", [{"horizon": 2}, {"model_size": 0.1}])
def test_parameters_of_another_size_are_one_clear_error(trained: MBDPO, tmp_path: Path, kwargs: dict[str, Any]) -> None:
    trained.save(tmp_path / "model")
    with pytest.raises(ValueError, match="a model of other sizes: horizon, model_size, policy_kwargs and spaces"):
        MBDPO.load(tmp_path / "model", **kwargs)


def test_a_preset_that_would_change_nothing_is_refused(trained: MBDPO, tmp_path: Path) -> None:
    trained.save(tmp_path / "model")
    assert MBDPO.load(tmp_path / "model", preset=trained.preset).n_samples == trained.n_samples
    with pytest.raises(ValueError, match=r"preset='paper' would change nothing .* from_pretrained\(preset=\.\.\.\)"):
        MBDPO.load(tmp_path / "model", preset="paper")


def test_refused_parameters_leave_the_model_as_it_was(trained: MBDPO) -> None:
    other = make(toy_envs(1), policy_kwargs=trained.policy_kwargs, seed=5)
    before = {name: value.clone() for name, value in other.policy.state_dict().items()}
    last = "world_model.prior_scale"
    policy = trained.policy.state_dict()
    groups = trained.policy.optimizer.state_dict()
    moments = {0: {"exp_avg": th.zeros(7)}}
    sizes = "a model of other sizes.*What differs in"
    for name, wrong, words in (
        ("policy", policy | {last: th.zeros(7)}, f"{sizes} policy: {last}"),
        ("policy", {name: value for name, value in policy.items() if name != last}, f"same tensors: {last} is missing"),
        ("policy", policy | {"more": th.zeros(7)}, r"same tensors: more is not the model's\..*exact_match=False"),
        ("policy.optimizer", groups | {"param_groups": groups["param_groups"][:1]}, f"{sizes} policy.optimizer: "),
        ("policy.optimizer", groups | {"state": moments}, f"{sizes} policy.optimizer: "),
    ):
        # Stable-Baselines3 raises PyTorch's RuntimeError
        for kind in (ValueError, RuntimeError):
            with pytest.raises(kind, match=words):
                other.set_parameters(trained.get_parameters() | {name: wrong})
        assert all((value == before[key]).all() for key, value in other.policy.state_dict().items())
        assert other.policy.prior_optimizer.state_dict()["state"] == {}
    for names, words in ((["policy", "nothing"], "invalid object name"), (["policy"], "pass all of them")):
        with pytest.raises(ValueError, match=words):
            other.set_parameters(dict.fromkeys(names, policy))
        assert all((value == before[key]).all() for key, value in other.policy.state_dict().items())


def test_a_part_of_the_parameters_is_taken_where_that_is_asked_for(trained: MBDPO) -> None:
    other = make(toy_envs(1), policy_kwargs=trained.policy_kwargs, seed=5)
    last = "world_model.prior_scale"
    kept = other.policy.state_dict()[last].clone()
    part = {name: value for name, value in trained.policy.state_dict().items() if name != last}
    other.set_parameters({"policy": part}, exact_match=False)
    found = other.policy.state_dict()
    assert th.equal(found.pop(last), kept) and all(th.equal(value, part[name]) for name, value in found.items())


@pytest.mark.parametrize("gone", ["none", "deleted"])
def test_a_model_whose_replay_buffer_was_taken_away(gone: str, tmp_path: Path) -> None:
    model = make(toy_envs(1), seed=0).learn(20)
    model.save_replay_buffer(tmp_path / "buffer")
    size = model.replay_buffer.size()  # type: ignore[union-attr]
    if gone == "none":
        model.replay_buffer = None
    else:
        del model.replay_buffer
    model.set_random_seed(1)
    model.save(tmp_path / "model", include=["replay_buffer"])
    with pytest.raises(AssertionError, match="The replay buffer is not defined"):
        model.save_replay_buffer(tmp_path / "nothing")
    make(toy_envs(2)).save_replay_buffer(tmp_path / "other")
    with pytest.raises(ValueError, match="n_envs=2, the model has 1"):
        model.load_replay_buffer(tmp_path / "other")
    assert model.replay_buffer is None
    with pytest.raises(ValueError, match="load_replay_buffer"):
        model.learn(4, reset_num_timesteps=False)
    model.load_replay_buffer(tmp_path / "buffer")
    assert model.replay_buffer is not None and model.replay_buffer.size() == size
    model.learn(4, reset_num_timesteps=False)
    assert model.replay_buffer.size() == size + 4


def test_running_state_stays_out_of_the_file(trained: MBDPO, tmp_path: Path) -> None:
    trained.save(tmp_path / "model")
    with zipfile.ZipFile(tmp_path / "model.zip") as archive:
        names = json.loads(archive.read("data")).keys()
        files = archive.namelist()
    assert not {"policy", "learner", "replay_buffer", "_plans", "_restarts", "_metrics"} & names
    assert {"policy.pth", "policy.optimizer.pth", "policy.prior_optimizer.pth", "policy.score_optimizer.pth"} <= set(
        files
    )


def test_learning_goes_on_after_loading(trained: MBDPO, tmp_path: Path) -> None:
    trained.save(tmp_path / "model")
    trained.save_replay_buffer(tmp_path / "buffer")
    loaded = MBDPO.load(tmp_path / "model", env=toy_envs(3), device="cpu")
    loaded.learn(9, reset_num_timesteps=False)
    assert loaded.num_timesteps == 29 and loaded._n_updates == trained._n_updates + 9
    loaded = MBDPO.load(tmp_path / "model", env=toy_envs(1))
    loaded.load_replay_buffer(tmp_path / "buffer")
    assert isinstance(loaded.replay_buffer, SequenceReplayBuffer) and loaded.replay_buffer.size() == 20
    loaded.learn(4, reset_num_timesteps=False)
    assert loaded.replay_buffer.size() == 24 and flat_parameters(loaded.policy).isfinite().all()


def test_continuing_after_loading_gives_the_same_numbers(tmp_path: Path) -> None:
    model = make().learn(14)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    loaded = MBDPO.load(tmp_path / "model")
    loaded.load_replay_buffer(tmp_path / "buffer")
    loaded.set_logger(model.logger)
    for each in (model, loaded):
        each.train(2, 8)
    assert th.equal(flat_parameters(model.policy), flat_parameters(loaded.policy))


def test_a_seed_given_later_counts(trained: MBDPO, tmp_path: Path) -> None:
    """Without one a loaded model goes on from its own random state."""
    trained.save(tmp_path / "model")
    expected = trained.policy.generator.get_state()
    assert th.equal(MBDPO.load(tmp_path / "model").policy.generator.get_state(), expected)
    first, again, other = (MBDPO.load(tmp_path / "model", seed=seed).predict(OBSERVATION)[0] for seed in (5, 5, 6))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    model = MBDPO.load(tmp_path / "model")
    outcomes = []
    for _ in range(2):
        model.set_random_seed(7)
        outcomes.append((model.predict(OBSERVATION)[0], model.replay_buffer.rng.integers(10**9)))
    assert np.array_equal(outcomes[0][0], outcomes[1][0]) and outcomes[0][1] == outcomes[1][1]


def test_the_way_to_act_can_be_changed_and_is_saved(trained: MBDPO, tmp_path: Path) -> None:
    model = copy.deepcopy(trained)
    model.policy.act_mode = "score"
    model.save(tmp_path / "model")
    loaded = MBDPO.load(tmp_path / "model")
    assert loaded.policy.act_mode == loaded.act_mode == "score"
    expected = model.predict(OBSERVATION, deterministic=True)[0]
    np.testing.assert_array_equal(loaded.predict(OBSERVATION, deterministic=True)[0], expected)
    with pytest.raises(ValueError, match=r"act_mode.*scores"):
        model.policy.act_mode = "scores"
    assert model.policy.act_mode == "score"


@pytest.mark.parametrize(("terminates", "episodic"), [(True, True), (False, False)])
def test_terminations_in_a_loaded_buffer_count_as_seen(terminates: bool, episodic: bool, tmp_path: Path) -> None:
    make(toy_envs(1, terminates=terminates)).learn(8).save_replay_buffer(tmp_path / "buffer")
    model = make(toy_envs(1))
    model.load_replay_buffer(tmp_path / "buffer")
    assert model.policy.episodic is episodic
    fixed = make(toy_envs(1), episodic=False)
    fixed.load_replay_buffer(tmp_path / "buffer")
    assert not fixed.policy.episodic


@pytest.mark.parametrize(
    ("terminates", "episodic", "expected"),
    [(True, False, 1), (False, False, 0), (True, None, 0), (True, True, 0)],
)
def test_ends_that_a_model_cannot_learn_are_told_once(
    terminates: bool, episodic: bool | None, expected: int, recwarn: pytest.WarningsRecorder
) -> None:
    warnings.simplefilter("always")
    make(toy_envs(2, terminates=terminates), episodic=episodic).learn(30).learn(30)
    assert len([entry for entry in recwarn if "train one with episodic=None" in str(entry.message)]) == expected


def test_an_interrupted_warmup_is_counted() -> None:
    model, update = make(warmup_updates=30), None
    update = model.learner.update

    def interrupted(samples: Any, index: int) -> Any:
        if index == 12:
            raise KeyboardInterrupt
        return update(samples, index)

    model.learner.update = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        model.learn(20)
    assert model._n_updates == 12


def test_a_diverged_update_is_an_error() -> None:
    model = make().learn(12)
    with th.no_grad():
        next(model.policy.world_model.dynamics.parameters()).fill_(th.nan)
    with pytest.raises(ValueError, match="grad_norm is nan at update"):
        model.train(1, 8)


def test_the_users_buffer_arguments_stay_his() -> None:
    given = {"handle_timeout_termination": True}
    assert make(replay_buffer_kwargs=given).replay_buffer_kwargs == given and "horizon" not in given


def test_parameters_can_be_exchanged(trained: MBDPO) -> None:
    other = make(toy_envs(1), policy_kwargs=trained.policy_kwargs, gamma=0.9, seed=5)
    other.set_parameters(trained.get_parameters())
    assert th.equal(flat_parameters(trained.policy), flat_parameters(other.policy)) and other.policy.episodic
    np.testing.assert_array_equal(
        trained.predict(OBSERVATION, deterministic=True)[0], other.predict(OBSERVATION, deterministic=True)[0]
    )
    with pytest.raises(ValueError, match="score_optimizer"):
        other.set_parameters({key: value for key, value in trained.get_parameters().items() if "score" not in key})


# --- construction ---------------------------------------------------------------------------------------------------


def test_episode_length_sets_discount_and_warmup() -> None:
    model = make(TimeLimit(ToyEnv(), 300), learning_starts=None)
    assert (model.learning_starts, model.warmup_updates) == (1500, 1500)
    assert model.gamma == pytest.approx(59 / 60) and model.policy.search_config.discount == model.gamma
    model = make(TimeLimit(ToyEnv(), 300), learning_starts=5, gamma=0.5)
    assert (model.learning_starts, model.warmup_updates, model.gamma) == (5, 0, 0.5)
    assert make().gamma == 0.99


def test_explicit_arguments_win_over_the_preset() -> None:
    model = make(n_samples=20, temperature=0.25, beta_end=0.1, exploration_noise=0.0)
    config = model.policy.search_config
    assert (config.n_samples, config.temperature, config.schedule.beta_end) == (20, 0.25, 0.1)
    assert config.n_elites == 5 and model.policy.exploration_noise == 0.0
    assert make(preset="auto").model_size == PRESETS["cpu"].model_size


def test_the_buffer_follows_the_space() -> None:
    assert type(make().replay_buffer) is SequenceReplayBuffer
    model = make(ToyEnv(MIXED), "MultiInputPolicy")
    assert type(model.replay_buffer) is DictSequenceReplayBuffer

    class Own(SequenceReplayBuffer):
        pass

    assert type(make(replay_buffer_class=Own, horizon=2).replay_buffer) is Own


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"horizon": 0}, "horizon"),
        ({"n_elites": 17}, "n_elites"),
        ({"n_prior_trajectories": 16}, "n_prior_trajectories"),
        ({"temperature": 0.0}, "temperature"),
        ({"denoising_steps": 1}, "denoising_steps"),
        ({"beta_start": 0.3}, "beta_start"),
        ({"beta_end": 1.0}, "beta_end"),
        ({"preset": "huge"}, "preset.*huge"),
        ({"model_size": 2}, "model_size"),
        ({"act_mode": "best"}, "act_mode.*best"),
        ({"bootstrap": "search"}, "bootstrap.*search"),
        ({"act_mode": "score", "score_coef": 0.0}, "act_mode.*score_coef"),
        ({"bootstrap": "score", "score_coef": 0.0}, "bootstrap.*score_coef"),
        ({"n_steps": 3}, "n_steps"),
        ({"replay_buffer_class": HerReplayBuffer}, "replay_buffer_class.*HerReplayBuffer"),
        ({"optimize_memory_usage": True}, "optimize_memory_usage"),
        ({"policy_kwargs": {"use_sde": True}}, "use_sde"),
        ({"policy_kwargs": {"n_critics": 1}}, "n_critics"),
        ({"policy_kwargs": {"latent_dim": 20}}, "latent_dim"),
        ({"policy": "LstmPolicy"}, "LstmPolicy"),
        ({"policy": "CnnPolicy"}, "CnnPolicy"),
        ({"env": ToyEnv(MIXED)}, "MultiInputPolicy"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_work_is_named(kwargs: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make(**kwargs)


@pytest.mark.parametrize(
    "space", [spaces.Discrete(3), spaces.MultiBinary(2), spaces.Box(-np.inf, np.inf, (2,)), spaces.Box(0, np.inf, (1,))]
)
def test_other_action_spaces_are_refused(space: spaces.Space) -> None:
    with pytest.raises((ValueError, AssertionError), match="action space"):
        make(ToyEnv(action_space=space))


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"env": ToyEnv(action_space=spaces.Box(0, 3, (2,), np.int64))}, "action space"),
        ({"policy_kwargs": {"horizon": 5}}, r"policy_kwargs.*horizon"),
        ({"score_samples": 1}, "^score_samples"),
        ({"score_interval": 0}, "score_interval"),
        ({"policy_delay": 0}, "policy_delay"),
        ({"prior_horizon": 4, "horizon": 3}, "prior_horizon"),
        ({"prior_margin": -0.1}, "prior_margin"),
        ({"energy_unit": "return"}, "energy_unit"),
        ({"behaviour_coef": float("nan")}, "behaviour_coef"),
        ({"warm_denoising_steps": 1.5}, "warm_denoising_steps must be a whole number"),
        ({"warm_denoising_steps": 0}, "warm_denoising_steps must be a whole number"),
        ({"warm_denoising_steps": 0.0}, "or a share between 0 and 1"),
        ({"warm_denoising_steps": 9}, r"between 1 and denoising_steps - 1 \(2\)"),
        ({"compile": "yes"}, "compile must be True or False, got 'yes'"),
        ({"normalize_observations": True}, "VecNormalize"),
        ({"update_dtype": None}, "update_dtype must be .* got None"),
        ({"policy_kwargs": {"net_arch": []}}, "net_arch needs at least one hidden width"),
        ({"policy_kwargs": {"activation_fn": th.nn.PReLU}}, "activation_fn must have no parameters"),
        ({"energy_interval": 0}, "energy_interval"),
        ({"batch_size": 0}, "batch_size"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_more_that_cannot_work_is_named(kwargs: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make(**kwargs)


def test_unset_elites_keep_their_share_of_the_samples() -> None:
    """Who asks for fewer candidates need not know how many elites the preset has."""
    full, half = make(), make(n_samples=8)
    assert (half.n_elites, half.n_prior_trajectories) == (full.n_elites // 2, full.n_prior_trajectories // 2)
    assert make(n_samples=8, n_elites=8).n_elites == 8


def test_speed_arguments_reach_their_place_and_are_saved(tmp_path: Path) -> None:
    arguments = {
        "policy_delay": 2,
        "energy_interval": 3,
        "score_interval": 5,
        "warm_denoising_steps": 1,
        "search_dtype": "bfloat16",
        "update_dtype": "bfloat16",
    }
    made = make(**arguments)
    made.save(tmp_path / "model")
    for model in (made, MBDPO.load(tmp_path / "model")):
        learner, config = model.learner, model.policy.search_config
        assert (learner.policy_delay, learner.energy_interval, learner.score_interval) == (2, 3, 5)
        assert learner.mixed_precision and config.dtype == th.bfloat16 and config.warm_steps == 1
        assert all(getattr(model, name) == value for name, value in arguments.items())
    assert MBDPO.load(tmp_path / "model", compile=True).policy.compiled and not made.policy.compiled


@pytest.mark.parametrize("warm", [1, 0.5])
def test_a_decision_that_continues_a_plan_takes_fewer_steps(warm: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model, evaluated = make(warm_denoising_steps=warm), []
    evaluate = Evaluator.__call__
    monkeypatch.setattr("sb3_mbdpo.evaluator.Evaluator.__call__", lambda *args: evaluated.append(1) or evaluate(*args))
    _, plans = model.predict(OBSERVATION, deterministic=True)
    steps = model.denoising_steps - 1
    assert len(evaluated) == steps > 1
    model.predict(OBSERVATION, plans, deterministic=True)
    assert len(evaluated) == steps + 1
    model.predict(OBSERVATION, plans, np.array([True]), deterministic=True)
    assert len(evaluated) == 2 * steps + 1


@pytest.mark.parametrize(("bins", "share"), [({}, 1.0), ({"vmin": -20.0, "vmax": 20.0}, 0.0)])
def test_rewards_beyond_the_bins_are_logged(bins: dict[str, float], share: float) -> None:
    """Whatever the horizon; wider bins hold them."""
    env = TransformReward(ToyEnv(), lambda reward: 1e6 + float(reward))
    model, writer = make(env, horizon=1, policy_kwargs=bins), LastDump()
    model.set_logger(Logger(None, [writer]))
    model.learn(20, log_interval=4)
    assert writer.values["train/clipped_targets"] == share
