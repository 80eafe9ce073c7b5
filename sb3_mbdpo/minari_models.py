"""From Minari data sets to models, and from what models collected to data sets."""

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

import gymnasium as gym
from gymnasium import spaces
from stable_baselines3.common.base_class import maybe_make_env
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.vec_env import VecEnv

from sb3_mbdpo.checkpoints import set_up
from sb3_mbdpo.minari_export import export_minari
from sb3_mbdpo.minari_sources import check_same_spaces, common_spaces, episode_limit, open_tasks, task_data
from sb3_mbdpo.multitask_env import EnvSource, make_multitask_env
from sb3_mbdpo.offline import OfflineAlgorithm, OfflineData
from sb3_mbdpo.offline_tasks import present, task_set_of_data
from sb3_mbdpo.presets import discount_for, learning_starts_for
from sb3_mbdpo.shard_format import TaskData
from sb3_mbdpo.shards import ShardedDataset

if TYPE_CHECKING:
    from minari import MinariDataset

    from sb3_mbdpo.mbdpo import MBDPO

SelfMinari = TypeVar("SelfMinari", bound="MinariAlgorithm")


class MinariAlgorithm(OfflineAlgorithm):
    """The part of MBDPO that is built for data sets and turns what it collected into one."""

    @classmethod
    def from_minari(
        cls: type[SelfMinari],
        dataset: OfflineData,
        env: GymEnv | str | Mapping[str, EnvSource] | None = None,
        policy: str | None = None,
        observation_dim: int | None = None,
        action_dim: int | None = None,
        **kwargs: Any,
    ) -> SelfMinari:
        """
        Build a model for recorded data: its spaces, its environment where that can be recovered, the discount that
        suits its episodes' length.

        Data of several tasks, or of one that is given by name, make a multi-task model: each task with its name, sizes,
        discount and reference scores, and the id of its environment where that alone makes it. Without an environment
        the model learns offline, predicts, saves and loads; ``set_env`` gives it one.

        :param dataset: As in :meth:`learn_offline`
        :param env: Environment to use instead of the recorded one; of several tasks a dict of them by task
        :param policy: "MlpPolicy", "CnnPolicy", "MultiInputPolicy" or a policy class; None: what suits the spaces
        :param observation_dim: Width of a multi-task model's observations, which leaves room for tasks to be added
            later; None: the widest task's
        :param action_dim: The same for actions
        :param kwargs: Further arguments of the algorithm
        :return: The model, not trained yet
        :raises ValueError: if the data cannot be read, or the environment given has other spaces
        """
        opened = None if isinstance(dataset, ShardedDataset) else open_tasks(dataset)
        if isinstance(dataset, ShardedDataset):
            pair, entries = (dataset.observation_space, dataset.action_space), present(dataset.tasks)
        else:
            assert opened is not None
            pair, entries = common_spaces(opened), [task_data(task) for task in opened]
        room = {"observation_dim": observation_dim, "action_dim": action_dim}
        if entries[0].name is not None:
            limits = [e.max_episode_length for e in entries] if opened is None else [episode_limit([t]) for t in opened]
            return cls._from_tasks(entries, pair, limits, env, policy, room, kwargs)
        if any(width is not None for width in room.values()) or isinstance(env, Mapping):
            raise ValueError(
                "observation_dim, action_dim and environments by task are for models of several tasks: give the data "
                'sets by the names of their tasks, {"name": data set}.'
            )
        if opened is None:
            limit, recorded = max(entry.max_episode_length or 0 for entry in entries), None
        else:
            limit, recorded = episode_limit(opened), None if env is not None else _recovered(opened[0].datasets, pair)
        policy = policy or _policy_for(pair[0])
        kwargs = {"gamma": discount_for(limit)} | kwargs
        env = recorded if env is None else env
        if env is not None:
            verbose = kwargs.get("verbose", 0)
            wrapped = cls._wrap_env(maybe_make_env(env, verbose), verbose)
            check_same_spaces(pair, wrapped.observation_space, cast(spaces.Box, wrapped.action_space))
            return cls(policy, wrapped, **kwargs)
        if kwargs.get("learning_starts") is None:
            kwargs["learning_starts"] = learning_starts_for(limit)
            kwargs.setdefault("warmup_updates", kwargs["learning_starts"])
        model = cls(policy, None, _init_setup_model=False, **kwargs)  # type: ignore[arg-type, call-arg]
        model.observation_space, model.action_space = pair
        model.n_envs = 1
        set_up(cast("MBDPO", model), to_act=True, initialize=True)
        return model

    @classmethod
    def _from_tasks(
        cls: type[SelfMinari],
        entries: Sequence[TaskData],
        pair: tuple[spaces.Space, spaces.Box],
        limits: Sequence[int | None],
        env: GymEnv | str | Mapping[str, EnvSource] | None,
        policy: str | None,
        room: dict[str, int | None],
        kwargs: dict[str, Any],
    ) -> SelfMinari:
        """A multi-task model, with all tasks' environments where each is known or given."""
        envs = env if isinstance(env, Mapping) else {}
        tasks = task_set_of_data(entries, pair, limits, envs, **room)
        if env is None and all(task.env_id is not None for task in tasks):
            env = make_multitask_env(tasks)
        elif isinstance(env, Mapping):
            env = make_multitask_env(tasks, env, [name for name in tasks.names if name in env])
        return cls(policy or "MultiInputPolicy", env, tasks=tasks, **kwargs)  # type: ignore[arg-type, call-arg]

    def to_minari(
        self,
        dataset_id: str,
        source: str = "replay_buffer",
        n_episodes: int = 100,
        env: GymEnv | str | None = None,
        deterministic: bool = True,
        ref_min_score: float | None = None,
        ref_max_score: float | None = None,
        n_ref_episodes: int = 0,
        task: str | None = None,
        **metadata: Any,
    ) -> "MinariDataset":
        """
        Make a Minari data set of what was collected while learning, or of fresh episodes (``source="agent"``).
        Arguments and errors are those of :func:`~sb3_mbdpo.minari_export.export_minari`.

        :return: The data set
        """
        return export_minari(
            cast("MBDPO", self),
            dataset_id,
            source,
            n_episodes,
            env,
            deterministic,
            ref_min_score,
            ref_max_score,
            n_ref_episodes,
            task,
            **metadata,
        )


def _policy_for(space: spaces.Space) -> str:
    if isinstance(space, spaces.Dict):
        return "MultiInputPolicy"
    return "CnnPolicy" if is_image_space(space) else "MlpPolicy"


def _recovered(datasets: list[Any], pair: tuple[spaces.Space, spaces.Box]) -> VecEnv | None:
    """The environment that one of the data sets names, wrapped; None, with a warning, if it cannot be made."""
    for dataset in datasets:
        if dataset.env_spec is None:
            continue
        env = None
        try:
            env = MinariAlgorithm._wrap_env(dataset.recover_environment())
            check_same_spaces(pair, env.observation_space, cast(spaces.Box, env.action_space))
        except (gym.error.Error, ImportError, ValueError, TypeError, AttributeError, RuntimeError, OSError) as error:
            if env is not None:
                env.close()
            warnings.warn(
                f"The environment of {dataset.id} could not be recovered ({error}): the model has none, unless you "
                "pass env=...",
                stacklevel=3,
            )
            return None
        return env
    return None
