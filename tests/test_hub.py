"""Push, list, pull, fine-tune and push again through a server of our own, with the Hub's real client.

The client reads its address when it is imported, so what uses it runs in a process of its own: one for all calls, whose
outcome the tests look at.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from huggingface_hub import ModelCard, ModelCardData

from tests.hostile import CASES, MARKER, hostile_files
from tests.hub_server import TOKEN, FakeHub, Repo, running_hub

ROOT = Path(__file__).parents[1]
PROGRAM = Path(__file__).parent / "hub_client.py"


class Outcome(NamedTuple):
    """What the client process found, and the server that it talked to."""

    found: dict[str, Any]
    hub: FakeHub
    folder: Path


def run_client(hub: FakeHub, folder: Path, *what: str, **environment: str) -> dict[str, Any]:
    """Run the client program; what it prints last is what it found."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    variables |= {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(folder / "hf"),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "NO_PROXY": "127.0.0.1",
    }
    variables |= environment
    result = subprocess.run(
        [sys.executable, str(PROGRAM), *what], cwd=folder, env=variables, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return dict(json.loads(result.stdout.splitlines()[-1]))


@pytest.fixture(scope="module")
def trip(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outcome]:
    folder = tmp_path_factory.mktemp("client")
    with running_hub() as hub:
        hub.repos["me/zip"] = Repo()
        hub.repos["me/zip"].commit("main", {"mbdpo.zip": b"PK", "mbdpo/policy.pth": b"\x80"}, "a zip")
        hub.cut = "me/cut"
        yield Outcome(run_client(hub, folder, "trip"), hub, folder)


def test_what_is_pulled_is_what_was_pushed(trip: Outcome) -> None:
    assert trip.found["same weights"] and trip.found["same actions"]
    assert trip.found["url"].endswith(trip.hub.repos["me/many"].commits[1][0])
    _, files = trip.hub.repos["me/many"].files("main") or ("", {})
    names = {"README.md", "config.json", "model.safetensors", "training.yml", "results.json"}
    assert set(files) == names and trip.hub.repos["me/many"].private
    assert trip.hub.repos["me/many"].commits[1][2] == "first"


def test_an_earlier_revision_can_be_pulled(trip: Outcome) -> None:
    assert trip.found["by revision"] and not trip.found["latest is the first"]


def test_files_that_a_newer_checkpoint_lacks_are_removed_others_stay(trip: Outcome) -> None:
    _, first = trip.hub.repos["me/one"].files(trip.hub.repos["me/one"].commits[2][0]) or ("", {})
    _, last = trip.hub.repos["me/one"].files("main") or ("", {})
    assert "optimizer.safetensors" in first and "optimizer.safetensors" not in last
    assert "notes.txt" in first and "notes.txt" in last


def test_a_fine_tuned_model_names_its_base(trip: Outcome) -> None:
    _, files = trip.hub.repos["me/tuned"].files("main") or ("", {})
    config = json.loads(files["config.json"])
    assert config["base_model"] == "me/many" and len(config["tasks"]["tasks"]) == 4
    assert ModelCard(files["README.md"].decode()).data.base_model == "me/many"
    # Pushed again as it came, it is still the same model
    _, copied = trip.hub.repos["me/copy"].files("main") or ("", {})
    assert json.loads(copied["config.json"])["base_model"] is None


def test_cards_are_valid_by_the_hubs_own_validator(trip: Outcome) -> None:
    asked = [path for method, path in trip.hub.requests if path == "/api/validate-yaml"]
    assert len(asked) >= 4 and trip.found["validated"]
    _, files = trip.hub.repos["me/many"].files("main") or ("", {})
    data = ModelCard(files["README.md"].decode()).data
    assert isinstance(data, ModelCardData) and data.library_name == "sb3-mbdpo"
    assert data.pipeline_tag == "reinforcement-learning" and {"up", "down", "wide"} <= set(data.tags)
    results = {result.dataset_name: result for result in data.eval_results}
    assert set(results) == {"up", "down", "wide"}
    assert results["up"].metric_args == {"episodes": 2, "seed": 7, "act_mode": "search", "deterministic": True}
    assert "±" in results["up"].metric_value and not results["up"].verified


def test_pull_requests_and_branches(trip: Outcome) -> None:
    one = trip.hub.repos["me/one"]
    assert one.pull_requests == 1 and "/discussions/1" in trip.found["pull request"]
    assert "experiment" in one.branches and one.branches["experiment"] != one.branches["main"]


@pytest.mark.parametrize(
    ("name", "by_hand", "same"), [("edit-1", 1, 1), ("edit-2", 1, 1), ("plain", 0, 1), ("edit-3", 0, 0)]
)
def test_what_was_said_of_a_folder_is_pushed_with_it(trip: Outcome, name: str, by_hand: int, same: int) -> None:
    assert trip.found["stated"]["codes"] == [0, 0]
    _, files = trip.hub.repos[f"me/{name}"].files("main") or ("", {})
    card, config = files["README.md"].decode(), json.loads(files["config.json"])
    assert card.endswith("Written by hand.") == bool(by_hand) and (ModelCard(card).data.license == "mit") == bool(same)
    # Of weights that are others now, neither the command nor the replay buffer is known
    assert ("--seed 7" in files["training.yml"].decode()) == bool(same)
    assert config["replay_dataset"] == ("me/replay-v0" if same else None) and config["datasets"] == ["me/ds"]


def test_cards_that_were_edited_on_the_hub_stay(trip: Outcome) -> None:
    repo = trip.hub.repos["me/by-hand"]
    for branch in ("main", "mine", "refs/pr/1"):
        _, files = repo.files(branch) or ("", {})
        assert files["README.md"].endswith(b"Written on the Hub.") and "model.safetensors" in files, branch
    _, files = trip.hub.repos["me/form"].files("main") or ("", {})
    assert b"MBDPO.from_hub('me/form'" in files["README.md"]


def test_what_was_downloaded_loads_without_a_network(trip: Outcome) -> None:
    assert trip.found["local files only"]


def test_pull_writes_everything_and_push_uploads_a_folder(trip: Outcome) -> None:
    assert trip.found["pull"] == 0 and trip.found["push"] == 0
    assert {"README.md", "results.json"} <= set(trip.found["pulled files"])
    _, files = trip.hub.repos["me/from-folder"].files("main") or ("", {})
    assert set(files) == {"README.md", "config.json", "model.safetensors", "training.yml", "results.json"}


def test_what_is_pulled_takes_the_whole_place_of_an_older_checkpoint(trip: Outcome) -> None:
    assert trip.found["pull over another"] == [0, 0]
    names = {"README.md", "config.json", "model.safetensors", "training.yml", "notes.txt"}
    assert {name for name in trip.found["files over another"] if not name.startswith(".")} == names
    # Where there was no checkpoint, nothing is one's
    assert trip.found["files of mine"] == "mine"


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("unknown repository", "There is no repository me/nothing"),
        ("private without token", "it is private"),
        ("unknown revision", "no revision 'v9'"),
        ("zip", "mbdpo.zip, mbdpo/policy.pth, which can run code when loaded and was not opened"),
        ("no config", "it has no config.json"),
        ("never downloaded", "was not downloaded before"),
        ("cut", "cut short"),
        ("no token", "hf auth login"),
        ("wrong token", "does not know this token"),
        ("no such folder", "There is no folder ./models/nothing"),
    ],
)
def test_what_goes_wrong_is_one_sentence(trip: Outcome, what: str, message: str) -> None:
    kind, text = trip.found["errors"][what]
    assert message in text and "\n" not in text, text
    assert kind == ("ValueError" if what in ("zip", "no config", "no such folder") else "OSError")


def test_without_a_network_folders_load_and_repositories_say_why_not(tmp_path: Path) -> None:
    with running_hub() as hub:
        found = run_client(hub, tmp_path, "offline", HF_ENDPOINT="http://127.0.0.1:9")
    for what in ("load", "push"):
        kind, text = found[what]
        assert kind == "OSError" and "cannot be reached" in text and "\n" not in text, text
    assert found["local"][0] == "nothing"


def test_archives_are_never_asked_for(trip: Outcome) -> None:
    asked = [path for _, path in trip.hub.requests if path.endswith((".zip", ".pth", ".pkl", ".pt"))]
    assert asked == []


# --- hostile repositories ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outcome]:
    folder = tmp_path_factory.mktemp("attacked")
    with running_hub() as hub:
        for name, files in hostile_files(folder / MARKER).items():
            hub.repos[f"evil/{name}"] = Repo()
            hub.repos[f"evil/{name}"].commit("main", files, name)
        before = set(folder.rglob("*"))
        found = run_client(hub, folder, "attacked", *CASES)
        found["written"] = sorted(str(path.relative_to(folder)) for path in set(folder.rglob("*")) - before)
        yield Outcome(found, hub, folder)


@pytest.mark.parametrize("case", CASES)
def test_hostile_repositories_are_refused_by_a_message_of_their_own(attacked: Outcome, case: str) -> None:
    kind, text = attacked.found["errors"][case]
    assert kind == "ValueError", text
    assert CASES[case] in text and "\n" not in text, text
    assert len(text) < 1500


def test_hostile_repositories_run_no_code_take_no_memory_and_write_only_to_the_cache(attacked: Outcome) -> None:
    assert len(CASES) >= 25 and set(attacked.found["errors"]) == set(CASES)
    assert not (attacked.folder / MARKER).exists()
    assert 100 < attacked.found["peak megabytes"] < 1000
    assert {Path(path).parts[0] for path in attacked.found["written"]} == {"hf"}
    assert attacked.found["new modules"] == []


def test_importing_the_package_leaves_the_client_and_the_compiler_alone() -> None:
    """Both take a while; the client also reads its settings from the environment when it is imported."""
    code = (
        "import sys, sb3_mbdpo; print([name for name in ('huggingface_hub', 'torch._dynamo') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
