"""Model sizes, presets, and the rules that set discount and warm-up from the episode length."""

import numbers
from dataclasses import asdict, dataclass
from typing import Any

import torch as th
from torch import nn

from sb3_mbdpo.activations import Mish

# Powers of the batch size by which learning rates can follow it
RATE_RULES = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}


@dataclass(frozen=True)
class ModelSize:
    """
    Widths of one world model.

    :param enc_dim: Hidden width of the encoder
    :param num_enc_layers: Layers of the encoder, the last one included
    :param mlp_dim: Width of the two hidden layers of every head
    :param latent_dim: Latent width L
    :param n_critics: Critics in the ensemble
    :param num_channels: Channels of the convolutions of pixel encoders
    :param activation_fn: Activation of the hidden layers
    """

    enc_dim: int
    num_enc_layers: int
    mlp_dim: int
    latent_dim: int
    n_critics: int
    num_channels: int = 32
    activation_fn: type[nn.Module] = Mish


# Keys: millions of parameters, nominal (a robot of 24 observations and 6 actions has 0.14, 1.4, 5.5 and 20 without
# target critics, score and termination for 0.1, 1, 5 and 19). 1 to 317 are the paper's; the smaller ones are for
# classic control on a CPU; there SiLU, which looks like the paper's Mish, is a single fast pass.
MODEL_SIZES: dict[float, ModelSize] = {
    0.02: ModelSize(32, 2, 32, 16, 2, 8, nn.SiLU),
    0.05: ModelSize(64, 2, 64, 64, 2, 16, nn.SiLU),
    0.1: ModelSize(96, 2, 96, 64, 2, 16, nn.SiLU),
    0.2: ModelSize(128, 2, 128, 64, 2, 16, nn.SiLU),
    0.5: ModelSize(256, 2, 192, 128, 2, 16, nn.SiLU),
    1: ModelSize(256, 2, 384, 128, 2),
    5: ModelSize(256, 2, 512, 512, 5),
    19: ModelSize(1024, 3, 1024, 768, 5),
    48: ModelSize(1792, 4, 1792, 768, 5),
    317: ModelSize(4096, 5, 4096, 1376, 8),
}


@dataclass(frozen=True)
class Preset:
    """What a preset decides; each field is an argument of ``MBDPO``, where it is described."""

    learning_rate: float
    tau: float
    model_size: float
    batch_size: int
    horizon: int
    denoising_steps: int
    n_samples: int
    n_elites: int
    n_prior_trajectories: int
    temperature: float
    beta_start: float
    beta_end: float
    exploration_noise: float
    prior_margin: float
    bootstrap: str
    target_horizon: int
    prior_horizon: int
    saturation_coef: float
    policy_delay: int
    energy_interval: int
    score_batch_size: int
    score_samples: int
    score_interval: int
    search_dtype: str


# "paper" is the paper's table; how much the score network learns is ours, a tenth of an update. "cpu" was found on
# Pendulum-v1 and dm_control's cartpole-swingup: few wide denoising steps, a barrier against a saturated prior, and
# values that travel fast: critics that bootstrap from the score network's whole plan, and target critics that follow
# five times as closely. With the paper's tau, values on Pendulum-v1 are at half of their true size after 1000
# updates, and the search settles where they have not arrived. The prior learns at every second update, the energy at
# every fourth: it saves an eighth of the time; cartpole-swingup, with more to learn, turns that off in its zoo entry.
PRESETS: dict[str, Preset] = {
    "paper": Preset(
        learning_rate=3e-4,
        tau=0.01,
        model_size=5,
        batch_size=256,
        horizon=3,
        denoising_steps=20,
        n_samples=512,
        n_elites=64,
        n_prior_trajectories=24,
        temperature=0.5,
        beta_start=1e-4,
        beta_end=1e-2,
        exploration_noise=0.05,
        prior_margin=0.0,
        bootstrap="prior",
        target_horizon=0,
        prior_horizon=0,
        saturation_coef=0.0,
        policy_delay=1,
        energy_interval=1,
        score_batch_size=32,
        score_samples=64,
        score_interval=8,
        search_dtype="auto",
    ),
    "cpu": Preset(
        learning_rate=1e-3,
        tau=0.05,
        model_size=0.1,
        batch_size=64,
        horizon=3,
        denoising_steps=5,
        n_samples=64,
        n_elites=12,
        n_prior_trajectories=12,
        temperature=0.5,
        beta_start=1e-3,
        beta_end=0.2,
        exploration_noise=0.2,
        prior_margin=0.0,
        bootstrap="score",
        target_horizon=2,
        prior_horizon=0,
        saturation_coef=0.001,
        policy_delay=2,
        energy_interval=4,
        score_batch_size=32,
        score_samples=8,
        score_interval=4,
        search_dtype="float32",
    ),
    "debug": Preset(
        learning_rate=1e-3,
        tau=0.05,
        model_size=0.02,
        batch_size=32,
        horizon=3,
        denoising_steps=3,
        n_samples=16,
        n_elites=4,
        n_prior_trajectories=4,
        temperature=0.5,
        beta_start=1e-3,
        beta_end=0.2,
        exploration_noise=0.1,
        prior_margin=0.0,
        bootstrap="score",
        target_horizon=1,
        prior_horizon=0,
        saturation_coef=0.001,
        policy_delay=1,
        energy_interval=1,
        score_batch_size=4,
        score_samples=8,
        score_interval=1,
        search_dtype="float32",
    ),
}

UNKNOWN_EPISODE_DISCOUNT = 0.99
MIN_RANDOM_STEPS = 1000


def resolve_preset(name: str, device: th.device) -> tuple[str, dict[str, Any]]:
    """
    :param name: "auto", "paper", "cpu" or "debug"
    :param device: "auto" is "paper" on an accelerator and "cpu" otherwise
    :return: name of the preset that applies and its values by argument name
    :raises ValueError: for an unknown name
    """
    if name != "auto" and name not in PRESETS:
        raise ValueError(f'preset must be "auto", "paper", "cpu" or "debug", got {name!r}.')
    resolved = name if name != "auto" else ("cpu" if device.type == "cpu" else "paper")
    return resolved, asdict(PRESETS[resolved])


def scaled_learning_rate(rate: float, batch_size: int, reference: int, rule: str) -> float:
    """
    The learning rate for another batch size than the one it was found with.

    For Adam a root keeps the noise of the weights' path alike (Malladi et al., 2022); their rule also moves Adam's
    betas and epsilon, which stay as they are here. Linear is the rule of plain gradient descent.

    :param rate: Learning rate for the reference
    :param batch_size: Windows per update
    :param reference: Windows per update that ``rate`` belongs to
    :param rule: One of :data:`RATE_RULES`
    :return: Learning rate for ``batch_size``
    :raises ValueError: for an unknown rule

    >>> [scaled_learning_rate(3e-4, 1024, 256, rule) for rule in RATE_RULES]
    [0.0003, 0.0006, 0.0012]
    """
    if rule not in RATE_RULES:
        raise ValueError(f"The rule for the learning rate must be one of {list(RATE_RULES)}, got {rule!r}.")
    return rate * (batch_size / reference) ** RATE_RULES[rule]


def resolve_model_size(model_size: float) -> dict[str, Any]:
    """
    :param model_size: Key of :data:`MODEL_SIZES`
    :return: widths and activation by name
    :raises ValueError: for a size that is not in the table
    """
    if model_size not in MODEL_SIZES:
        raise ValueError(
            f"model_size must be one of {sorted(MODEL_SIZES)} (million parameters), got {model_size!r}; "
            "for widths in between pass policy_kwargs=dict(latent_dim=..., mlp_dim=..., enc_dim=...)."
        )
    return asdict(MODEL_SIZES[model_size])


def widths_of(net_arch: Any) -> dict[str, list[int]]:
    """
    >>> widths_of([64, 64]), widths_of(None)
    ({'heads': [64, 64]}, {})

    :param net_arch: Widths of the heads' hidden layers, or a dict of those of "encoder" and "heads"; None for neither
    :return: Such a dict
    :raises ValueError: if it is anything else
    """
    arch = net_arch if isinstance(net_arch, dict) else {} if net_arch is None else {"heads": net_arch}
    lists = all(isinstance(widths, (list, tuple)) for widths in arch.values())
    if arch.keys() - {"encoder", "heads"} or not lists:
        raise ValueError(f'net_arch must be a list of widths, or a dict of "encoder" and "heads", got {net_arch!r}.')
    for width in (width for widths in arch.values() for width in widths):
        if isinstance(width, bool) or not isinstance(width, numbers.Integral) or width < 1:
            raise ValueError(f"net_arch must hold whole numbers of at least 1, got {width!r}.")
    return {name: list(widths) for name, widths in arch.items()}


def discount_for(episode_length: int | None) -> float:
    """
    The paper's discount: clip((L/5 - 1) / (L/5), 0.95, 0.995).

    :param episode_length: Longest episode L in environment steps; None when unknown
    :return: gamma; 0.99 when the length is unknown

    >>> discount_for(200)
    0.975
    >>> discount_for(None)
    0.99
    """
    if episode_length is None:
        return UNKNOWN_EPISODE_DISCOUNT
    fifth = max(episode_length / 5, 1.0)
    return min(max((fifth - 1) / fifth, 0.95), 0.995)


def learning_starts_for(episode_length: int | None) -> int:
    """
    The paper's warm-up: max(1000, 5 L) random steps.

    :param episode_length: Longest episode L in environment steps; None when unknown
    :return: Environment steps before the first update

    >>> learning_starts_for(200), learning_starts_for(1000)
    (1000, 5000)
    """
    return max(MIN_RANDOM_STEPS, 5 * (episode_length or 0))
