"""The latent world model and the policies that live on it (arXiv 2605.26282; architecture of TD-MPC2).

Verified against the released implementation: every module's forward pass, its regression targets and the gradients of
one update (tests/test_golden.py). Different on purpose: random shifts of images act in training only; the task
embedding is kept inside its norm by the forward pass, and stored so after each update, instead of at each lookup.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch as th
from torch import nn
from torch.nn import functional as F

from sb3_mbdpo.activations import Mish, SimNorm
from sb3_mbdpo.encoders import Encoder, Features
from sb3_mbdpo.ensemble import EnsembleMLP
from sb3_mbdpo.layers import mlp
from sb3_mbdpo.products import Joined, of_parts
from sb3_mbdpo.score import ScoreNetwork
from sb3_mbdpo.two_hot import TwoHot

LOG_SQRT_2PI = 0.9189385332046727


class PriorSample(NamedTuple):
    """A draw from the prior. ``action`` [..., A]; ``log_prob`` and ``scaled_entropy`` [..., 1]."""

    action: th.Tensor
    log_prob: th.Tensor
    scaled_entropy: th.Tensor


class TaskSpec(NamedTuple):
    """Tasks of a multi-task model. ``action_dims``: actions of each task; ``embedding_dim``: embedding width."""

    action_dims: Sequence[int]
    embedding_dim: int = 96


class WorldModel(nn.Module):
    """
    Encoder, dynamics, reward, termination, critics, prior, energy and score network on one latent space.

    Shapes: latents [..., L], actions [..., A] in [-1, 1], task indices int64, broadcastable to the leading dimensions.

    :param encoder: Encoder h, observations to latents
    :param latent_dim: Latent width L, a multiple of ``simnorm_dim``
    :param action_dim: Number of actions A (the widest task's)
    :param hidden: Widths of the hidden layers of every head
    :param n_critics: Number of critics, at least 2
    :param horizon: Plan length H, the score network's output
    :param num_bins: Bins of reward and value regression
    :param vmin: Lowest bin in symlog space
    :param vmax: Highest bin in symlog space
    :param simnorm_dim: Group size of SimNorm
    :param dropout: Dropout of the critics' first layer
    :param log_std_min: Lower bound of the prior's log standard deviation
    :param log_std_max: Upper bound of the prior's log standard deviation
    :param time_embed_dim: Width of the score network's embedding of the denoising step
    :param score_prediction: What the score network's output means, see :class:`~sb3_mbdpo.score.ScoreNetwork`
    :param with_termination: Build the termination head (episodic tasks)
    :param with_energy: Build the energy
    :param with_score: Build the score network
    :param tasks: Tasks of a multi-task model
    :param activation_fn: Activation of hidden layers
    """

    energy_mean: th.Tensor
    energy_std: th.Tensor
    prior_scale: th.Tensor
    action_masks: th.Tensor

    def __init__(
        self,
        encoder: Encoder,
        latent_dim: int,
        action_dim: int,
        hidden: Sequence[int] = (512, 512),
        n_critics: int = 5,
        horizon: int = 3,
        num_bins: int = 101,
        vmin: float = -10.0,
        vmax: float = 10.0,
        simnorm_dim: int = 8,
        dropout: float = 0.01,
        log_std_min: float = -10.0,
        log_std_max: float = 2.0,
        time_embed_dim: int = 64,
        score_prediction: str = "sample",
        with_termination: bool = True,
        with_energy: bool = True,
        with_score: bool = True,
        tasks: TaskSpec | None = None,
        activation_fn: type[nn.Module] = Mish,
    ):
        super().__init__()
        if latent_dim % simnorm_dim:
            raise ValueError(f"latent_dim ({latent_dim}) must be a multiple of simnorm_dim ({simnorm_dim}).")
        if n_critics < 2:
            raise ValueError(f"n_critics must be at least 2 (targets take the lower of two), got {n_critics}.")
        if time_embed_dim < 4 or time_embed_dim % 2:
            raise ValueError(f"time_embed_dim must be an even number of at least 4, got {time_embed_dim}.")
        if not hidden:
            raise ValueError("net_arch needs at least one hidden width for the heads, e.g. net_arch=[96, 96].")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}.")
        self.latent_dim, self.action_dim, self.horizon = latent_dim, action_dim, horizon
        self.n_critics = n_critics
        self.log_std_min, self.log_std_max = log_std_min, log_std_max
        self.two_hot = TwoHot(num_bins, vmin, vmax)
        task_dim = self._setup_tasks(tasks)
        joint = latent_dim + action_dim + task_dim

        def head(in_dim: int, out_dim: int, zero_last: bool = False) -> nn.Sequential:
            return mlp(in_dim, hidden, out_dim, None, activation_fn, zero_last)

        self.encoder = encoder
        self.dynamics = mlp(joint, hidden, latent_dim, SimNorm(simnorm_dim), activation_fn)
        self.reward = head(joint, num_bins, zero_last=True)
        self.termination = head(latent_dim + task_dim, 1, zero_last=True) if with_termination else None
        self.critics = EnsembleMLP(n_critics, joint, hidden, num_bins, activation_fn, dropout)
        self.target_critics = EnsembleMLP(n_critics, joint, hidden, num_bins, activation_fn, dropout)
        self.target_critics.load_state_dict(self.critics.state_dict())
        self.target_critics.requires_grad_(False)
        self.prior = head(latent_dim + task_dim, 2 * action_dim)
        self.energy = head(joint, 1, zero_last=True) if with_energy else None
        self.score = (
            ScoreNetwork(
                latent_dim + task_dim, action_dim, horizon, hidden, time_embed_dim, activation_fn, score_prediction
            )
            if with_score
            else None
        )
        self.set_recompute(False)
        self.register_buffer("energy_mean", th.zeros(1))
        self.register_buffer("energy_std", th.ones(1))
        self.register_buffer("prior_scale", th.ones(1))

    def _setup_tasks(self, tasks: TaskSpec | None) -> int:
        self.task_embedding: nn.Embedding | None = None
        if tasks is None:
            return 0
        n_tasks = len(tasks.action_dims)
        self.task_embedding = nn.Embedding(n_tasks, tasks.embedding_dim)
        nn.init.uniform_(self.task_embedding.weight, -0.02, 0.02)
        width = th.arange(self.action_dim)
        masks = th.stack([(width < dim).float() for dim in tasks.action_dims])
        self.register_buffer("action_masks", masks)
        return tasks.embedding_dim

    def set_recompute(self, wanted: bool) -> None:
        """
        :param wanted: Whether losses compute activations again in the backward pass instead of keeping them
        """
        self.recompute = self.critics.recompute = wanted

    # --- inputs -------------------------------------------------------------------------------------------------

    def embed(self, task: th.Tensor | None) -> th.Tensor | None:
        """
        Task embeddings, scaled down where their norm exceeds 1.

        :param task: Task indices [...], or None in single-task models
        :return: [..., E] or None
        :raises ValueError: if a multi-task model gets no task
        """
        if self.task_embedding is None:
            return None
        if task is None:
            raise ValueError("This world model knows several tasks: pass `task`, the index of each observation's task.")
        embedding = self.task_embedding(task)
        stored = embedding.detach()
        # Straight through: the gradient is the one that the rescaled embedding would get if it were the parameter
        return embedding + (stored / stored.norm(dim=-1, keepdim=True).clamp(min=1.0) - stored)

    @th.no_grad()
    def project_embeddings(self) -> None:
        """
        Scale task embeddings [tasks, E] that an optimizer moved beyond norm 1 back to it, where they learn.

        Left to grow they would turn ever more slowly. The released implementation does it at each lookup.
        """
        if self.task_embedding is not None and self.task_embedding.weight.requires_grad:
            weight = self.task_embedding.weight
            weight.div_(weight.norm(dim=-1, keepdim=True).clamp_(min=1.0))

    def mask(self, task: th.Tensor | None) -> th.Tensor | None:
        """
        :param task: Task indices [...]
        :return: 1 for the actions that a task has [..., A], None in single-task models
        """
        return None if self.task_embedding is None or task is None else self.action_masks[task]

    def join(self, z: th.Tensor, action: th.Tensor | None = None, task: th.Tensor | None = None) -> th.Tensor:
        """
        What the heads read: latent, task embedding, action, in the released order.

        :param z: [..., L]
        :param action: [..., A]
        :param task: Task indices
        :return: [..., L (+E) (+A)]
        """
        parts = [z]
        embedding = self.embed(task)
        if embedding is not None:
            parts.append(embedding.expand(*z.shape[:-1], -1))
        if action is not None:
            parts.append(action)
        return th.cat(parts, dim=-1) if len(parts) > 1 else z

    # --- modules ------------------------------------------------------------------------------------------------

    def encode(self, obs: Features, task: th.Tensor | None = None) -> th.Tensor:
        """
        :param obs: Preprocessed observations [B, ...] or a dict of them
        :param task: Task indices [B]
        :return: Latents [B, L]
        """
        return self.encoder(obs, self.embed(task))

    def next(self, z: th.Tensor, action: th.Tensor, task: th.Tensor | None = None) -> th.Tensor:
        """
        :param z: [..., L]
        :param action: [..., A]
        :param task: Task indices
        :return: Next latents [..., L]
        """
        return self.dynamics(self.join(z, action, task))

    def predict_reward(self, z: th.Tensor, action: th.Tensor, task: th.Tensor | None = None) -> th.Tensor:
        """
        :param z: [..., L]
        :param action: [..., A]
        :param task: Task indices
        :return: Expected rewards [..., 1]
        """
        return self.two_hot.decode(self.reward(self.join(z, action, task)))

    def require_energy(self) -> nn.Sequential:
        """
        :return: The energy head
        :raises ValueError: if the model has none
        """
        if self.energy is None:
            raise ValueError("This world model has no energy: act with energy_coef=0.")
        return self.energy

    def scale_energy(self, energy: th.Tensor) -> th.Tensor:
        """
        Energy relative to its running statistics, clipped.

        :param energy: Output of the energy head [..., 1]
        :return: [..., 1] in [-5, 5]
        """
        return ((energy - self.energy_mean) / self.energy_std).clamp(-5.0, 5.0)

    def value(
        self,
        z: th.Tensor,
        action: th.Tensor,
        task: th.Tensor | None = None,
        critics: Callable[[th.Tensor], th.Tensor] | None = None,
    ) -> th.Tensor:
        """
        Values by each chosen critic.

        :param z: [..., L]
        :param action: [..., A]
        :param task: Task indices
        :param critics: ``critics.select(...)`` or ``target_critics.select(...)``; by default all critics
        :return: [E, ..., 1]
        """
        critics = critics or self.critics
        if action.requires_grad and not z.requires_grad:
            # As where the prior learns: most of what the first layer reads then needs no gradient
            return self.two_hot.decode(of_parts(critics, Joined(self.join(z, None, task), action)))
        return self.two_hot.decode(critics(self.join(z, action, task)))

    # --- prior --------------------------------------------------------------------------------------------------

    def prior_params(self, z: th.Tensor, task: th.Tensor | None = None) -> tuple[th.Tensor, th.Tensor]:
        """
        Gaussian prior before squashing.

        :param z: [..., L]
        :param task: Task indices
        :return: mean and log standard deviation, both [..., A]; zero where a task has no such action
        """
        mean, raw = self.prior(self.join(z, None, task)).chunk(2, dim=-1)
        log_std = self.log_std_min + 0.5 * (self.log_std_max - self.log_std_min) * (raw.tanh() + 1)
        mask = self.mask(task)
        if mask is not None:
            mean, log_std = mean * mask, log_std * mask
        return mean, log_std

    def prior_action(self, z: th.Tensor, noise: th.Tensor | None = None, task: th.Tensor | None = None) -> th.Tensor:
        """
        :param z: [..., L]
        :param noise: Standard normal draws, broadcastable to [..., A]; None gives the mode
        :param task: Task indices
        :return: Actions [..., A] in [-1, 1]
        """
        mask = self.mask(task)
        if noise is None:
            mean = self.prior(self.join(z, None, task))[..., : self.action_dim]
            return (mean if mask is None else mean * mask).tanh()
        mean, log_std = self.prior_params(z, task)
        return (mean + log_std.exp() * (noise if mask is None else noise * mask)).tanh()

    def prior_sample(self, z: th.Tensor, noise: th.Tensor, task: th.Tensor | None = None) -> PriorSample:
        """
        Draw from the prior with what its loss needs.

        The entropy is scaled by the ratio of the action count times the unsquashed log-density to the squashed one,
        as in TD-MPC2, so that tasks of different widths weigh alike.

        :param z: [..., L]
        :param noise: Standard normal draws [..., A]
        :param task: Task indices
        :return: actions, log-probabilities and scaled entropies
        """
        mean, log_std = self.prior_params(z, task)
        mask = self.mask(task)
        if mask is not None:
            noise = noise * mask
        gaussian = (-0.5 * noise.pow(2) - log_std - LOG_SQRT_2PI).sum(-1, keepdim=True)
        width: float | th.Tensor = float(self.action_dim) if mask is None else mask.sum(-1, keepdim=True)
        action = (mean + log_std.exp() * noise).tanh()
        log_prob = gaussian - (F.relu(1 - action.pow(2)) + 1e-6).log().sum(-1, keepdim=True)
        scaled_entropy = -log_prob * (gaussian * width) / (log_prob + 1e-8)
        return PriorSample(action, log_prob, scaled_entropy)
