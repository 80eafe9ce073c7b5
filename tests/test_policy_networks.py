"""Sizes, extractors and encoders that a policy's arguments stand for."""

from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor, NatureCNN
from torch import nn

from sb3_mbdpo.encoders import DictEncoder, FeaturesEncoder, PixelEncoder, StateEncoder
from sb3_mbdpo.policy_networks import SIZE_ARGUMENTS, layer_sizes, make_encoder, make_extractor, make_task_encoder
from sb3_mbdpo.presets import MODEL_SIZES
from sb3_mbdpo.tasks import Task, TaskSet
from tests.fakes import ACTIONS, IMAGE, VECTOR

CHANNELS_FIRST = spaces.Box(0, 255, (3, 36, 36), np.uint8)
SIZES = layer_sizes(0.02, None, None, {}, False)


@pytest.mark.parametrize("size", MODEL_SIZES)
def test_without_arguments_sizes_are_the_tables(size: float) -> None:
    table, found = MODEL_SIZES[size], layer_sizes(size, None, None, dict.fromkeys(SIZE_ARGUMENTS), False)
    assert found.encoder == [table.enc_dim] * (table.num_enc_layers - 1) and found.heads == [table.mlp_dim] * 2
    assert (found.latent_dim, found.n_critics, found.num_channels) == (
        table.latent_dim,
        table.n_critics,
        table.num_channels,
    )
    assert found.activation_fn is table.activation_fn


def test_arguments_win_over_the_table_and_net_arch_over_both() -> None:
    own = {"enc_dim": 24, "num_enc_layers": 3, "mlp_dim": 40, "latent_dim": 48, "n_critics": 3, "num_channels": 4}
    sizes = layer_sizes(5, None, nn.Tanh, own, False)
    assert sizes == ([24, 24], [40, 40], 48, 3, 4, nn.Tanh)
    assert layer_sizes(5, [7], None, own, False).heads == [7]
    both = layer_sizes(5, {"encoder": [5, 6], "heads": [8]}, None, own, False)
    assert (both.encoder, both.heads) == ([5, 6], [8])
    # One layer is the last one alone, which is not hidden; one hidden layer is the fewest
    assert layer_sizes(5, None, None, own | {"num_enc_layers": 1}, False).encoder == [24]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.3, None, None, {}, False), "model_size"),
        ((5, None, "relu", {}, False), "activation_fn must be a class of modules"),
        ((5, None, nn.PReLU, {}, False), "PReLU has some"),
        ((5, {"encoder": [8]}, None, {}, True), "images are read by convolutions: use num_channels"),
    ],
)
def test_sizes_that_cannot_be(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer_sizes(*arguments)


def test_extractors() -> None:
    assert make_extractor(None, None, VECTOR, True) is None
    with pytest.raises(ValueError, match=r"features_extractor_kwargs \(\['features_dim'\]\) are those of a"):
        make_extractor(None, {"features_dim": 3}, VECTOR, True)
    assert isinstance(make_extractor(FlattenExtractor, None, VECTOR, True), FlattenExtractor)
    given = {"features_dim": 32}
    floats = spaces.Box(0, 1, (3, 36, 36), np.float32)
    made = make_extractor(NatureCNN, given, floats, False)
    assert made is not None and made.features_dim == 32
    assert given == {"features_dim": 32}, "the user's own"
    with pytest.raises(AssertionError, match="image"):
        make_extractor(NatureCNN, given, floats, True)


@pytest.mark.parametrize(
    ("space", "kind", "encoder"),
    [
        (VECTOR, "vectors", StateEncoder),
        (CHANNELS_FIRST, "vectors", StateEncoder),
        (CHANNELS_FIRST, "images", PixelEncoder),
        (spaces.Dict({"speed": VECTOR, "camera": CHANNELS_FIRST}), "dicts", DictEncoder),
        (spaces.Dict({"speed": VECTOR}), "vectors", DictEncoder),
    ],
    ids=str,
)
def test_what_reads_which_observations(space: spaces.Space, kind: str, encoder: type[nn.Module]) -> None:
    made = make_encoder(space, kind, SIZES, 8, True)
    assert type(made) is encoder
    extractor = make_extractor(
        CombinedExtractor if isinstance(space, spaces.Dict) else FlattenExtractor, None, space, True
    )
    assert type(make_encoder(space, kind, SIZES, 8, True, extractor)) is FeaturesEncoder


@pytest.mark.parametrize(
    ("space", "kind", "message"),
    [
        (VECTOR, "dicts", "MultiInputPolicy needs Dict observations"),
        (VECTOR, "images", "CnnPolicy needs image observations"),
        (IMAGE, "images", "channels first"),
    ],
    ids=str,
)
def test_what_is_not_read_names_the_policy_that_reads_it(space: spaces.Space, kind: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_encoder(space, kind, SIZES, 8, True)


def test_tasks_are_read_with_their_embedding() -> None:
    tasks = TaskSet([Task("small", 2, 1), Task("large", 5, 2)])
    encoder = make_task_encoder(tasks, tasks.observation_space, tasks.action_space, SIZES, 8, 4)
    assert encoder(th.zeros(3, 5), th.zeros(3, 4)).shape == (3, SIZES.latent_dim)
    with pytest.raises(ValueError, match="tasks"):
        make_task_encoder(tasks, VECTOR, ACTIONS, SIZES, 8, 4)
