import json
import re
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.noise import ActionNoise, NormalActionNoise, VectorizedActionNoise
from stable_baselines3.common.type_aliases import TrainFreq, TrainFrequencyUnit
from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule, LinearSchedule
from torch import nn

from sb3_mbdpo import MBDPO
from sb3_mbdpo.activations import Mish
from sb3_mbdpo.checkpoint_format import (
    ACTIVATIONS,
    CLASSES,
    LIMITS,
    argument_names,
    decode,
    decode_arguments,
    encode,
    encode_schedule,
)


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        3,
        -0.1,
        "text",
        float("inf"),
        [1, [2, "x"]],
        (0.9, (1, 2)),
        {"a": {"b": (1,)}},
        nn.SiLU,
        nn.Mish,
        Mish,
        th.optim.RAdam,
    ],
)
def test_values_come_back_as_they_went(value: Any) -> None:
    written = json.loads(json.dumps(encode(value, "x"), allow_nan=False))
    found = decode(written, {}, "x")
    assert found == value and type(found) is type(value)


def test_numbers_of_numpy_become_plain_ones() -> None:
    assert encode({"a": np.float32(0.5), "b": np.int64(3)}, "x") == {"a": 0.5, "b": 3}
    assert encode(TrainFreq(4, TrainFrequencyUnit.EPISODE), "x") == [4, "episode"]
    assert np.isnan(decode(encode(float("nan"), "x"), {}, "x"))


@pytest.mark.parametrize("value", [print, {1: 2}, {"$class": "x"}, object(), np.zeros(2)])
def test_what_json_cannot_hold_is_named(value: Any) -> None:
    with pytest.raises(ValueError, match=r"policy_kwargs.*cannot"):
        encode({"kwargs": value}, "policy_kwargs")


def test_schedules() -> None:
    assert encode_schedule(FloatSchedule(3e-4), 3e-4) == 3e-4
    assert encode_schedule(ConstantSchedule(0.1), 0.1) == 0.1
    written = encode_schedule(FloatSchedule(LinearSchedule(1.0, 0.2, 0.5)), 1.0)
    assert [decode(written, {}, "x")(left) for left in (1, 0.75, 0)] == [1.0, 0.6, 0.2]
    with pytest.warns(UserWarning, match="schedule of your own"):
        assert encode_schedule(lambda left: left, 0.7) == 0.7


class OwnNoise(ActionNoise):
    """Noise of the user's own."""

    def __call__(self) -> np.ndarray:
        return np.zeros(2)


def test_noise() -> None:
    noise = NormalActionNoise(np.array([0.1, 0.2]), np.array([0.3, 0.4]), np.float64)
    found = decode(encode(VectorizedActionNoise(noise, 3), "action_noise"), {}, "action_noise")
    assert type(found) is NormalActionNoise and repr(found) == repr(noise) and found().dtype == np.float64
    written = encode(OwnNoise(), "action_noise")
    with pytest.raises(ValueError, match="custom_objects"):
        decode(written, {}, "action_noise")
    own = OwnNoise()
    assert decode(written, {"OwnNoise": own}, "action_noise") is own


@pytest.mark.parametrize(
    "written",
    [
        {"$class": "os.system"},
        {"$class": ["SiLU"]},
        {"$custom": "torch.nn.SiLU"},
        {"$custom": 3},
        {"$tuple": "ab"},
        {"$float": "1"},
        {"$schedule": "LinearSchedule", "start": 1},
        {"$schedule": "exec"},
        {"$noise": "NormalActionNoise", "mu": [0], "sigma": [1], "dtype": "object"},
        {"$noise": "Laplace", "mu": [0], "sigma": [1], "dtype": "float32"},
        {"$reduce": ["os.system", "x"]},
        [{"$eval": "1"}],
    ],
)
def test_nothing_else_is_decoded(written: Any) -> None:
    with pytest.raises(ValueError, match="policy_kwargs"):
        decode(written, {}, "policy_kwargs")


def test_classes_on_the_list_are_what_they_are_called() -> None:
    for name in ACTIVATIONS:
        # An activation that heads share has no parameters
        assert CLASSES[name].__module__.startswith("torch.nn") and not list(CLASSES[name]().parameters())
    assert len(set(CLASSES.values())) == len(CLASSES)


def test_every_constructor_argument_is_written_but_those_of_the_machine() -> None:
    names = argument_names(MBDPO)
    assert {"learning_rate", "policy_kwargs", "seed", "n_samples", "verbose"} <= set(names)
    assert not {"env", "device", "compile", "tensorboard_log", "tasks", "policy"} & set(names)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 2.5}, "batch_size must be"),
        ({"batch_size": True}, "batch_size must be"),
        ({"act_mode": None}, "act_mode must be str"),
        ({"train_freq": [1, 2]}, "train_freq must be"),
        ({"policy_kwargs": []}, "policy_kwargs must be"),
        ({"action_noise": "loud"}, "action_noise must be"),
        ({"replay_buffer_class": "x"}, "replay_buffer_class must be"),
        ({"learning_rate": "1e-3"}, "learning_rate must be"),
        ({"device": "cpu"}, "no arguments ['device']"),
        ([], "must be an object"),
        *(({name: 10 * limit}, f"{name}={10 * limit} in the file is absurd") for name, limit in LIMITS.items()),
    ],
)
def test_arguments_of_another_type_or_size_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        decode_arguments(MBDPO, arguments, {})


def test_real_numbers_written_as_whole_ones_are_real_whole_ones_stay_whole() -> None:
    written = {"temperature": 10**30, "learning_rate": 1, "prior_margin": -0, "model_size": 5, "episodic": True}
    found = decode_arguments(MBDPO, written | {"warm_denoising_steps": 2, "seed": 3, "train_freq": 4, "horizon": 3}, {})
    assert [type(found[name]) for name in ("temperature", "learning_rate", "prior_margin")] == [float] * 3
    whole = {name: found[name] for name in ("model_size", "warm_denoising_steps", "seed", "train_freq", "horizon")}
    assert list(whole.values()) == [5, 2, 3, 4, 3] and {type(value) for value in whole.values()} == {int}
    assert found["temperature"] == 1e30 and found["episodic"] is True
    with pytest.raises(ValueError, match="energy_coef in the file is absurd: no number of 401 digits"):
        decode_arguments(MBDPO, {"energy_coef": 10**400}, {})


def test_arguments_that_fit() -> None:
    found = decode_arguments(MBDPO, {"train_freq": [2, "episode"], "tau": 1, "episodic": None, "batch_size": 7}, {})
    assert found == {"train_freq": (2, "episode"), "tau": 1, "episodic": None, "batch_size": 7}
