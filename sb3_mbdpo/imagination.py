"""Looking into the model: what it imagines for a plan, and how a search found its plan."""

from typing import Any, NamedTuple, cast

import numpy as np
import torch as th
from gymnasium import spaces

from sb3_mbdpo.acting import batch_of
from sb3_mbdpo.finite import require_finite
from sb3_mbdpo.policies import MBDPOPolicy
from sb3_mbdpo.search import SearchStep

Observation = np.ndarray | dict[str, np.ndarray]


class Imagination(NamedTuple):
    """
    A plan as the world model sees it; for a single observation the leading B is missing.

    ``latents`` [B, T + 1, L], the observation's own first; ``rewards`` [B, T] predicted, in the environment's units;
    ``values`` [B, T + 1] mean over critics of the discounted return from each latent on, taking the plan's action there
    and, after the last one, the mode of the prior; ``energies`` [B, T] as the search uses them, in [-5, 5];
    ``terminations`` [B, T] probability that the episode ends with that action, 0 for tasks that were never seen to end.
    """

    latents: np.ndarray
    rewards: np.ndarray
    values: np.ndarray
    energies: np.ndarray
    terminations: np.ndarray


class PlanTrace(NamedTuple):
    """
    The denoising path of a search with S steps for B observations, in scaled actions (-1 to 1).

    ``sigmas`` [S] spread of the noise; ``centres`` [S, B, H, A] around which candidates were laid; ``candidates``
    [S, B, N, H, A], the prior's rollouts first; ``returns`` [S, B, N] in the environment's units, with the energy and
    the prior's margin that the search adds; ``plans`` [S, B, H, A] weighted mean of the elites; the last one times
    sqrt(alpha_bar_0), nearly 1, is the plan.
    """

    sigmas: np.ndarray
    centres: np.ndarray
    candidates: np.ndarray
    returns: np.ndarray
    plans: np.ndarray


@th.no_grad()
def imagine(policy: MBDPOPolicy, observation: Observation, actions: np.ndarray) -> Imagination:
    """
    Unroll the world model along a plan.

    :param policy: Policy with the world model
    :param observation: One observation or a batch of them
    :param actions: The plan in the environment's own units, [T, *action_shape] for one observation and
        [B, T, *action_shape] for a batch; any T from 1 on
    :return: What the model expects
    :raises ValueError: if the shapes do not fit, or a value is not finite
    """
    require_finite("imagine", observation=observation, actions=actions)
    policy.set_training_mode(False)
    obs, vectorized = policy.obs_to_tensor(observation)
    task = policy.tasks_of(obs)
    model, z = policy.world_model, policy.world_model.encode(policy.preprocess(obs), task)
    plan = _scaled_plan(policy, actions, len(z), vectorized)
    mask = model.mask(task)
    plan = plan if mask is None else plan * mask[:, None]
    latents = [z]
    for action in plan.unbind(1):
        latents.append(model.next(latents[-1], action, task))
    path = th.stack(latents, dim=1)
    # One task for all steps of a row
    task = None if task is None else task[:, None]
    joined = model.join(path[:, :-1], plan, task)
    last = model.prior_action(path[:, -1:], None, task)
    rewards = model.two_hot.decode(model.reward(joined))
    values = model.value(path, th.cat([plan, last], dim=1), task).mean(0)
    energies = model.scale_energy(model.energy(joined)) if model.energy is not None else th.zeros_like(rewards)
    ended = th.zeros_like(rewards)
    if policy.episodic and model.termination is not None:
        ended = model.termination(model.join(path[:, 1:], None, task)).sigmoid()
    numbers = [x.squeeze(-1).cpu().numpy() for x in (rewards, values, energies, ended)]
    return Imagination(*(x if vectorized else x[0] for x in (path.cpu().numpy(), *numbers)))


def plan(
    policy: MBDPOPolicy,
    observation: Observation,
    state: np.ndarray | None = None,
    episode_start: np.ndarray | None = None,
    deterministic: bool = True,
    return_trace: bool = False,
) -> np.ndarray | tuple[np.ndarray, PlanTrace]:
    """
    The whole plan of which ``predict`` returns the first action, without exploration noise.

    :param policy: Policy
    :param observation: One observation or a batch of them
    :param state: Plans of the previous decision as ``predict`` returned them [B, H, A]; None starts cold
    :param episode_start: Rows whose episode has just begun [B]
    :param deterministic: The same candidates at every call
    :param return_trace: Return the denoising path as well
    :return: plan in the environment's own units, [H, *action_shape] for one observation and [B, H, *action_shape] for a
        batch; with ``return_trace`` the path too, always with its batch dimension
    :raises ValueError: if shapes do not fit, a value is not finite, or a path is wanted from a policy that does not
        search
    """
    if return_trace and policy.act_mode != "search":
        raise ValueError(f'return_trace needs act_mode="search", this policy has act_mode={policy.act_mode!r}.')
    require_finite("plan", observation=observation)
    policy.set_training_mode(False)
    obs, vectorized = policy.obs_to_tensor(observation)
    batch = batch_of(obs)
    steps: list[SearchStep] = []
    previous, restart = policy.check_state(state, episode_start, batch)
    result = policy.plan(obs, previous, restart, deterministic, steps if return_trace else None)
    space = cast(spaces.Box, policy.action_space)
    actions = policy.to_env(result.plan.cpu().numpy()).reshape(batch, -1, *space.shape)
    actions = actions if vectorized else actions[0]
    return (actions, _stack(steps)) if return_trace else actions


def _scaled_plan(policy: MBDPOPolicy, actions: np.ndarray, batch: int, vectorized: bool) -> th.Tensor:
    """The plan as [B, T, A] in [-1, 1]."""
    space = cast(spaces.Box, policy.action_space)
    given = np.asarray(actions)
    lead = given.ndim - len(space.shape)
    expected = (batch, "T", *space.shape) if vectorized else ("T", *space.shape)
    fits = lead == (2 if vectorized else 1) and given.shape[lead:] == space.shape and given.shape[lead - 1] > 0
    if not fits or (vectorized and given.shape[0] != batch):
        raise ValueError(f"actions must be a plan of shape {expected} for these observations, got {given.shape}.")
    scaled: Any = policy.scale_action(given.reshape(-1, *space.shape))
    length = given.shape[lead - 1]
    return th.as_tensor(scaled, dtype=th.float32, device=policy.device).reshape(batch, length, -1).clamp(-1, 1)


def _stack(steps: list[SearchStep]) -> PlanTrace:
    def stacked(name: str) -> np.ndarray:
        return th.stack([getattr(step, name) for step in steps]).cpu().numpy()

    sigmas = np.array([step.sigma for step in steps])
    return PlanTrace(sigmas, stacked("centre"), stacked("candidates"), stacked("returns"), stacked("plan"))
