import pytest

pytest.importorskip("dm_control")

from sb3_mbdpo import cli, task_commands


def test_the_table(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["tasks"]) == 0
    text = capsys.readouterr().out
    assert len([line for line in text.splitlines() if line.startswith("mbdpo/")]) == 104
    assert "mbdpo/walker-walk-v0" in text
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.startswith("mbdpo/")}
    assert rows["mbdpo/walker-walk-v0"] == ["24", "6", "500", "yes", "DMControl", "yes"]
    assert rows["mbdpo/pick-cube-v0"][:3] == ["?", "?", "100"]
    for suite in task_commands.SUITES.values():
        assert (suite.install_command in text) == (not suite.installed)


def test_sets_and_tasks_are_listed_once(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["tasks", "locomotion", "dog-run", "cup-spin"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("mbdpo/")]
    assert len(names) == 8
    assert names[-1] == "mbdpo/cup-spin-v0"


def test_trying_tasks_out(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    assert cli.main(["tasks", "pendulum-spin", "--check"]) == 0
    assert "mbdpo/pendulum-spin-v0: 500 decisions" in capsys.readouterr().out

    def broken(env_id: str) -> None:
        raise ValueError("broken")

    monkeypatch.setattr(task_commands, "check_task", broken)
    assert cli.main(["tasks", "cup-spin", "cup-catch", "--check"]) == 1
    assert "0 of 2 tasks passed" in capsys.readouterr().out
    # Of these one alone can be seen
    assert cli.main(["tasks", "cup-spin", "reacher-easy", "--check", "--pixels"]) == 1
    assert "0 of 1 tasks passed" in capsys.readouterr().out
    assert cli.main(["tasks", "cup-catch", "--pixels"]) == 2
