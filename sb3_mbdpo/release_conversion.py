"""Checkpoints that the authors of MBDPO and TD-MPC2 released, as checkpoints of this package."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch as th
from gymnasium import spaces
from torch import nn

from sb3_mbdpo.checkpoints import set_up
from sb3_mbdpo.encoders import PixelEncoder, StateEncoder
from sb3_mbdpo.presets import discount_for
from sb3_mbdpo.released_checkpoints import load_released_checkpoint
from sb3_mbdpo.suites.registration import DMCONTROL, env_id
from sb3_mbdpo.task_names import META_WORLD, MT30, MT80, sizes_of
from sb3_mbdpo.tasks import Task, TaskSet
from sb3_mbdpo.world_model import WorldModel

if TYPE_CHECKING:
    from sb3_mbdpo.mbdpo import MBDPO

# Decisions of an episode, by which the released models were trained
DMCONTROL_LENGTH, META_WORLD_LENGTH = 500, 100
KNOWN_SETS = {len(names): names for names in (MT30, MT80)}


def convert_released(
    path: str | Path,
    task_names: Sequence[str] | None = None,
    action_dims: tuple[int, ...] | None = None,
    episode_length: int | Sequence[int] | None = None,
    env_id: str | None = None,
    device: th.device | str = "cpu",
    **reader_arguments: Any,
) -> MBDPO:
    """
    The model that a released ``.pt`` file holds, ready to act, to be saved with ``save_pretrained`` and fine-tuned.

    The search is the paper's. Models without an energy act with ``energy_coef=0``, those without a score network, or
    with one that was never trained, by search or prior; nothing that a file does not hold is added. Running statistics
    start anew, as released files do not hold them.

    :param path: The file; read with ``weights_only=True``
    :param task_names: Names of the tasks of a multi-task model; None: those of mt30 or mt80, by their number
    :param action_dims: Actions of each task, for files that do not say
    :param episode_length: Longest episode in decisions, for the discount, or that of each task; None: 500, and 100 for
        Meta-World's tasks
    :param env_id: Gymnasium id of a single task's environment
    :param device: Where the model goes
    :param reader_arguments: What shapes cannot tell, see ``load_released_checkpoint``
    :return: The model
    :raises ValueError: if the file is no released checkpoint, or its tasks cannot be named
    """
    from sb3_mbdpo.mbdpo import MBDPO

    dropout, simnorm_dim = reader_arguments.get("dropout", 0.01), reader_arguments.get("simnorm_dim", 8)
    world_model = load_released_checkpoint(path, action_dims=action_dims, **reader_arguments)
    if world_model.score is not None and _is_untrained(world_model.score):
        warnings.warn(
            f"The score network in {Path(path).name} was never trained and is left out: the model acts by search or "
            "prior.",
            stacklevel=2,
        )
        world_model.score = None
    tasks = _task_set(world_model, task_names, episode_length)
    policy, observation_space, policy_kwargs = _architecture(world_model, dropout, simnorm_dim)
    trained = {
        "energy_coef": 0.01 if world_model.energy is not None else 0.0,
        "energy_loss_coef": 1.0 if world_model.energy is not None else 0.0,
        "score_coef": 1.0 if world_model.score is not None else 0.0,
    }
    length = episode_length if isinstance(episode_length, int) else DMCONTROL_LENGTH
    model = MBDPO(
        "MultiInputPolicy" if tasks else policy,
        None,
        gamma=None if tasks else discount_for(length),
        learning_starts=length,
        preset="paper",
        horizon=world_model.horizon,
        episodic=world_model.termination is not None,
        tasks=tasks,
        policy_kwargs=policy_kwargs,
        device=device,
        _init_setup_model=False,
        **trained,  # type: ignore[arg-type]
    )
    if tasks is None:
        model.observation_space = observation_space
        model.action_space = spaces.Box(-1.0, 1.0, (world_model.action_dim,), np.float32)
        model._env_source = None if env_id is None else {"id": env_id, "action_repeat": 1}
    model.n_envs = 1
    set_up(model, to_act=True)
    model.policy.world_model.load_state_dict(world_model.state_dict())
    model.policy.terminates.fill_(float(model.policy.episodic))
    # It has been trained, which warm-up updates are for
    model.warmup_updates, model._n_updates = 0, 1
    return model


def _is_untrained(score: nn.Module) -> bool:
    """Whether biases and norms are as initialised: released training without the score's loss leaves them so."""
    vectors = [(name, values) for name, values in score.named_parameters() if values.ndim == 1]
    return all(bool((values == float(name.endswith("weight"))).all()) for name, values in vectors)


def _architecture(model: WorldModel, dropout: float, simnorm_dim: int) -> tuple[str, spaces.Box, dict[str, Any]]:
    """Policy, observation space and sizes by which this package builds the same networks."""
    hidden = _widths(model.dynamics)[1:-1]
    arch: dict[str, list[int]] = {"heads": hidden}
    sizes: dict[str, Any] = {}
    encoder = model.encoder
    if isinstance(encoder, PixelEncoder):
        first = encoder.trunk[0]
        policy, space = "CnnPolicy", spaces.Box(0, 255, (first.in_channels, 64, 64), np.uint8)  # type: ignore[arg-type]
        sizes["num_channels"] = first.out_channels
    else:
        assert isinstance(encoder, StateEncoder)
        width, *hidden_widths, _ = _widths(encoder.net)
        if model.task_embedding is not None:
            width -= model.task_embedding.embedding_dim
            sizes["task_embedding_dim"] = model.task_embedding.embedding_dim
        policy, space = "MlpPolicy", spaces.Box(-np.inf, np.inf, (width,), np.float32)
        arch["encoder"] = hidden_widths
    if model.score is not None:
        sizes |= {"time_embed_dim": model.score.time_embed_dim, "score_prediction": model.score.prediction_type}
    if model.energy is None:
        sizes["with_energy"] = False
    return (
        policy,
        space,
        sizes
        | {
            "net_arch": arch,
            "latent_dim": model.latent_dim,
            "n_critics": model.n_critics,
            "num_bins": model.two_hot.num_bins,
            "vmin": model.two_hot.vmin,
            "vmax": model.two_hot.vmax,
            "simnorm_dim": simnorm_dim,
            "dropout": dropout,
            "log_std_min": model.log_std_min,
            "log_std_max": model.log_std_max,
        },
    )


def _widths(net: nn.Sequential) -> list[int]:
    """Inputs of a stack of normed layers, then the outputs of each."""
    layers = [cast(nn.Linear, getattr(layer, "linear", layer)) for layer in net]
    return [layers[0].in_features, *(layer.out_features for layer in layers)]


def _task_set(
    model: WorldModel, names: Sequence[str] | None, episode_length: int | Sequence[int] | None
) -> TaskSet | None:
    if model.task_embedding is None:
        if names is not None:
            raise ValueError("This is a checkpoint of a single task: leave out task_names.")
        return None
    action_dims = [int(count) for count in model.action_masks.sum(-1)]
    names = KNOWN_SETS.get(len(action_dims)) if names is None else names
    if names is None or len(names) != len(action_dims):
        raise ValueError(
            f"This checkpoint knows {len(action_dims)} tasks, which is neither mt30 nor mt80: pass task_names, their "
            f"{len(action_dims)} names in order."
        )
    assert isinstance(model.encoder, StateEncoder)
    padded = _widths(model.encoder.net)[0] - model.task_embedding.embedding_dim
    one_for_all = episode_length is None or isinstance(episode_length, int)
    given = [episode_length] * len(names) if one_for_all else list(cast(Sequence[int], episode_length))
    tasks = [
        _task(name, action_dim, padded, cast(int | None, length))
        for name, action_dim, length in zip(names, action_dims, given, strict=True)
    ]
    return TaskSet(tasks, padded, model.action_dim)


def _task(name: str, action_dim: int, padded: int, episode_length: int | None) -> Task:
    """A task of the suites is known by its name; of others the width is that of all."""
    sizes, known = sizes_of(name), name in MT80
    width = padded if sizes is None else sizes[0]
    default_length = (META_WORLD_LENGTH if name in META_WORLD else DMCONTROL_LENGTH) if known else None
    return Task(
        name,
        min(width, padded),
        action_dim,
        env_id=env_id(name) if name in DMCONTROL else None,
        episode_length=episode_length or default_length,
    )
