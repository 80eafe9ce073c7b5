"""What makes the models of several processes one: the same arguments and data, the same weights, and no drift."""

import hashlib
import inspect
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING

import torch as th

from sb3_mbdpo.policies import MBDPOPolicy
from sb3_mbdpo.ranks import Ranks, described
from sb3_mbdpo.shards import ShardedDataset

if TYPE_CHECKING:
    from sb3_mbdpo.mbdpo import MBDPO

# Arguments that may differ from one process to the next: where it runs and what it says
FREE = ("self", "env", "policy", "verbose", "device", "tensorboard_log", "stats_window_size", "_init_setup_model")


def facts_of_model(model: "MBDPO") -> dict[str, str]:
    """
    :param model: A model
    :return: What must be the same in all processes that train it, by name: arguments, progress and versions
    """
    names = [name for name in inspect.signature(type(model).__init__).parameters if name not in FREE]
    facts = {name: described(getattr(model, name)) for name in names if name != "tasks"}
    rates = [model.lr_schedule(remaining) for remaining in (1.0, 0.5, 0.0)]
    facts |= {"policy": described(model.policy_class), "tasks": described(model._tasks), "learning_rate": str(rates)}
    facts["number of steps so far"] = f"{model.num_timesteps} ({model._n_updates} updates)"
    facts["optimizer states"] = str([len(optimizer.state) for optimizer in optimizers_of(model.policy)])
    facts["parameters"] = str([tuple(p.shape) for p in model.policy.parameters() if p.requires_grad])
    facts |= {f"version of {package}": version(package) for package in ("torch", "sb3-mbdpo")}
    return facts


def join(ranks: Ranks, model: "MBDPO", facts: Mapping[str, str]) -> None:
    """
    Make one model of those of all processes, or refuse in all of them.

    :param ranks: The processes
    :param model: This process's, which gets the first one's state
    :param facts: What else must be the same, by name
    :raises ValueError: in every process, if something is not the same, or a batch cannot be shared
    """
    if ranks.size == 1:
        return
    assert model.batch_size is not None
    ranks.agree(facts_of_model(model) | dict(facts))
    ranks.check_divides(model.gradient_accumulation, batch_size=model.batch_size)
    if model.policy.score_optimizer is not None:
        ranks.check_divides(model.gradient_accumulation, score_batch_size=model.learner.score_batch_size)
    share_state(ranks, model.policy)


def facts_of_data(data: ShardedDataset) -> dict[str, str]:
    """
    :param data: Set of shards
    :return: What must be the same in all processes that learn from it; its place on the disk need not be
    """
    digest = hashlib.sha256(data.description.to_json().encode()).hexdigest()[:16]
    count = f"{data.n_episodes} episodes, {len(data)} transitions, {digest}"
    return {"data": count, "horizon": str(data.horizon), "task_sampling of the data": data.task_sampling}


def optimizers_of(policy: MBDPOPolicy) -> list[th.optim.Optimizer]:
    """
    :param policy: A policy
    :return: Its optimizers, in the order of updates
    """
    score = [] if policy.score_optimizer is None else [policy.score_optimizer]
    return [policy.optimizer, policy.prior_optimizer, *score]


def share_state(ranks: Ranks, policy: MBDPOPolicy) -> None:
    """
    Give all processes the first one's weights, running statistics, optimizer states and random generator.

    :param ranks: The processes
    :param policy: Policy of the same sizes in all of them, changed in place
    """
    if ranks.size == 1:
        return
    generator = policy.generator.get_state()
    ranks.broadcast([*policy.state_dict().values(), *_optimizer_tensors(policy), generator])
    policy.generator.set_state(generator)
    if policy.terminates.item() > 0:
        policy.mark_episodic()


def check_no_drift(ranks: Ranks, policy: MBDPOPolicy) -> None:
    """
    Compare weights and random generators: a callback that changes the model in the first process would go unnoticed.

    :param ranks: The processes
    :param policy: The policy
    :raises ValueError: in every process, if they are not the same any more
    """
    if ranks.size == 1:
        return
    generator = hashlib.sha256(policy.generator.get_state().numpy().tobytes()).hexdigest()[:16]
    sums = th.stack([value.double().sum() for value in policy.state_dict().values()])
    weights = hashlib.sha256(sums.cpu().numpy().tobytes()).hexdigest()[:16]
    ranks.agree({"weights": weights, "random numbers of the policy": generator})


def _optimizer_tensors(policy: MBDPOPolicy) -> Iterator[th.Tensor]:
    for optimizer in optimizers_of(policy):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                state = optimizer.state.get(parameter, {})
                yield from (state[name] for name in sorted(state) if isinstance(state[name], th.Tensor))
