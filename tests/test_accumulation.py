"""A batch in parts gives what the whole batch gives."""

from pathlib import Path
from typing import Any

import pytest
import torch as th

from sb3_mbdpo import MBDPO
from sb3_mbdpo.accumulation import AccumulatingLearner
from sb3_mbdpo.buffers import SequenceSamples
from sb3_mbdpo.shards import ShardedDataset
from tests.fakes import VECTOR, make_policy, toy_envs
from tests.processes import launch, learn, toy_model, toy_shards
from tests.test_updates import IMAGE, learner_for, samples

PARTS = 4
# Steps of plain descent are as far apart as gradients; Adam's would show little but their signs
SGD: dict[str, Any] = {"optimizer_class": th.optim.SGD}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({"dropout": 0.1}, {}),
    "imagined": ({}, {"target_horizon": 2, "prior_horizon": 2}),
    "by score": ({"episodic": True}, {"bootstrap": "score"}),
    "images": ({"observation_space": IMAGE}, {"score_interval": 3}),
}


def masked(case: str) -> SequenceSamples:
    """Windows some of which end early, so that parts have different numbers of valid steps."""
    whole = samples(space=IMAGE if case == "images" else VECTOR)
    whole.masks[2, :3] = 0
    whole.masks[1:, 5] = 0
    whole.terminations[0, 5] = 1
    return whole


def updated(case: str, parts: int) -> tuple[dict[str, th.Tensor], dict[str, th.Tensor]]:
    """State after two updates, generator included, and the metrics of the second."""
    policy_kwargs, kwargs = CASES[case]
    policy = make_policy(**(SGD | policy_kwargs))
    for optimizer in (policy.optimizer, policy.prior_optimizer, policy.score_optimizer):
        for group in optimizer.param_groups:
            group["lr"] = 0.01
    kind = {} if parts == 1 else {"kind": AccumulatingLearner, "parts": parts}
    learner = learner_for(policy, max_grad_norm=1e9, tau=0.1, **kwargs, **kind)
    metrics: dict[str, th.Tensor] = {}
    for index in range(2):
        metrics = learner.update(masked(case), index)
    return policy.state_dict() | {"generator": policy.generator.get_state()}, metrics


@pytest.mark.parametrize("case", CASES)
def test_the_result_is_that_of_the_whole_batch(case: str) -> None:
    (whole, metrics), (parts, metrics_of_parts) = updated(case, 1), updated(case, PARTS)
    for name, value in whole.items():
        th.testing.assert_close(parts[name], value, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    assert metrics.keys() == metrics_of_parts.keys()
    for name, value in metrics.items():
        if name != "train/cross_td_error":
            th.testing.assert_close(metrics_of_parts[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_unequal_parts_are_refused() -> None:
    learner = learner_for(make_policy(), kind=AccumulatingLearner, parts=5)
    with pytest.raises(ValueError, match="multiple of gradient_accumulation"):
        learner.update(samples())


def test_activations_of_one_part_at_a_time() -> None:
    sizes = [max(graph_bytes(parts)) for parts in (1, PARTS)]
    assert sizes[1] < sizes[0] / 3


def graph_bytes(parts: int) -> list[int]:
    """Bytes kept for the backward pass of each loss of an update from 64 windows."""
    learner = learner_for(make_policy(), AccumulatingLearner, parts=parts, score_batch_size=16)
    found: list[int] = [0]
    backward = learner._backward

    def count(*args: Any) -> None:
        found.append(0)
        backward(*args)

    def pack(tensor: th.Tensor) -> th.Tensor:
        found[-1] += tensor.nbytes
        return tensor

    learner._backward = count  # type: ignore[method-assign]
    with th.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        learner.update(samples(size=64))
    return found


def test_the_argument(tmp_path: Path) -> None:
    kwargs: dict[str, Any] = {"preset": "debug", "device": "cpu", "seed": 0, "batch_size": 8, "buffer_size": 200}
    kwargs |= {"learning_starts": 10, "score_batch_size": 4}
    model = MBDPO("MlpPolicy", toy_envs(2), gradient_accumulation=2, **kwargs).learn(30)
    assert isinstance(model.learner, AccumulatingLearner) and model._n_updates == 20
    model.save(tmp_path / "model")
    loaded = MBDPO.load(tmp_path / "model", device="cpu")
    assert loaded.gradient_accumulation == 2 and isinstance(loaded.learner, AccumulatingLearner)
    model.save_pretrained(tmp_path / "folder", n_eval_episodes=0)
    assert MBDPO.from_pretrained(tmp_path / "folder", device="cpu").gradient_accumulation == 2
    assert MBDPO.load(tmp_path / "model", device="cpu", gradient_accumulation=1).learner.__class__.__name__ == "Learner"
    with pytest.raises(ValueError, match=r"batch_size must be a multiple of gradient_accumulation \(3\)"):
        MBDPO("MlpPolicy", toy_envs(2), gradient_accumulation=3, **kwargs)
    with pytest.raises(ValueError, match="score_batch_size must be a multiple"):
        MBDPO("MlpPolicy", toy_envs(2), gradient_accumulation=8, **kwargs)
    with pytest.raises(ValueError, match="gradient_accumulation must be a whole number of at least 1"):
        MBDPO("MlpPolicy", toy_envs(2), gradient_accumulation=0, **kwargs)


def test_parts_of_the_shares_of_two_processes(tmp_path: Path) -> None:
    data = toy_shards(tmp_path / "data", 3)
    kwargs: dict[str, Any] = {"policy_kwargs": {"dropout": 0.1, "optimizer_kwargs": {"eps": 1e-5}}}
    kwargs["score_batch_size"] = 8
    alone = toy_model(data, **kwargs).learn_offline(ShardedDataset(data), 6)
    launch(learn, 2, data, tmp_path / "model.zip", 6, kwargs | {"gradient_accumulation": 2})
    together = MBDPO.load(tmp_path / "model.zip", device="cpu").policy.state_dict()
    for name, value in alone.policy.state_dict().items():
        th.testing.assert_close(together[name], value, rtol=0, atol=1e-5, msg=name)
