"""Recorded windows in the batches of online learning."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
import yaml
from gymnasium import spaces
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_mbdpo import MBDPO, SequenceSamples, ShardedDataset, convert_minari
from sb3_mbdpo.distributed_learning import check_can_share
from sb3_mbdpo.rehearsal import mixed
from tests.fakes import UNEVEN, VECTOR, Leaning, ToyEnv, flat_parameters
from tests.recordings import record
from tests.test_offline_tasks import UP, WIDE, record_task, registered  # noqa: F401 (a fixture for all tests)

pytestmark = pytest.mark.usefixtures("minari_cache")
SMALL: dict[str, Any] = {"preset": "debug", "seed": 0, "device": "cpu", "batch_size": 16, "warmup_updates": 0}
DATA = {"up": "test/up-v0", "wide": "test/wide-v0"}


@pytest.fixture
def pretrained() -> MBDPO:
    """A model of two tasks, trained from data that is at hand."""
    record_task("test/up-v0", UP)
    record_task("test/wide-v0", WIDE, 4)
    return MBDPO.from_minari(DATA, normalize_observations=True, **SMALL).learn_offline(DATA, 5)


def batches_of(model: MBDPO, monkeypatch: pytest.MonkeyPatch) -> list[SequenceSamples]:
    """What the model learns from, from now on."""
    seen: list[SequenceSamples] = []
    update = model.learner.update
    monkeypatch.setattr(model.learner, "update", lambda samples, index: seen.append(samples) or update(samples, index))
    return seen


def numbered(first: int, count: int, task: bool, as_dict: bool = False) -> SequenceSamples:
    """Windows whose every number is that of their row."""
    rows = th.arange(first, first + count, dtype=th.float32)

    def filled(steps: int, width: int) -> th.Tensor:
        return rows[None, :, None].expand(steps, -1, width).clone()

    observations: Any = {"a": filled(4, 3), "b": filled(4, 2)} if as_dict else filled(4, 3)
    fields = [filled(3, width) for width in (2, 1, 1, 1)]
    return SequenceSamples(observations, *fields, rows.long() if task else None)


@pytest.mark.parametrize("as_dict", [False, True])
@pytest.mark.parametrize("task", [False, True])
def test_rows_stay_whole(task: bool, as_dict: bool) -> None:
    batch = mixed(numbered(0, 5, task, as_dict), numbered(5, 3, task, as_dict), (1, 2))
    parts = [*batch.observations.values()] if as_dict else [batch.observations]
    parts += [batch.actions, batch.rewards, batch.terminations, batch.masks]
    order = batch.actions[0, :, 0]
    assert sorted(order.tolist()) == list(range(8)) and order.tolist() != list(range(8))
    assert all(bool((part == order[None, :, None]).all()) for part in parts)
    assert batch.task is None if not task else batch.task.tolist() == order.tolist()
    again = mixed(numbered(0, 5, task, as_dict), numbered(5, 3, task, as_dict), (1, 2))
    assert th.equal(again.rewards, batch.rewards)


def test_a_new_task_is_learned_beside_the_old_ones(pretrained: MBDPO, monkeypatch: pytest.MonkeyPatch) -> None:
    pretrained.add_task(Leaning(), name="new", like="up", learning_starts=10)
    assert pretrained.rehearse(DATA, share=0.25) is pretrained
    seen = batches_of(pretrained, monkeypatch)
    before = flat_parameters(pretrained.policy)
    pretrained.learn(60)
    assert len(seen) == 50 and not th.equal(before, flat_parameters(pretrained.policy))
    tasks = th.stack([batch.task for batch in seen if batch.task is not None])
    assert tasks.shape == (50, 16) and (tasks == 2).sum(1).tolist() == [12] * 50
    assert {0, 1} <= set(tasks.unique().tolist())
    # Of both kinds among the first rows, which alone the score network reads
    assert 0 < (tasks[:, :4] == 2).float().mean() < 1
    for batch, row in zip(seen, tasks, strict=True):
        assert not batch.actions[:, row != 1, 1].any() and not batch.observations[:, row != 1, 3].any()
    # What is collected is kept apart
    assert pretrained.replay_buffer is not None
    assert (pretrained.replay_buffer.observations["task"][: pretrained.replay_buffer.size()] == 2).all()
    pretrained.rehearse(None).learn(3, reset_num_timesteps=False)
    assert isinstance(seen[-1].observations, dict), "the replay buffer's alone"


def make(**kwargs: Any) -> MBDPO:
    return MBDPO("MlpPolicy", ToyEnv(VECTOR, UNEVEN), learning_starts=10, **(SMALL | kwargs))


def test_one_tasks_data_beside_learning_it(monkeypatch: pytest.MonkeyPatch) -> None:
    # Rewards of the environment are 0 to 1, those of the data from 100
    data = record("test/data-v0", None, VECTOR, UNEVEN)
    model = make().rehearse(data, share=0.5)
    assert model.policy.episodic, "some of its episodes terminate"
    seen = batches_of(model, monkeypatch)
    model.learn(30)
    recorded = [(batch.rewards[0] >= 100).float().mean().item() for batch in seen]
    assert len(seen) == 20 and max(recorded) <= 0.5 and np.mean(recorded) > 0.2


def test_observations_are_normalised_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    record("test/data-v0", None, VECTOR, UNEVEN)
    env = VecNormalize(DummyVecEnv([lambda: Monitor(ToyEnv(VECTOR, UNEVEN))]), norm_reward=False)
    model = MBDPO("MlpPolicy", env, learning_starts=10, **SMALL).rehearse("test/data-v0")
    env.training = False
    env.obs_rms.mean, env.obs_rms.var = np.full(3, 5.0), np.full(3, 0.25)
    seen = batches_of(model, monkeypatch)
    model.learn(15)
    # (x - 5) / 0.5 of numbers between -1 and 1
    assert all(bool((batch.observations < -7.9).all()) for batch in seen) and len(seen) == 5


@pytest.mark.parametrize(("share", "expected"), [(0.001, 1), (0.999, 15)])
def test_shares_leave_some_of_both(share: float, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make().rehearse(record("test/data-v0", None, VECTOR, UNEVEN), share)
    counts: list[int] = []
    sample = model._rehearsal.sample
    monkeypatch.setattr(model._rehearsal, "sample", lambda n, env: counts.append(n) or sample(n, env))
    model.learn(12)
    assert counts == [expected] * 2


def test_training_that_goes_on_is_the_training_that_was_not_interrupted(tmp_path: Path) -> None:
    record("test/data-v0", None, VECTOR, UNEVEN)
    whole = make().rehearse("test/data-v0", share=0.25).learn(30)
    model = make().rehearse("test/data-v0", share=0.25).learn(20)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    env = copy.deepcopy(model.get_env())
    loaded = MBDPO.load(tmp_path / "model", env=env, device="cpu", force_reset=False)
    loaded.load_replay_buffer(tmp_path / "buffer")
    with pytest.raises(ValueError, match=r"recorded data \(0.25 of each batch\).*call model.rehearse\(dataset\) again"):
        loaded.learn(10, reset_num_timesteps=False)
    loaded.rehearse("test/data-v0").learn(10, reset_num_timesteps=False)
    assert th.equal(flat_parameters(loaded.policy), flat_parameters(whole.policy))
    MBDPO.load(tmp_path / "model", env=env, device="cpu").rehearse(None).learn(5)


def test_observations_may_be_called_like_those_of_several_tasks() -> None:
    space = spaces.Dict({"observation": VECTOR, "task": spaces.Box(0.0, 1.0, (2,))})
    record("test/dict-v0", None, space, UNEVEN)
    model = MBDPO("MultiInputPolicy", ToyEnv(space, UNEVEN), learning_starts=10, **SMALL).rehearse("test/dict-v0")
    assert model.learn(15)._n_updates == 5


def test_the_callers_data_stays_as_it_is() -> None:
    record("test/data-v0", None, VECTOR, UNEVEN)
    data = ShardedDataset(convert_minari("test/data-v0"), horizon=7, seed=3)
    first, second = make().rehearse(data), make(horizon=2).rehearse(data)
    first.learn(12)
    second.learn(12)
    make(seed=None).rehearse(data).learn(12)
    assert data.horizon == 7 and data.rng.integers(1000) == np.random.default_rng(3).integers(1000)


def test_what_is_refused(pretrained: MBDPO) -> None:
    for share in (0.0, 1.0, -0.5, 2.0):
        with pytest.raises(ValueError, match="share must lie between 0 and 1"):
            pretrained.rehearse(DATA, share=share)
    with pytest.raises(ValueError, match="not among this model's"):
        pretrained.rehearse({"other": "test/up-v0"})
    with pytest.raises(ValueError, match="does-not-exist"):
        pretrained.rehearse({"up": "test/does-not-exist-v0"})
    pretrained.batch_size = 1
    with pytest.raises(ValueError, match="pass batch_size=2 or more"):
        pretrained.rehearse(DATA)
    assert pretrained._rehearsal is None and pretrained._rehearsal_share == 0
    record("test/data-v0", None, VECTOR, UNEVEN)
    with pytest.raises(ValueError, match=r"rehearse\(\) is for learning in one process"):
        check_can_share(make().rehearse("test/data-v0"))


def test_a_folder_names_the_data_that_was_learned_from(pretrained: MBDPO, tmp_path: Path) -> None:
    def named(model: MBDPO, **kwargs: Any) -> list[str]:
        folder = model.save_pretrained(tmp_path / "folder", **kwargs)
        found = yaml.safe_load((folder / "training.yml").read_text())["datasets"]
        assert json.loads((folder / "config.json").read_text())["datasets"] == found
        return list(found)

    assert named(pretrained) == ["test/up-v0", "test/wide-v0"]
    pretrained.rehearse({"up": [record_task("test/more-v0", UP, seed=1), "hf://me/test/up-v0"]})
    assert named(pretrained) == ["test/up-v0", "test/wide-v0", "test/more-v0"]
    pretrained.save(tmp_path / "model")
    assert named(MBDPO.load(tmp_path / "model", device="cpu")) == ["test/up-v0", "test/wide-v0", "test/more-v0"]
    loaded = MBDPO.from_pretrained(tmp_path / "folder", device="cpu")
    record_task("test/last-v0", UP, seed=2)
    # What is refused, or comes as shards that do not say what they were made of, is not named
    with pytest.raises(ValueError, match="no data set"):
        loaded.rehearse({"up": "test/none-v0"})
    loaded.learn_offline(ShardedDataset(convert_minari(DATA)), 1).learn_offline({"up": "test/last-v0"}, 1)
    assert named(loaded) == ["test/up-v0", "test/wide-v0", "test/more-v0", "test/last-v0"]
    # What the caller says counts
    assert named(loaded, datasets=["me/mine"]) == ["me/mine"] and named(loaded, datasets=[]) == []
