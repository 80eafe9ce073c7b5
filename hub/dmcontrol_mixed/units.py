"""The study's units of work: each takes the study's folder and its arguments as text, and returns what came of it."""

from pathlib import Path
from typing import Any

import minari
import numpy as np
import pandas as pd
from behaviour_cloning import clone_behaviour
from online import ONLINE, LearningCurve, eval_env, play, train_from_scratch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import configure
from study import (
    COLLECT_STEPS,
    ENERGY_COEFS,
    FINETUNE_STEPS,
    FINETUNED_SIZE,
    HELD_OUT,
    PRETRAIN_STEPS,
    SINGLE_STEPS,
    TASKS,
    dataset_id,
)

from sb3_mbdpo import MBDPO, ShardedDataset, WeightAveraging, convert_minari

# DMControl's returns lie between 0 and 1000 on every task
REFERENCES = {"ref_min_score": 0.0, "ref_max_score": 1000.0}
# Room for the held-out tasks is there already: none of them is wider than the widest of the six
OFFLINE = {
    "preset": "cpu",
    "batch_size": 128,
    "prior_horizon": 3,
    # Values follow a prior that stays near what the data did
    "bootstrap": "prior",
    "behaviour_coef": 1.0,
    "device": "cpu",
}
# What is known must not be forgotten over the first few episodes: five of them before the first update, smaller steps,
# and an average of the weights that acts. Less of it holds on reacher-hard: larger steps, and targets as from scratch
FINETUNE: dict[str, dict[str, Any]] = {
    "walker-run": {"learning_rate": 1e-4},
    "reacher-hard": {"learning_rate": 3e-4, "bootstrap": "score", "score_interval": 4},
}
FINETUNE_LEARNING_STARTS = 2500
EVAL_EPISODES = 10
CURVE_EVERY, CURVE_EPISODES = 1000, 5
# A target is reached or not: means of five such episodes swing by hundreds
HELD_OUT_EPISODES = {"walker-run": 5, "reacher-hard": 16}


def collect(out: Path, task: str) -> dict[str, Any]:
    """Learn a task online, and make a Minari data set of everything that was tried on the way."""
    model = train_from_scratch(task, COLLECT_STEPS, 0, out / f"collect-{task}.csv", 2500, CURVE_EPISODES)
    dataset = model.to_minari(dataset_id(task), author="sb3_mbdpo", **REFERENCES)
    return {"task": task, "returns": _returns(dataset), "curve": _curve(out / f"collect-{task}.csv")}


def pretrain(out: Path, size: str) -> dict[str, Any]:
    """Learn all six tasks in one model of a size from data alone."""
    data = {task: dataset_id(task) for task in TASKS}
    # Twice the windows for six times the tasks, whose observations differ in size by a factor of a hundred; nothing
    # here acts by the score network
    arguments = OFFLINE | {"batch_size": 256, "normalize_observations": True, "score_interval": 16}
    model = MBDPO.from_minari(data, model_size=float(size), seed=0, **arguments)
    model.set_logger(configure(str(out / f"pretrain-{size}"), ["csv", "stdout"]))
    model.learn_offline(data, PRETRAIN_STEPS, shards_dir=out / "shards")
    model.save(out / f"pretrain-{size}.zip")
    assert model.tasks is not None
    table = {}
    for entry in model.tasks:
        returns = play(model, entry.name, EVAL_EPISODES, model.tasks)
        mean = float(np.mean(returns))
        table[entry.name] = {"mean": mean, "std": float(np.std(returns)), "normalized": entry.normalized(mean)}
        print(entry.name, returns, flush=True)
    parameters = sum(p.numel() for p in model.policy.world_model.parameters())
    mean_normalized = float(np.mean([row["normalized"] for row in table.values()]))
    return {"size": float(size), "parameters": parameters, "tasks": table, "mean_normalized": mean_normalized}


def finetune(out: Path, task: str, seed: str) -> dict[str, Any]:
    """Add a held-out task to the pretrained model and go on learning, on that task alone."""
    arguments = {"batch_size": ONLINE["batch_size"], "seed": int(seed)} | FINETUNE[task]
    model = MBDPO.load(out / f"pretrain-{FINETUNED_SIZE}.zip", device="cpu", **arguments)
    model.set_random_seed(int(seed))
    added = model.add_task(
        f"mbdpo/{task}-v0",
        name=task,
        like=HELD_OUT[task],
        episode_length=500,
        learning_starts=FINETUNE_LEARNING_STARTS,
    )
    curve = out / f"finetune-{task}-{seed}.csv"
    env = eval_env(task, HELD_OUT_EPISODES[task], model.tasks)
    model.learn(FINETUNE_STEPS, [WeightAveraging(), LearningCurve(curve, env, CURVE_EVERY, at_start=True)])
    return {"task": task, "like": added.source, "seed": int(seed), "curve": _curve(curve)}


def scratch(out: Path, task: str, seed: str) -> dict[str, Any]:
    """Learn a held-out task from scratch, with a model of the same size."""
    return _scratch(out, f"scratch-{task}-{seed}", task, seed, [])


def _scratch(out: Path, name: str, task: str, seed: str, callbacks: list[BaseCallback]) -> dict[str, Any]:
    curve, episodes = out / f"{name}.csv", HELD_OUT_EPISODES[task]
    arguments = {"callbacks": callbacks, "model_size": FINETUNED_SIZE}
    train_from_scratch(task, FINETUNE_STEPS, int(seed), curve, CURVE_EVERY, episodes, **arguments)
    return {"task": task, "seed": int(seed), "curve": _curve(curve)}


def averaged(out: Path, task: str, seed: str) -> dict[str, Any]:
    """The same, acting with an average of the weights as models that are fine-tuned do."""
    return _scratch(out, f"averaged-{task}-{seed}", task, seed, [WeightAveraging()])


def single(out: Path, task: str, seed: str) -> dict[str, Any]:
    """Learn one task from its data alone, and act with each weight of the energy, of which training knows nothing."""
    return _offline(out, f"single-{task}-{seed}", task, seed)


def anchor(out: Path, task: str, seed: str) -> dict[str, Any]:
    """The same with a prior that nothing keeps where there is data, the energy's weight in units of the value range."""
    return _offline(out, f"anchor-{task}-{seed}", task, seed, behaviour_coef=0.0, energy_unit="value_range")


def _offline(out: Path, name: str, task: str, seed: str, **kwargs: Any) -> dict[str, Any]:
    arguments = OFFLINE | {"score_coef": 0.0} | kwargs
    model = MBDPO.from_minari(dataset_id(task), seed=int(seed), **arguments)
    model.set_logger(configure(str(out / name), ["csv"]))
    data = _shards(out, task)
    model.learn_offline(data, SINGLE_STEPS, log_interval=500)
    model.save(out / f"{name}.zip")
    log = pd.read_csv(out / name / "progress.csv")
    observations = data.sample(256).observations[0].numpy()
    acting = {}
    for coef in ENERGY_COEFS:
        model = MBDPO.load(out / f"{name}.zip", energy_coef=coef, device="cpu")
        returns = play(model, task, EVAL_EPISODES)
        planned, _ = model.predict(observations, deterministic=True)
        # What the critics bootstrap from
        model.policy.act_mode = "prior"
        followed, _ = model.predict(observations, deterministic=True)
        drift = float(np.linalg.norm(planned - followed, axis=1).mean())
        acting[str(coef)] = {"returns": returns, "action_drift": drift}
    return {
        "task": task,
        "seed": int(seed),
        "energy_coefs": acting,
        "prior_returns": play(model, task, EVAL_EPISODES),
        "cross_td_error": float(log["train/cross_td_error"].iloc[-4:].mean()),
        "data_returns": _returns(minari.load_dataset(dataset_id(task))),
    }


def clone(out: Path, task: str, seed: str) -> dict[str, Any]:
    """Behaviour cloning on the same data, with as many updates."""
    policy = clone_behaviour(_shards(out, task), SINGLE_STEPS, seed=int(seed))
    return {"task": task, "seed": int(seed), "returns": play(policy, task, EVAL_EPISODES)}


def _shards(out: Path, task: str) -> ShardedDataset:
    return ShardedDataset(convert_minari(dataset_id(task), out / "shards"))


def _returns(dataset: minari.MinariDataset) -> list[float]:
    return [round(float(np.sum(episode.rewards)), 2) for episode in dataset.iterate_episodes()]


def _curve(path: Path) -> dict[str, list[float]]:
    table = pd.read_csv(path)
    return {name: table[name].tolist() for name in ("step", "return_mean", "train_seconds")}
