"""What needs the Hub itself is in test_hub.py."""

import json
from pathlib import Path

import pytest

from sb3_mbdpo import MBDPO, hub_commands
from tests.checkpoint_fakes import QUICK, trained
from tests.fakes import ToyEnv
from tests.test_release_conversion import GOLDEN


def test_convert_writes_a_checkpoint_that_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = str(GOLDEN / "single.pt"), tmp_path / "new"
    assert hub_commands.convert([source, str(target), "--env", "mbdpo/walker-run-v0", "--license", "mit"]) == 0
    assert "environment mbdpo/walker-run-v0" in capsys.readouterr().out
    model = MBDPO.from_pretrained(target, device="cpu")
    assert model.policy.world_model.score is not None
    assert "converted from single.pt" in (target / "README.md").read_text()
    assert json.loads((target / "config.json").read_text())["env"]["id"] == "mbdpo/walker-run-v0"
    # What is there is not replaced
    assert hub_commands.convert([source, str(target)]) == 1
    assert "holds a checkpoint already" in capsys.readouterr().err


def test_convert_exports_to_onnx(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    trained("vector", steps=1).save_pretrained(tmp_path / "m")
    arguments = [str(tmp_path / "m"), str(tmp_path / "policy.onnx"), "--onnx", "--act-mode", "prior"]
    assert hub_commands.main(["convert", *arguments]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "policy.onnx") and (tmp_path / "policy.onnx").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", "nothing.pt", "x"], "There is no file nothing.pt"),
        (["convert", "text.pt", "x"], "error: "),
        (["convert", str(GOLDEN / "multitask.pt"), "x"], "pass task_names"),
        (["push", "nothing", "me/x", "--token", "hf_x"], "There is no nothing"),
        (["push", "empty", "me/x", "--as-is", "--token", "hf_x"], "has no config.json"),
        (["push", "empty", "me/x", "--token", "hf_x"], "has no config.json"),
        (["pull", "me/x/y"], "Repo id must be"),
    ],
)
def test_mistakes_are_one_line_and_code_1(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("text.pt").write_text("hello")
    assert hub_commands.main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1, error
    assert not Path("x").exists()


def test_push_looks_at_names_and_numbers_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    MBDPO("MlpPolicy", "CheckpointPendulum-v0", **QUICK).save(tmp_path / "agent.zip")
    monkeypatch.setattr("sb3_mbdpo.hub_transfer.check_account", lambda token: pytest.fail("asked the Hub"))
    assert hub_commands.push([str(tmp_path / "agent.zip"), "me/agent/x"]) == 1
    assert "error: 'me/agent/x' is no name of a repository" in capsys.readouterr().err
    for more in (["-n", "-3"], ["--seed", "-1"]):
        with pytest.raises(SystemExit, match="2"):
            hub_commands.push([str(tmp_path / "agent.zip"), "me/agent", *more])
        assert "must be at least 0" in capsys.readouterr().err


def test_push_of_a_zip_evaluates_and_writes_a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    MBDPO("MlpPolicy", "CheckpointPendulum-v0", **QUICK).save(tmp_path / "agent.zip")
    monkeypatch.setattr("sb3_mbdpo.hub_transfer.check_account", lambda token: None)
    uploaded = {}

    def upload(folder: Path, repo_id: str, **kwargs: object) -> str:
        uploaded.update({path.name: path.read_bytes() for path in Path(folder).iterdir()}, repo_id=repo_id, **kwargs)
        return "https://address"

    monkeypatch.setattr("sb3_mbdpo.hub_transfer.upload_checkpoint", upload)
    arguments = [str(tmp_path / "agent.zip"), "me/agent", "-n", "2", "--command", "python x.py", "--private"]
    assert hub_commands.push([*arguments, "--dataset", "me/data-v0"]) == 0
    assert uploaded["repo_id"] == "me/agent" and uploaded["private"] is True and uploaded["create_pr"] is None
    assert {"results.json", "replay.mp4", "README.md", "config.json", "model.safetensors"} <= uploaded.keys()
    assert len(json.loads(uploaded["results.json"])["tasks"][0]["returns"]) == 2
    card = uploaded["README.md"].decode()
    assert "MBDPO.from_hub('me/agent'" in card and "python x.py" in card and "me/data-v0" in card


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert hub_commands.main([]) == 2 and hub_commands.main(["help"]) == 2 and hub_commands.main(["--help"]) == 0
    assert "push,pull,convert" in capsys.readouterr().err


def test_what_a_folder_is(tmp_path: Path) -> None:
    results = {"tasks": [{"name": "up", "mean": 1.0, "std": 0.5}]}
    model = trained("tasks", steps=1)
    model._base_model = "me/base"
    (tmp_path / "m").mkdir()
    model.save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "results.json").write_text(json.dumps(results))
    text = hub_commands.describe_folder(tmp_path / "m")
    for piece in ("up, down, wide", "base model  me/base", "up 1.0 ± 0.5", "acts by search"):
        assert piece in text, piece
    MBDPO("MlpPolicy", ToyEnv(), **QUICK).save_pretrained(tmp_path / "n")
    assert "environment" not in hub_commands.describe_folder(tmp_path / "n")
