"""Learning in environments, shared by several processes: each acts in its own, all update one model.

It is what one process would do with the environments of all of them, but for two things: each process keeps what it
collected to itself and takes its share of a batch from there, and each draws its own noise while acting.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, ConvertCallback, ProgressBarCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.type_aliases import MaybeCallback, TrainFreq, TrainFrequencyUnit

from sb3_mbdpo.own_draws import OwnDraws, OwnNoise
from sb3_mbdpo.ranks import ALONE, Ranks
from sb3_mbdpo.replicas import check_no_drift, join
from sb3_mbdpo.tasks import TASK_KEY

if TYPE_CHECKING:
    from sb3_mbdpo.mbdpo import MBDPO

# What is told of an episode that ended, besides its task and its success
PLAIN = (bool, int, float, str, np.number, np.bool_)

# Of a step's names, those that are none of Stable-Baselines3's
NOT_SEEN = ("self", "model", "ranks", "first", "last")


class SharedCallback(BaseCallback):
    """
    A callback that runs in every process, at the same steps, and may wait for the others; all other callbacks run in
    the first process alone. It is passed to ``learn`` itself, alone or in a list, not within another callback. Its
    ``repr`` must be the same in all processes.
    """

    # Set by `learn` where there are several
    ranks: Ranks = ALONE

    def _init_callback(self) -> None:
        if self.ranks != self.model.learner.ranks:  # type: ignore[attr-defined]  # of MBDPO
            raise ValueError(
                f"{type(self).__name__} has to run in every process: pass it to learn() itself, alone or in a list, "
                "not within another callback."
            )


class StepsBar(ProgressBarCallback):
    """
    Stable-Baselines3's progress bar, a given number of steps at a time.

    :param steps: Timesteps of each call
    """

    def __init__(self, steps: int = 1):
        super().__init__()
        self.steps = steps

    def _on_step(self) -> bool:
        self.pbar.update(self.steps)
        return True


def learn_together(
    model: "MBDPO",
    ranks: Ranks,
    total_timesteps: int,
    callback: MaybeCallback,
    log_interval: int | None,
    tb_log_name: str,
    reset_num_timesteps: bool,
    progress_bar: bool,
) -> None:
    """
    ``learn`` in several processes; arguments are those of ``MBDPO.learn``, errors are in every process.

    :param model: This process's
    :param ranks: The processes
    :param total_timesteps: Environment steps of all processes together
    :param callback: Callback(s), called in the first process unless they are :class:`SharedCallback`
    :param log_interval: Episodes of all processes between logs; None for no logs
    :param tb_log_name: Name of the run in tensorboard
    :param reset_num_timesteps: Start counting from zero
    :param progress_bar: Show a progress bar
    :raises ValueError: for what cannot be shared or is not the same in all processes, before anything changes
    :raises LostProcessError: if another process has ended
    :raises OtherProcessError: if another process has failed
    """
    with ranks.together():
        check_can_share(model)
    facts: dict[str, Any] = {"total_timesteps": total_timesteps, "log_interval": log_interval}
    facts |= {"reset_num_timesteps": reset_num_timesteps, "number of environments": model.n_envs}
    facts |= {"observation space": model.observation_space, "action space": model.action_space}
    facts["environments that go on"] = model._last_obs is not None
    # Those that would wait for the others have to be everywhere
    facts["shared callbacks"] = [
        repr(single) for single in callbacks_of(callback) if isinstance(single, SharedCallback)
    ]
    join(ranks, model, {name: str(value) for name, value in facts.items()})
    with model._sharing(ranks), _silent_unless(ranks.is_main, model):
        SharedRun(model, ranks, callback, log_interval, progress_bar).learn(
            total_timesteps, tb_log_name, reset_num_timesteps
        )


def check_can_share(model: "MBDPO") -> None:
    """
    :param model: A model
    :raises ValueError: if several processes cannot train it in environments
    """
    if model.env is None:
        raise ValueError("This model has no environment: give each process its own with set_env().")
    assert isinstance(model.train_freq, TrainFreq)
    if model.train_freq.unit is not TrainFrequencyUnit.STEP:
        raise ValueError(
            "train_freq counts episodes, which end at other times in each process: with several of them pass a number "
            "of steps."
        )
    if model._rehearsal_share > 0:
        raise ValueError("rehearse() is for learning in one process: call rehearse(None) first.")
    if model._vec_normalize_env is not None:
        raise ValueError(
            "VecNormalize would keep other statistics in each process: with several of them leave it out (rewards are "
            "learned in symlog space), or scale observations in a wrapper."
        )


@contextmanager
def _silent_unless(speaks: bool, model: "MBDPO") -> Iterator[None]:
    """Processes but the first one log nowhere."""
    custom = model._custom_logger
    if not speaks:
        model.set_logger(Logger(folder=None, output_formats=[]))
    try:
        yield
    finally:
        model._custom_logger = custom


def callbacks_of(callback: MaybeCallback) -> list[BaseCallback]:
    """
    :param callback: What was passed to ``learn``
    :return: Callbacks one by one, those of lists among them
    """
    if callback is None:
        return []
    if isinstance(callback, list):
        return [single for entry in callback for single in callbacks_of(entry)]
    # Not the user's own kinds of list
    if type(callback) is CallbackList:
        return callbacks_of(callback.callbacks)
    return [callback if isinstance(callback, BaseCallback) else ConvertCallback(callback)]


class SharedRun:
    """
    One process's part in a call of ``learn``. The order of things is that of Stable-Baselines3's own loop.

    :param model: This process's model
    :param ranks: The processes
    :param callback: Callback(s)
    :param log_interval: Episodes between logs
    :param progress_bar: Show a progress bar
    """

    def __init__(
        self, model: "MBDPO", ranks: Ranks, callback: MaybeCallback, log_interval: int | None, progress_bar: bool
    ):
        assert model.env is not None and model.replay_buffer is not None
        self.model, self.ranks, self.log_interval = model, ranks, log_interval
        self.env, self.buffer = model.env, model.replay_buffer
        # Timesteps of one step in all environments of all processes
        self.width = self.env.num_envs * ranks.size
        given = callbacks_of(callback)
        self.shared = [single for single in given if isinstance(single, SharedCallback)]
        own = [single for single in given if not isinstance(single, SharedCallback)] if ranks.is_main else []
        self.own = CallbackList([*own, StepsBar(self.width)] if progress_bar and ranks.is_main else own)

    def learn(self, total_timesteps: int, tb_log_name: str, reset_num_timesteps: bool) -> None:
        """
        :param total_timesteps: Environment steps of all processes together
        :param tb_log_name: Name of the run in tensorboard
        :param reset_num_timesteps: Start counting from zero
        """
        model, ranks = self.model, self.ranks
        self.draws = OwnDraws(model, ranks, 0 if reset_num_timesteps else model.num_timesteps)
        begins = reset_num_timesteps or model._last_obs is None
        with ranks.together():
            if begins and self.draws.env_seed is not None:
                self.env.seed(self.draws.env_seed)
            total_timesteps, _ = model._setup_learn(total_timesteps, self.own, reset_num_timesteps, tb_log_name)
            # By now there is one noise for each environment
            noise = model.action_noise
            self.noise = None if noise is None else OwnNoise(noise, self.draws.noise_seed)
            for single in self.shared:
                single.ranks = ranks
                single.init_callback(model)
        names = {"self": model, "total_timesteps": total_timesteps, "env": self.env, "log_interval": self.log_interval}
        with ranks.together():
            self.own.on_training_start(names, globals())
        for single in self.shared:
            single.on_training_start(names, globals())
        while model.num_timesteps < total_timesteps and self._collect():
            self._update()
        check_no_drift(ranks, model.policy)
        with ranks.together():
            self.own.on_training_end()
        for single in self.shared:
            single.on_training_end()

    # --- collecting -----------------------------------------------------------------------------------------------

    def _collect(self) -> bool:
        """Steps up to the next updates; whether to go on after them."""
        assert isinstance(self.model.train_freq, TrainFreq)
        self.model.policy.set_training_mode(False)
        for single in self.shared:
            single.on_rollout_start()
        steps = self.model.train_freq.frequency
        for step in range(steps):
            if not self._step(first=step == 0, last=step == steps - 1):
                return False
        for single in self.shared:
            single.on_rollout_end()
        return True

    def _step(self, first: bool, last: bool) -> bool:
        """
        One step in all environments of all processes; whether to go on after it. What can fail is in as few blocks as
        the order of things allows: each of them is an exchange between the processes.
        """
        model, ranks, env, replay_buffer = self.model, self.ranks, self.env, self.buffer
        with ranks.together():
            if first:
                self.own.on_rollout_start()
            with self.draws.acting():
                actions, buffer_actions = model._sample_action(model.learning_starts, self.noise, env.num_envs)
            new_obs, rewards, dones, infos = env.step(actions)
        model.num_timesteps += self.width
        seen = {name: value for name, value in locals().items() if name not in NOT_SEEN}
        for single in self.shared:
            single.update_locals(seen)
        # All of them, one after the other: any may wait for the other processes
        wishes = [single.on_step() for single in self.shared]
        with ranks.together() as step:
            self.own.update_locals(seen)
            step.stop = not (self.own.on_step() and all(wishes))
        if step.stop:
            model._pass_over(new_obs, dones)  # type: ignore[arg-type]
            return False
        episodes = ended_episodes(model, infos, dones)
        with ranks.together():
            model._store_transition(replay_buffer, buffer_actions, new_obs, rewards, dones, infos)  # type: ignore[arg-type]
            if self.noise is not None:
                for index in np.flatnonzero(dones).tolist():
                    self.noise.reset([index] if env.num_envs > 1 else None)
            if last:
                self.own.on_rollout_end()
        model._update_current_progress_remaining(model.num_timesteps, model._total_timesteps)
        self._agree_on_episodes(int(np.sum(dones)), episodes)
        return True

    def _agree_on_episodes(self, ended: int, episodes: list[dict[str, Any]]) -> None:
        """Tell each other what has ended, and whether episodes have been seen to terminate."""
        model, ranks = self.model, self.ranks
        own = th.tensor([[ended, len(episodes), int(model.policy.episodic)]])
        all_ended, told, episodic = ranks.sum(own)[0].tolist()
        if episodic and not model.policy.episodic:
            model.policy.mark_episodic()
        if told:
            texts = ranks.gather_texts(json.dumps(episodes))
            for episode in (episode for text in texts for episode in json.loads(text)):
                _note(model, episode)
        before, model._episode_num = model._episode_num, model._episode_num + all_ended
        if self.log_interval is not None and model._episode_num // self.log_interval > before // self.log_interval:
            self._log()

    def _log(self) -> None:
        check_no_drift(self.ranks, self.model.policy)
        self.model._metrics.average(self.ranks)
        with self.ranks.together():
            self.model.dump_logs()

    # --- updating -------------------------------------------------------------------------------------------------

    def _update(self) -> None:
        model = self.model
        assert isinstance(model.train_freq, TrainFreq) and model.batch_size is not None
        if model.num_timesteps <= model.learning_starts:
            return
        collected = model.train_freq.frequency * self.width
        gradient_steps = model.gradient_steps if model.gradient_steps >= 0 else collected
        if gradient_steps > 0:
            model.train(gradient_steps, model.batch_size // self.ranks.size)


def ended_episodes(model: "MBDPO", infos: list[dict[str, Any]], dones: np.ndarray) -> list[dict[str, Any]]:
    """
    :param model: The model, whose last observation is still the one before the step
    :param infos: What the environments said of the step
    :param dones: Whether it ended their episodes [n_envs]
    :return: What logs and callbacks are told of each that ended: its "episode" (numbers and texts of it), "is_success"
        and "task", where there are such
    """
    tasks, last = model.policy.task_set, model._last_obs
    told = []
    for row, info in enumerate(infos):
        episode: dict[str, Any] = {}
        if "episode" in info:
            values = {name: value for name, value in info["episode"].items() if isinstance(value, PLAIN)}
            episode["episode"] = {name: getattr(value, "item", lambda v=value: v)() for name, value in values.items()}
            if tasks is not None:
                assert isinstance(last, dict)
                episode["task"] = tasks.names[int(np.asarray(last[TASK_KEY]).reshape(-1)[row])]
        if info.get("is_success") is not None and dones[row]:
            episode["is_success"] = float(info["is_success"])
        if episode:
            told.append(episode)
    return told


def _note(model: "MBDPO", episode: dict[str, Any]) -> None:
    """Remember an episode, of whichever process, as Stable-Baselines3 remembers one's own."""
    assert model.ep_info_buffer is not None and model.ep_success_buffer is not None
    if "episode" in episode:
        model.ep_info_buffer.append(episode["episode"])
    if "is_success" in episode:
        model.ep_success_buffer.append(episode["is_success"])
    if "task" in episode:
        model._add_task_return(episode["task"], float(episode["episode"]["r"]))
