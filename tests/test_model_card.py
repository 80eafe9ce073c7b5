import runpy
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results

from sb3_mbdpo import MBDPO, Task, TaskSet, make_multitask_env
from sb3_mbdpo.checkpoint_config import read_config
from sb3_mbdpo.model_card import MARKER, make_card, usage_snippet
from tests.checkpoint_fakes import QUICK, trained
from tests.fakes import ToyEnv

ROOT = Path(__file__).parents[1]
RESULTS: dict[str, Any] = {
    "n_episodes": 2,
    "seed": 3,
    "act_mode": "search",
    "deterministic": True,
    "num_timesteps": 16,
    "tasks": [
        {"name": name, "mean": mean, "std": 1.0, "returns": [mean - 1, mean + 1], "lengths": [6, 7]}
        | {"normalized": None, "success": 0.5}
        for name, mean in (("up", 1.0), ("down", -2.0), ("wide", 3.0))
    ],
}


def snippet_of(card: str) -> str:
    return card.split("```python\n")[1].split("```")[0]


def run_snippet(card: str, folder: Path, cwd: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run a card's program as it is pasted."""
    monkeypatch.chdir(cwd)
    (folder / "pasted.py").write_text(snippet_of(card))
    return runpy.run_path(str(folder / "pasted.py"))


def test_the_metadata_are_those_of_the_hub(tmp_path: Path) -> None:
    model = trained("tasks", steps=1)
    model.save_pretrained(
        tmp_path, results=RESULTS, datasets=["me/walks-v0", "D4RL/pen/human-v2"], license="mit", repo_id="me/many"
    )
    card = ModelCard.load(tmp_path / "README.md")
    metadata = yaml.safe_load(card.content.split("---")[1])
    # Read as the Hub's own classes read it, which check it
    name, results = model_index_to_eval_results(metadata["model-index"])
    assert ModelCardData(**metadata).to_dict() == card.data.to_dict() and name == "MBDPO"
    assert metadata["library_name"] == "sb3-mbdpo" and metadata["pipeline_tag"] == "reinforcement-learning"
    assert metadata["datasets"] == ["me/walks-v0"] and metadata["license"] == "mit"
    assert [result.metric_value for result in results] == ["1.00 ± 1.00", "-2.00 ± 1.00", "3.00 ± 1.00"]
    assert results[0].metric_args == {"episodes": 2, "seed": 3, "act_mode": "search", "deterministic": True}
    text = card.text
    for piece in ("D4RL/pen/human-v2", "| up | 3 | 1 |", "| `n_samples` | `16` |", "-2.00 ± 1.00", "Not checked"):
        assert piece in text, piece
    assert text.rstrip().endswith(MARKER) and "\n\n\n" not in text


def test_a_model_that_was_not_evaluated_says_so(tmp_path: Path) -> None:
    trained("vector", steps=1).save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.eval_results is None and "Not evaluated." in card.text and "Not checked: returns." in card.text
    assert "model-index" not in card.content


def test_command_curve_and_base_model(tmp_path: Path) -> None:
    (tmp_path / "curve.png").write_bytes(b"\x89PNG")
    model = trained("vector", steps=1)
    model._base_model = "me/base"
    model.save_pretrained(tmp_path / "m", command="python train.py", learning_curve=tmp_path / "curve.png")
    card = ModelCard.load(tmp_path / "m" / "README.md")
    assert card.data.base_model == "me/base" and "(https://huggingface.co/me/base)" in card.text
    assert "```\npython train.py\n```" in card.text and "![Learning curve](learning_curve.png)" in card.text
    assert (tmp_path / "m" / "learning_curve.png").read_bytes() == b"\x89PNG"


def make_folder(kind: str, folder: Path) -> None:
    if kind == "tasks":
        known = Task("swing", 3, 1, env_id="Pendulum-v1", episode_length=200)
        tasks = TaskSet([Task("unknown", 3, 1), known])
        envs = {"unknown": lambda: ToyEnv(action_space=ToyEnv().action_space), "swing": "Pendulum-v1"}
        MBDPO("MultiInputPolicy", make_multitask_env(tasks, envs, ["swing"]), **QUICK).save_pretrained(folder)
    elif kind == "repeated":
        import gymnasium

        from sb3_mbdpo.wrappers import ActionRepeat

        MBDPO("MlpPolicy", ActionRepeat(gymnasium.make("Pendulum-v1"), 3), **QUICK).save_pretrained(folder)
    elif kind == "by id":
        MBDPO("MlpPolicy", "Pendulum-v1", **QUICK).save_pretrained(folder)
    else:
        MBDPO("MlpPolicy", ToyEnv(), **QUICK).save_pretrained(folder)


@pytest.mark.parametrize("kind", ["by id", "repeated", "tasks", "without an id"])
def test_the_snippet_runs_as_it_is_pasted(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_folder(kind, Path("my-model"))
    found = run_snippet((tmp_path / "my-model" / "README.md").read_text(), tmp_path, tmp_path, monkeypatch)
    assert found["action"].shape[-1] in (1, 2) and isinstance(found["model"], MBDPO)
    if kind == "repeated":
        assert found["env"].get_attr("action_repeat") == [3]
    if kind == "tasks":
        assert found["model"].get_env().get_attr("task_name") == ["swing"]


PUBLISHED = sorted(path.parent for path in (ROOT / "hub").glob("*/config.json"))


@pytest.mark.skipif(not PUBLISHED, reason="there is no checkpoint folder in hub/")
@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda path: path.name)
def test_checkpoints_of_this_repository_load_act_and_show_how(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = MBDPO.from_hub(folder, device="cpu", local_files_only=True)
    assert model.num_timesteps > 0
    card = (folder / "README.md").read_text(encoding="utf-8")
    ModelCard(card)
    config = read_config(folder)
    assert snippet_of(card).strip() == usage_snippet(config, f"hub/{folder.name}")
    pytest.importorskip("dm_control", reason="the snippet plays in dm_control")
    found = run_snippet(card, tmp_path, ROOT, monkeypatch)
    assert found["action"].shape[-1] == model.action_space.shape[-1]


def test_cards_do_not_depend_on_what_is_written_in_names(tmp_path: Path) -> None:
    """Names come from whoever made the model: they stay text."""
    name = 'x"\n---\nlicense: mit'
    tasks = TaskSet([Task(name, 3, 2)])
    model = MBDPO("MultiInputPolicy", None, tasks=tasks, **QUICK)
    model.save_pretrained(tmp_path)
    data = make_card(read_config(tmp_path), "me/x").data
    assert data.license is None and name in data.tags
