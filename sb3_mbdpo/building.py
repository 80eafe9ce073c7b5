"""What MBDPO's arguments become, at first and when they change: those of its policy and of its learner."""

from collections.abc import Callable, Collection
from dataclasses import replace
from operator import attrgetter
from typing import TYPE_CHECKING, Any, cast

from sb3_mbdpo.accumulation import AccumulatingLearner
from sb3_mbdpo.captured_updates import CapturedLearner
from sb3_mbdpo.hardware import resolve_dtype
from sb3_mbdpo.losses import LossCoefficients
from sb3_mbdpo.search_config import OF_SEARCH, warm_steps_of, with_samples
from sb3_mbdpo.updates import Learner

if TYPE_CHECKING:
    from sb3_mbdpo.mbdpo import MBDPO

# Arguments of the algorithm that the policy or the learner takes under the same name
OF_POLICY = (
    "model_size",
    "horizon",
    "denoising_steps",
    "n_samples",
    "n_elites",
    "n_prior_trajectories",
    "temperature",
    "beta_start",
    "beta_end",
    "energy_coef",
    "energy_unit",
    "prior_margin",
    "exploration_noise",
    "act_mode",
    "episodic",
    "encoder_lr_scale",
    "compile",
    "warm_denoising_steps",
    "seed",
)
OF_LEARNER = (
    "tau",
    "bootstrap",
    "target_horizon",
    "prior_horizon",
    "policy_delay",
    "energy_interval",
    "score_coef",
    "score_batch_size",
    "score_samples",
    "score_interval",
    "max_grad_norm",
    "activation_checkpointing",
)
# Weights of the losses by the learner's names
COEFFICIENTS = {
    "consistency": "consistency_coef",
    "reward": "reward_coef",
    "value": "value_coef",
    "termination": "termination_coef",
    "energy": "energy_loss_coef",
    "entropy": "entropy_coef",
    "rho": "rho",
    "saturation": "saturation_coef",
}
# Decided when a model is built, networks and schedules depend on them. `compile` belongs to a machine rather than to a
# model: it counts when one is built or loaded
FIXED = (
    "model_size",
    "horizon",
    "denoising_steps",
    "beta_start",
    "beta_end",
    "encoder_lr_scale",
    "search_dtype",
    "update_dtype",
    "gradient_accumulation",
    "activation_checkpointing",
    "episodic",
)
# What else can be changed at any time
FOLLOWED = (
    "gamma",
    "exploration_noise",
    "act_mode",
    "warm_denoising_steps",
    "behaviour_coef",
    "task_sampling",
    "learning_rate",
    "train_freq",
)
ARGUMENTS = tuple(dict.fromkeys((*OF_SEARCH, *OF_LEARNER, *COEFFICIENTS.values(), *FOLLOWED, *FIXED)))
_read: Callable[[Any], tuple[Any, ...]] = attrgetter(*ARGUMENTS)


def policy_arguments(model: "MBDPO") -> dict[str, Any]:
    """
    :param model: Algorithm, its arguments resolved
    :return: Its own arguments that the policy takes, by name
    :raises ValueError: for an unknown ``search_dtype``
    """
    return {name: getattr(model, name) for name in OF_POLICY} | {
        "discount": model.gamma if model.tasks is None else max(model.tasks.discounts),
        "tasks": model._tasks,
        "search_dtype": resolve_dtype("search_dtype", cast(str, model.search_dtype), model.device),
        "with_score": model.score_coef > 0,
    }


def make_learner(model: "MBDPO") -> Learner:
    """
    :param model: Algorithm with a policy, its arguments resolved
    :return: What updates the policy
    :raises ValueError: for an unknown ``update_dtype``
    """
    coefficients = LossCoefficients(**_coefficients(model))
    arguments: dict[str, Any] = {name: getattr(model, name) for name in OF_LEARNER}
    arguments["mixed_precision"] = resolve_dtype("update_dtype", model.update_dtype, model.device) == "bfloat16"
    if model.gradient_accumulation > 1:
        return AccumulatingLearner(model.policy, coefficients, parts=model.gradient_accumulation, **arguments)
    learner_class = CapturedLearner if model.policy.captures else Learner
    return learner_class(model.policy, coefficients, **arguments)


def current_arguments(model: "MBDPO") -> tuple[Any, ...]:
    """
    :param model: Algorithm
    :return: Its arguments that decide how it acts and learns, as they are now, in the order of :data:`ARGUMENTS`
    """
    # Asked for at each decision
    return _read(model)


def follow_arguments(model: "MBDPO", changed: Collection[str]) -> None:
    """
    Have policy and learner do as the algorithm's arguments say now, as when a callback anneals one of them.

    :param model: Algorithm, its arguments checked
    :param changed: Arguments that have changed
    :raises ValueError: for one that is decided when a model is built, or a combination that cannot work
    """
    policy, learner = model.policy, model.learner
    fixed = sorted(set(changed) & set(FIXED))
    if (model.score_coef > 0) != (policy.score_optimizer is not None):
        fixed.append("score_coef")
    if fixed:
        raise ValueError(f"{', '.join(fixed)} is decided when a model is built: build another one, or set it back.")
    search: dict[str, Any] = {name: getattr(model, name) for name in changed if name in OF_SEARCH}
    if "warm_denoising_steps" in changed:
        steps = policy.search_config.schedule.denoising_steps
        search["warm_steps"] = warm_steps_of(model.warm_denoising_steps, steps)
    if "gamma" in changed and model.tasks is None:
        search["discount"] = model.gamma
    policy.search_config = replace(policy.search_config, **search)
    for name in ("exploration_noise", "act_mode"):
        if name in changed:
            setattr(policy, name, getattr(model, name))
    for name in OF_LEARNER:
        if name in changed and name != "score_samples":
            setattr(learner, name, getattr(model, name))
    if "task_sampling" in changed:
        model._share_tasks()
    # Stable-Baselines3 reads these two in a form of its own
    if "learning_rate" in changed:
        model._setup_lr_schedule()
    if "train_freq" in changed:
        model._convert_train_freq()
    weights = {name: getattr(model, argument) for name, argument in COEFFICIENTS.items() if argument in changed}
    if learner.near_data:
        weights["behaviour"] = model.behaviour_coef
    learner.coefficients = replace(learner.coefficients, **weights)
    learner.without_energy = replace(learner.coefficients, energy=0.0)
    if search or "score_samples" in changed:
        learner.score_config = with_samples(policy.search_config, cast(int, model.score_samples))


def _coefficients(model: "MBDPO") -> dict[str, float]:
    return {name: getattr(model, argument) for name, argument in COEFFICIENTS.items()}
