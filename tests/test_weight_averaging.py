"""Acting with an average of the weights."""

import pytest
import torch as th
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from torch.nn.utils import parameters_to_vector

from sb3_mbdpo import MBDPO, WeightAveraging


def small(**kwargs: object) -> MBDPO:
    arguments = {"preset": "debug", "learning_starts": 6, "batch_size": 8, "buffer_size": 100, "seed": 0}
    return MBDPO("MlpPolicy", "Pendulum-v1", **{"device": "cpu", **arguments, **kwargs})  # type: ignore[arg-type]


def pretend_to_update(model: MBDPO, count: int, change: float) -> None:
    model._n_updates += count
    with th.no_grad():
        for parameter in model.policy.parameters():
            parameter.add_(change)


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
    pretend_to_update(model, 1, 1.0)
    averaging.on_rollout_start()
    th.testing.assert_close(flat(model), start + 0.25)
    averaging.on_rollout_end()
    th.testing.assert_close(flat(model), start + 1)
    # Two updates at once leave as much of the average as two, one after the other
    pretend_to_update(model, 2, 1.0)
    averaging.on_training_end()
    th.testing.assert_close(flat(model), start + 0.25 * 0.75**2 + 2 * (1 - 0.75**2))


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
