"""From a policy's arguments to its networks: sizes of layers, features extractor, encoder."""

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

from gymnasium import spaces
from stable_baselines3.common.preprocessing import get_flattened_obs_dim, is_image_space
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, CombinedExtractor, NatureCNN
from torch import nn

from sb3_mbdpo.encoders import DictEncoder, Encoder, FeaturesEncoder, PixelEncoder, StateEncoder
from sb3_mbdpo.presets import resolve_model_size, widths_of
from sb3_mbdpo.task_checks import check_task_spaces
from sb3_mbdpo.tasks import TaskSet

# Arguments that override entries of the size table
SIZE_ARGUMENTS = ("enc_dim", "num_enc_layers", "mlp_dim", "latent_dim", "n_critics", "num_channels")


class LayerSizes(NamedTuple):
    """Widths of a world model's layers, and what is between them."""

    encoder: list[int]
    heads: list[int]
    latent_dim: int
    n_critics: int
    num_channels: int
    activation_fn: type[nn.Module]


def layer_sizes(
    model_size: float,
    net_arch: list[int] | dict[str, list[int]] | None,
    activation_fn: type[nn.Module] | None,
    overrides: Mapping[str, int | None],
    convolutional: bool,
) -> LayerSizes:
    """
    :param model_size: Key of the size table, million parameters
    :param net_arch: Hidden widths of every head, or of "encoder" and "heads"; None: the table's
    :param activation_fn: Activation of hidden layers; None: the table's
    :param overrides: Entries in place of the table's, by the names in ``SIZE_ARGUMENTS``; None: the table's
    :param convolutional: Whether the encoder reads images alone, and so has no widths
    :return: The sizes
    :raises ValueError: for a size that there is not, an activation that is none or has parameters, or widths of an
        encoder that has none
    """
    sizes = resolve_model_size(model_size) | {name: value for name, value in overrides.items() if value is not None}
    activation_fn = activation_fn or sizes["activation_fn"]
    if not callable(activation_fn):
        raise ValueError(f"activation_fn must be a class of modules, such as torch.nn.SiLU, got {activation_fn!r}.")
    if any(True for _ in activation_fn().parameters()):
        raise ValueError(f"activation_fn must have no parameters (heads share it), {activation_fn.__name__} has some.")
    arch = widths_of(net_arch)
    if "encoder" in arch and convolutional:
        raise ValueError('net_arch has widths of an "encoder", images are read by convolutions: use num_channels.')
    return LayerSizes(
        arch.get("encoder", [sizes["enc_dim"]] * max(sizes["num_enc_layers"] - 1, 1)),
        arch.get("heads", [sizes["mlp_dim"]] * 2),
        sizes["latent_dim"],
        sizes["n_critics"],
        sizes["num_channels"],
        activation_fn,
    )


def make_extractor(
    extractor_class: type[BaseFeaturesExtractor] | None,
    extractor_kwargs: dict[str, Any] | None,
    observation_space: spaces.Space,
    normalize_images: bool,
) -> BaseFeaturesExtractor | None:
    """
    :param extractor_class: A features extractor of the user's own, or None
    :param extractor_kwargs: Its keyword arguments
    :param observation_space: What it reads
    :param normalize_images: Whether images are divided by 255 before it reads them
    :return: The extractor, None without a class
    :raises ValueError: for arguments without a class
    """
    if extractor_class is None:
        if extractor_kwargs:
            raise ValueError(
                f"features_extractor_kwargs ({sorted(extractor_kwargs)}) are those of a "
                "features_extractor_class: pass one, or use net_arch, latent_dim, enc_dim, num_channels."
            )
        return None
    arguments = dict(extractor_kwargs or {})
    if not normalize_images and issubclass(extractor_class, (NatureCNN, CombinedExtractor)):
        # As Stable-Baselines3's own models tell its own extractors
        arguments["normalized_image"] = True
    return extractor_class(observation_space, **arguments)


def make_task_encoder(
    tasks: TaskSet,
    observation_space: spaces.Space,
    action_space: spaces.Box,
    sizes: LayerSizes,
    simnorm_dim: int,
    task_dim: int,
) -> Encoder:
    """
    :param tasks: Tasks of a multi-task model
    :param observation_space: Observation space, of all the tasks
    :param action_space: Action space, of all the tasks
    :param sizes: Sizes of layers
    :param simnorm_dim: Group size of SimNorm
    :param task_dim: Width of the task embeddings
    :return: Encoder of padded observations [B, O] and task embeddings [B, E]
    :raises ValueError: if the spaces are not those of the tasks
    """
    check_task_spaces(tasks, observation_space, action_space)
    return StateEncoder(
        tasks.observation_dim, sizes.encoder, sizes.latent_dim, simnorm_dim, task_dim, sizes.activation_fn
    )


def make_encoder(
    space: spaces.Space,
    kind: str,
    sizes: LayerSizes,
    simnorm_dim: int,
    normalize_images: bool,
    extractor: BaseFeaturesExtractor | None = None,
) -> Encoder:
    """
    :param space: Observation space of a single-task model
    :param kind: What the policy is for: "vectors", "images" or "dicts"; a Dict is read by any but through an extractor
    :param sizes: Sizes of layers
    :param simnorm_dim: Group size of SimNorm
    :param normalize_images: Whether images are divided by 255
    :param extractor: A features extractor of the user's own in front of it
    :return: Encoder of preprocessed observations [B, ...] to latents [B, L]
    :raises ValueError: for a space that this kind of policy does not read, naming the policy that does
    """
    latent_dim, activation_fn = sizes.latent_dim, sizes.activation_fn
    if extractor is not None:
        return FeaturesEncoder(extractor, sizes.encoder, latent_dim, simnorm_dim, activation_fn=activation_fn)
    if isinstance(space, spaces.Dict):
        return DictEncoder(
            space,
            sizes.encoder,
            sizes.num_channels,
            latent_dim,
            simnorm_dim,
            activation_fn=activation_fn,
            normalized_images=not normalize_images,
        )
    if kind == "dicts":
        raise ValueError(
            f"MultiInputPolicy needs Dict observations, got {space}: use CnnPolicy for images, else MlpPolicy."
        )
    if kind == "images":
        if not is_image_space(space, check_channels=False, normalized_image=not normalize_images):
            raise ValueError(
                f"CnnPolicy needs image observations (uint8, 0 to 255, three dimensions), got {space}; "
                "use MlpPolicy for vectors, or pass policy_kwargs=dict(normalize_images=False) for float images."
            )
        return PixelEncoder(cast(tuple[int, ...], space.shape), sizes.num_channels, latent_dim, simnorm_dim)
    width = get_flattened_obs_dim(space)
    return StateEncoder(width, sizes.encoder, latent_dim, simnorm_dim, activation_fn=activation_fn)
