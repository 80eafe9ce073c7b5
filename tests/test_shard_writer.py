import threading
from pathlib import Path

import pytest

from sb3_mbdpo.shard_writer import ShardWriter, write_once
from sb3_mbdpo.shards import ShardedDataset
from tests.episodes import numbered, write
from tests.fakes import ACTIONS, VECTOR


def test_a_set_is_replaced_only_by_a_complete_one(tmp_path: Path) -> None:
    path = write(tmp_path / "set", numbered(), fingerprint="old")
    with pytest.raises(KeyError), ShardWriter(path, VECTOR, ACTIONS, "new") as writer:
        writer.add(*numbered()[0])
        raise KeyError
    assert ShardedDataset(path).description.fingerprint == "old"
    write(path, numbered((4,)), fingerprint="new")
    assert ShardedDataset(path).description.fingerprint == "new"
    assert len(ShardedDataset(path)) == 4
    assert [entry.name for entry in tmp_path.iterdir()] == ["set"]


def test_what_a_killed_process_left_is_cleared_away(tmp_path: Path) -> None:
    part = tmp_path / ".set.part"
    part.mkdir()
    for name in ("rows-00000.bin", "junk"):
        (part / name).write_bytes(b"1234")
    with pytest.raises(ValueError, match="holds no shards"):
        ShardedDataset(tmp_path / "set")
    assert len(ShardedDataset(write(tmp_path / "set", numbered()))) == 37
    assert [entry.name for entry in tmp_path.iterdir()] == ["set"]


def test_two_writers_of_one_set(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "set", VECTOR, ACTIONS) as writer:
        writer.add(*numbered()[0])
        with pytest.raises(ValueError, match="Another process is writing"):
            write(tmp_path / "set", numbered())
        writer.add(*numbered()[1])
    assert len(ShardedDataset(tmp_path / "set")) == 6


def test_an_empty_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="source is empty"):
        write(tmp_path / "set", [])
    assert not list(tmp_path.iterdir())


def test_episodes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    obs, actions, rewards, terminated, _ = numbered()[0]
    for bad in (
        (obs[:-1], actions, rewards, terminated),
        (obs[:, :2], actions, rewards, terminated),
        (obs, actions[:-1], rewards, terminated),
        (obs, actions, rewards, terminated, 1),
        (obs[:1], actions[:0], rewards[:0], terminated),
        ({"a": obs}, actions, rewards, terminated),
    ):
        with pytest.raises(ValueError), ShardWriter(tmp_path / "set", VECTOR, ACTIONS) as writer:
            writer.add(*bad)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_other_folders_are_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    assert len(ShardedDataset(write(tmp_path / "set", numbered()))) == 37
    (tmp_path / "set" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"set holds other files \(notes.txt\): choose a folder"):
        write(tmp_path / "set", numbered())
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="file is a file: choose a folder"):
        write(tmp_path / "file", numbered())
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "set"]


def test_a_set_that_another_is_writing_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, inside, go_on = tmp_path / "set", threading.Event(), threading.Event()
    monkeypatch.setattr("sb3_mbdpo.shard_writer.time.sleep", lambda _: (go_on.set(), other.join()))

    def write_slowly() -> None:
        with ShardWriter(path, VECTOR, ACTIONS, "print") as writer:
            writer.add(*numbered()[0])
            inside.set()
            go_on.wait(20)

    other = threading.Thread(target=write_slowly)
    other.start()
    assert inside.wait(20)
    tries: list[int] = []

    def write_it() -> None:
        tries.append(1)
        write(path, numbered(), fingerprint="print")

    assert write_once(path, "print", write_it) == path
    # Tried once, waited, and took what the other had written
    assert (len(tries), len(ShardedDataset(path))) == (1, 5)
    assert "waiting for it" in capsys.readouterr().out
    write_once(path, "changed", lambda: write(path, numbered(), fingerprint="changed") and None)
    assert len(ShardedDataset(path)) == 37
