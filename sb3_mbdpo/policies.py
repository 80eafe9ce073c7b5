"""Policies: what they are built of, for vectors, images and dicts. How they act is in :mod:`sb3_mbdpo.acting`."""

from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import get_action_dim, is_image_space, preprocess_obs
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import nn

from sb3_mbdpo.acting import ActingPolicy
from sb3_mbdpo.cuda_graphs import CudaGraphs
from sb3_mbdpo.encoders import Encoder, Features, random_shift
from sb3_mbdpo.hardware import keep_freed_memory, resolve_dtype
from sb3_mbdpo.optimizers import build_optimizers
from sb3_mbdpo.policy_networks import (
    SIZE_ARGUMENTS,
    LayerSizes,
    layer_sizes,
    make_encoder,
    make_extractor,
    make_task_encoder,
)
from sb3_mbdpo.ranks import ALONE, Ranks
from sb3_mbdpo.schedule import NoiseSchedule
from sb3_mbdpo.search_config import SearchConfig, check_act_mode, warm_steps_of
from sb3_mbdpo.tasks import TaskSet
from sb3_mbdpo.world_model import TaskSpec, WorldModel


class MBDPOPolicy(ActingPolicy):
    """
    Policy class of MBDPO: the world model, its optimizers, and three ways to act (search, score, prior).

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
    :param energy_unit: What the energy is weighted in: "reward" or "value_range"
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
    :param warm_denoising_steps: Denoising steps of decisions that continue a plan, or a share of them
    :param compile: Compile search and losses
    :param seed: Seed of the policy's own random generator; None draws one from the operating system
    """

    terminates: th.Tensor
    image_encoder: ClassVar[bool] = False
    dict_encoder: ClassVar[bool] = False

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
        energy_unit: str = "reward",
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
        warm_denoising_steps: int | float | None = None,
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
            warm_steps_of(warm_denoising_steps, denoising_steps),
            getattr(th, resolve_dtype("search_dtype", search_dtype, self.device)),
            prior_margin=prior_margin,
            energy_unit=energy_unit,
        )
        self.compiled = compile
        # Calls that were captured on a GPU
        self.graphs = CudaGraphs()
        keep_freed_memory()
        sizes = layer_sizes(
            model_size,
            net_arch,
            activation_fn,
            {name: self._init_arguments[name] for name in SIZE_ARGUMENTS},
            self.image_encoder and not isinstance(observation_space, spaces.Dict) and features_extractor_class is None,
        )
        extractor = make_extractor(
            features_extractor_class, features_extractor_kwargs, observation_space, normalize_images
        )
        task_dim = 0 if self.task_set is None else task_embedding_dim
        self.world_model = WorldModel(
            self._make_encoder(sizes, simnorm_dim, extractor, task_dim),
            sizes.latent_dim,
            get_action_dim(action_space),
            sizes.heads,
            sizes.n_critics,
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
            activation_fn=sizes.activation_fn,
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
        self, sizes: LayerSizes, simnorm_dim: int, extractor: BaseFeaturesExtractor | None, task_dim: int
    ) -> Encoder:
        if self.task_set is None:
            kind = "images" if self.image_encoder else "dicts" if self.dict_encoder else "vectors"
            return make_encoder(self.observation_space, kind, sizes, simnorm_dim, self.normalize_images, extractor)
        if extractor is not None:
            raise ValueError("features_extractor_class does not go with tasks: leave it out.")
        action_space = cast(spaces.Box, self.action_space)
        return make_task_encoder(self.task_set, self.observation_space, action_space, sizes, simnorm_dim, task_dim)

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
        changed = self.search_config.arguments() | {"exploration_noise": self.exploration_noise}
        return {**self._init_arguments, **changed, "act_mode": self.act_mode, "lr_schedule": self._dummy_schedule}

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
        head = self.world_model.termination
        if head is not None and not self.episodic:
            # It has learned nothing so far: what it would say at random must not end what the search imagines
            for parameter in head[-1].parameters():
                nn.init.zeros_(parameter)
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

    dict_encoder: ClassVar[bool] = True
