"""What each of several processes draws for itself while acting; updates draw alike in all of them."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch as th
from stable_baselines3.common.noise import ActionNoise

from sb3_mbdpo.ranks import Ranks

if TYPE_CHECKING:
    from sb3_mbdpo.mbdpo import MBDPO


class OwnNoise(ActionNoise):
    """
    Action noise of one process. Stable-Baselines3's kinds draw from NumPy's global generator, which is seeded alike in
    all processes: here they find a state of their own there, and leave the global one as it was.

    :param noise: The user's
    :param seed: Of this process's draws
    """

    def __init__(self, noise: ActionNoise, seed: int):
        super().__init__()
        self.noise, self.state = noise, np.random.RandomState(seed).get_state()

    def __call__(self) -> np.ndarray:
        before = np.random.get_state()
        np.random.set_state(self.state)
        try:
            return self.noise()
        finally:
            self.state = np.random.get_state()
            np.random.set_state(before)

    def reset(self, indices: Iterable[int] | None = None) -> None:
        """
        :param indices: Environments whose episode has ended; None for all
        """
        if indices is None:
            self.noise.reset()
        else:
            self.noise.reset(indices)  # type: ignore[call-arg]  # vectorized


class OwnDraws:
    """
    What a process draws for itself, while updates draw alike from the policy's generator: noise and random actions, and
    the windows it replays. Follows from the seed, the process and the number of steps so far: what goes on after a
    restart does not repeat the beginning.

    :param model: The model; its action space and replay buffer are seeded
    :param ranks: The processes
    :param steps: Timesteps so far
    """

    def __init__(self, model: "MBDPO", ranks: Ranks, steps: int):
        assert model.replay_buffer is not None
        seed = ranks.shared_seed() if model.seed is None else model.seed
        sequence = np.random.SeedSequence((seed, steps, ranks.rank))
        acting, actions, replay, noise = (int(word) for word in sequence.generate_state(4))
        self.policy = model.policy
        self.generator = th.Generator(device=model.device)
        self.generator.manual_seed(acting)
        model.action_space.seed(actions)
        model.replay_buffer.seed(replay)
        self.noise_seed = noise
        # The first process's environments are seeded as if it were alone; later ones go on with other seeds
        common = seed if steps == 0 else int(np.random.SeedSequence((seed, steps)).generate_state(1)[0] >> 1)
        self.env_seed = None if model.seed is None else common + ranks.rank * model.n_envs

    @contextmanager
    def acting(self) -> Iterator[None]:
        """Draw from this process's own generator; the one of updates stays where it is."""
        shared, self.policy._generator = self.policy.generator, self.generator
        try:
            yield
        finally:
            self.policy._generator = shared
