import numpy as np
import pytest
import torch as th
from gymnasium import spaces

from sb3_mbdpo.activations import SimNorm
from sb3_mbdpo.encoders import DictEncoder, PixelEncoder, StateEncoder, conv_trunk, random_shift


def generator(seed: int = 0) -> th.Generator:
    return th.Generator().manual_seed(seed)


def assert_is_latent(z: th.Tensor, batch: int, width: int) -> None:
    assert z.shape == (batch, width)
    th.testing.assert_close(z.unflatten(-1, (-1, 8)).sum(-1), th.ones(batch, width // 8))


# --- images ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "layers", "flat"),
    [
        ((36, 36), 3, 2 * 2),
        ((40, 40), 4, 1),
        ((64, 64), 4, 4 * 4),
        ((84, 84), 4, 6 * 6),
        ((64, 96), 4, 4 * 8),
        ((7, 50), 1, 1 * 22),
        ((7, 7), 1, 1),
    ],
)
def test_images_of_any_size(size: tuple[int, int], layers: int, flat: int) -> None:
    trunk, width = conv_trunk((3, *size), 6)
    assert sum(isinstance(layer, th.nn.Conv2d) for layer in trunk) == layers and width == 6 * flat
    assert isinstance(trunk[-1], th.nn.Conv2d)
    encoder = PixelEncoder((3, *size), 6, 32)
    images = th.rand(2, 3, *size, generator=generator())
    z = encoder(images)
    assert_is_latent(z, 2, 32)
    assert not th.equal(z[0], z[1])


def test_released_image_size_needs_no_projection() -> None:
    assert isinstance(PixelEncoder((9, 64, 64), 4, 64).project, SimNorm)
    assert not isinstance(PixelEncoder((9, 64, 64), 4, 64, task_dim=8).project, SimNorm)


@pytest.mark.parametrize("shape", [(64, 64), (3, 6, 64), (64, 64, 3), (1, 3, 64, 64)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="channels first"):
        PixelEncoder(shape, 4, 32)


# --- vectors, dicts, tasks ------------------------------------------------------------------------------------------


def test_vectors_of_any_shape_are_flattened() -> None:
    encoder = StateEncoder(6, [10], 16)
    x = th.randn(4, 2, 3, generator=generator())
    assert_is_latent(encoder(x), 4, 16)
    assert th.equal(encoder(x), encoder(x.flatten(1)))


def test_task_embeddings_are_read() -> None:
    x, image = th.randn(2, 6, generator=generator()), th.rand(2, 3, 40, 40, generator=generator())
    space = spaces.Dict({"v": spaces.Box(-1.0, 1.0, (6,))})
    one, other = th.zeros(2, 5), th.ones(2, 5)
    for encoder, obs in (
        (StateEncoder(6, [10], 16, task_dim=5), x),
        (PixelEncoder((3, 40, 40), 4, 16, task_dim=5), image),
        (DictEncoder(space, [10], 4, 16, task_dim=5), {"v": x}),
    ):
        assert_is_latent(encoder(obs, one), 2, 16)
        assert not th.equal(encoder(obs, one), encoder(obs, other))


def test_dict_encoder_reads_every_key_by_name() -> None:
    image = spaces.Box(0, 255, (3, 36, 36), np.uint8)
    space = spaces.Dict(
        {"a.b": image, "weight": spaces.Box(-1.0, 1.0, (2, 2)), "pop": spaces.Discrete(3), "": spaces.MultiBinary(2)}
    )
    encoder = DictEncoder(space, [10, 12], 4, 16)
    draw = generator()
    obs = {
        "a.b": th.rand(2, 3, 36, 36, generator=draw),
        "weight": th.randn(2, 2, 2, generator=draw),
        "pop": th.eye(3)[:2],
        "": th.ones(2, 2),
    }
    z = encoder(obs)
    assert_is_latent(z, 2, 16)
    assert th.equal(z, encoder(dict(reversed(obs.items()))))
    for key in obs:
        assert not th.equal(z, encoder({**obs, key: 1 - obs[key]})), key


def test_dict_encoder_with_float_images() -> None:
    space = spaces.Dict({"image": spaces.Box(0.0, 1.0, (3, 36, 36), np.float32)})
    convolved = DictEncoder(space, [10], 4, 16, normalized_images=True)
    flattened = DictEncoder(space, [10], 4, 16)
    assert any(isinstance(layer, th.nn.Conv2d) for layer in convolved.modules())
    assert not any(isinstance(layer, th.nn.Conv2d) for layer in flattened.modules())
    assert_is_latent(flattened({"image": th.rand(2, 3, 36, 36)}), 2, 16)


# --- random shifts --------------------------------------------------------------------------------------------------


def coordinates(batch: int, height: int, width: int, dtype: th.dtype = th.uint8) -> th.Tensor:
    """Images whose two channels hold each pixel's row and column."""
    rows, cols = th.meshgrid(th.arange(height), th.arange(width), indexing="ij")
    return th.stack([rows, cols]).to(dtype).expand(batch, -1, -1, -1)


@pytest.mark.parametrize("size", [(12, 12), (9, 20)])
@pytest.mark.parametrize("dtype", [th.uint8, th.float32])
def test_shifts_are_whole_and_within_bounds(size: tuple[int, int], dtype: th.dtype) -> None:
    height, width = size
    images = coordinates(400, height, width, dtype)
    shifted = random_shift(images, 3, generator())
    assert shifted.dtype == dtype and shifted.shape == images.shape
    moved = shifted[:, :, height // 2, width // 2].long() - th.tensor([height // 2, width // 2])
    for image, (down, right) in zip(shifted, moved.tolist(), strict=True):
        rows = (th.arange(height) + down).clamp(0, height - 1)
        cols = (th.arange(width) + right).clamp(0, width - 1)
        assert th.equal(image, images[0][:, rows][:, :, cols])
    # Every pair of shifts from -3 to 3 is as likely as any other, and each image has its own
    assert moved.min() == -3 and moved.max() == 3 and len(moved.unique(dim=0)) == 49
    assert abs(th.corrcoef(moved.float().T)[0, 1]) < 0.15


def test_shifts_follow_the_generator() -> None:
    images, global_state = coordinates(20, 12, 12), th.get_rng_state()
    first, again = random_shift(images, 3, generator(1)), random_shift(images, 3, generator(1))
    assert th.equal(first, again) and not th.equal(first, random_shift(images, 3, generator(2)))
    assert th.equal(global_state, th.get_rng_state())
    assert th.equal(images, coordinates(20, 12, 12)), "the input is left alone"
    assert th.equal(random_shift(images, 0, generator()), images)
