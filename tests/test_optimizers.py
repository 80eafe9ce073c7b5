from typing import Any

import pytest
import torch as th

from tests.fakes import make_policy


@pytest.mark.parametrize("with_score", [True, False])
def test_each_parameter_belongs_to_one_optimizer(with_score: bool) -> None:
    policy = make_policy(with_score=with_score, encoder_lr_scale=0.1)
    optimizers = [policy.optimizer, policy.prior_optimizer]
    optimizers += [policy.score_optimizer] if policy.score_optimizer is not None else []
    owned = [id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    targets = {id(p) for p in policy.world_model.target_critics.parameters()}
    assert len(owned) == len(set(owned)) and set(owned) == {id(p) for p in policy.parameters()} - targets
    assert [group["lr"] for group in policy.optimizer.param_groups] == pytest.approx([3e-5, 3e-4])
    assert policy.prior_optimizer.param_groups[0]["eps"] == 1e-5


def test_own_optimizers() -> None:
    """One kernel for all parameters where the optimizer has it, unless the user asks for something else."""

    class Plain(th.optim.SGD):
        def __init__(self, params: Any, lr: float):
            super().__init__(params, lr)

    assert make_policy().optimizer.defaults["fused"]
    assert not make_policy(optimizer_kwargs={"foreach": True}).optimizer.defaults["fused"]
    assert make_policy(optimizer_class=th.optim.AdamW).optimizer.defaults["fused"]
    assert isinstance(make_policy(optimizer_class=Plain).prior_optimizer, Plain)
