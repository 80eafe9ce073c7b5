import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from torch import nn

from sb3_mbdpo import CnnPolicy, MlpPolicy, MultiInputPolicy
from sb3_mbdpo.checkpoint_weights import (
    NoInitialization,
    TensorInfo,
    compare,
    fingerprint,
    implied_shapes,
    infos_of,
    optimizer_tensors,
    read_header,
    read_into,
    restore_optimizer,
    write_tensors,
)
from tests.fakes import ACTIONS, LEANING, TINY_SIZES, VECTOR, make_policy

# Channels first, as Stable-Baselines3 hands images to policies
FIRST = spaces.Box(0, 255, (3, 36, 36), np.uint8)


@pytest.mark.parametrize(
    ("policy", "space", "more"),
    [
        (MlpPolicy, VECTOR, {}),
        (MlpPolicy, VECTOR, {"episodic": False, "with_score": False, "with_energy": False, "energy_coef": 0.0}),
        (CnnPolicy, FIRST, {}),
        (MultiInputPolicy, spaces.Dict({"camera": FIRST, "gear": spaces.Discrete(3)}), {}),
        (MultiInputPolicy, LEANING.observation_space, {"tasks": LEANING}),
    ],
)
def test_shapes_are_known_without_the_weights(policy: Any, space: Any, more: dict[str, Any]) -> None:
    actions = LEANING.action_space if more.get("tasks") else ACTIONS
    arguments = TINY_SIZES | more
    built = policy(space, actions, lambda _: 1e-3, **arguments)
    assert implied_shapes(policy, space, actions, arguments) == infos_of(built.state_dict())


def test_shapes_need_no_optimizers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sb3_mbdpo.policies.build_optimizers", lambda *_: pytest.fail("optimizers were built"))
    assert implied_shapes(MlpPolicy, VECTOR, ACTIONS, TINY_SIZES)


def test_shapes_of_the_largest_model_take_no_memory() -> None:
    infos = implied_shapes(MlpPolicy, VECTOR, ACTIONS, {"model_size": 317})
    assert sum(th.Size(info.shape).numel() for info in infos.values()) > 5e8


def test_arguments_that_build_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="No policy can be built"):
        implied_shapes(MlpPolicy, VECTOR, ACTIONS, {"hook": print})


def test_without_initialization_no_number_is_drawn() -> None:
    before = th.random.get_rng_state()
    with NoInitialization():
        layer = nn.Linear(200, 200)
        nn.init.trunc_normal_(layer.weight)
        assert th.zeros(2).add_(1).tolist() == [1.0, 1.0]
    assert (th.random.get_rng_state() == before).all()
    assert layer.weight.requires_grad and nn.Linear(2, 2).weight.abs().sum() > 0


@pytest.mark.parametrize("at_once", [10**9, 1])
def test_tensors_come_back_into_a_module(at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sb3_mbdpo.checkpoint_weights.MOST_MAPPED_BYTES", at_once)
    first, second = make_policy(seed=1), make_policy(seed=2)
    write_tensors(tmp_path / "x.safetensors", first.state_dict(), {"fingerprint": "abc"})
    infos, metadata = read_header(tmp_path / "x.safetensors")
    assert infos == infos_of(first.state_dict()) and metadata == {"format": "pt", "fingerprint": "abc"}
    read_into(tmp_path / "x.safetensors", second)
    assert all((second.state_dict()[name] == value).all() for name, value in first.state_dict().items())


@pytest.mark.parametrize("value", [th.nan, th.inf, -th.inf])
def test_numbers_that_are_not_finite_are_refused(value: float, tmp_path: Path) -> None:
    tensors = {"weight": th.zeros(2, 3), "bias": th.tensor([0.0, value])}
    write_tensors(tmp_path / "x.safetensors", tensors, {})
    with pytest.raises(ValueError, match=r"x\.safetensors holds numbers that are not finite in bias"):
        read_into(tmp_path / "x.safetensors", nn.Linear(3, 2))


def test_fingerprints_tell_names_and_numbers_apart() -> None:
    tensors = {"a": th.arange(3.0), "b": th.zeros(0)}
    assert fingerprint(tensors) == fingerprint({"b": th.zeros(0), "a": th.arange(3.0)})
    others = [
        {"a": th.arange(3.0)},
        {"a": th.tensor([0, 1, 2.1]), "b": th.zeros(0)},
        {"c": tensors["a"], "b": tensors["b"]},
    ]
    assert len({fingerprint(tensors), *map(fingerprint, others)}) == 4


def test_differences_are_named_and_long_lists_cut() -> None:
    expected = {f"layer.{index}": TensorInfo("F32", (2, 3)) for index in range(20)}
    found = {"layer.0": TensorInfo("F32", (3, 2)), "other": TensorInfo("F32", ())}
    with pytest.raises(ValueError, match="layer") as caught:
        compare("model.safetensors", found, expected)
    text = str(caught.value)
    assert "layer.0 is F32[3, 2] instead of F32[2, 3]" in text and "too many: other" in text
    assert "and 13 more" in text and "layer.19" not in text
    compare("model.safetensors", expected, dict(expected))


def stepped(optimizer_class: Any, **kwargs: Any) -> tuple[nn.Linear, th.optim.Optimizer]:
    th.manual_seed(0)
    layer = nn.Linear(3, 2)
    optimizer = optimizer_class(layer.parameters(), lr=0.1, **kwargs)
    for _ in range(3):
        optimizer.zero_grad()
        layer(th.ones(1, 3)).pow(2).sum().backward()
        optimizer.step()
    return layer, optimizer


@pytest.mark.parametrize(
    ("optimizer_class", "kwargs"),
    [
        (th.optim.Adam, {"fused": True}),
        (th.optim.Adam, {"amsgrad": True}),
        (th.optim.AdamW, {}),
        (th.optim.SGD, {"momentum": 0.9}),
        (th.optim.SGD, {"fused": True}),
        *((getattr(th.optim, name), {}) for name in ("NAdam", "RAdam", "Adamax", "Adagrad", "Adadelta", "RMSprop")),
        (th.optim.RMSprop, {"centered": True, "momentum": 0.5}),
    ],
)
def test_optimizers_come_back(optimizer_class: Any, kwargs: dict[str, Any]) -> None:
    layer, optimizer = stepped(optimizer_class, **kwargs)
    tensors, plain = optimizer_tensors("policy.optimizer", optimizer)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    plain = json.loads(json.dumps(plain))
    other = nn.Linear(3, 2)
    other.load_state_dict(layer.state_dict())
    fresh = optimizer_class(other.parameters(), lr=0.5, **kwargs)
    restore_optimizer("policy.optimizer", fresh, tensors, plain)
    assert fresh.param_groups[0]["lr"] == 0.1
    for model, own in ((layer, optimizer), (other, fresh)):
        own.zero_grad()
        model(th.ones(1, 3)).sum().backward()
        own.step()
    assert (layer.weight == other.weight).all()


@pytest.mark.parametrize("change", ["index", "settings", "number", "missing group"])
def test_states_of_other_optimizers_are_refused(change: str) -> None:
    _, optimizer = stepped(th.optim.Adam)
    tensors, plain = optimizer_tensors("o", optimizer)
    if change == "index":
        tensors["o.9.exp_avg"] = th.zeros(2)
    elif change == "settings":
        plain["groups"][0]["hook"] = 1
    elif change == "number":
        plain["groups"][0]["lr"] = "os.system"
    else:
        plain["groups"] = []
    with pytest.raises(ValueError, match=r"optimizer.safetensors does not hold the state of this model's o .*remove"):
        restore_optimizer("o", th.optim.Adam(nn.Linear(3, 2).parameters()), tensors, plain)


SETTINGS: list[tuple[str, Any]] = [
    *(("betas", betas) for betas in (None, [], [0.9], [0.9, 2.0], [0.9, "x"], 0.9)),
    *(("eps", eps) for eps in (None, [], True, -1.0, "1e-8", float("nan"), float("inf"), 10**400)),
    *(("weight_decay", decay) for decay in (None, -1.0, 1e300, {})),
    *(("lr_scale", scale) for scale in (None, -1.0, True, [1.0])),
    ("lr", -1.0),
]


@pytest.mark.parametrize(("key", "value"), SETTINGS, ids=lambda part: str(part)[:12])
def test_settings_that_no_step_can_be_made_with_are_refused(key: str, value: Any) -> None:
    _, optimizer = stepped(th.optim.Adam)
    tensors, plain = optimizer_tensors("o", optimizer)
    fresh = th.optim.Adam(nn.Linear(3, 2).parameters())
    fresh.param_groups[0]["lr_scale"] = plain["groups"][0]["lr_scale"] = 1.0
    plain["groups"][0][key] = value
    with pytest.raises(ValueError, match=r"optimizer.safetensors does not hold the state of this model's o"):
        restore_optimizer("o", fresh, tensors, json.loads(json.dumps(plain)))


def test_flags_of_an_optimizer_are_the_models_own() -> None:
    _, optimizer = stepped(th.optim.Adam)
    tensors, plain = optimizer_tensors("o", optimizer)
    flags = ("maximize", "amsgrad", "fused", "foreach", "capturable", "differentiable")
    plain["groups"][0].update(dict.fromkeys(flags, True))
    layer = nn.Linear(3, 2)
    fresh = th.optim.Adam(layer.parameters(), foreach=True)
    restore_optimizer("o", fresh, tensors, json.loads(json.dumps(plain)))
    assert [fresh.param_groups[0][flag] for flag in flags] == [False, False, None, True, False, False]
    layer(th.ones(1, 3)).sum().backward()
    fresh.step()


@pytest.mark.parametrize(
    ("optimizer_class", "change"),
    [
        (th.optim.Adam, lambda t: t.pop("o.1.exp_avg_sq")),
        (th.optim.Adam, lambda t: [t.pop(f"o.{index}.exp_avg_sq") for index in (0, 1)]),
        (th.optim.Adam, lambda t: t.update({"o.0.max_exp_avg_sq": th.zeros(2, 3)})),
        (th.optim.Adam, lambda t: t.update({"o.0.exp_avg": t["o.0.exp_avg"].double()})),
        (th.optim.Adam, lambda t: t.update({"o.0.exp_avg": th.tensor(0.0)})),
        (th.optim.Adam, lambda t: t.update({"o.0.exp_avg": th.full((2, 3), th.nan)})),
        (th.optim.Adam, lambda t: t.update({"o.0.exp_avg_sq": th.full((2, 3), -1.0)})),
        (th.optim.Adam, lambda t: t.update({"o.0.step": th.zeros(2, 3)})),
        (th.optim.Adam, lambda t: t.update({"o.0.step": th.tensor(-1.0)})),
        (th.optim.Adam, lambda t: t.update({f"o.-1.{key}": t.pop(f"o.1.{key}") for key in ("step", "exp_avg")})),
        # Begins with a state, and cannot do without
        (th.optim.Adagrad, lambda t: [t.pop(f"o.0.{key}") for key in ("step", "sum")]),
        (partial(th.optim.SGD, momentum=0.9), lambda t: t.update({"o.0.momentum_buffer": th.full((2, 3), th.inf)})),
    ],
)
def test_states_that_no_step_can_be_made_from_are_refused(optimizer_class: Any, change: Any) -> None:
    _, optimizer = stepped(optimizer_class)
    tensors, plain = optimizer_tensors("o", optimizer)
    fresh = optimizer_class(nn.Linear(3, 2).parameters())
    restore_optimizer("o", fresh, dict(tensors), json.loads(json.dumps(plain)))
    change(tensors)
    with pytest.raises(ValueError, match=r"optimizer.safetensors does not hold the state of this model's o"):
        restore_optimizer("o", optimizer_class(nn.Linear(3, 2).parameters()), tensors, json.loads(json.dumps(plain)))
