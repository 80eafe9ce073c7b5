import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from sb3_mbdpo import MBDPO
from sb3_mbdpo.saving import whole_file, whole_files
from tests.fakes import ToyEnv


def test_a_file_takes_its_place_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "new" / "model"
    with whole_file(target, "zip") as file:
        file.write(b"first")
        assert not target.with_suffix(".zip").exists()
    assert target.with_suffix(".zip").read_bytes() == b"first"
    with pytest.raises(RuntimeError), whole_file(target, "zip") as file:
        file.write(b"sec")
        raise RuntimeError
    assert target.with_suffix(".zip").read_bytes() == b"first"
    assert [path.name for path in target.parent.iterdir()] == ["model.zip"]


def test_names_links_and_folders_are_those_of_sb3(tmp_path: Path) -> None:
    with whole_file(tmp_path / "model.v2", "zip") as file:
        file.write(b"x")
    assert (tmp_path / "model.v2").read_bytes() == b"x"
    (tmp_path / "link.zip").symlink_to(tmp_path / "model.v2")
    with whole_file(str(tmp_path / "link"), "zip") as file:
        file.write(b"y")
    assert (tmp_path / "link.zip").is_symlink() and (tmp_path / "model.v2").read_bytes() == b"y"
    (tmp_path / "folder.zip").mkdir()
    with pytest.warns(UserWarning, match="is a folder"), whole_file(tmp_path / "folder", "zip") as file:
        file.write(b"z")
    assert (tmp_path / "folder_2.zip").read_bytes() == b"z"


@pytest.mark.parametrize("what", ["save", "save_replay_buffer"])
def test_killed_while_saving_the_previous_file_stands(what: str, tmp_path: Path) -> None:
    """The process is killed outright as soon as the second file has begun to grow."""
    program = f"""
        import io, os, signal, sys
        sys.path.insert(0, {str(Path(__file__).parents[1])!r})
        from sb3_mbdpo import MBDPO, saving
        from tests.fakes import ToyEnv

        model = MBDPO("MlpPolicy", ToyEnv(), preset="debug", buffer_size=500, device="cpu", seed=0)
        model.learn(20)
        model.{what}({str(tmp_path / "file")!r})
        print("saved", flush=True)
        model.learn(20)

        class Deadly(io.BufferedWriter):
            def write(self, data):
                super().write(data[: len(data) // 2])
                self.flush()
                os.kill(os.getpid(), signal.SIGKILL)

        saving.open = lambda path, mode: Deadly(io.FileIO(path, "x"))
        model.{what}({str(tmp_path / "file")!r})
    """
    finished = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert finished.returncode == -signal.SIGKILL and finished.stdout == "saved\n", finished.stderr
    assert any(path.suffix == ".part" and path.stat().st_size > 0 for path in tmp_path.iterdir())
    model = MBDPO("MlpPolicy", ToyEnv(), preset="debug", buffer_size=500, device="cpu")
    if what == "save":
        assert MBDPO.load(tmp_path / "file").num_timesteps == 20
    else:
        model.load_replay_buffer(tmp_path / "file")
        assert model.replay_buffer is not None and model.replay_buffer.size() == 20


def test_files_of_a_folder_take_their_places_together(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "folder"
    with whole_files(target) as staging:
        (staging / "a").write_text("1")
        (staging / "b").write_text("1")
        assert not (target / "a").exists()
    (target / "mine").write_text("x")
    with pytest.raises(RuntimeError), whole_files(target) as staging:
        (staging / "a").write_text("2")
        raise RuntimeError
    assert {path.name: path.read_text() for path in target.iterdir()} == {"a": "1", "b": "1", "mine": "x"}
    with pytest.raises(RuntimeError), whole_files(tmp_path / "new") as staging:
        raise RuntimeError
    assert not (tmp_path / "new").exists()
