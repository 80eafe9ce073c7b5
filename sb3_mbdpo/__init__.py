"""MBDPO for Stable-Baselines3: world-model reinforcement learning with diffusion search."""

from sb3_mbdpo.buffers import DictSequenceReplayBuffer, SequenceReplayBuffer, SequenceSamples
from sb3_mbdpo.mbdpo import MBDPO
from sb3_mbdpo.policies import CnnPolicy, MBDPOPolicy, MlpPolicy, MultiInputPolicy
from sb3_mbdpo.released_checkpoints import load_released_checkpoint
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
    "WorldModel",
    "load_released_checkpoint",
]
