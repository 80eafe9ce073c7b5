"""The part of MBDPO that acts while it collects: running plans, what is stored, and figures about the search."""

import warnings
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.type_aliases import MaybeCallback, RolloutReturn, TrainFreq
from stable_baselines3.common.vec_env import VecEnv

from sb3_mbdpo.acting import PlanResult
from sb3_mbdpo.arguments import check_arguments, check_finite, resolve_defaults
from sb3_mbdpo.buffer_arrays import map_arrays
from sb3_mbdpo.building import ARGUMENTS, current_arguments, follow_arguments
from sb3_mbdpo.rehearsal import RehearsingAlgorithm

if TYPE_CHECKING:
    from sb3_mbdpo.mbdpo import MBDPO

# The drift of the actions is a figure to watch, and as dear as acting without search: measured at every so many
# decisions, a number that divides few lengths of episodes, whose same steps would always be met
DRIFT_INTERVAL = 7


class CollectingAlgorithm(RehearsingAlgorithm):
    """The part of MBDPO that collects experience. Arguments are those of the algorithm."""

    bootstrap: str | None
    # Arguments as policy and learner have them
    _followed: tuple[Any, ...] | None = None
    # Whether somebody has been told that this model does not learn where episodes terminate
    _told_of_terminations: bool = False

    def _follow_arguments(self) -> None:
        model = cast("MBDPO", self)
        if self._followed is None:
            # Pickled whole, before there was anything to follow
            self._followed = current_arguments(model)
        place = ARGUMENTS.index("act_mode")
        if model.act_mode != self.policy.act_mode and model.act_mode == self._followed[place]:
            # Set on the policy itself
            model.act_mode = self.policy.act_mode
            self._followed = (*self._followed[:place], model.act_mode, *self._followed[place + 1 :])
        current = current_arguments(model)
        if current != self._followed:
            changed = [name for name, old, new in zip(ARGUMENTS, self._followed, current, strict=True) if old != new]
            resolve_defaults(model)
            check_arguments(model)
            follow_arguments(model, changed)
            self._followed = current_arguments(model)

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "run",
        progress_bar: bool = False,
    ) -> tuple[int, BaseCallback]:
        # First of all: Stable-Baselines3 wants them in its own form, and what is refused must not cost an episode
        self._follow_arguments()
        if self.replay_buffer is None:
            raise ValueError(
                "The replay buffer is not defined: load one with load_replay_buffer, or build the model anew."
            )
        self._check_rehearsal()
        if reset_num_timesteps:
            self._counts_offline_steps = False
        if reset_num_timesteps or self._last_obs is None:
            # The environment is about to be reset: neither plans nor what is stored so far continue
            self._plans = self._restarts = None
            if self.replay_buffer.size() > 0:
                self.replay_buffer.mark_boundary()
        if self.episodic is None and not self.policy.episodic and self.replay_buffer.has_terminations():
            # Put there by other means than this model's steps
            self.policy.mark_episodic()
        prepared = super()._setup_learn(total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar)
        assert self._last_obs is not None
        check_finite(self._last_obs)
        return prepared

    def collect_rollouts(
        self,
        env: VecEnv,
        callback: BaseCallback,
        train_freq: TrainFreq,
        replay_buffer: ReplayBuffer,
        action_noise: ActionNoise | None = None,
        learning_starts: int = 0,
        log_interval: int | None = None,
    ) -> RolloutReturn:
        self._follow_arguments()
        # As it is by now: a callback may have set it to a number
        frequency = cast("MBDPO", self).train_freq
        assert isinstance(frequency, TrainFreq)
        try:
            rollout = super().collect_rollouts(
                env, callback, frequency, replay_buffer, action_noise, learning_starts, log_interval
            )
        except BaseException:
            # The environments may be a step ahead of what is stored: whoever goes on begins with a new episode
            self._last_obs = None
            raise
        if not rollout.continue_training:
            self._pass_over(callback.locals["new_obs"], callback.locals["dones"])
        return rollout

    def _pass_over(self, new_obs: np.ndarray | dict[str, np.ndarray], dones: np.ndarray) -> None:
        """
        Go on after a step at which a callback stopped, which Stable-Baselines3 does not store: the environments are
        beyond it, and some of them in a new episode.
        """
        assert self.replay_buffer is not None
        self._last_obs = new_obs
        if self._vec_normalize_env is not None:
            self._last_original_obs = self._vec_normalize_env.get_original_obs()
        self._restarts = np.array(dones, dtype=bool)
        if self.replay_buffer.size() > 0:
            self.replay_buffer.mark_boundary()

    def _sample_action(
        self, learning_starts: int, action_noise: ActionNoise | None = None, n_envs: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        acts_already = self._acts_from_start or self._counts_offline_steps
        if self.num_timesteps < learning_starts and not acts_already:
            # Stable-Baselines3 unscales in float32, which can end a hair outside of the bounds
            _, scaled = super()._sample_action(learning_starts, action_noise, n_envs)
            scaled = self._mask_actions(scaled)
            return self.policy.to_env(scaled), scaled
        assert self._last_obs is not None, "self._last_obs was not set"
        self._follow_arguments()
        self.policy.set_training_mode(False)
        obs, _ = self.policy.obs_to_tensor(self._last_obs)
        previous, restart = self.policy.check_state(self._plans, self._restarts, n_envs)
        result = self.policy.plan(obs, previous, restart)
        self._plans = result.plan.cpu().numpy()
        self._record_plan(result)
        scaled = result.action.cpu().numpy().reshape(n_envs, *self.action_space.shape)  # type: ignore[misc]
        if action_noise is not None:
            scaled = self._mask_actions(np.clip(scaled + action_noise(), -1, 1))
        return self.policy.to_env(scaled), scaled

    def _record_plan(self, result: PlanResult) -> None:
        """Search statistics, and how far the executed plan is from the policy that the critics bootstrap from."""
        metrics: dict[str, th.Tensor] = {}
        # Of all environments of all processes: their means are taken over the same decisions
        decisions = self.num_timesteps // (self.n_envs * self.learner.ranks.size)
        if decisions % DRIFT_INTERVAL == 0:
            metrics["search/action_drift"] = self._action_drift(result)
        if result.search is not None:
            metrics["search/value"] = result.search.value.mean()
            metrics["search/value_std"] = result.search.value_std.mean()
        self._metrics.add(metrics)

    @th.no_grad()
    def _action_drift(self, result: PlanResult) -> th.Tensor:
        if self.bootstrap == "prior":
            action = self.policy.world_model.prior_action(result.latent, None, result.task)
        else:
            action = self.learner.cold_plan(result.latent, result.task)[:, 0]
        return (result.plan[:, 0] - action).abs().mean()

    def _store_transition(
        self,
        replay_buffer: ReplayBuffer,
        buffer_action: np.ndarray,
        new_obs: np.ndarray | dict[str, np.ndarray],
        reward: np.ndarray,
        dones: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        check_finite(new_obs, reward)
        for done, info in zip(dones, infos, strict=True):
            # `new_obs` is then what the next episode begins with
            if done and info.get("terminal_observation") is not None:
                check_finite(info["terminal_observation"])
        normalize = self._vec_normalize_env
        raw: Any = new_obs if normalize is None else normalize.get_original_obs()
        before: Any = self._last_obs if normalize is None else self._last_original_obs
        reached = self._reached(raw, dones, infos)
        rewards = reward if normalize is None else normalize.get_original_reward()
        replay_buffer.add(before, reached, buffer_action, rewards, dones, infos)
        self._last_obs = new_obs
        if normalize is not None:
            self._last_original_obs = raw
        self._restarts = np.array(dones, dtype=bool)
        if self._restarts.any():
            self._note_terminations(replay_buffer, infos)

    def _reached(self, raw: Any, dones: np.ndarray, infos: list[dict[str, Any]]) -> Any:
        """
        Raw observations that a step led to: where an episode has ended, its last one. Stable-Baselines3 writes it into
        integers before it undoes VecNormalize; here it is rounded after.
        """
        reached = map_arrays(np.array, raw)
        for row, (done, info) in enumerate(zip(dones, infos, strict=True)):
            last = info.get("terminal_observation")
            if not done or last is None:
                continue
            last = last if self._vec_normalize_env is None else self._vec_normalize_env.unnormalize_obs(last)
            map_arrays(partial(_write, row), reached, last)
        return reached

    def _note_terminations(self, replay_buffer: ReplayBuffer, infos: list[dict[str, Any]]) -> None:
        """With the first termination the head for them joins in; a model without one says so, once."""
        assert self._restarts is not None
        timeouts = np.array([info.get("TimeLimit.truncated", False) for info in infos])
        if not getattr(replay_buffer, "handle_timeout_termination", True):
            timeouts[:] = False
        if not (self._restarts & ~timeouts).any():
            return
        if self.policy.world_model.termination is not None:
            if self.episodic is None:
                self.policy.mark_episodic()
        elif not self._told_of_terminations:
            self._told_of_terminations = True
            warnings.warn(
                "An episode has terminated, which a model without a termination head (episodic=False, or converted "
                "without one) cannot learn: train one with episodic=None, unless plans may go on past such ends.",
                stacklevel=2,
            )


def _write(row: int, target: np.ndarray, value: Any) -> None:
    if np.issubdtype(target.dtype, np.integer):
        limits = np.iinfo(target.dtype)
        value = np.clip(np.rint(value), limits.min, limits.max)
    target[row] = value
