"""Acting with an average of the weights."""

from pathlib import Path
from typing import Any

import pytest
import torch as th
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from torch.nn.utils import parameters_to_vector

from sb3_mbdpo import MBDPO, WeightAveraging
from sb3_mbdpo.ranks import Ranks
from tests.fakes import ACTIONS, VECTOR, ToyEnv
from tests.recordings import record


def small(env: Any = "Pendulum-v1", **kwargs: Any) -> MBDPO:
    arguments: dict[str, Any] = {"preset": "debug", "learning_starts": 6, "batch_size": 8, "buffer_size": 100}
    return MBDPO("MlpPolicy", env, seed=0, device="cpu", **arguments, **kwargs)


def pretend_to_update(model: MBDPO, change: float) -> None:
    assert model._after_update is not None
    with th.no_grad():
        for parameter in model.policy.parameters():
            parameter.add_(change)
    model._after_update()


def flat(model: MBDPO) -> th.Tensor:
    return parameters_to_vector(model.policy.parameters()).detach().clone()


def test_the_average_acts_and_the_weights_learn() -> None:
    model, averaging = small(), WeightAveraging(0.75)
    averaging.init_callback(model)
    start = flat(model)
    averaging.on_training_start({}, {})
    averaging.on_rollout_start()
    assert th.equal(flat(model), start)
    averaging.on_rollout_end()
    pretend_to_update(model, 1.0)
    averaging.on_rollout_start()
    th.testing.assert_close(flat(model), start + 0.25)
    averaging.on_rollout_end()
    th.testing.assert_close(flat(model), start + 1)
    # Two updates at once: each of them counts
    pretend_to_update(model, 1.0)
    pretend_to_update(model, 1.0)
    averaging.on_training_end()
    th.testing.assert_close(flat(model), start + 0.25 * 0.75**2 + 2 * 0.25 * 0.75 + 3 * 0.25)
    assert model._after_update is None


def test_what_averages_over_nothing_changes_nothing() -> None:
    alone = small().learn(20)
    followed = small().learn(20, WeightAveraging(1e-12))
    assert alone._n_updates > 0
    assert th.equal(flat(alone), flat(followed))
    assert th.equal(alone.policy.generator.get_state(), followed.policy.generator.get_state())


class Record(BaseCallback):
    """The weights at each step, and a stop."""

    def __init__(self, stop: int | None = None):
        super().__init__()
        self.seen: list[th.Tensor] = []
        self.stop = stop

    def _on_step(self) -> bool:
        assert isinstance(self.model, MBDPO)
        self.seen.append(flat(self.model))
        return self.num_timesteps != self.stop


def test_callbacks_see_the_average_and_it_remains(monkeypatch: pytest.MonkeyPatch) -> None:
    model, record, decay = small(), Record(), 0.9
    weights = [flat(model)]
    train = MBDPO.train

    def recorded(self: MBDPO, gradient_steps: int, batch_size: int = 100) -> None:
        assert th.equal(flat(self), weights[-1])
        train(self, gradient_steps, batch_size)
        weights.append(flat(self))

    monkeypatch.setattr(MBDPO, "train", recorded)
    model.learn(20, [WeightAveraging(decay), record])
    assert len(weights) > 10
    average, expected = weights[0], []
    for after in weights[1:]:
        expected.append(average)
        average = average.lerp(after, 1 - decay)
    # The first update comes after the seventh step
    for seen, value in zip(record.seen[6:], expected, strict=True):
        th.testing.assert_close(seen, value)
    th.testing.assert_close(flat(model), average)
    assert not th.allclose(flat(model), weights[-1])


def test_the_average_remains_where_a_callback_stops() -> None:
    record = Record(stop=12)
    model = small().learn(20, [WeightAveraging(0.9), record])
    assert model.num_timesteps == 12
    assert th.equal(flat(model), record.seen[-1])


def test_evaluation_and_frozen_parts_go_with_it() -> None:
    model = small()
    model.policy.world_model.encoder.requires_grad_(False)
    frozen = [parameter.clone() for parameter in model.policy.world_model.encoder.parameters()]
    evaluation = EvalCallback(model.get_env() or model.env, n_eval_episodes=1, eval_freq=10, verbose=0)
    model.learn(20, [WeightAveraging(), evaluation])
    assert evaluation.last_mean_reward < 0
    for parameter, value in zip(model.policy.world_model.encoder.parameters(), frozen, strict=True):
        assert th.equal(parameter, value)


@pytest.mark.parametrize("decay", [0, 1, -0.5, 2])
def test_decay_out_of_bounds(decay: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        WeightAveraging(decay)


def followed(model: MBDPO, monkeypatch: pytest.MonkeyPatch) -> list[th.Tensor]:
    """The average of decay 0.9 before and after each update to come."""
    averages, update = [flat(model)], MBDPO._update

    def recorded(self: MBDPO, samples: Any) -> None:
        update(self, samples)
        averages.append(averages[-1].lerp(flat(self), 0.1))

    monkeypatch.setattr(MBDPO, "_update", recorded)
    return averages


@pytest.mark.parametrize("train_freq", [3, (1, "episode")])
def test_all_updates_between_rollouts_count(train_freq: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    env = make_vec_env(lambda: ToyEnv(lengths=(5,)), n_envs=1 if isinstance(train_freq, tuple) else 2)
    model = small(env=env, train_freq=train_freq, gradient_steps=4)
    averages = followed(model, monkeypatch)
    model.learn(30, WeightAveraging(0.9))
    assert model._n_updates >= 8
    th.testing.assert_close(flat(model), averages[-1])


def test_offline_learning_ends_with_the_average(minari_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small(env=ToyEnv())
    averages = followed(model, monkeypatch)
    model.learn_offline(record("test/toy-v0", None, VECTOR, ACTIONS), 5, WeightAveraging(0.9))
    th.testing.assert_close(flat(model), averages[-1])


def test_learning_goes_on_from_the_average_also_after_an_interruption(monkeypatch: pytest.MonkeyPatch) -> None:
    model, averaging = small(), WeightAveraging(0.9)
    model.learn(12, averaging)
    first = flat(model)
    # The zoo ends its first callback once more
    averaging.on_training_end()
    assert th.equal(flat(model), first)
    seen = Record()
    model.learn(4, [averaging, seen], reset_num_timesteps=False)
    assert th.equal(seen.seen[0], first)
    train = MBDPO.train

    def interrupted(self: MBDPO, gradient_steps: int, batch_size: int = 100) -> None:
        train(self, gradient_steps, batch_size)
        raise KeyboardInterrupt

    before = flat(model)
    monkeypatch.setattr(MBDPO, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.learn(4, averaging, reset_num_timesteps=False)
    weights = flat(model)
    averaging.on_training_end()
    th.testing.assert_close(flat(model), before.lerp(weights, 0.1))
    monkeypatch.setattr(MBDPO, "train", train)
    # What was interrupted holds nothing back
    model.learn(4, WeightAveraging(), reset_num_timesteps=False)
    model.learn(4, reset_num_timesteps=False)
    assert model._after_update is None


def test_it_is_saved_with_a_model_as_the_average(tmp_path: Path) -> None:
    model, record = small(), Record()
    model.learn(12, [WeightAveraging(0.9), CheckpointCallback(12, str(tmp_path), "at"), record])
    loaded = MBDPO.load(tmp_path / "at_12_steps", device="cpu")
    assert th.equal(flat(loaded), record.seen[-1]) and loaded._after_update is None


def test_what_it_refuses() -> None:
    with pytest.raises(ValueError, match="One WeightAveraging at a time"):
        small().learn(10, [WeightAveraging(), WeightAveraging()])
    with pytest.raises(ValueError, match="not those of SAC"):
        SAC("MlpPolicy", "Pendulum-v1", device="cpu").learn(10, WeightAveraging())
    model = small()
    model.learner.ranks = Ranks(0, 2)
    averaging = WeightAveraging()
    averaging.init_callback(model)
    with pytest.raises(ValueError, match="for one process"):
        averaging.on_training_start({}, {})


def test_the_zoo_takes_it_by_name() -> None:
    utils = pytest.importorskip("rl_zoo3.utils")
    (callback,) = utils.get_callback_list({"callback": [{"sb3_mbdpo.WeightAveraging": {"decay": 0.99}}]})
    assert isinstance(callback, WeightAveraging) and callback.decay == 0.99
