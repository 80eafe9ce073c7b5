import gymnasium as gym
import pytest

from sb3_mbdpo.multitask_env import flat_sizes
from sb3_mbdpo.suites.registration import DMCONTROL, env_id
from sb3_mbdpo.task_names import META_WORLD, MT30, MT80, sizes_of


def test_the_sets_have_their_sizes_and_no_name_twice() -> None:
    assert (len(MT30), len(META_WORLD), len(MT80)) == (30, 50, 80)
    assert len(set(MT80)) == 80


@pytest.mark.parametrize(
    ("index", "name"),
    [(0, "walker-stand"), (18, "hopper-hop"), (29, "pendulum-spin"), (30, "mw-assembly"), (79, "mw-hand-insert")],
)
def test_names_stand_at_their_indices(index: int, name: str) -> None:
    assert MT80[index] == name


def test_every_task_has_sizes_that_fit_the_released_data() -> None:
    sizes = {name: sizes_of(name) for name in MT80}
    assert all(sizes.values())
    widths = [[size[part] for name, size in sizes.items() if name in MT30 and size] for part in (0, 1)]
    assert [max(width) for width in widths] == [24, 6]
    assert {sizes[name] for name in META_WORLD} == {(39, 4)}
    assert sizes["reacher-easy"] == (6, 2) and sizes["reacher-three-hard"] == (8, 3)
    assert sizes_of("humanoid-walk") is None


@pytest.mark.parametrize("name", [name for name in MT30 if name in DMCONTROL])
def test_sizes_are_those_of_the_environments(name: str) -> None:
    pytest.importorskip("dm_control")
    env = gym.make(env_id(name))
    assert flat_sizes(env) == sizes_of(name)
    env.close()
