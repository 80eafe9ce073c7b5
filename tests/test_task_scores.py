from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from sb3_mbdpo import make_multitask_env
from sb3_mbdpo.plots import plot_task_scores
from sb3_mbdpo.task_scores import TaskScore, TaskScores, evaluate_tasks
from sb3_mbdpo.tasks import Task, TaskSet
from tests.fakes import LEANING, LEANING_ENVS, Leaning, leaning_model


class Constant:
    """Acts by task, and counts in its state how long each episode has lasted."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[np.ndarray, Any]:
        assert deterministic and set(observation) == {"observation", "task"}
        tasks = observation["task"]
        self.rows.append(len(tasks))
        state = np.zeros(len(tasks), int) if state is None else state
        state = np.where(episode_start, 0, state) + 1
        assert (state <= np.array([6, 6, 7])[tasks]).all(), "an episode's state goes on into the next one"
        return np.array([0.5, 0.5, 1.0])[tasks][:, None].repeat(3, 1), state


class Solving(Leaning):
    """Solved in every second episode; remembers its seeds and whether it was closed."""

    def __init__(self) -> None:
        super().__init__()
        self.seeds: list[int | None] = []
        self.closed = False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self.seeds.append(seed)
        return super().reset(seed=seed, options=options)

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        *outcome, info = super().step(action)
        return *outcome, info | {"success": self.episodes % 2}  # type: ignore[return-value]

    def close(self) -> None:
        self.closed = True


def test_every_task_gets_its_episodes() -> None:
    model = Constant()
    scores = evaluate_tasks(model, LEANING, LEANING_ENVS, n_eval_episodes=3)
    assert [score.name for score in scores] == ["up", "down", "wide"]
    assert [score.returns for score in scores] == [(6.0,) * 3, (-6.0,) * 3, (14.0,) * 3]
    assert [score.lengths for score in scores] == [(6,) * 3, (6,) * 3, (7,) * 3]
    assert [score.normalized for score in scores] == [None, 0.25, None] and scores.mean_normalized is None
    # Together while all go on; the longest one alone at the end
    assert model.rows == [3] * 18 + [1] * 3


def test_success_seeds_and_who_closes() -> None:
    given, made = Solving(), Solving()
    scores = evaluate_tasks(Constant(), LEANING, {"up": given}, n_eval_episodes=4, seed=7)
    assert scores[0].success == 0.5 and given.seeds == [7, 8, 9, 10] and not given.closed
    evaluate_tasks(Constant(), LEANING, {"up": lambda: made}, ["up"], 1)
    assert made.seeds == [None] and made.closed


def test_the_table() -> None:
    scores = TaskScores(
        [
            TaskScore("cup-catch", 500.0, 20.0, 0.5, 0.02, None, (480.0, 520.0), (500, 500)),
            TaskScore("reach", 9.0, 1.0, 0.9, 0.1, 1.0, (9.0,), (100,)),
        ]
    )
    lines = str(scores).splitlines()
    assert [line.split()[0] for line in lines] == ["task", "cup-catch", "reach", "mean"]
    assert lines[1].split()[1:] == ["500.0", "20.0", "0.500", "-", "2"] and lines[3].endswith("0.700")
    assert len({len(line) for line in lines[:3]}) == 1
    assert scores.by_name()["reach"].success == 1.0


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({}, r"no environment for \['up', 'down', 'wide'\]"),
        ({"envs": {"up": Leaning()}, "names": ["up", "wide"]}, r"no environment for \['wide'\]"),
        ({"envs": {"upp": Leaning()}}, "did you mean"),
        ({"names": ["dwn"]}, "did you mean"),
        ({"envs": LEANING_ENVS, "n_eval_episodes": 0}, "n_eval_episodes"),
    ],
)
def test_what_cannot_be_evaluated(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        evaluate_tasks(Constant(), LEANING, **arguments)


def test_a_model_scores_its_tasks_by_their_ids(tmp_path: Path) -> None:
    gym.register("Leaning-v0", Leaning)
    try:
        tasks = TaskSet([Task("up", 3, 1, env_id="Leaning-v0"), Task("down", 3, 1, env_id="Leaning-v0")])
        model = leaning_model(make_multitask_env(tasks))
        first, second = (model.evaluate_tasks(2, seed=0) for _ in range(2))
        assert first == second and len(first) == 2
        # One after another, the same numbers
        assert model.evaluate_tasks(2, names=["down"], seed=0)[0] == first[1]
    finally:
        gym.registry.pop("Leaning-v0")


def test_the_picture(tmp_path: Path) -> None:
    returns = TaskScores([TaskScore("a", 5.0, 1.0, None, None, None, (5.0,), (1,))])
    both = TaskScores(
        [
            TaskScore("a", 5.0, 1.0, 0.5, 0.1, None, (5.0,), (1,)),
            TaskScore("b", 5.0, 1.0, 0.7, 0.2, None, (5.0,), (1,)),
        ]
    )
    (panel,) = plot_task_scores(both, before=TaskScores(both[:1])).axes
    assert [bar.get_height() for bar in panel.patches] == [0.5, 0.5, 0.7]
    assert panel.get_ylabel() == "normalised score" and panel.get_legend() is not None
    assert [label.get_text() for label in panel.get_xticklabels()] == ["a", "b"]
    figure = plot_task_scores(both, before=returns)
    assert [bar.get_height() for bar in figure.axes[0].patches] == [5.0] * 3, "returns, where some have no references"
    figure.savefig(tmp_path / "tasks.png")
    assert (tmp_path / "tasks.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="no scores"):
        plot_task_scores(TaskScores())
