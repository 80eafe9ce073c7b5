"""What MBDPO's arguments become: those of its policy, and the learner that updates it."""

from typing import TYPE_CHECKING, Any, cast

from sb3_mbdpo.accumulation import AccumulatingLearner
from sb3_mbdpo.captured_updates import CapturedLearner
from sb3_mbdpo.hardware import resolve_dtype
from sb3_mbdpo.losses import LossCoefficients
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
    coefficients = LossCoefficients(
        consistency=model.consistency_coef,
        reward=model.reward_coef,
        value=model.value_coef,
        termination=model.termination_coef,
        energy=model.energy_loss_coef,
        entropy=model.entropy_coef,
        rho=model.rho,
        saturation=cast(float, model.saturation_coef),
    )
    arguments: dict[str, Any] = {name: getattr(model, name) for name in OF_LEARNER}
    arguments["mixed_precision"] = resolve_dtype("update_dtype", model.update_dtype, model.device) == "bfloat16"
    if model.gradient_accumulation > 1:
        return AccumulatingLearner(model.policy, coefficients, parts=model.gradient_accumulation, **arguments)
    learner_class = CapturedLearner if model.policy.captures else Learner
    return learner_class(model.policy, coefficients, **arguments)
