"""Encoders h: observation (and task embedding) to latent. All end in SimNorm (as in TD-MPC2)."""

from collections.abc import Sequence
from typing import cast

import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import get_flattened_obs_dim, is_image_space
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

from sb3_mbdpo.activations import Mish, SimNorm
from sb3_mbdpo.layers import NormedLinear, init_weights, mlp
from sb3_mbdpo.ranks import ALONE, Ranks

# (kernel, stride) of each convolution
KERNELS = ((7, 2), (5, 2), (3, 2), (3, 1))
Features = th.Tensor | dict[str, th.Tensor]


class Encoder(nn.Module):
    """What encoders have in common: preprocessed observations [B, ...] and task embeddings [B, E] in, [B, L] out."""

    def forward(self, obs: Features, task_embedding: th.Tensor | None = None) -> th.Tensor:
        """
        :param obs: Preprocessed observation (images in [0, 1]), batch first
        :param task_embedding: [B, E] in multi-task models
        :return: Latents [B, L]
        """
        raise NotImplementedError


class StateEncoder(Encoder):
    """
    MLP encoder for vectors.

    :param in_dim: Width of the flattened observation
    :param hidden: Widths of the hidden layers
    :param latent_dim: Latent width L
    :param simnorm_dim: Group size of SimNorm
    :param task_dim: Width of the task embedding (0: single task)
    :param activation_fn: Activation of the hidden layers
    """

    def __init__(
        self,
        in_dim: int,
        hidden: Sequence[int],
        latent_dim: int,
        simnorm_dim: int = 8,
        task_dim: int = 0,
        activation_fn: type[nn.Module] = Mish,
    ):
        super().__init__()
        self.net = mlp(in_dim + task_dim, hidden, latent_dim, SimNorm(simnorm_dim), activation_fn)

    def forward(self, obs: Features, task_embedding: th.Tensor | None = None) -> th.Tensor:
        x = cast(th.Tensor, obs).flatten(1)
        if task_embedding is not None:
            x = th.cat([x, task_embedding], dim=-1)
        return self.net(x)


def conv_trunk(image_shape: tuple[int, ...], channels: int) -> tuple[nn.Sequential, int]:
    """
    The convolutions of TD-MPC2's pixel encoder: kernels 7, 5, 3, 3 with strides 2, 2, 2, 1 (64 pixels become 4).

    Images under 39 pixels a side get the first layers only, as many as fit.

    :param image_shape: (channels, height, width)
    :param channels: Channels of every layer
    :return: trunk [B, *image_shape] -> [B, channels, h', w'] without activation after the last layer, and the
        flattened width channels * h' * w'
    :raises ValueError: if the shape is not that of a channels-first image of at least 7 pixels a side
    """
    if len(image_shape) != 3 or min(image_shape[1:]) < KERNELS[0][0]:
        raise ValueError(
            f"Images must be channels first and at least {KERNELS[0][0]} pixels a side, got shape {image_shape}; "
            "resize them, or pass policy_kwargs=dict(features_extractor_class=...) with an extractor of your own."
        )
    in_channels, height, width = image_shape
    layers: list[nn.Module] = []
    for kernel, stride in KERNELS:
        if min(height, width) < kernel:
            break
        layers += [nn.ReLU()] if layers else []
        layers.append(nn.Conv2d(in_channels, channels, kernel, stride))
        height, width = (height - kernel) // stride + 1, (width - kernel) // stride + 1
        in_channels = channels
    return nn.Sequential(*layers), channels * height * width


class PixelEncoder(Encoder):
    """
    CNN encoder for images in [0, 1], channels first.

    Where the flattened convolutions are as wide as the latent (64x64 images and L = 16 channels, as in the released
    models) SimNorm follows at once; otherwise one normed linear layer maps them to the latent.

    :param image_shape: (channels, height, width); at least 7 pixels a side
    :param channels: Channels of every convolution
    :param latent_dim: Latent width L
    :param simnorm_dim: Group size of SimNorm
    :param task_dim: Width of the task embedding (0: single task)
    """

    def __init__(
        self, image_shape: tuple[int, ...], channels: int, latent_dim: int, simnorm_dim: int = 8, task_dim: int = 0
    ):
        super().__init__()
        self.trunk, flat_dim = conv_trunk(image_shape, channels)
        self.project: nn.Module
        if flat_dim == latent_dim and task_dim == 0:
            self.project = SimNorm(simnorm_dim)
        else:
            self.project = NormedLinear(flat_dim + task_dim, latent_dim, SimNorm(simnorm_dim))
            self.project.apply(init_weights)

    def forward(self, obs: Features, task_embedding: th.Tensor | None = None) -> th.Tensor:
        # Centred at zero, as in the released pixel preprocessing
        x = self.trunk(cast(th.Tensor, obs) - 0.5).flatten(1)
        if task_embedding is not None:
            x = th.cat([x, task_embedding], dim=-1)
        return self.project(x)


class DictEncoder(Encoder):
    """
    One trunk per key (convolutions for images, a hidden layer for everything else), fused by a normed linear layer.

    :param space: Flat Dict space
    :param hidden: Widths of the hidden layers of vector keys
    :param channels: Channels of the convolutions of image keys
    :param latent_dim: Latent width L
    :param simnorm_dim: Group size of SimNorm
    :param task_dim: Width of the task embedding (0: single task)
    :param activation_fn: Activation of the hidden layers
    :param normalized_images: The images are floats in a range of the user's own (``normalize_images=False``)
    """

    def __init__(
        self,
        space: spaces.Dict,
        hidden: Sequence[int],
        channels: int,
        latent_dim: int,
        simnorm_dim: int = 8,
        task_dim: int = 0,
        activation_fn: type[nn.Module] = Mish,
        normalized_images: bool = False,
    ):
        super().__init__()
        self.trunks = nn.ModuleDict()
        self.keys: list[tuple[str, str]] = []
        width = task_dim
        for i, (key, subspace) in enumerate(space.spaces.items()):
            # A name of its own: user keys may hold dots, which module names may not
            name = f"key_{i}"
            self.keys.append((key, name))
            if is_image_space(subspace, check_channels=False, normalized_image=normalized_images):
                trunk, flat_dim = conv_trunk(cast(tuple[int, ...], subspace.shape), channels)
                self.trunks[name] = trunk
            else:
                flat_dim = hidden[-1] if hidden else latent_dim
                self.trunks[name] = nn.Sequential(
                    nn.Flatten(),
                    mlp(get_flattened_obs_dim(subspace), hidden[:-1], flat_dim, activation_fn(), activation_fn),
                )
            width += flat_dim
        self.fuse = NormedLinear(width, latent_dim, SimNorm(simnorm_dim))
        self.fuse.apply(init_weights)

    def forward(self, obs: Features, task_embedding: th.Tensor | None = None) -> th.Tensor:
        observations = cast(dict[str, th.Tensor], obs)
        parts = [self.trunks[name](observations[key]).flatten(1) for key, name in self.keys]
        if task_embedding is not None:
            parts.append(task_embedding)
        return self.fuse(th.cat(parts, dim=-1))


class FeaturesEncoder(Encoder):
    """
    A user's own SB3 features extractor, followed by the MLP encoder.

    :param extractor: Features extractor
    :param hidden: Widths of the hidden layers after it
    :param latent_dim: Latent width L
    :param simnorm_dim: Group size of SimNorm
    :param task_dim: Width of the task embedding (0: single task)
    :param activation_fn: Activation of the hidden layers
    """

    def __init__(
        self,
        extractor: BaseFeaturesExtractor,
        hidden: Sequence[int],
        latent_dim: int,
        simnorm_dim: int = 8,
        task_dim: int = 0,
        activation_fn: type[nn.Module] = Mish,
    ):
        super().__init__()
        self.extractor = extractor
        self.head = StateEncoder(extractor.features_dim, hidden, latent_dim, simnorm_dim, task_dim, activation_fn)

    def forward(self, obs: Features, task_embedding: th.Tensor | None = None) -> th.Tensor:
        return self.head(self.extractor(obs), task_embedding)


def random_shift(images: th.Tensor, pad: int, generator: th.Generator, ranks: Ranks = ALONE) -> th.Tensor:
    """
    Shift each image by a whole number of pixels in both directions, edges repeated (DrQ-v2).

    :param images: [B, C, h, w], any dtype (kept)
    :param pad: Largest shift in pixels
    :param generator: Source of the shifts
    :param ranks: Processes that share the batch
    :return: [B, C, h, w]
    """
    batch, _, height, width = images.shape
    device = images.device
    draws = th.randint(-pad, pad + 1, (2, batch * ranks.size, 1), generator=generator, device=generator.device)
    shift = ranks.rows(draws, 1).to(device)
    rows = (th.arange(height, device=device) + shift[0]).clamp_(0, height - 1)
    cols = (th.arange(width, device=device) + shift[1]).clamp_(0, width - 1)
    index = th.arange(batch, device=device)[:, None, None]
    return images.permute(0, 2, 3, 1)[index, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)
