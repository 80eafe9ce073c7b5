"""Acting: plans by search, by the score network or by the prior; the plan is the recurrent state of ``predict``."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.type_aliases import PyTorchObs

from sb3_mbdpo.cuda_graphs import copied
from sb3_mbdpo.encoders import Features
from sb3_mbdpo.finite import require_finite
from sb3_mbdpo.hardware import compiled
from sb3_mbdpo.products import MIN_ROWS
from sb3_mbdpo.ranks import ALONE, Ranks
from sb3_mbdpo.score import score_plan
from sb3_mbdpo.search import (
    DETERMINISTIC_SEED,
    SearchNoise,
    SearchResult,
    SearchStep,
    draw_noise,
    prior_rollouts,
    search,
)
from sb3_mbdpo.search_config import SearchConfig, check_act_mode
from sb3_mbdpo.task_policy import TaskPolicy
from sb3_mbdpo.world_model import WorldModel


class PlanResult(NamedTuple):
    """
    What acting computes for a batch: ``action`` [B, A] scaled to [-1, 1], exploration noise included; ``plan``
    [B, H, A], the next warm start; ``latent`` [B, L]; ``search`` its statistics, None when acting without search;
    ``task`` [B] the index of each row's task, None in single-task models.
    """

    action: th.Tensor
    plan: th.Tensor
    latent: th.Tensor
    search: SearchResult | None
    task: th.Tensor | None = None


def batch_of(obs: PyTorchObs) -> int:
    """
    :param obs: A batch of observations, or a dict of such
    :return: How many there are; none in a dict without keys
    """
    return len(next(iter(obs.values()), ())) if isinstance(obs, dict) else len(obs)


class ActingPolicy(TaskPolicy):
    """
    The part of the policies that acts with a world model: planning lives here, so that a policy saved alone acts like
    the model it came from. Arguments are those of the policy, which builds what is declared here.
    """

    world_model: WorldModel
    search_config: SearchConfig
    exploration_noise: float
    compiled: bool
    episodic: bool
    _act_mode: str

    def preprocess(
        self, obs: PyTorchObs, augment: bool = False, ranks: Ranks = ALONE, task: th.Tensor | None = None
    ) -> Features:
        """
        Raw observations to what the encoder reads.

        :param obs: Batch of observations as the environment gives them [B, ...]
        :param augment: Shift images at random, as training does
        :param ranks: Processes that share the batch
        :param task: Task indices [B], where they came beside the observations
        :return: Preprocessed observations [B, ...]
        """
        raise NotImplementedError

    @property
    def device(self) -> th.device:
        """Where the world model is; looking for a first parameter at each call, as the base class does, takes long."""
        model = cast("WorldModel | None", self._modules.get("world_model"))
        return super().device if model is None else model.prior_scale.device

    # --- randomness ---------------------------------------------------------------------------------------------

    def seed(self, seed: int | None) -> None:
        """
        Seed the policy's own random generator; the global random state is never used for acting or learning.

        :param seed: None draws a seed from the operating system
        """
        self._generator = th.Generator(device=self.device)
        self.graphs.clear()
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)
        self._deterministic_noise: tuple[SearchConfig, SearchNoise] | None = None

    @property
    def generator(self) -> th.Generator:
        """The policy's random generator, on the policy's device."""
        if self._generator.device.type != self.device.type:
            moved = th.Generator(device=self.device)
            moved.manual_seed(self._generator.initial_seed())
            self._generator = moved
            self.graphs.clear()
        return self._generator

    def _shared_noise(self) -> SearchNoise:
        """
        Of deterministic searches: always the same, the two critics that value plans included. Rows share it: a plan
        must not depend on how many observations came with it.
        """
        if self._deterministic_noise is not None:
            config, noise = self._deterministic_noise
            if config == self.search_config and noise.candidates.device == self.device:
                return noise
        generator = th.Generator().manual_seed(DETERMINISTIC_SEED)
        noise = draw_noise(self.search_config, self.world_model, generator, None, self.device)
        self._deterministic_noise = (self.search_config, noise)
        return noise

    # --- acting -------------------------------------------------------------------------------------------------

    @property
    def act_mode(self) -> str:
        """
        How to act: "search", "score" or "prior". It can be changed at any time, and is saved.

        :raises ValueError: when set to an unknown mode, or to "score" without a score network
        """
        return self._act_mode

    @act_mode.setter
    def act_mode(self, mode: str) -> None:
        check_act_mode(mode, self.world_model.score is not None)
        self._act_mode = mode

    @property
    def plan_shape(self) -> tuple[int, int]:
        """Horizon H and number of actions A of a plan."""
        return self.search_config.horizon, self.world_model.action_dim

    @th.no_grad()
    def plan(
        self,
        obs: PyTorchObs,
        previous_plan: th.Tensor,
        restart: th.Tensor,
        deterministic: bool = False,
        trace: list[SearchStep] | None = None,
    ) -> PlanResult:
        """
        Plan from a batch of observations, by the policy's ``act_mode``.

        :param obs: Observations as tensors [B, ...]
        :param previous_plan: Plans of the previous decision [B, H, A]
        :param restart: Rows at an episode's first step [B] bool
        :param deterministic: Same noise for every call and row, no exploration noise
        :param trace: When given, a search appends its denoising steps to it
        :return: Actions, plans, latents and search statistics
        """
        searches = self.act_mode == "search"
        # The only number that is read on the host, and only where it saves denoising steps
        all_warm = searches and self.search_config.warm_steps is not None and not bool(restart.any())
        shared = self._shared_noise() if searches and deterministic else None
        if not self.captures or trace is not None:
            return self._plan(obs, previous_plan, restart, shared, deterministic, all_warm, trace)

        def plan(
            obs: PyTorchObs, previous_plan: th.Tensor, restart: th.Tensor, shared: SearchNoise | None
        ) -> PlanResult:
            return self._plan(obs, previous_plan, restart, shared, deterministic, all_warm)

        settings = self.search_config, self.episodic, self.exploration_noise, self.training
        key = ("plan", self.act_mode, deterministic, all_warm, *settings)
        result = self.graphs(key, plan, (obs, previous_plan, restart, shared), self.generator)
        return cast(PlanResult, copied(result))

    @property
    def captures(self) -> bool:
        """Whether whole calls become CUDA graphs: compiled policies on a GPU."""
        return self.compiled and self.device.type == "cuda"

    def _plan(
        self,
        obs: PyTorchObs,
        previous_plan: th.Tensor,
        restart: th.Tensor,
        shared: SearchNoise | None,
        deterministic: bool,
        all_warm: bool,
        trace: list[SearchStep] | None = None,
    ) -> PlanResult:
        """:meth:`plan` without a look at the host; ``shared`` is the noise of a deterministic search."""
        model, config = self.world_model, self.search_config
        batch = len(previous_plan)
        task = self.tasks_of(obs)
        z = self._encode(obs, batch, task)
        if len(z) > batch:
            previous_plan, restart = repeated(previous_plan, len(z)), repeated(restart, len(z))
            task = None if task is None else repeated(task, len(z))
        result = None
        if self.act_mode == "search":
            noise = draw_noise(config, model, self.generator, len(z), self.device) if shared is None else shared
            discount, episodic = self.row_discounts(task), self.episodic
            options: dict[str, Any] = {"prepare": self._compiled} if self.compiled else {}
            result = search(
                model, config, z, previous_plan, restart, noise, task, discount, episodic, trace, all_warm, **options
            )
            plan = result.plan
        elif self.act_mode == "score":
            # All of a graph's work is one launch already
            denoised = score_plan if self.captures or not self.compiled else self._compiled(score_plan)
            plan = denoised(model, config.schedule, z, previous_plan, restart, task)
        else:
            shape = (config.horizon, len(z), 1, model.action_dim)
            draws = th.zeros(shape, device=z.device) if deterministic else self._normal(shape)
            plan = prior_rollouts(model, z, draws, task)[:, 0]
        plan, z = plan[:batch].nan_to_num(0.0), z[:batch]
        task = None if task is None else task[:batch]
        mask = model.mask(task)
        plan = plan if mask is None else plan * mask[:, None]
        result = None if result is None else SearchResult(*(x[:batch] for x in result))
        action = plan[:, 0]
        if not deterministic and self.act_mode != "prior":
            action = (action + self.exploration_noise * self._normal(tuple(action.shape))).clamp(-1, 1)
            action = action if mask is None else action * mask
        return PlanResult(action, plan, z, result, task)

    def _compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return compiled(function, self.captures)

    def _encode(self, obs: PyTorchObs, batch: int, task: th.Tensor | None) -> th.Tensor:
        """
        Latents, with the first rows repeated where there are so few that matrix products would round in another order
        than they do for many: a row's plan must not depend on how many came with it, to the last bit.
        """
        config, features = self.search_config, self.preprocess(obs)
        n_prior = config.n_prior_trajectories
        narrowest = min(config.n_samples - n_prior, n_prior or MIN_ROWS) if self.act_mode == "search" else 1
        # A CPU may divide the rows between its threads
        parts = th.get_num_threads() if batch > MIN_ROWS and self.device.type == "cpu" else 1
        fewest = MIN_ROWS * parts
        rows = max(batch, math.ceil(fewest / narrowest))
        if fewest > batch:
            if isinstance(features, dict):
                features = {key: repeated(x, fewest) for key, x in features.items()}
            else:
                features = repeated(features, fewest)
            task = None if task is None else repeated(task, fewest)
        return self.world_model.encode(features, task)[:rows]

    def _normal(self, shape: tuple[int, ...]) -> th.Tensor:
        return th.randn(shape, generator=self.generator, device=self.generator.device)

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        batch = batch_of(observation)
        cold = th.zeros(batch, *self.plan_shape, device=self.device)
        restart = th.ones(batch, dtype=th.bool, device=self.device)
        return self.plan(observation, cold, restart, deterministic).action

    def forward(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        """
        Actions of cold-started plans.

        :param observation: [B, ...]
        :param deterministic: see :meth:`plan`
        :return: Actions [B, A] in [-1, 1]
        """
        return self._predict(observation, deterministic)

    def predict(  # type: ignore[override]
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: np.ndarray | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, np.ndarray]:
        """
        Actions for observations, and the plans to hand back with the next ones.

        :param observation: One observation or a batch of them
        :param state: Plans returned by the previous call [n_envs, H, A]; None starts cold
        :param episode_start: Rows whose episode has just begun [n_envs]: their plan is ignored
        :param deterministic: No exploration noise, and the same candidates at every call
        :return: actions in the action space's shape, dtype and bounds, and plans [n_envs, H, A]
        :raises ValueError: if observations or plans are of another shape, or observations are not finite
        """
        if isinstance(observation, tuple):
            raise ValueError(
                "predict() got a tuple instead of an observation: Gymnasium's `obs, info = env.reset()` returns two "
                "values, a VecEnv's `obs = vec_env.reset()` one; pass the observation alone."
            )
        self.set_training_mode(False)
        obs, vectorized = self.obs_to_tensor(observation)
        batch = batch_of(obs)
        if batch == 0:
            raise ValueError("predict() needs at least one observation, got a batch of none.")
        require_finite("predict", observation=observation)
        previous, restart = self.check_state(state, episode_start, batch)
        result = self.plan(obs, previous, restart, deterministic)
        action = self.to_env(result.action.cpu().numpy())
        return (action if vectorized else action.squeeze(axis=0)), result.plan.cpu().numpy()

    def check_state(
        self, state: np.ndarray | None, episode_start: np.ndarray | None, batch: int
    ) -> tuple[th.Tensor, th.Tensor]:
        """
        Recurrent state of :meth:`predict` as tensors.

        :param state: Plans of the previous decision [B, H, A], None for none
        :param episode_start: Rows whose episode has just begun [B], None for none
        :param batch: Number of observations B
        :return: previous plans [B, H, A], rows to start cold [B] bool
        :raises ValueError: if a shape does not fit
        """
        shape = (batch, *self.plan_shape)
        if state is None:
            return th.zeros(shape, device=self.device), th.ones(batch, dtype=th.bool, device=self.device)
        if np.shape(state) != shape:
            raise ValueError(
                f"state must be the plans returned by the previous predict(), of shape {shape} for {batch} "
                f"observation(s), got {np.shape(state)}; pass state=None to start cold."
            )
        previous = th.as_tensor(state, dtype=th.float32, device=self.device)
        if episode_start is None:
            return previous, th.zeros(batch, dtype=th.bool, device=self.device)
        start = np.asarray(episode_start, dtype=bool).reshape(-1)
        if start.shape != (batch,):
            raise ValueError(f"episode_start must hold one flag per observation ({batch}), got shape {start.shape}.")
        return previous, th.as_tensor(start, device=self.device)

    def to_env(self, scaled: np.ndarray) -> np.ndarray:
        """
        Scaled actions in the environment's terms.

        :param scaled: Actions in [-1, 1], [B, ...]
        :return: Actions in the action space's own shape, bounds and dtype [B, ...]
        """
        space = cast(spaces.Box, self.action_space)
        actions = self.unscale_action(scaled.reshape(-1, *space.shape))
        return np.clip(actions, space.low, space.high).astype(space.dtype, copy=False)


def repeated(x: th.Tensor, rows: int) -> th.Tensor:
    """
    :param x: [B, ...]
    :param rows: Rows R wanted
    :return: The rows over and over again until there are R [R, ...]
    """
    if x.dim() > 3:
        # The way images lie in memory decides how a convolution rounds, and this keeps it
        return x[th.arange(rows, device=x.device) % len(x)]
    if len(x) == 1:
        return x.expand(rows, *x.shape[1:])
    times = -(-rows // len(x))
    return x.repeat(times, *[1] * (x.dim() - 1))[:rows]
