import pytest

from sb3_mbdpo.task_names import META_WORLD, MT30, MT80


def test_the_sets_have_their_sizes_and_no_name_twice() -> None:
    assert (len(MT30), len(META_WORLD), len(MT80)) == (30, 50, 80)
    assert len(set(MT80)) == 80


@pytest.mark.parametrize(
    ("index", "name"),
    [(0, "walker-stand"), (18, "hopper-hop"), (29, "pendulum-spin"), (30, "mw-assembly"), (79, "mw-hand-insert")],
)
def test_names_stand_at_their_indices(index: int, name: str) -> None:
    assert MT80[index] == name
