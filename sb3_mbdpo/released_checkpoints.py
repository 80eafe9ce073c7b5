"""Reader of the checkpoints that the authors of MBDPO and of TD-MPC2 released (`.pt`, weights only, strict).

Every size is read from the shapes. Both layouts of TD-MPC2's critics are understood: named parameters stacked over
critics, and the older numbered lists. Anything unknown, missing or of another shape is an error.
"""

import pathlib
import re
import struct

import torch as th

from sb3_mbdpo.encoders import Encoder, PixelEncoder, StateEncoder
from sb3_mbdpo.layers import NormedLinear
from sb3_mbdpo.world_model import TaskSpec, WorldModel

# Copies and shadows of the critics that the released code writes next to them
REPEATED = re.compile(r"^(_detach_Qs|_Qs\.module\.|_target_Qs\.module\.)")
LAYER_FIELDS = ("weight", "bias", "ln.weight", "ln.bias")
HEADS = {"_dynamics": "dynamics", "_reward": "reward", "_pi": "prior", "_termination": "termination", "_F": "energy"}
IMAGE_SIDE = 64
Weights = dict[str, th.Tensor]


def load_released_checkpoint(
    path: str | pathlib.Path,
    simnorm_dim: int = 8,
    vmin: float = -10.0,
    vmax: float = 10.0,
    dropout: float = 0.01,
    horizon: int = 3,
    action_dims: tuple[int, ...] | None = None,
    device: th.device | str = "cpu",
) -> WorldModel:
    """
    Build the world model that a released ``.pt`` file holds.

    What shapes cannot tell are arguments, with the released defaults. Models without an energy or a score network come
    back with ``energy`` or ``score`` None: they act by search with ``energy_coef=0`` and refuse to act by score.

    :param path: The file; read with ``weights_only=True``, so that no code in it can run
    :param simnorm_dim: Group size of SimNorm
    :param vmin: Lowest bin of the regression in symlog space
    :param vmax: Highest bin
    :param dropout: Dropout of the critics' first layer, for further training
    :param horizon: Plan length H, used only where the file has no score network to read it from
    :param action_dims: Actions of each task, used only for multi-task files without ``_action_masks``
    :param device: Where the model goes
    :return: World model with the file's weights; running statistics, which the file does not hold, at their start
    :raises ValueError: naming what is missing, unknown or of another shape
    """
    weights = _read(path)
    try:
        model = _build(weights, simnorm_dim, vmin, vmax, dropout, horizon, action_dims)
        state = _translate(weights, model)
    except (IndexError, ZeroDivisionError) as error:
        raise ValueError(f"{path} holds tensors of impossible shapes ({error}); nothing was loaded.") from error
    except KeyError as error:
        raise ValueError(
            f"{path} is not a checkpoint of MBDPO or TD-MPC2: it has no {error.args[0]!r}; nothing was loaded."
        ) from error
    expected = model.state_dict()
    wrong = [
        f"{key}: expected {tuple(expected[key].shape)}, found {tuple(value.shape)}"
        for key, value in state.items()
        if key in expected and expected[key].shape != value.shape
    ]
    missing = sorted(set(expected) - set(state))
    unknown = sorted(set(state) - set(expected))
    if wrong or missing or unknown:
        raise ValueError(
            f"{path} holds another architecture; nothing was loaded. Missing: {missing or 'none'}; "
            f"unknown: {unknown or 'none'}; other shapes: {wrong or 'none'}."
        )
    model.load_state_dict(state)
    return model.to(device)


def _read(path: str | pathlib.Path) -> Weights:
    try:
        content = th.load(path, map_location="cpu", weights_only=True)
    except (LookupError, EOFError, RuntimeError, ValueError, TypeError, AttributeError, struct.error) as error:
        # What PyTorch's reader stumbles over where a file is damaged, or something else
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is not a checkpoint of MBDPO or TD-MPC2: it cannot be read ({reason}).") from error
    weights = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(value, th.Tensor) for value in weights.values()):
        raise ValueError(f"{path} is not a checkpoint of MBDPO or TD-MPC2: it must hold a flat dict of tensors.")
    weights = {_modern_name(key, weights): value for key, value in weights.items()}
    return {key: value for key, value in weights.items() if not REPEATED.match(key)}


def _modern_name(key: str, weights: Weights) -> str:
    """Numbered critic parameters (``_Qs.params.N``) under their later names (``_Qs.params.LAYER.FIELD``)."""
    match = re.fullmatch(r"(_Qs\.params|_target_Qs\.params|_target_Qs_params)\.(\d+)", key)
    if match:
        layer, field = divmod(int(match[2]), len(LAYER_FIELDS))
        return f"{match[1]}.{layer}.{LAYER_FIELDS[field]}".replace("_target_Qs.params", "_target_Qs_params")
    return key


def _hidden(weights: Weights, prefix: str, axis: int = 0) -> list[int]:
    """Widths of a head's hidden layers: the outputs of all its layers but the last."""
    layers = sorted(
        int(key[len(prefix) + 1 :].split(".")[0])
        for key in weights
        if re.match(rf"{re.escape(prefix)}\.\d+\.weight$", key)
    )
    if not layers:
        raise KeyError(f"{prefix}.0.weight")
    return [weights[f"{prefix}.{i}.weight"].shape[axis] for i in layers[:-1]]


def _build(
    weights: Weights,
    simnorm_dim: int,
    vmin: float,
    vmax: float,
    dropout: float,
    horizon: int,
    action_dims: tuple[int, ...] | None,
) -> WorldModel:
    hidden = _hidden(weights, "_dynamics")
    last = len(hidden)
    latent_dim = weights[f"_dynamics.{last}.weight"].shape[0]
    action_dim = weights[f"_pi.{last}.weight"].shape[0] // 2
    num_bins = weights[f"_reward.{last}.weight"].shape[0]
    tasks = _task_spec(weights, action_dim, action_dims)
    task_dim = 0 if tasks is None else tasks.embedding_dim
    time_embed_dim = 64
    if "_score.0.weight" in weights:
        horizon = weights[f"_score.{last}.weight"].shape[0] // action_dim
        time_embed_dim = weights["_score.0.weight"].shape[1] - latent_dim - task_dim - horizon * action_dim
        if time_embed_dim < 2 or time_embed_dim % 2:
            raise ValueError(
                f"_score.0.weight leaves {time_embed_dim} inputs for the denoising step, which must be even and "
                "positive; nothing was loaded."
            )
    log_std_min = float(weights.get("log_std_min", th.tensor(-10.0)))
    return WorldModel(
        _encoder(weights, latent_dim, simnorm_dim, task_dim),
        latent_dim,
        action_dim,
        hidden=hidden,
        n_critics=weights["_Qs.params.0.weight"].shape[0],
        horizon=horizon,
        num_bins=num_bins,
        vmin=vmin,
        vmax=vmax,
        simnorm_dim=simnorm_dim,
        dropout=dropout,
        log_std_min=log_std_min,
        log_std_max=log_std_min + float(weights.get("log_std_dif", th.tensor(12.0))),
        time_embed_dim=time_embed_dim,
        score_prediction="score",
        with_termination="_termination.0.weight" in weights,
        with_energy="_F.0.weight" in weights,
        with_score="_score.0.weight" in weights,
        tasks=tasks,
    )


def _task_spec(weights: Weights, action_dim: int, action_dims: tuple[int, ...] | None) -> TaskSpec | None:
    if "_task_emb.weight" not in weights:
        return None
    n_tasks, embedding_dim = weights["_task_emb.weight"].shape
    if "_action_masks" in weights:
        action_dims = tuple(int(count) for count in weights["_action_masks"].sum(-1))
    if action_dims is None:
        raise ValueError(
            "This multi-task checkpoint holds no `_action_masks`: pass `action_dims`, the actions of each task."
        )
    if len(action_dims) != n_tasks or max(action_dims) > action_dim:
        raise ValueError(f"action_dims must name {n_tasks} tasks of at most {action_dim} actions, got {action_dims}.")
    return TaskSpec(action_dims, embedding_dim)


def _encoder(weights: Weights, latent_dim: int, simnorm_dim: int, task_dim: int) -> Encoder:
    if "_encoder.rgb.2.weight" in weights:
        channels, in_channels = weights["_encoder.rgb.2.weight"].shape[:2]
        return PixelEncoder((in_channels, IMAGE_SIDE, IMAGE_SIDE), channels, latent_dim, simnorm_dim, task_dim)
    hidden = _hidden(weights, "_encoder.state")
    in_dim = weights["_encoder.state.0.weight"].shape[1] - task_dim
    return StateEncoder(in_dim, hidden, latent_dim, simnorm_dim, task_dim)


def _translate(weights: Weights, model: WorldModel) -> Weights:
    """Released names to ours; a name without a translation is kept, and hence reported as unknown."""
    state: Weights = {key: value for key, value in model.state_dict().items() if key in RUNNING_STATISTICS}
    for key, value in weights.items():
        head, _, rest = key.partition(".")
        if key in ("log_std_min", "log_std_dif"):
            continue
        if key == "_action_masks":
            state["action_masks"] = value.float()
        elif key == "_task_emb.weight":
            state["task_embedding.weight"] = value
        elif head in HEADS and (net := getattr(model, HEADS[head])) is not None:
            state[f"{HEADS[head]}.{_layer_name(rest, net)}"] = value
        elif head == "_score" and model.score is not None:
            state[f"score.net.{_layer_name(rest, model.score.net)}"] = value
        elif key.startswith("_encoder.state.") and isinstance(model.encoder, StateEncoder):
            state[f"encoder.net.{_layer_name(key[len('_encoder.state.') :], model.encoder.net)}"] = value
        elif match := re.fullmatch(r"_encoder\.rgb\.(\d+)\.(weight|bias)", key):
            # Two preprocessing layers come first in the released stack
            state[f"encoder.trunk.{int(match[1]) - 2}.{match[2]}"] = value
        elif match := re.fullmatch(r"(_Qs\.params|_target_Qs_params)\.(\d+)\.(.+)", key):
            critics = "critics" if match[1] == "_Qs.params" else "target_critics"
            state |= _critic_layer(critics, int(match[2]), match[3], value)
        else:
            state[key] = value
    if model.task_embedding is not None:
        state.setdefault("action_masks", model.action_masks)
    return state


RUNNING_STATISTICS = ("energy_mean", "energy_std", "prior_scale")


def _layer_name(rest: str, net: th.nn.Module) -> str:
    """``1.ln.weight`` -> ``1.norm.weight``, ``1.weight`` -> ``1.linear.weight`` for normed layers."""
    index, _, field = rest.partition(".")
    layers = dict(net.named_children())
    if isinstance(layers.get(index), NormedLinear):
        field = field.replace("ln.", "norm.") if field.startswith("ln.") else f"linear.{field}"
    return f"{index}.{field}"


def _critic_layer(critics: str, layer: int, field: str, value: th.Tensor) -> Weights:
    if field == "weight":
        return {f"{critics}.weights.{layer}": value.transpose(1, 2).contiguous()}
    name = {"bias": "biases", "ln.weight": "norm_weights", "ln.bias": "norm_biases"}.get(field)
    if name is None:
        return {f"{critics}.{layer}.{field}": value}
    return {f"{critics}.{name}.{layer}": value.unsqueeze(1)}
