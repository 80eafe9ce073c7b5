"""Policies: the world model, its optimizers, and three ways to act (search, score, prior)."""

import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, cast

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import get_action_dim, get_flattened_obs_dim, is_image_space, preprocess_obs
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, CombinedExtractor, NatureCNN
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import nn

from sb3_mbdpo.cuda_graphs import CudaGraphs, copied
from sb3_mbdpo.distributed import ALONE, Ranks
from sb3_mbdpo.encoders import DictEncoder, Encoder, Features, FeaturesEncoder, PixelEncoder, StateEncoder, random_shift
from sb3_mbdpo.hardware import compiled, keep_freed_memory, resolve_dtype
from sb3_mbdpo.layers import MIN_ROWS
from sb3_mbdpo.optimizers import build_optimizers
from sb3_mbdpo.presets import resolve_model_size
from sb3_mbdpo.schedule import NoiseSchedule
from sb3_mbdpo.score import score_plan
from sb3_mbdpo.search import (
    DETERMINISTIC_SEED,
    SearchConfig,
    SearchNoise,
    SearchResult,
    SearchStep,
    check_act_mode,
    draw_noise,
    prior_rollouts,
    search,
)
from sb3_mbdpo.task_policy import TaskPolicy
from sb3_mbdpo.tasks import TaskSet, check_task_spaces
from sb3_mbdpo.world_model import TaskSpec, WorldModel

# Arguments that override entries of the size table
SIZE_ARGUMENTS = ("enc_dim", "num_enc_layers", "mlp_dim", "latent_dim", "n_critics", "num_channels")


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


class MBDPOPolicy(TaskPolicy):
    """
    Policy class of MBDPO: planning lives here, so that a policy saved alone acts like the model it came from.

    The plan is the recurrent state of :meth:`predict`.

    :param observation_space: Observation space
    :param action_space: Action space, a finite Box
    :param lr_schedule: Learning rate schedule
    :param net_arch: Hidden widths: a list for every head, or a dict with "encoder" and "heads"; default from the sizes
    :param activation_fn: Activation of hidden layers, without parameters of its own; default from the sizes
    :param model_size: Key of the size table, million parameters; the arguments from ``enc_dim`` on override its entries
    :param enc_dim: Hidden width of the encoder
    :param num_enc_layers: Layers of the encoder
    :param mlp_dim: Width of the two hidden layers of every head
    :param latent_dim: Latent width L
    :param n_critics: Critics in the ensemble, at least 2
    :param num_channels: Channels of the convolutions
    :param num_bins: Bins of reward and value regression
    :param vmin: Lowest bin in symlog space
    :param vmax: Highest bin in symlog space
    :param simnorm_dim: Group size of SimNorm
    :param dropout: Dropout of the critics' first layer
    :param log_std_min: Lower bound of the prior's log standard deviation
    :param log_std_max: Upper bound of the prior's log standard deviation
    :param time_embed_dim: Width of the score network's step embedding
    :param shift_pixels: Largest random shift of images while training, in pixels
    :param features_extractor_class: A features extractor of one's own in front of the encoder
    :param features_extractor_kwargs: Its keyword arguments
    :param normalize_images: Divide image observations by 255
    :param optimizer_class: Optimizer of world model, prior and score network
    :param optimizer_kwargs: Its keyword arguments, without the learning rate
    :param encoder_lr_scale: Learning rate of the encoder relative to the rest
    :param horizon: see ``MBDPO``, as all the following
    :param denoising_steps: Length T of the noise schedule
    :param n_samples: Candidates N
    :param n_elites: Elites K
    :param n_prior_trajectories: Prior rollouts M
    :param temperature: Temperature lambda
    :param beta_start: First beta of the schedule
    :param beta_end: Last beta of the schedule
    :param energy_coef: Weight eta of the energy in the search
    :param prior_margin: Return by which a plan must beat the prior's, in units of the value range
    :param exploration_noise: Standard deviation of the noise added to actions that are not deterministic
    :param act_mode: "search", "score" or "prior"
    :param discount: Discount factor gamma of the search
    :param episodic: Whether episodes can terminate; None: from the first termination on
    :param with_score: Whether there is a score network
    :param with_energy: Whether there is an energy; models of TD-MPC2 have none and act with ``energy_coef=0``
    :param score_prediction: What the score network's output means, see :class:`~sb3_mbdpo.score.ScoreNetwork`
    :param tasks: Tasks of a multi-task model, see :class:`~sb3_mbdpo.tasks.TaskSet`, as a set or as its plain data
    :param task_embedding_dim: Width of the task embeddings
    :param search_dtype: Type of the search's matrix products
    :param warm_denoising_steps: Denoising steps of decisions that continue a plan
    :param compile: Compile search and losses
    :param seed: Seed of the policy's own random generator; None draws one from the operating system
    """

    terminates: th.Tensor
    image_encoder: ClassVar[bool] = False

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        net_arch: list[int] | dict[str, list[int]] | None = None,
        activation_fn: type[nn.Module] | None = None,
        model_size: float = 5,
        enc_dim: int | None = None,
        num_enc_layers: int | None = None,
        mlp_dim: int | None = None,
        latent_dim: int | None = None,
        n_critics: int | None = None,
        num_channels: int | None = None,
        num_bins: int = 101,
        vmin: float = -10.0,
        vmax: float = 10.0,
        simnorm_dim: int = 8,
        dropout: float = 0.01,
        log_std_min: float = -10.0,
        log_std_max: float = 2.0,
        time_embed_dim: int = 64,
        shift_pixels: int = 3,
        features_extractor_class: type[BaseFeaturesExtractor] | None = None,
        features_extractor_kwargs: dict[str, Any] | None = None,
        normalize_images: bool = True,
        optimizer_class: type[th.optim.Optimizer] = th.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
        encoder_lr_scale: float = 0.3,
        horizon: int = 3,
        denoising_steps: int = 20,
        n_samples: int = 512,
        n_elites: int = 64,
        n_prior_trajectories: int = 24,
        temperature: float = 0.5,
        beta_start: float = 1e-4,
        beta_end: float = 1e-2,
        energy_coef: float = 0.01,
        prior_margin: float = 0.0,
        exploration_noise: float = 0.05,
        act_mode: str = "search",
        discount: float = 0.99,
        episodic: bool | None = None,
        with_score: bool = True,
        with_energy: bool = True,
        score_prediction: str = "sample",
        tasks: TaskSet | dict[str, Any] | None = None,
        task_embedding_dim: int = 96,
        search_dtype: str = "float32",
        warm_denoising_steps: int | None = None,
        compile: bool = False,
        seed: int | None = None,
    ):
        self._init_arguments = {
            name: value for name, value in locals().items() if name not in ("self", "__class__", "lr_schedule")
        }
        check_act_mode(act_mode, with_score)
        if not with_energy and energy_coef != 0:
            raise ValueError(f"A policy without an energy acts with energy_coef=0, got {energy_coef}.")
        self.task_set = TaskSet.from_plain(tasks) if isinstance(tasks, dict) else tasks
        super().__init__(
            observation_space,
            action_space,
            normalize_images=normalize_images,
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
            squash_output=True,
        )
        self._act_mode, self.exploration_noise, self.shift_pixels = act_mode, exploration_noise, shift_pixels
        self.search_config = SearchConfig(
            NoiseSchedule(denoising_steps, beta_start, beta_end),
            horizon,
            n_samples,
            n_elites,
            n_prior_trajectories,
            temperature,
            energy_coef,
            discount,
            warm_denoising_steps,
            getattr(th, resolve_dtype("search_dtype", search_dtype, self.device)),
            prior_margin=prior_margin,
        )
        self.compiled = compile
        # Calls that were captured on a GPU
        self.graphs = CudaGraphs()
        keep_freed_memory()
        sizes = resolve_model_size(model_size)
        given = {name: self._init_arguments[name] for name in SIZE_ARGUMENTS}
        sizes |= {name: value for name, value in given.items() if value is not None}
        activation_fn = activation_fn or sizes["activation_fn"]
        if any(True for _ in activation_fn().parameters()):
            raise ValueError(
                f"activation_fn must have no parameters (heads share it), {activation_fn.__name__} has some."
            )
        arch = net_arch if isinstance(net_arch, dict) else {} if net_arch is None else {"heads": net_arch}
        if arch.keys() - {"encoder", "heads"}:
            raise ValueError(f'net_arch must be a list of widths, or a dict of "encoder" and "heads", got {net_arch}.')
        encoder_widths = arch.get("encoder", [sizes["enc_dim"]] * max(sizes["num_enc_layers"] - 1, 1))
        extractor = None
        if features_extractor_class is not None:
            extractor_kwargs = dict(features_extractor_kwargs or {})
            if not normalize_images and issubclass(features_extractor_class, (NatureCNN, CombinedExtractor)):
                # As Stable-Baselines3's own models tell its own extractors
                extractor_kwargs["normalized_image"] = True
            extractor = features_extractor_class(observation_space, **extractor_kwargs)
        task_dim = 0 if self.task_set is None else task_embedding_dim
        self.world_model = WorldModel(
            self._make_encoder(encoder_widths, sizes, simnorm_dim, activation_fn, extractor, task_dim),
            sizes["latent_dim"],
            get_action_dim(action_space),
            arch.get("heads", [sizes["mlp_dim"]] * 2),
            sizes["n_critics"],
            horizon,
            num_bins,
            vmin,
            vmax,
            simnorm_dim,
            dropout,
            log_std_min,
            log_std_max,
            time_embed_dim,
            with_termination=episodic is not False,
            score_prediction=score_prediction,
            with_score=with_score,
            with_energy=with_energy,
            tasks=None if self.task_set is None else TaskSpec([t.action_dim for t in self.task_set], task_dim),
            activation_fn=activation_fn,
        )
        self.register_tasks(self.task_set)
        # A float tensor in the state_dict: a policy loaded elsewhere knows whether its task terminates
        self.register_buffer("terminates", th.full((1,), float(episodic is True)))
        self.episodic = episodic is True
        self.register_load_state_dict_post_hook(_read_terminates)
        self.rebuild_optimizers(lr_schedule)
        self.seed(seed)

    # --- construction -------------------------------------------------------------------------------------------

    def _make_encoder(
        self,
        widths: list[int],
        sizes: dict[str, Any],
        simnorm_dim: int,
        activation_fn: type[nn.Module],
        extractor: BaseFeaturesExtractor | None,
        task_dim: int = 0,
    ) -> Encoder:
        latent_dim, space = sizes["latent_dim"], self.observation_space
        if self.task_set is not None:
            check_task_spaces(self.task_set, space, self.action_space)
            if extractor is not None:
                raise ValueError("features_extractor_class does not go with tasks: leave it out.")
            width = self.task_set.observation_dim
            return StateEncoder(width, widths, latent_dim, simnorm_dim, task_dim, activation_fn)
        if extractor is not None:
            return FeaturesEncoder(extractor, widths, latent_dim, simnorm_dim, activation_fn=activation_fn)
        if isinstance(space, spaces.Dict):
            return DictEncoder(
                space,
                widths,
                sizes["num_channels"],
                latent_dim,
                simnorm_dim,
                activation_fn=activation_fn,
                normalized_images=not self.normalize_images,
            )
        if self.image_encoder:
            if not is_image_space(space, check_channels=False, normalized_image=not self.normalize_images):
                raise ValueError(
                    f"CnnPolicy needs image observations (uint8, 0 to 255, three dimensions), got {space}; "
                    "use MlpPolicy for vectors, or pass policy_kwargs=dict(normalize_images=False) for float images."
                )
            return PixelEncoder(cast(tuple[int, ...], space.shape), sizes["num_channels"], latent_dim, simnorm_dim)
        return StateEncoder(get_flattened_obs_dim(space), widths, latent_dim, simnorm_dim, activation_fn=activation_fn)

    def rebuild_optimizers(self, lr_schedule: Schedule) -> None:
        """
        Optimizers without a past: at first, and for parameters that have changed their shape.

        :param lr_schedule: Learning rate schedule
        """
        model, scale = self.world_model, self._init_arguments["encoder_lr_scale"]
        self.graphs.clear()
        self.optimizer, self.prior_optimizer, self.score_optimizer = build_optimizers(
            model, lr_schedule(1), self.optimizer_class, self.optimizer_kwargs, scale
        )

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {**self._init_arguments, "act_mode": self.act_mode, "lr_schedule": self._dummy_schedule}

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
        """Of deterministic searches. Rows share it: a plan must not depend on how many observations came with it."""
        if self._deterministic_noise is not None:
            config, noise = self._deterministic_noise
            if config == self.search_config and noise.candidates.device == self.device:
                return noise
        generator = th.Generator().manual_seed(DETERMINISTIC_SEED)
        noise = draw_noise(self.search_config, self.world_model, generator, None, self.device)
        self._deterministic_noise = (self.search_config, noise)
        return noise

    # --- observations -------------------------------------------------------------------------------------------

    def preprocess(
        self, obs: PyTorchObs, augment: bool = False, ranks: Ranks = ALONE, task: th.Tensor | None = None
    ) -> Features:
        """
        Raw observations to what the encoder reads: floats, one-hot where discrete, images in [0, 1].

        :param obs: Batch of observations as the environment gives them [B, ...]
        :param augment: Shift images at random, as training does
        :param ranks: Processes that share the batch
        :param task: Task indices [B], where they came beside the observations
        :return: Preprocessed observations [B, ...]
        """
        if self.task_set is not None:
            return self.standardise(obs, task)
        if augment and self.shift_pixels > 0:
            obs = self._augment(obs, ranks)
        return preprocess_obs(obs, self.observation_space, normalize_images=self.normalize_images)

    def _augment(self, obs: PyTorchObs, ranks: Ranks) -> PyTorchObs:
        def shift(x: th.Tensor, space: spaces.Space) -> th.Tensor:
            image = is_image_space(space, check_channels=False, normalized_image=not self.normalize_images)
            return random_shift(x, self.shift_pixels, self.generator, ranks) if image else x

        if isinstance(obs, dict):
            dict_space = cast(spaces.Dict, self.observation_space)
            return {key: shift(value, dict_space.spaces[key]) for key, value in obs.items()}
        return shift(obs, self.observation_space) if self.image_encoder else obs

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
            repeated = th.arange(len(z), device=z.device) % batch
            previous_plan, restart = previous_plan[repeated], restart[repeated]
            task = None if task is None else task[repeated]
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
            plan = score_plan(model, config.schedule, z, previous_plan, restart, task)
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
        rows = max(batch, math.ceil(MIN_ROWS / narrowest))
        index = th.arange(max(batch, MIN_ROWS), device=self.device) % batch
        if len(index) > batch:
            features = {k: x[index] for k, x in features.items()} if isinstance(features, dict) else features[index]
            task = None if task is None else task[index]
        return self.world_model.encode(features, task)[:rows]

    def _normal(self, shape: tuple[int, ...]) -> th.Tensor:
        return th.randn(shape, generator=self.generator, device=self.generator.device)

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        batch = len(next(iter(observation.values()))) if isinstance(observation, dict) else len(observation)
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
        :raises ValueError: if observations or plans are of another shape
        """
        if isinstance(observation, tuple):
            raise ValueError(
                "predict() got a tuple instead of an observation: Gymnasium's `obs, info = env.reset()` returns two "
                "values, a VecEnv's `obs = vec_env.reset()` one; pass the observation alone."
            )
        self.set_training_mode(False)
        obs, vectorized = self.obs_to_tensor(observation)
        batch = len(next(iter(obs.values()))) if isinstance(obs, dict) else len(obs)
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

    def _apply(self, fn: Callable[[th.Tensor], th.Tensor], recurse: bool = True) -> "MBDPOPolicy":
        # Behind `to`, `cuda`, `float`, ...: parameters move
        self.graphs.clear()
        return super()._apply(fn, recurse)

    def set_training_mode(self, mode: bool) -> None:
        """
        Switch dropout on or off. Switching walks over all modules, so it is skipped when nothing changes.

        :param mode: True while learning
        """
        if self.training != mode:
            self.train(mode)

    def mark_episodic(self) -> None:
        """Switch the termination head on: the task has been seen to terminate."""
        if self.world_model.termination is not None and not self.episodic:
            self.episodic = True
            self.terminates.fill_(1.0)


def _read_terminates(module: nn.Module, _incompatible_keys: Any) -> None:
    policy = cast(MBDPOPolicy, module)
    policy.episodic = bool(policy.terminates.item())


class MlpPolicy(MBDPOPolicy):
    """MBDPO on vector observations (Box, Discrete, MultiDiscrete, MultiBinary); images are flattened."""


class CnnPolicy(MBDPOPolicy):
    """MBDPO on image observations, channels first."""

    image_encoder: ClassVar[bool] = True


class MultiInputPolicy(MBDPOPolicy):
    """MBDPO on flat Dict observations: one encoder trunk per key."""
