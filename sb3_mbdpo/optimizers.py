"""An optimizer each for world model, prior and score network, so that their gradients never mix."""

import inspect
from typing import Any, NamedTuple

import torch as th

from sb3_mbdpo.world_model import WorldModel


class Optimizers(NamedTuple):
    """Of the world model with its energy (``model``), of the ``prior``, and of the ``score`` network, None without."""

    model: th.optim.Optimizer
    prior: th.optim.Optimizer
    score: th.optim.Optimizer | None


def build_optimizers(
    model: WorldModel,
    lr: float,
    optimizer_class: type[th.optim.Optimizer],
    optimizer_kwargs: dict[str, Any],
    encoder_lr_scale: float,
) -> Optimizers:
    """
    Optimizers without a past.

    :param model: World model
    :param lr: Learning rate to begin with
    :param optimizer_class: Class of all three
    :param optimizer_kwargs: Its keyword arguments, without the learning rate
    :param encoder_lr_scale: Learning rate of the encoder relative to the rest; each group of parameters says its own
        as "lr_scale"
    :return: The optimizers
    :raises ValueError: if the class is none, or its keyword arguments hold the learning rate
    """
    if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, th.optim.Optimizer)):
        raise ValueError(
            f"optimizer_class must be a class of optimizers, such as torch.optim.Adam, got {optimizer_class!r}: pass "
            "its arguments as optimizer_kwargs."
        )
    kwargs = dict(optimizer_kwargs)
    if "lr" in kwargs:
        raise ValueError("optimizer_kwargs holds lr: pass learning_rate to MBDPO.")
    known = inspect.signature(optimizer_class).parameters
    if "fused" in known and not kwargs.keys() & {"foreach", "differentiable"}:
        # One kernel for all parameters: several times faster on a CPU for small networks
        kwargs.setdefault("fused", True)
    encoder = list(model.encoder.parameters())
    apart = {id(p) for module in (model.encoder, model.prior, model.target_critics) for p in module.parameters()}
    apart |= {id(p) for p in (model.score.parameters() if model.score is not None else [])}
    rest = [p for p in model.parameters() if id(p) not in apart]
    groups = [
        {"params": encoder, "lr": lr * encoder_lr_scale, "lr_scale": encoder_lr_scale},
        {"params": rest, "lr": lr, "lr_scale": 1.0},
    ]
    prior_kwargs = {"eps": 1e-5} | kwargs if issubclass(optimizer_class, th.optim.Adam) else kwargs
    score = None
    if model.score is not None:
        score = optimizer_class(model.score.parameters(), lr=lr, **kwargs)  # type: ignore[call-arg]
    return Optimizers(
        optimizer_class(groups, lr=lr, **kwargs),  # type: ignore[call-arg]
        optimizer_class(model.prior.parameters(), lr=lr, **prior_kwargs),  # type: ignore[call-arg]
        score,
    )


def set_encoder_lr_scale(optimizer: th.optim.Optimizer, encoder_lr_scale: float) -> None:
    """
    Have the encoder learn at another rate.

    :param optimizer: The world model's
    :param encoder_lr_scale: Learning rate of the encoder relative to the rest
    """
    encoder = optimizer.param_groups[0]
    # Optimizers of a policy of the user's own may have no such group
    if "lr_scale" in encoder:
        encoder["lr_scale"] = encoder_lr_scale
