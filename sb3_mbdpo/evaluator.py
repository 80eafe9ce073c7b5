"""Return of candidate plans in the world model, the inner loop of the search (arXiv 2605.26282; TD-MPC2's estimate).

Verified against the released planner (tests/test_golden.py). The arithmetic is arranged, not changed: heads that read
the same latent are stacked, so that each layer of all of them is one batched product; a first layer comes apart by what
it reads, so that what all candidates of a row share (the first latent, the task) is multiplied once; values are asked
of the two critics in use.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch as th

from sb3_mbdpo.activations import SimNorm
from sb3_mbdpo.blocks import block_count
from sb3_mbdpo.hardware import on_accelerator, uses_kernels
from sb3_mbdpo.head_stacks import HeadStack, Layer, head_layers, member_layers, stack_heads
from sb3_mbdpo.layers import NormedLinear
from sb3_mbdpo.products import ALIGNED
from sb3_mbdpo.search_config import SearchConfig
from sb3_mbdpo.world_model import WorldModel

# Candidates times width up to which a CPU too is faster with stacked heads: below it, calls cost more than numbers
STACKED_ON_CPU = 8192
# Rows up to which outputs of heads that nothing waits for are multiplied once for all steps of the horizon: it saves
# calls, and copies what the outputs read
FEW_ROWS = 2048


class Arrangement(NamedTuple):
    """
    The heads of a world model as a search needs them: ``steps`` dynamics, reward and energy in one or several stacks,
    ``starts`` what their candidates share in the first latent, ``prior``, and the ``critics`` in use.
    """

    steps: list[HeadStack]
    starts: list[th.Tensor]
    prior: HeadStack
    critics: list[HeadStack]


def arrange(
    model: WorldModel, config: SearchConfig, z: th.Tensor, critics: th.Tensor, embedding: th.Tensor | None
) -> Arrangement:
    """
    Lay out the heads for a search, and multiply what all its candidates share.

    :param model: World model
    :param config: Search configuration
    :param z: Latents to start from [B, L]
    :param critics: Indices of the critics in use
    :param embedding: Task embeddings [B, E]
    :return: The heads
    """
    heads = [head_layers(model.dynamics), head_layers(model.reward)]
    if config.energy_coef != 0:
        heads.append(head_layers(model.require_energy()))
    stacked = config.stacked
    if stacked is None:
        width = heads[0][0][0].shape[-1]
        # Few large products keep an accelerator busy; a CPU's caches hold one wide head at a time
        stacked = on_accelerator(z) or config.n_samples * width <= STACKED_ON_CPU

    chosen = member_layers(model.critics, critics)
    each = (heads, [head_layers(model.prior)], chosen)
    steps, (prior,), ends = (_stacks(model, config, embedding, group, stacked) for group in each)
    return Arrangement(steps, [stack.start(z) for stack in steps], prior, ends)


def _stacks(
    model: WorldModel, config: SearchConfig, embedding: th.Tensor | None, heads: list[list[Layer]], stacked: bool
) -> list[HeadStack]:
    groups = [heads] if stacked else [[head] for head in heads]
    common = model.latent_dim, embedding, model.critics.activation, config.dtype
    return [stack_heads(group, *common) for group in groups]


class Evaluator:
    """
    Return of candidate plans in the world model (TD-MPC2's value estimate plus energy).

    :param model: World model
    :param config: Search configuration
    :param z: Latents to start from [B, L]
    :param critics: Indices [2] of the critics averaged beyond the horizon
    :param task: Task indices [B]
    :param discount: Discount of each row [B, 1]; by default ``config.discount`` for all
    :param episodic: Use the termination head
    :param prepare: Applied to :func:`arrange` before it is called, on accelerators
    """

    def __init__(
        self,
        model: WorldModel,
        config: SearchConfig,
        z: th.Tensor,
        critics: th.Tensor,
        task: th.Tensor | None = None,
        discount: th.Tensor | None = None,
        episodic: bool = False,
        prepare: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda function: function,
    ):
        self.model, self.config, self.episodic = model, config, episodic
        self.discount: float | th.Tensor = config.discount if discount is None else discount
        self.task = task
        self._arrange(z, critics, prepare)

    def _arrange(
        self, z: th.Tensor, critics: th.Tensor, prepare: Callable[[Callable[..., Any]], Callable[..., Any]]
    ) -> None:
        lay_out = prepare(arrange) if on_accelerator(z) else arrange
        heads: Arrangement = lay_out(self.model, self.config, z, critics, self.model.embed(self.task))
        self.steps, self.starts, self.prior, self.critics = heads

    def __call__(self, actions: th.Tensor) -> th.Tensor:
        """
        :param actions: Candidate plans [B, N, H, A]
        :return: Returns [B, N]; NaN counts as 0
        """
        batch, count, *_ = actions.shape
        blocks = block_count(actions, batch * count, self.model.critics.first_width)
        if blocks == 1:
            return self._returns(actions)
        parts = actions.tensor_split(min(blocks, count), dim=1)
        return th.cat([self._returns(part) for part in parts], dim=1)

    def _returns(self, actions: th.Tensor) -> th.Tensor:
        batch, count, horizon, _ = actions.shape
        z, rewards = self.roll_out(actions)
        terminal = self.terminal_value(z[-1], count).view(batch, count)
        alive = self._alive(z, count)
        total = th.zeros_like(terminal)
        discount: float | th.Tensor = 1.0
        for t in range(horizon):
            reward = rewards[t].view(batch, count)
            total = total + discount * (reward if alive is None or t == 0 else alive[t - 1] * reward)
            discount = discount * self.discount
        total = total + discount * (terminal if alive is None else alive[-1] * terminal)
        return total.nan_to_num(0.0)

    def roll_out(self, actions: th.Tensor) -> tuple[list[th.Tensor], th.Tensor]:
        """
        Unroll the dynamics along plans.

        :param actions: [B, N, H, A]
        :return: latents at t = 1 .. H, [B N, L] each, and rewards plus weighted energies at t = 0 .. H - 1 [H, B N]
        """
        horizon, moves, two_hot = actions.shape[2], actions.flatten(0, 1), self.model.two_hot
        heads = [(stack, k) for stack in self.steps for k in range(len(stack.outputs))]
        later = on_accelerator(actions) and len(moves) <= FEW_ROWS
        latents: list[th.Tensor] = []
        outputs: list[list[th.Tensor]] = []
        # All candidates of a row start from one latent
        pairs = zip(self.steps, self.starts, strict=True)
        parts = [part for stack, start in pairs for part in stack.parts(start, None, moves, 0)]
        for t in range(1, horizon + 1):
            rest = list(zip(heads, parts, strict=True))[1:]
            outputs.append([h if later else stack.read(k, h, two_hot) for (stack, k), h in rest])
            z = self._next_latent(parts[0])
            latents.append(z)
            if t < horizon:
                parts = [part for stack in self.steps for part in stack.parts(stack.shared, z, moves, t)]
        found = [th.stack(values) for values in zip(*outputs, strict=True)]
        if later:
            reads = zip(heads[1:], found, strict=True)
            found = [stack.read(k, h.flatten(0, 1), two_hot).unflatten(0, h.shape[:2]) for (stack, k), h in reads]
        rewards, *energies = found
        # Where no kernel has decoded them
        rewards = rewards if rewards.shape[-1] == 1 else two_hot.decode(rewards)
        if energies:
            bonus = self.config.energy_coef * self.model.scale_energy(energies[0])
            in_range = self.config.energy_unit == "value_range"
            rewards = rewards + (bonus * self.model.prior_scale if in_range else bonus)
        return latents, rewards.squeeze(-1)

    def terminal_value(self, z: th.Tensor, count: int) -> th.Tensor:
        """
        Value beyond the horizon: mean of the two critics at the mode of the prior.

        :param z: Last latents [B N, L]
        :param count: Candidates N of a row
        :return: [B N]
        """
        params = self.prior.output(0, self.prior.hidden(self.prior.shared, z))
        action, mask = params[:, : self.model.action_dim].tanh(), self.model.mask(self.task)
        action = action if mask is None else action * mask.repeat_interleave(count, 0)
        hidden = [stack.hidden(stack.shared, z, action[:, None]) for stack in self.critics]
        pairs = zip(self.critics, hidden, strict=True)
        return th.cat([stack.scalars(h, self.model.two_hot) for stack, h in pairs]).mean(0).squeeze(-1)

    def _next_latent(self, hidden: th.Tensor) -> th.Tensor:
        """What follows from what the output layer of the dynamics reads [B N, M]: the next latents [B N, L]."""
        last, stack = self.model.dynamics[-1], self.steps[0]
        assert isinstance(last, NormedLinear)
        if not fuses_simplicial_norm(last, hidden):
            return last.normalise(stack.output(0, hidden))
        from sb3_mbdpo.triton_kernels import simplicial_norm

        weight, bias = stack.outputs[0]
        norm, group = last.norm, cast(SimNorm, last.activation).group_size
        return simplicial_norm(hidden @ weight, bias[0], norm.weight, norm.bias, group, norm.eps)

    def _alive(self, latents: list[th.Tensor], count: int) -> th.Tensor | None:
        """1 while no latent up to and including t + 1 looks terminal [H, B, N]; None for tasks that never end."""
        if not self.episodic or self.model.termination is None:
            return None
        task = None if self.task is None else self.task.repeat_interleave(count, 0)
        z = th.stack(latents).float()
        ended = self.model.termination(self.model.join(z, None, task)).squeeze(-1) > 0
        return (~ended).to(z.dtype).cumprod(dim=0).unflatten(1, (-1, count))


def fuses_simplicial_norm(layer: NormedLinear, x: th.Tensor) -> bool:
    """
    :param layer: Last layer of the dynamics
    :param x: Its input
    :return: Whether one kernel does all that follows its product
    """
    width = layer.norm.normalized_shape[0]
    usual = isinstance(layer.activation, SimNorm) and layer.activation.group_size == 8 and width % ALIGNED == 0
    return usual and uses_kernels(x)
