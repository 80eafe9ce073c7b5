"""What makes an MBDPO that was stopped go on as if it had not been: random generators, running plans, whole files."""

import io
import pathlib
from collections.abc import Iterable
from typing import Any, NotRequired, TypedDict

import numpy as np
import torch as th
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.type_aliases import TensorDict

from sb3_mbdpo.buffers import SequenceReplayBuffer, check_buffer
from sb3_mbdpo.normalization import Normalization
from sb3_mbdpo.optimizers import set_encoder_lr_scale
from sb3_mbdpo.parameter_checks import check_parameters
from sb3_mbdpo.policies import MBDPOPolicy
from sb3_mbdpo.saving import whole_file
from sb3_mbdpo.task_replay import MultiTaskReplayBuffer


class RandomState(TypedDict):
    """State of the random generators, with the seed they started from."""

    seed: int | None
    device: str
    policy: np.ndarray
    action_space: Any
    noise: NotRequired[Any]


class ResumableAlgorithm(OffPolicyAlgorithm):
    """
    The part of MBDPO that seeds, saves and loads. Arguments are those of the algorithm.

    Random generators are saved with the model, running plans with the replay buffer whose episodes they belong to.
    """

    policy: MBDPOPolicy
    # Users take it away to save memory, by None or del
    replay_buffer: SequenceReplayBuffer | None = None
    act_mode: str
    horizon: int | None
    encoder_lr_scale: float
    episodic: bool | None
    task_sampling: str
    # What VecNormalize made of observations when the model was saved; while there is one, its own statistics count
    _normalization: Normalization | None = None
    _plans: np.ndarray | None
    _restarts: np.ndarray | None
    _random_state: RandomState | None

    def set_random_seed(self, seed: int | None = None) -> None:
        """
        Seed everything random: what Stable-Baselines3 seeds, the policy's own generator and the buffer's.

        :param seed: None changes nothing
        """
        super().set_random_seed(seed)
        if seed is not None and getattr(self, "policy", None) is not None:
            self.policy.seed(seed)
            if self.replay_buffer is not None:
                self.replay_buffer.seed(seed)

    def _follow_arguments(self) -> None:
        """What was set on the model since it was built takes effect; ``act_mode`` may be set on the policy."""

    def _current_random_state(self) -> RandomState:
        return {
            "seed": self.seed,
            "device": self.device.type,
            "policy": self.policy.generator.get_state().numpy(),
            "action_space": self.action_space.np_random.bit_generator.state,
            # Stable-Baselines3's action noise draws from the global generator
            "noise": None if self.action_noise is None else np.random.get_state(),
        }

    def _restore_random_state(self) -> bool:
        """
        Go on from the saved generators, unless the model was loaded with another seed than it was saved with.

        :return: Whether it goes on
        """
        state = self._random_state
        if state is None or state["seed"] != self.seed:
            return False
        self.action_space.np_random.bit_generator.state = state["action_space"]
        if state["device"] == self.device.type:
            self.policy.generator.set_state(th.from_numpy(state["policy"]))
        # Loading with a seed has just seeded the global generator anyway
        if self.seed is not None and state.get("noise") is not None:
            np.random.set_state(state["noise"])
        return True

    def _give_running_plans(self) -> None:
        """Put the running plans into the replay buffer, which is about to be saved."""
        if self.replay_buffer is None:
            return
        self.replay_buffer.running_plans = None
        if self._plans is not None and self._restarts is not None:
            self.replay_buffer.running_plans = (self._plans, self._restarts)

    def _take_running_plans(self) -> None:
        """Go on with the plans that the replay buffer was saved with."""
        assert self.replay_buffer is not None
        self._plans, self._restarts = self.replay_buffer.running_plans or (None, None)

    def save(
        self,
        path: str | pathlib.Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """
        Save the model, random generators and statistics of VecNormalize included, so that a continued run is the run
        that was stopped. The zip can run code when it is loaded; for models that others load there is
        ``save_pretrained``.

        A previous file is replaced only when the new one is complete.

        :param path: File
        :param exclude: Attributes to leave out
        :param include: Attributes to save although they are left out by default; the running plans come with
            "replay_buffer"
        """
        self._follow_arguments()
        self._normalization = Normalization.of(self._vec_normalize_env) or self._normalization
        self._random_state = self._current_random_state()
        include = list(include or [])
        if "replay_buffer" in include:
            self._give_running_plans()
        if isinstance(path, io.BufferedIOBase):
            super().save(path, exclude, include)
            return
        with whole_file(path, "zip") as file:
            super().save(file, exclude, include)

    def save_replay_buffer(self, path: str | pathlib.Path | io.BufferedIOBase) -> None:
        """
        Save the replay buffer, and with it the running plans of the episodes whose transitions it holds.

        A previous file is replaced only when the new one is complete.

        :param path: File
        """
        self._give_running_plans()
        if isinstance(path, io.BufferedIOBase):
            super().save_replay_buffer(path)
            return
        with whole_file(path, "pkl") as file:
            super().save_replay_buffer(file)

    def load_replay_buffer(self, path: str | pathlib.Path | io.BufferedIOBase, truncate_last_traj: bool = True) -> None:
        """
        Load a replay buffer. Like any pickle, the file can run code: load only what you trust.

        :param path: File
        :param truncate_last_traj: Of no effect: only hindsight buffers have a use for it
        :raises ValueError: if the buffer holds something else than sequences of this model's environment; the present
            buffer then stays
        """
        present = self.replay_buffer
        try:
            super().load_replay_buffer(path, truncate_last_traj)
            loaded = check_buffer(self.replay_buffer, self)
            if isinstance(loaded, MultiTaskReplayBuffer):
                loaded.set_task_sampling(self.task_sampling)
        finally:
            self.replay_buffer = present
        self.replay_buffer = loaded
        if self.episodic is None and loaded.has_terminations():
            self.policy.mark_episodic()
        self._take_running_plans()

    def set_parameters(
        self,
        load_path_or_dict: str | TensorDict,
        exact_match: bool = True,
        device: th.device | str = "auto",
    ) -> None:
        """
        Load parameters, as every Stable-Baselines3 algorithm does.

        :param load_path_or_dict: File of a model, or what ``get_parameters`` gave
        :param exact_match: Whether everything the model has must be there
        :param device: Where to load to
        :raises ValueError: for parameters of a model of other sizes; nothing has changed then
        """
        params = load_path_or_dict
        if not isinstance(params, dict):
            params = load_from_zip_file(params, device=device, load_data=False)[1]
        check_parameters(self, params, exact_match)
        try:
            super().set_parameters(params, exact_match, device)
        finally:
            # Optimizers have other tensors now
            self.policy.graphs.clear()
        # An argument, for which what was saved with other arguments does not count
        set_encoder_lr_scale(self.policy.optimizer, self.encoder_lr_scale)

    def _excluded_save_params(self) -> list[str]:
        own = ["learner", "_plans", "_restarts", "_metrics", "_rehearsal", "_after_update", "_followed"]
        # Loaded from a file, a model has no functions of its own, all the room for replay, and no folder elsewhere
        return [*super()._excluded_save_params(), *own, "_task_sources", "_acts_only", "_folder_source"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        names = ["policy", "policy.optimizer", "policy.prior_optimizer"]
        if self.policy.score_optimizer is not None:
            names.append("policy.score_optimizer")
        return names, []
