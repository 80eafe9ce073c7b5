"""What a user does with the Hub, in a process of its own; prints what it found as JSON. Run by test_hub.py."""

import json
import os
import re
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard

from sb3_mbdpo import MBDPO, hub_commands
from tests.checkpoint_fakes import acts_alike, same_weights, trained
from tests.fakes import LEANING_ENVS


def error_of(call: Callable[[], Any]) -> tuple[str, str]:
    """Name of the built-in error that a call raises, and what it says."""
    try:
        call()
    except ValueError as error:
        return "ValueError", str(error)
    except OSError as error:
        return "OSError", str(error)
    return "nothing", "nothing was raised"


def trip() -> dict[str, Any]:
    """There and back."""
    found: dict[str, Any] = {}
    model = trained("tasks", preset="debug")
    found["url"] = model.push_to_hub(
        "me/many",
        private=True,
        commit_message="first",
        n_eval_episodes=2,
        eval_envs=LEANING_ENVS,
        eval_seed=7,
        video=False,
        progress_bar=False,
    )
    pulled = MBDPO.from_hub("me/many", device="cpu")
    found["same weights"], found["same actions"] = same_weights(model, pulled), acts_alike(model, pulled)
    ModelCard.load("me/many").validate()
    found["validated"] = True

    tuned = MBDPO.from_hub("me/many", env=LEANING_ENVS["up"](), task="sideways", like="down", device="cpu")
    tuned.learn(10)
    tuned.push_to_hub("me/tuned", n_eval_episodes=0, video=False)
    pulled.push_to_hub("me/copy", n_eval_episodes=0, video=False)

    single = trained("vector")
    single.push_to_hub("me/one", include_optimizer=True)
    api = HfApi()
    api.upload_file(path_or_fileobj=b"mine", path_in_repo="notes.txt", repo_id="me/one")
    first = api.model_info("me/one").sha
    earlier = MBDPO.from_hub("me/one", device="cpu")
    single.learn(16)
    single.push_to_hub("me/one")
    found["by revision"] = same_weights(earlier, MBDPO.from_hub("me/one", revision=first, device="cpu"))
    found["latest is the first"] = same_weights(earlier, MBDPO.from_hub("me/one", device="cpu"))
    found["local files only"] = same_weights(single, MBDPO.from_hub("me/one", local_files_only=True, device="cpu"))
    found["pull request"] = single.push_to_hub("me/one", create_pr=True)
    earlier.push_to_hub("me/one", revision="experiment")

    found["pull"] = hub_commands.pull(["me/many", "pulled"])
    found["pulled files"] = os.listdir("pulled")
    single.save_pretrained("older", include_optimizer=True)
    for path in ("older/results.json", "older/notes.txt", "learning_curve.png"):
        Path(path).write_text("mine")
    found["pull over another"] = [hub_commands.pull(["me/one", folder]) for folder in ("older", ".")]
    found["files over another"], found["files of mine"] = os.listdir("older"), Path("learning_curve.png").read_text()
    found["push"] = hub_commands.push(["pulled", "me/from-folder", "--as-is"])
    found["stated"], found["kept"] = edited(single), kept(single)
    found["errors"] = mistakes(single)
    return found


def edited(model: MBDPO) -> dict[str, Any]:
    """Push a folder whose card was edited by hand, by the command and by the model that it holds."""
    stated = {"command": "train --seed 7", "license": "mit", "datasets": ["me/ds"], "replay_dataset": "me/replay-v0"}
    folder = model.save_pretrained("edit", **stated)
    model.save_pretrained("plain", **stated)
    lines = (folder / "README.md").read_text().splitlines()
    (folder / "README.md").write_text("\n".join([*lines[:-1], "Written by hand."]))
    arguments = ["-n", "0", "--no-video"]
    codes = [hub_commands.push(["edit", "me/edit-1", *arguments]), hub_commands.push(["plain", "me/plain", *arguments])]
    loaded = MBDPO.from_pretrained("edit", device="cpu")
    loaded.push_to_hub("me/edit-2", n_eval_episodes=0, video=False)
    next(loaded.policy.parameters()).data.add_(1)
    loaded.push_to_hub("me/edit-3", n_eval_episodes=0, video=False)
    return {"codes": codes}


def kept(model: MBDPO) -> None:
    """Push to repositories whose card somebody edited, on a branch of one's own, and where it is nothing but a form."""
    api = HfApi()
    form = b"---\nlicense: mit\n---\n"
    for name, card in {"by-hand": form + b"Written on the Hub.", "form": form}.items():
        api.create_repo(f"me/{name}")
        api.upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id=f"me/{name}")
    # The account's own name may be left out
    model.push_to_hub("by-hand", n_eval_episodes=0, video=False)
    model.push_to_hub("me/by-hand", n_eval_episodes=0, video=False, revision="mine")
    model.save_pretrained("kept", push_to_hub=True, repo_id="me/by-hand", create_pr=True)
    model.push_to_hub("me/form", n_eval_episodes=0, video=False)


def mistakes(model: MBDPO) -> dict[str, tuple[str, str]]:
    """What goes wrong, and what is said."""

    def load(repo: str, **kwargs: Any) -> Callable[[], Any]:
        return lambda: MBDPO.from_hub(repo, device="cpu", **kwargs)

    errors = {
        "unknown repository": error_of(load("me/nothing")),
        "private without token": error_of(load("me/many", token=False, cache_dir="empty")),
        "unknown revision": error_of(load("me/one", revision="v9")),
        "zip": error_of(load("me/zip")),
        "never downloaded": error_of(load("me/elsewhere", local_files_only=True)),
        "no token": error_of(lambda: model.push_to_hub("me/one", token=False)),
        "wrong token": error_of(lambda: model.push_to_hub("me/one", token="hf_wrong")),
        "no such folder": error_of(load("./models/nothing")),
    }
    api = HfApi()
    api.create_repo("me/empty")
    errors["no config"] = error_of(load("me/empty"))
    # The server sends half of its weights
    model.push_to_hub("me/cut")
    errors["cut"] = error_of(load("me/cut"))
    return errors


def offline() -> dict[str, Any]:
    """Without a network."""
    model = trained("vector", steps=1)
    return {
        "load": error_of(lambda: MBDPO.from_hub("me/one", cache_dir="empty")),
        "push": error_of(lambda: model.push_to_hub("me/one")),
        "local": error_of(lambda: (model.save_pretrained("kept"), MBDPO.from_hub("kept"))),
    }


def peak_megabytes() -> float:
    """Largest resident memory of this process alone; `ru_maxrss` starts at what the process that forked it had."""
    status = Path("/proc/self/status")
    if not status.exists():  # other systems do not hand the figure down
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10)
    return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) / 1024


def attacked(names: list[str]) -> dict[str, Any]:
    """Load every hostile repository."""
    MBDPO.from_pretrained  # noqa: B018 (imported before modules are counted)
    before = set(sys.modules)
    errors = {name: error_of(lambda name=name: MBDPO.from_hub(f"evil/{name}", device="cpu")) for name in names}
    new = {name.partition(".")[0] for name in set(sys.modules) - before}
    return {
        "errors": errors,
        "peak megabytes": peak_megabytes(),
        "new modules": sorted(new & {"os.system", "antigravity", "pickletools", "this"}),
    }


if __name__ == "__main__":
    result = attacked(sys.argv[2:]) if sys.argv[1] == "attacked" else {"trip": trip, "offline": offline}[sys.argv[1]]()
    shutil.rmtree(Path("pulled"), ignore_errors=True)
    print(json.dumps(result))
