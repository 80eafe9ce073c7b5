import pytest

from sb3_mbdpo.presets import MODEL_SIZES
from sb3_mbdpo.sizes import PAPER_SIZES, count_parameters, main, size_table
from tests.test_multitask import multitask_policy

# The paper's multi-task sizes, million parameters: 1.7M and 340M are its range; of the size 5 it says 5 to 6
PAPER = {1: 1.7, 5: 5.5, 19: 19, 48: 48, 317: 340}


@pytest.mark.parametrize("size", PAPER_SIZES)
@pytest.mark.parametrize("widths", [(24, 6, 30), (39, 6, 80)])
def test_multitask_sizes_are_the_papers(size: float, widths: tuple[int, int, int]) -> None:
    count = count_parameters(size, *widths)
    assert count.total / 1e6 == pytest.approx(PAPER[int(size)], rel=0.15)
    assert count.stored > count.trained > count.total


def test_the_count_is_that_of_a_real_model() -> None:
    """The same modules, and as many numbers, as in a policy."""
    model = multitask_policy().world_model
    count = count_parameters(0.02, 5, 3, 3)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count.trained == trained
    assert count.stored == sum(p.numel() for p in model.parameters())
    left_out = [model.termination, model.score]
    assert count.total == trained - sum(p.numel() for module in left_out for p in module.parameters())
    assert count.modules["task_embedding"] == 3 * 96
    assert "task_embedding" not in count_parameters(0.02, n_tasks=0).modules


def test_larger_sizes_are_larger() -> None:
    counts = [count_parameters(size).total for size in sorted(MODEL_SIZES)]
    assert counts == sorted(counts)
    with pytest.raises(ValueError, match="model_size"):
        count_parameters(3)


def test_the_table_is_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["sizes", "--observations", "24", "--tasks", "30"])
    main()
    printed = capsys.readouterr().out
    assert printed.startswith(size_table(24, 6, 30))
    assert [line.split()[0] for line in printed.splitlines()[1:6]] == ["1", "5", "19", "48", "317"]
