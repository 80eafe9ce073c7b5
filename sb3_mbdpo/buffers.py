"""Replay buffers that return short sequences of consecutive transitions.

Storage and saving are those of Stable-Baselines3; what is new is ``sample``. Every stored transition can open a window,
and a window that meets an episode's end, a break in the data or the newest row stops there: its remaining steps are
masked rather than the window being rejected, so short episodes and last steps are seen as often as any others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictReplayBuffer, ReplayBuffer
from stable_baselines3.common.type_aliases import TensorDict
from stable_baselines3.common.vec_env import VecNormalize

from sb3_mbdpo.buffer_arrays import Array, map_arrays, sampled_dtype, take, take_observations

if TYPE_CHECKING:
    from sb3_mbdpo.resuming import ResumableAlgorithm

# The arrays of the ring, each of shape [buffer_size, n_envs, ...], that a device mirror holds.
_STORED = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")


class SequenceSamples(NamedTuple):
    """
    A batch of ``B`` windows of ``H`` transitions, time first.

    :param observations: ``[H+1, B, *obs_shape]``, or a dict of such tensors. Entry 0 is where the window starts and
        entry ``t+1`` what transition ``t`` led to; after the window's end the last observation is repeated
    :param actions: ``[H, B, action_dim]``, float32, zero where masked
    :param rewards: ``[H, B, 1]``, float32, zero where masked
    :param terminations: ``[H, B, 1]``, float32, 1 for a true termination (not for a time limit), zero where masked
    :param masks: ``[H, B, 1]``, float32, 1 while the window goes on; the first entry always is 1, and no 1 follows a 0
    :param task: ``[B]``, int64, index of each window's task, None where there is only one
    """

    observations: th.Tensor | TensorDict
    actions: th.Tensor
    rewards: th.Tensor
    terminations: th.Tensor
    masks: th.Tensor
    task: th.Tensor | None = None


class SequenceReplayBuffer(ReplayBuffer):
    """
    Replay buffer that samples windows of ``horizon`` consecutive transitions of one environment.

    Draws come from the generator ``rng``, which is saved with the buffer; NumPy's global random state is never used.

    >>> from gymnasium import spaces
    >>> box = spaces.Box(-1.0, 1.0, (3,))
    >>> buffer = SequenceReplayBuffer(100, box, box, device="cpu", horizon=2)
    >>> for step in range(5):
    ...     obs = np.full((1, 3), step, dtype=np.float32)
    ...     buffer.add(obs, obs + 1, np.zeros((1, 3)), np.ones(1), np.array([step == 4]), [{}])
    >>> buffer.sample(8).observations.shape
    torch.Size([3, 8, 3])

    :param buffer_size: Max number of transitions, over all environments
    :param observation_space: Observation space
    :param action_space: Action space
    :param device: PyTorch device of the samples
    :param n_envs: Number of parallel environments
    :param optimize_memory_usage: Must be False: windows need the terminal observations that this option drops
    :param handle_timeout_termination: Tell time limits from terminations; if False both count as terminations
    :param horizon: Number of transitions in a window, at least 1
    :param device_storage: Whether to keep a copy of the stored arrays on ``device`` and gather windows there: "auto"
        does so on a CUDA device when the whole ring fits in half of its free memory, True always, False never.
        Normalised samples (a ``VecNormalize`` passed to ``sample``) are gathered on the host in any case.
    """

    _dict_observations: ClassVar[bool] = False
    # Saved with the episodes in progress: their plans [n_envs, H, A], and which environments begin a new one [n_envs]
    running_plans: tuple[np.ndarray, np.ndarray] | None = None

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        device: th.device | str = "auto",
        n_envs: int = 1,
        optimize_memory_usage: bool = False,
        handle_timeout_termination: bool = True,
        horizon: int = 3,
        device_storage: str | bool = "auto",
    ):
        name = type(self).__name__
        if horizon < 1:
            raise ValueError(f"horizon must be at least 1, got {horizon}: pass the number of transitions in a window.")
        if optimize_memory_usage:
            raise ValueError(
                f"optimize_memory_usage=True drops the terminal observations that {name} needs: "
                "pass optimize_memory_usage=False."
            )
        if not (isinstance(device_storage, bool) or device_storage == "auto"):
            raise ValueError(f'device_storage={device_storage!r} is not known: pass "auto", True or False.')
        if isinstance(observation_space, spaces.Dict) != self._dict_observations:
            right = "SequenceReplayBuffer" if self._dict_observations else "DictSequenceReplayBuffer"
            raise ValueError(
                f"observation_space={observation_space} does not suit {name}: use {right} for this observation_space."
            )
        super().__init__(
            buffer_size,
            observation_space,
            action_space,
            device,
            n_envs=n_envs,
            optimize_memory_usage=optimize_memory_usage,
            handle_timeout_termination=handle_timeout_termination,
        )
        self.horizon = horizon
        self.device_storage = device_storage
        self.rng = np.random.default_rng()
        # True where no window may go on to the next row: the episode ended, or the next row is no continuation.
        self.window_ends = np.zeros((self.buffer_size, self.n_envs), dtype=bool)
        # The mirror is built when windows are first gathered from it: models that only act, and those whose samples
        # are normalised, take no device memory for it.
        self._mirror: dict[str, Any] | None = None
        self._mirror_device: th.device | str | None = None

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled: everything but the mirror, which only repeats the stored arrays."""
        return {**self.__dict__, "_mirror": None, "_mirror_device": None}

    def seed(self, seed: int | None = None) -> None:
        """
        Restart the generator behind ``sample``.

        :param seed: the seed, or None for one from the operating system
        """
        self.rng = np.random.default_rng(seed)

    def reset(self) -> None:
        """Forget all transitions; the generator goes on."""
        super().reset()
        self.window_ends[:] = False

    def has_terminations(self) -> bool:
        """
        Look for true terminations, as opposed to time limits.

        :return: Whether any stored transition ended its episode by one
        """
        rows = slice(0, self.size())
        return bool((self.dones[rows] * (1 - self.timeouts[rows])).any())

    def check_room(self) -> None:
        """
        Buffers of models that only act need no room; those that are learned from must hold a whole window.

        :raises ValueError: if this one cannot
        """
        if self.buffer_size < self.horizon:
            raise ValueError(
                f"The replay buffer has {self.buffer_size} row(s) for each of {self.n_envs} environment(s), fewer than "
                f"horizon={self.horizon}: pass buffer_size >= {self.horizon * self.n_envs}, or a smaller horizon."
            )

    def mark_boundary(self) -> None:
        """
        Declare that what is added next does not continue what was added last, in any environment.

        ``add`` notices most breaks by itself; call this where the environments were restarted and the first new
        observation might equal the last stored one.
        """
        if self.size() > 0:
            self.window_ends[self._newest_row()] = True

    def add(
        self,
        obs: np.ndarray | dict[str, np.ndarray],
        next_obs: np.ndarray | dict[str, np.ndarray],
        action: np.ndarray,
        reward: np.ndarray,
        done: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        """
        Store one transition of every environment.

        :param obs: ``[n_envs, *obs_shape]`` observations, or a dict of them
        :param next_obs: ``[n_envs, *obs_shape]`` what followed, terminal observations included
        :param action: ``[n_envs, action_dim]`` actions
        :param reward: ``[n_envs]`` rewards
        :param done: ``[n_envs]`` whether the episode ended
        :param infos: one dict per environment, "TimeLimit.truncated" telling time limits from terminations
        """
        row, previous, had_rows = self.pos, self._newest_row(), self.size() > 0
        super().add(obs, next_obs, action, reward, done, infos)  # type: ignore[arg-type]
        if had_rows:
            self.window_ends[previous] |= self._breaks(previous, row)
        self.window_ends[row] = self.dones[row] > 0

        # Built where it is read: normalised samples never do
        for name, tensors in (self._mirror or {}).items():
            map_arrays(
                lambda target, array: target[row].copy_(th.from_numpy(array[row]), non_blocking=True),
                tensors,
                getattr(self, name),
            )

    def sample(  # type: ignore[override]
        self, batch_size: int, env: VecNormalize | None = None
    ) -> SequenceSamples:
        """
        Draw windows whose first transitions are uniform over all stored transitions of all environments.

        :param batch_size: Number of windows
        :param env: VecNormalize whose statistics normalise the raw stored observations and rewards, if any
        :return: the windows, time first
        :raises ValueError: if nothing is stored, or there is no room for a window
        """
        if self.size() == 0:
            raise ValueError("sample was called on an empty buffer: add at least one transition first.")
        # Row * n_envs + env, flattened: rows 0 to size-1 are the stored ones whether or not the ring has wrapped.
        starts = self.rng.integers(self.size() * self.n_envs, size=batch_size)
        return self._get_samples(starts, env)

    def _get_samples(  # type: ignore[override]
        self, batch_inds: np.ndarray, env: VecNormalize | None = None
    ) -> SequenceSamples:
        """The windows that open at ``batch_inds``, flat positions (row * n_envs + env); see ``sample``."""
        self.check_room()
        index: Any
        masked: Any
        index, masked = self._windows(batch_inds)
        mirror = self._device_mirror() if env is None else None
        stored = mirror if mirror is not None else {name: getattr(self, name) for name in _STORED}
        cuda = th.device(self.device).type == "cuda"  # where a copy need not be waited for, even from plain memory
        # From here to `finish` everything is a NumPy array, or a tensor on the mirror's device.
        if mirror is not None:
            index, masked = (th.from_numpy(array).to(self.device, non_blocking=cuda) for array in (index, masked))

        observations = map_arrays(
            lambda current, following: take_observations(current, following, index),
            stored["observations"],
            stored["next_observations"],
        )
        actions, rewards, dones, timeouts = (take(stored[name], index) for name in _STORED[2:])
        terminations = dones * (1 - timeouts)
        if env is not None:
            observations = self._normalize_obs(observations, env)
            rewards = self._normalize_reward(rewards, env)
        for array in (actions, rewards, terminations):
            # Set, not multiplied: a NaN in the repeated last transition must not reach the masked steps.
            array[masked] = 0

        def finish(array: Array) -> th.Tensor:
            tensor = th.from_numpy(array) if isinstance(array, np.ndarray) else array
            return (tensor.float() if tensor.is_floating_point() else tensor).to(self.device, non_blocking=cuda)

        return SequenceSamples(
            observations=map_arrays(finish, observations),
            actions=finish(actions).float(),
            rewards=finish(rewards[..., None]),
            terminations=finish(terminations[..., None]),
            masks=finish(~masked[..., None]).float(),
        )

    def _windows(self, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """
        Lay out windows in the ring.

        :param starts: ``[B]`` flat positions of the first transitions
        :return: ``[H, B]`` flat positions of the transitions, the last valid one repeated where a window is cut short,
            and ``[H, B]`` True at those repetitions
        """
        capacity = self.buffer_size * self.n_envs
        steps = np.arange(self.horizon)[:, None]
        newer_rows = (self._newest_row() - starts // self.n_envs) % self.buffer_size
        ends = self.window_ends.reshape(-1).take(starts + steps * self.n_envs, mode="wrap")
        ends |= steps >= newer_rows  # nothing follows the newest row, whatever the ring still holds there
        ends[-1] = True
        last = ends.argmax(axis=0)
        return (starts + np.minimum(steps, last) * self.n_envs) % capacity, steps > last

    def _newest_row(self) -> int:
        """The row that was written last."""
        return (self.pos - 1) % self.buffer_size

    def _breaks(self, previous: int, row: int) -> np.ndarray:
        """``[n_envs]``: True where ``row`` does not start from the observation that ``previous`` led to."""

        # Rows are compared as stored, so that both sides have the dtype and the shape of the observation space.
        def differs(following: np.ndarray, current: np.ndarray) -> np.ndarray:
            equal = following[previous] == current[row]
            if np.issubdtype(current.dtype, np.inexact) and not equal.all():
                equal |= np.isnan(following[previous]) & np.isnan(current[row])
            return ~equal.reshape(self.n_envs, -1).all(axis=1)

        broken = map_arrays(differs, self.next_observations, self.observations)
        return np.any(list(broken.values()), axis=0) if isinstance(broken, dict) else broken

    def _device_mirror(self) -> dict[str, Any] | None:
        """
        Tensors on ``self.device`` that repeat the stored arrays; decided anew whenever ``device`` was changed.

        :return: name -> tensor ``[buffer_size, n_envs, ...]`` or dict of them, None if samples come from the host
        """
        if self._mirror_device != self.device:
            self._mirror = None  # frees the old device first
            if self._wants_mirror():
                self._mirror = {name: map_arrays(self._mirrored, getattr(self, name)) for name in _STORED}
            self._mirror_device = self.device
        return self._mirror

    def _mirrored(self, array: np.ndarray) -> th.Tensor:
        """Tensor of the array's shape and sampled dtype on ``self.device``, holding the rows written so far."""
        tensor = th.zeros(array.shape, dtype=sampled_dtype(array), device=self.device)
        tensor[: self.size()].copy_(th.from_numpy(array[: self.size()]))
        return tensor

    def _wants_mirror(self) -> bool:
        """Whether ``device_storage`` asks for a mirror on the present device."""
        if isinstance(self.device_storage, bool):
            return self.device_storage
        if th.device(self.device).type != "cuda":
            return False
        nbytes = 0
        for name in _STORED:
            tree = getattr(self, name)
            for array in tree.values() if isinstance(tree, dict) else (tree,):
                nbytes += array.size * sampled_dtype(array).itemsize
        return nbytes <= th.cuda.mem_get_info(self.device)[0] // 2


class DictSequenceReplayBuffer(SequenceReplayBuffer, DictReplayBuffer):  # type: ignore[misc]
    """
    ``SequenceReplayBuffer`` for dictionary observations: takes the same arguments, samples a dict of observations.
    """

    observation_space: spaces.Dict
    obs_shape: dict[str, tuple[int, ...]]
    observations: dict[str, np.ndarray]
    next_observations: dict[str, np.ndarray]
    _dict_observations = True


def check_buffer(loaded: Any, model: ResumableAlgorithm) -> SequenceReplayBuffer:
    """
    Check that a buffer from a file can take the place of an algorithm's own.

    :param loaded: What the file held
    :param model: The algorithm
    :return: The loaded one
    :raises ValueError: naming what differs
    """
    if not isinstance(loaded, SequenceReplayBuffer):
        raise ValueError(
            f"The file holds a {type(loaded).__name__}: MBDPO needs a SequenceReplayBuffer or "
            "DictSequenceReplayBuffer, saved by save_replay_buffer()."
        )
    for name in ("horizon", "n_envs", "observation_space", "action_space"):
        found, wanted = getattr(loaded, name), getattr(model, name)
        if found != wanted:
            raise ValueError(
                f"The replay buffer in the file has {name}={found}, the model has {wanted}: "
                "load one that was saved with the same settings."
            )
    return loaded
