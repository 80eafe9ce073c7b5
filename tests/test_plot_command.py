"""Runs beside the paper's curves, from evaluations written by hand."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rl_zoo3")

from matplotlib.figure import Figure

from sb3_mbdpo import cli, plot_command, zoo


def write_run(folder: Path, name: str, steps: list[int], values: list[float], key: str = "results") -> None:
    (folder / "mbdpo" / name).mkdir(parents=True)
    arrays = {"timesteps": np.array(steps), "results": np.zeros((len(steps), 2)), key: np.array([values, values]).T}
    np.savez(folder / "mbdpo" / name / "evaluations.npz", **arrays)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    figures, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: (figures.append(self), save(self, *args, **kwargs))
    )
    return figures


def lines(figure: Figure) -> dict[str, np.ndarray]:
    return {str(line.get_label()): np.array(line.get_data()) for line in figure.axes[0].lines}


def test_runs_are_drawn_in_environment_steps_over_the_references(tmp_path: Path, drawn: list[Figure]):
    write_run(tmp_path, "mbdpo-walker-walk-v0_1", [50_000, 100_000], [100.0, 900.0])
    write_run(tmp_path, "mbdpo-walker-walk-v0_2", [50_000, 100_000], [300.0, 700.0])
    # Not runs of this environment
    write_run(tmp_path, "mbdpo-walker-walk-v0-pixels-v0_1", [1], [0.0])
    assert cli.main(["plot", "--env", "mbdpo/walker-walk-v0", "-f", str(tmp_path), "--against", "paper"]) == 0
    assert (tmp_path / "mbdpo" / "mbdpo-walker-walk-v0_against_paper.png").stat().st_size > 5_000
    curves = lines(drawn[0])
    np.testing.assert_array_equal(curves["this project (2 runs)"], [[100_000, 200_000], [200, 800]])
    released = curves["mbdpo, released (3 seeds)"]
    assert released[0, 1] == 200_000
    assert released[1, 1] > 900
    assert drawn[0].axes[0].get_xlim() == (0, 400_000)


def test_rates_of_success_beside_rates_of_success(tmp_path: Path, drawn: list[Figure]):
    write_run(tmp_path, "mbdpo-mw-reach-v0_3", [10_000], [0.5], "successes")
    output = tmp_path / "picture.png"
    arguments = ["--env", "mbdpo/mw-reach-v0", "-f", str(tmp_path), "--against", "paper", "-o", str(output)]
    assert cli.main(["plot", *arguments, "--methods", "mbdpo"]) == 0
    curves = lines(drawn[0])
    np.testing.assert_array_equal(curves["mbdpo-mw-reach-v0_3"], [[20_000], [0.5]])
    assert drawn[0].axes[0].get_ylabel() == "success rate"
    assert output.is_file()


def test_pixels_are_laid_beside_pixels():
    assert [curve.method for curve in plot_command.find_references("reacher-easy", pixels=True)] == [
        "mbdpo-pixels",
        "tdmpc2-pixels",
    ]


def test_pictures_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_run(tmp_path, "Pendulum-v1_1", [100, 200], [-1000.0, -200.0])
    (tmp_path / "file").touch()
    for output in ("x.xyz", "mbdpo", "file/x.png"):
        for command in (["plot", "-o"], ["plot", "train", "-a", "mbdpo", "--save"]):
            path = str(tmp_path / output)
            arguments = ["-e", "Pendulum-v1"] if "train" in command else ["--env", "Pendulum-v1"]
            assert cli.main([*command, path, *arguments, "-f", str(tmp_path)]) == 2
            said = capsys.readouterr().err
            assert said.startswith(f"mbdpo plot: {path} ") and "written" in said and len(said.splitlines()) == 1


def test_runs_and_methods_that_are_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_run(tmp_path, "Pendulum-v1_1", [100], [-1000.0])
    for more, words in (
        (["--exp-id", "99"], "There is no run 99 of mbdpo on Pendulum-v1; there are [1]."),
        (["--methods", "sac"], "--methods are the reference's: add --against paper."),
    ):
        assert cli.main(["plot", "--env", "Pendulum-v1", "-f", str(tmp_path), *more]) == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("steps", ["-5", "0", "nan", "inf"])
def test_steps_to_draw_are_some(steps: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_run(tmp_path, "Pendulum-v1_1", [100], [-1000.0])
    with pytest.raises(SystemExit, match="2"):
        cli.main(["plot", "--env", "Pendulum-v1", "-f", str(tmp_path), "--max-timesteps", steps])
    assert "must be more than 0" in capsys.readouterr().err


def test_the_zoo_plots_environments_that_have_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    write_run(tmp_path, "mbdpo-walker-walk-v0_1", [100], [1.0])
    begun: list[str] = []
    monkeypatch.setattr(zoo, "hand_over", lambda program, *rest: begun.append(program))
    where = ["-a", "mbdpo", "-f", str(tmp_path)]
    picture = tmp_path / "t.png"
    for env_id, words in (
        ("Nope-v1", "There is no run of mbdpo on Nope-v1"),
        ("mbdpo/walker-walk-v0", "-e mbdpo-walker-walk-v0."),
    ):
        for command in ("train", "all"):
            assert cli.main(["plot", command, "-e", env_id, *where, "--save", str(picture)]) == 2
            assert words in capsys.readouterr().err
    assert not begun and not picture.exists()
    # Parts of names are enough for the zoo
    assert cli.main(["plot", "train", "-e", "walker-walk", *where, "--save", str(picture)]) == 0
    assert begun == ["plot_train"]
