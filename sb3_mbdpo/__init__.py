"""MBDPO for Stable-Baselines3: world-model reinforcement learning with diffusion search."""

from sb3_mbdpo.buffers import DictSequenceReplayBuffer, SequenceReplayBuffer, SequenceSamples
from sb3_mbdpo.chunks import convert_chunks
from sb3_mbdpo.mbdpo import MBDPO
from sb3_mbdpo.minari_data import convert_minari
from sb3_mbdpo.multitask_env import MultiTaskEnv, describe_tasks, make_multitask_env
from sb3_mbdpo.policies import CnnPolicy, MBDPOPolicy, MlpPolicy, MultiInputPolicy
from sb3_mbdpo.released_checkpoints import load_released_checkpoint
from sb3_mbdpo.shard_writer import ShardWriter
from sb3_mbdpo.shards import ShardedDataset
from sb3_mbdpo.suites import task_set, task_set_names
from sb3_mbdpo.task_replay import MultiTaskReplayBuffer
from sb3_mbdpo.tasks import Task, TaskSet
from sb3_mbdpo.weight_averaging import WeightAveraging
from sb3_mbdpo.world_model import WorldModel

__version__ = "0.1.0"

__all__ = [
    "MBDPO",
    "CnnPolicy",
    "DictSequenceReplayBuffer",
    "MBDPOPolicy",
    "MlpPolicy",
    "MultiInputPolicy",
    "MultiTaskEnv",
    "MultiTaskReplayBuffer",
    "SequenceReplayBuffer",
    "SequenceSamples",
    "ShardWriter",
    "ShardedDataset",
    "Task",
    "TaskSet",
    "WeightAveraging",
    "WorldModel",
    "convert_chunks",
    "convert_minari",
    "describe_tasks",
    "load_released_checkpoint",
    "make_multitask_env",
    "task_set",
    "task_set_names",
]
