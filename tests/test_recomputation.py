"""Activations that are computed again give the same gradients from less memory."""

from pathlib import Path
from typing import Any

import pytest
import torch as th

from sb3_mbdpo import MBDPO
from sb3_mbdpo.accumulation import AccumulatingLearner
from sb3_mbdpo.hardware import recomputed
from sb3_mbdpo.losses import draw_update_noise
from sb3_mbdpo.updates import Learner
from tests.fakes import make_policy, toy_envs
from tests.test_accumulation import CASES, PARTS, masked
from tests.test_updates import learner_for, samples


@pytest.mark.parametrize("parts", [1, PARTS])
@pytest.mark.parametrize("case", CASES)
def test_updates_are_the_same_to_the_last_bit(case: str, parts: int) -> None:
    found = []
    for wanted in (False, True):
        policy_kwargs, kwargs = CASES[case]
        policy = make_policy(**policy_kwargs)
        kind: dict[str, Any] = {} if parts == 1 else {"kind": AccumulatingLearner, "parts": parts}
        learner = learner_for(policy, activation_checkpointing=wanted, **kind, **kwargs)
        before, calls = th.get_rng_state(), forwards(learner)
        metrics = learner.update(masked(case))
        assert th.equal(th.get_rng_state(), before), "the global generator was used"
        found.append((policy.state_dict() | metrics, calls["reward"]))
    (kept, once), (anew, again) = found
    assert all(th.equal(kept[name], anew[name]) for name in kept)
    assert again > once, "nothing was computed again"


def forwards(learner: Learner) -> dict[str, int]:
    """Counts the calls of the reward head."""
    calls = {"reward": 0}

    def count(*_: Any) -> None:
        calls["reward"] += 1

    # Before the head, which stops where nothing more is needed
    learner.model.reward.register_forward_pre_hook(count)
    return calls


def test_less_is_kept() -> None:
    kept, anew = (saved_bytes(wanted) for wanted in (False, True))
    assert anew < kept / 3


def saved_bytes(wanted: bool) -> int:
    """Bytes kept for the backward passes of an update from 64 windows, each tensor's memory once."""
    learner = learner_for(make_policy(episodic=True), activation_checkpointing=wanted, score_batch_size=16)
    sizes: dict[int, int] = {}

    def pack(tensor: th.Tensor) -> th.Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    own = {parameter.untyped_storage().data_ptr() for parameter in learner.policy.parameters()}
    # Up to the backward pass of each loss: what it computes again is gone before the next
    with th.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        batch = learner.encode(samples(size=64))
        noise = draw_update_noise(learner.model, batch.actions, learner.policy.generator)
        learner.loss_of_world_model(batch, noise)
    return sum(size for place, size in sizes.items() if place not in own)


def test_the_argument(tmp_path: Path) -> None:
    kwargs: dict[str, Any] = {"preset": "debug", "device": "cpu", "seed": 0, "batch_size": 8, "buffer_size": 200}
    models = [
        MBDPO("MlpPolicy", toy_envs(2), activation_checkpointing=wanted, learning_starts=10, **kwargs).learn(30)
        for wanted in (False, True)
    ]
    kept, anew = (model.policy.state_dict() for model in models)
    assert all(th.equal(kept[name], anew[name]) for name in kept)
    models[1].save(tmp_path / "model")
    assert MBDPO.load(tmp_path / "model", device="cpu").policy.world_model.recompute
    with pytest.raises(ValueError, match="activation_checkpointing must be True or False"):
        MBDPO("MlpPolicy", toy_envs(2), activation_checkpointing=1, **kwargs)  # type: ignore[arg-type]


def test_without_gradients_nothing_is_wrapped() -> None:
    calls = []
    with th.no_grad():
        assert recomputed(True, lambda x: calls.append(1) or x, th.ones(1)) == 1  # type: ignore[func-returns-value]
    assert len(calls) == 1
