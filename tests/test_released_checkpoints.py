"""Reading released files; that what is read computes the released numbers is checked in test_golden.py."""

import io
import pathlib
import pickle
import re
import subprocess
from collections.abc import Callable
from typing import Any

import pytest
import torch as th

from sb3_mbdpo.encoders import PixelEncoder
from sb3_mbdpo.released_checkpoints import load_released_checkpoint

GOLDEN = pathlib.Path(__file__).parent / "data" / "golden"
CASES = ("single", "multitask", "episodic", "pixels")
CRITIC_FIELDS = ("weight", "bias", "ln.weight", "ln.bias")
Weights = dict[str, th.Tensor]


def weights_of(case: str) -> Weights:
    content = th.load(GOLDEN / f"{case}.pt", weights_only=True)
    return dict(content.get("model", content))


@pytest.fixture
def load(tmp_path: pathlib.Path) -> Callable[..., Any]:
    def save_and_load(content: Any, **kwargs: Any) -> Any:
        th.save(content, tmp_path / "file.pt")
        return load_released_checkpoint(tmp_path / "file.pt", **kwargs)

    return save_and_load


def without(weights: Weights, *patterns: str) -> Weights:
    """The weights less those whose name starts with one of the patterns."""
    return {key: value for key, value in weights.items() if not re.match("|".join(patterns), key)}


def older_layout(weights: Weights) -> Weights:
    """As TD-MPC2's first releases stored it: critics in numbered lists, without copies and without bounds."""
    kept = without(
        weights, "_detach_Qs", r"_Qs\.module", r"_target_Qs\.module", "log_std", "_F", "_score", "_action_masks"
    )
    older = {}
    for key, value in kept.items():
        match = re.fullmatch(r"(_Qs\.params|_target_Qs_params)\.(\d+)\.(.+)", key)
        if match:
            number = 4 * int(match[2]) + CRITIC_FIELDS.index(match[3])
            key = f"{match[1].replace('_target_Qs_params', '_target_Qs.params')}.{number}"
        older[key] = value
    return older


# --- layouts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_older_layout_holds_the_same_model(case: str, load: Callable[..., Any]) -> None:
    weights = weights_of(case)
    older = older_layout(weights)
    assert "_Qs.params.0" in older and "_target_Qs.params.9" in older and "_Qs.params.10" not in older
    kwargs = {"action_dims": tuple(weights["_action_masks"].sum(-1).int().tolist())} if case == "multitask" else {}
    new, old = load({"model": weights}), load({"model": older}, horizon=4, **kwargs)
    assert old.energy is None and old.score is None and old.horizon == 4
    assert (old.log_std_min, old.log_std_max) == (-10.0, 2.0)
    expected = new.state_dict()
    for key, value in old.state_dict().items():
        assert th.equal(value, expected[key]), key
    missing = {key.split(".")[0] for key in expected} - {key.split(".")[0] for key in old.state_dict()}
    assert missing == {"energy", "score"}


def test_flat_files_without_the_outer_key(load: Callable[..., Any]) -> None:
    weights = weights_of("single")
    nested, flat = load({"model": weights}).state_dict(), load(weights).state_dict()
    assert all(th.equal(nested[key], flat[key]) for key in nested)


def test_targets_are_their_own_weights(load: Callable[..., Any]) -> None:
    """The two ensembles must not be mixed up, nor share memory."""
    weights = weights_of("single")
    key = "_target_Qs_params.2.weight"
    weights[key] = weights[key] + 1
    model = load(weights)
    th.testing.assert_close(model.target_critics.weights[2].transpose(1, 2), weights[key])
    th.testing.assert_close(model.critics.weights[2].transpose(1, 2), weights["_Qs.params.2.weight"])
    assert not any(parameter.requires_grad for parameter in model.target_critics.parameters())
    assert all(parameter.requires_grad for parameter in model.critics.parameters())


def test_bounds_of_the_prior_are_read(load: Callable[..., Any]) -> None:
    weights = weights_of("single") | {"log_std_min": th.tensor(-4.0), "log_std_dif": th.tensor(5.0)}
    model = load(weights)
    assert (model.log_std_min, model.log_std_max) == (-4.0, 1.0)


def test_running_statistics_start_anew(load: Callable[..., Any]) -> None:
    model = load(weights_of("single"))
    assert (model.energy_mean.item(), model.energy_std.item(), model.prior_scale.item()) == (0.0, 1.0, 1.0)


def test_pixels_become_a_pixel_encoder(load: Callable[..., Any]) -> None:
    assert isinstance(load(weights_of("pixels")).encoder, PixelEncoder)


# --- refusals -------------------------------------------------------------------------------------------------------


def test_multitask_without_masks_asks_for_them(load: Callable[..., Any]) -> None:
    weights = without(weights_of("multitask"), "_action_masks")
    n_tasks = len(weights["_task_emb.weight"])
    with pytest.raises(ValueError, match="action_dims"):
        load(weights)
    with pytest.raises(ValueError, match=f"{n_tasks} tasks"):
        load(weights, action_dims=(1,) * (n_tasks + 1))
    with pytest.raises(ValueError, match="at most"):
        load(weights, action_dims=(99,) * n_tasks)
    assert load(weights, action_dims=(1,) * n_tasks).action_masks.sum(-1).tolist() == [1.0] * n_tasks


@pytest.mark.parametrize("case", ["single", "episodic"])
@pytest.mark.parametrize(
    "key",
    [
        "_encoder.state.0.weight",
        "_encoder.state.1.ln.bias",
        "_dynamics.0.weight",
        "_dynamics.2.weight",
        "_dynamics.1.ln.weight",
        "_reward.2.weight",
        "_pi.2.bias",
        "_Qs.params.0.weight",
        "_Qs.params.1.ln.bias",
        "_target_Qs_params.0.bias",
        "_score.0.weight",
        "_score.2.bias",
        "_F.0.weight",
        "_F.1.weight",
    ],
)
def test_a_missing_key_is_refused(case: str, key: str, load: Callable[..., Any]) -> None:
    weights = weights_of(case)
    del weights[key]
    with pytest.raises(ValueError, match=r"nothing was loaded"):
        load(weights)


@pytest.mark.parametrize(
    "key", ["_extra.weight", "_dynamics.7.weight", "_Qs.params.0.scale", "_Qs.params.99", "mystery"]
)
def test_an_unknown_key_is_refused(key: str, load: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="unknown"):
        load(weights_of("single") | {key: th.zeros(3)})


@pytest.mark.parametrize(
    "key",
    [
        "_encoder.state.1.bias",
        "_dynamics.1.weight",
        "_reward.0.weight",
        "_pi.0.weight",
        "_F.2.weight",
        "_Qs.params.1.weight",
        "_Qs.params.2.bias",
        "_target_Qs_params.0.ln.weight",
        "_score.1.weight",
    ],
)
def test_another_shape_is_refused_and_shown(key: str, load: Callable[..., Any]) -> None:
    weights = weights_of("single")
    weights[key] = th.cat([weights[key], weights[key]], dim=-1)
    with pytest.raises(ValueError, match=r"other shapes.*expected \(.*\), found \("):
        load(weights)


@pytest.mark.parametrize(
    ("key", "shape"), [("_Qs.params.0.weight", (-1,)), ("_dynamics.1.weight", ()), ("_pi.2.weight", (1, 4, 32))]
)
def test_another_number_of_dimensions_is_refused(key: str, shape: tuple[int, ...], load: Callable[..., Any]) -> None:
    weights = weights_of("single")
    weights[key] = weights[key].flatten()[0] if shape == () else weights[key].reshape(shape)
    with pytest.raises(ValueError, match="nothing was loaded"):
        load(weights)


@pytest.mark.parametrize(
    "content",
    [
        [th.zeros(3)],
        th.zeros(3),
        {"model": {"a": {"b": th.zeros(2)}}},
        {"model": 3},
        {},
        {"actor.0.weight": th.zeros(4, 4), "actor.0.bias": th.zeros(4)},
    ],
    ids=["list", "tensor", "nested", "number", "empty", "another model"],
)
def test_something_else_is_refused(content: Any, load: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="not a checkpoint of MBDPO or TD-MPC2"):
        load(content)


def test_another_group_size_is_refused(load: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="simnorm_dim"):
        load(weights_of("single"), simnorm_dim=7)


class Trap:
    """Unpickling it would run a command."""

    def __init__(self, target: pathlib.Path):
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return subprocess.check_call, (["touch", str(self.target)],)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_file_is_not_run(tmp_path: pathlib.Path, legacy: bool) -> None:
    target = tmp_path / "ran"
    buffer = io.BytesIO()
    th.save(weights_of("single") | {"trap": Trap(target)}, buffer, _use_new_zipfile_serialization=not legacy)
    (tmp_path / "trap.pt").write_bytes(buffer.getvalue())
    with pytest.raises(pickle.UnpicklingError):
        load_released_checkpoint(tmp_path / "trap.pt")
    assert not target.exists()
