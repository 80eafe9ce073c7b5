"""Statistics of VecNormalize as safetensors: what a policy that was trained on normalised observations needs to act."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from sb3_mbdpo.checkpoint_weights import check_mark, plain_metadata, read_header, read_tensors, write_tensors

if TYPE_CHECKING:
    from sb3_mbdpo.shards import ShardedDataset

NUMBERS = {"clip_obs": float, "clip_reward": float, "gamma": float, "epsilon": float}
FLAGS = ("norm_obs", "norm_reward", "training")
PARTS = ("mean", "var", "count")
# Name of the statistics of an observation that is no dict; keys of a dict are written behind a slash
WHOLE, RETURN = "observation", "return"
LARGEST_FILE = 10**9


@dataclass(frozen=True)
class Normalization:
    """
    Settings and statistics of a VecNormalize.

    :param settings: Its constructor arguments
    :param statistics: Mean, variance and count by name, float64
    """

    settings: dict[str, Any]
    statistics: dict[str, np.ndarray]

    @classmethod
    def of(cls, env: VecNormalize | None) -> Normalization | None:
        """
        :param env: The model's VecNormalize
        :return: A copy of its statistics; None for None
        """
        if env is None:
            return None
        settings: dict[str, Any] = {name: float(getattr(env, name)) for name in NUMBERS}
        settings |= {name: bool(getattr(env, name)) for name in FLAGS}
        settings["norm_obs_keys"] = env.norm_obs_keys
        return cls(settings, {name: value for rms, key in _rms(env) for name, value in _parts(key, rms)})

    def write(self, path: Path, metadata: dict[str, str]) -> None:
        """
        :param path: File to write
        :param metadata: Further strings of its header
        """
        tensors = {name: th.from_numpy(np.array(value, np.float64)) for name, value in self.statistics.items()}
        write_tensors(path, tensors, metadata | {"settings": json.dumps(self.settings)})

    @classmethod
    def read(cls, path: Path, observation_space: spaces.Space, mark: str | None = None) -> Normalization | None:
        """
        :param path: File
        :param observation_space: Observation space of the model
        :param mark: Fingerprint of the checkpoint that it should belong to; None: not looked at
        :return: What it holds, None if there is no such file
        :raises ValueError: if it holds something else, or statistics of other observations
        """
        if not path.is_file():
            return None
        infos, metadata = read_header(path)
        if mark is not None:
            check_mark(path.name, metadata, mark)
        settings = plain_metadata(path, metadata, "settings")
        _check_settings(path, settings)
        shapes = _shapes(settings, observation_space)
        found = {name: info.shape for name, info in infos.items() if info.dtype == "F64"}
        if found != shapes or len(found) != len(infos):
            raise ValueError(
                f"{path.name} holds statistics of other observations: {sorted(infos)} where the model's space needs "
                f"{sorted(shapes)} of its shapes in float64."
            )
        tensors = read_tensors(path, infos, LARGEST_FILE)
        return cls(settings, {name: tensor.numpy() for name, tensor in tensors.items()})

    def apply(self, env: VecEnv) -> VecNormalize:
        """
        An environment that normalises with these statistics.

        :param env: Vector environment; one that is a VecNormalize keeps its settings and gets the statistics
        :return: VecNormalize
        """
        layer: Any = env
        while layer is not None and not isinstance(layer, VecNormalize):
            layer = getattr(layer, "venv", None)
        if layer is None:
            layer = env = VecNormalize(env, **self.settings)
        self.fill(layer)
        return env  # type: ignore[return-value]  # at least one of its layers is

    def fill(self, env: VecNormalize) -> None:
        """
        :param env: VecNormalize that gets the statistics, and keeps its settings
        :raises ValueError: if it normalises observations of other shapes
        """
        for rms, key in _rms(env):
            parts = [self.statistics.get(f"{key}.{part}") for part in PARTS]
            if all(part is not None for part in parts):
                mean, var, count = (np.array(part) for part in parts)
                if mean.shape != rms.mean.shape:
                    raise ValueError(
                        f"The model's statistics are of observations of shape {mean.shape}, this environment's are of "
                        f"{rms.mean.shape}: pass one with the model's spaces, and wrap it in VecNormalize where it was "
                        "when the model was trained."
                    )
                rms.mean, rms.var, rms.count = mean, var, float(count)

    def acting(self, env: VecEnv) -> VecNormalize:
        """
        An environment to act in: statistics stand still, rewards are as they are.

        :param env: Vector environment
        :return: VecNormalize
        """
        normalized = self.apply(env)
        normalized.training, normalized.norm_reward = False, False
        return normalized

    def observation_statistics(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """
        :return: Mean and variance by key of the observation, "observation" where it is no dict; empty if observations
            are not normalised
        """
        if not self.settings["norm_obs"]:
            return {}
        names = [name.removesuffix(".mean") for name in self.statistics if name.endswith(".mean")]
        return {
            name.removeprefix(f"{WHOLE}/"): (self.statistics[f"{name}.mean"], self.statistics[f"{name}.var"])
            for name in names
            if name != RETURN
        }


def take_statistics(env: VecNormalize, data: ShardedDataset) -> None:
    """
    Give a VecNormalize that has seen nothing yet the statistics of recorded data; others keep theirs.

    :param env: The model's VecNormalize
    :param data: Recorded data, its observations and rewards as they are
    :raises ValueError: for observations of other shapes than those that it normalises
    """
    unknown = [(rms, key) for rms, key in _rms(env) if rms.count < 1 and (key != RETURN or env.norm_reward)]
    if not env.training or not unknown:
        return
    observations: Any = data.spread_observations() if any(key != RETURN for _, key in unknown) else None
    found = []
    for rms, key in unknown:
        values = observations[key.removeprefix(f"{WHOLE}/")] if isinstance(observations, dict) else observations
        values = data.spread_returns(env.gamma) if key == RETURN else values
        if values.shape[1:] != rms.mean.shape:
            raise ValueError(
                f"The data's observations are of shape {values.shape[1:]}, those that VecNormalize sees of "
                f"{rms.mean.shape}: wrap in VecNormalize last, around the wrappers that change observations."
            )
        found.append((rms, values))
    for rms, values in found:
        rms.update(values)


def _rms(env: VecNormalize) -> list[tuple[RunningMeanStd, str]]:
    """Running statistics with their names."""
    found: list[tuple[RunningMeanStd, str]] = [(env.ret_rms, RETURN)]
    if env.norm_obs:
        rms: Any = env.obs_rms
        found += [(value, f"{WHOLE}/{key}") for key, value in rms.items()] if isinstance(rms, dict) else [(rms, WHOLE)]
    return found


def _parts(key: str, rms: RunningMeanStd) -> list[tuple[str, np.ndarray]]:
    return [(f"{key}.{part}", np.array(getattr(rms, part), np.float64)) for part in PARTS]


def _check_settings(path: Path, settings: Any) -> None:
    keys = settings.get("norm_obs_keys") if isinstance(settings, Mapping) else None
    good = (
        isinstance(settings, Mapping)
        and settings.keys() == {*NUMBERS, *FLAGS, "norm_obs_keys"}
        and all(isinstance(settings[name], (int, float)) for name in NUMBERS)
        and all(isinstance(settings[name], bool) for name in FLAGS)
        and (keys is None or (isinstance(keys, list) and all(isinstance(key, str) for key in keys)))
    )
    if not good:
        raise ValueError(f"{path.name} holds settings that are not those of VecNormalize: {settings!r}.")


def _shapes(settings: Mapping[str, Any], space: spaces.Space) -> dict[str, tuple[int, ...]]:
    """Shapes of the statistics that a space needs."""
    shapes: dict[str, tuple[int, ...]] = {RETURN: ()}
    if settings["norm_obs"] and isinstance(space, spaces.Dict):
        keys = settings["norm_obs_keys"] if settings["norm_obs_keys"] is not None else list(space.spaces)
        unknown = [key for key in keys if key not in space.spaces]
        if unknown:
            raise ValueError(f"The statistics are of {unknown}, which the observations do not have.")
        shapes |= {f"{WHOLE}/{key}": tuple(space.spaces[key].shape or ()) for key in keys}
    elif settings["norm_obs"]:
        shapes[WHOLE] = tuple(space.shape or ())
    return {f"{key}.{part}": () if part == "count" else shape for key, shape in shapes.items() for part in PARTS}
