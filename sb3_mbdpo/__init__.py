"""MBDPO for Stable-Baselines3: world-model reinforcement learning with diffusion search."""

from sb3_mbdpo.buffers import DictSequenceReplayBuffer, SequenceReplayBuffer, SequenceSamples
from sb3_mbdpo.chunks import convert_chunks
from sb3_mbdpo.mbdpo import MBDPO
from sb3_mbdpo.minari_data import convert_minari
from sb3_mbdpo.policies import CnnPolicy, MBDPOPolicy, MlpPolicy, MultiInputPolicy
from sb3_mbdpo.released_checkpoints import load_released_checkpoint
from sb3_mbdpo.shard_writer import ShardWriter
from sb3_mbdpo.shards import ShardedDataset
from sb3_mbdpo.world_model import WorldModel

__version__ = "0.1.0"

__all__ = [
    "MBDPO",
    "CnnPolicy",
    "DictSequenceReplayBuffer",
    "MBDPOPolicy",
    "MlpPolicy",
    "MultiInputPolicy",
    "SequenceReplayBuffer",
    "SequenceSamples",
    "ShardWriter",
    "ShardedDataset",
    "WorldModel",
    "convert_chunks",
    "convert_minari",
    "load_released_checkpoint",
]
