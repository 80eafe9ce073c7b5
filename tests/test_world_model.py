import math

import pytest
import torch as th

from sb3_mbdpo.world_model import TaskSpec
from tests.fakes import make_model

TASKS = TaskSpec([2, 1, 2], 12)
TASK = th.tensor([0, 1, 2, 1])


def normal(*shape: int, seed: int = 0) -> th.Tensor:
    return th.randn(shape, generator=th.Generator().manual_seed(seed))


def latents(size: int = 4) -> th.Tensor:
    return normal(size, 2, 8).softmax(-1).flatten(1)


# --- tasks ----------------------------------------------------------------------------------------------------------


def test_task_embeddings_are_at_most_of_norm_one() -> None:
    model = make_model(TASKS)
    with th.no_grad():
        model.task_embedding.weight[0] = 0.1
        model.task_embedding.weight[1] = 5.0
    before = model.task_embedding.weight.detach().clone()
    embedding = model.embed(th.tensor([0, 1]))
    th.testing.assert_close(embedding[0], before[0])
    th.testing.assert_close(embedding[1], before[1] / before[1].norm())
    assert th.equal(before, model.task_embedding.weight), "the stored embedding is left as it is"
    # Where rescaled, the gradient passes as if the rescaled vector were the parameter
    (3 * embedding).sum().backward()
    th.testing.assert_close(model.task_embedding.weight.grad[:2], th.full((2, 12), 3.0))
    assert not model.task_embedding.weight.grad[2].any()


def test_multitask_models_ask_for_the_task() -> None:
    with pytest.raises(ValueError, match="pass `task`"):
        make_model(TASKS).encode(normal(4, 5))
    assert make_model().embed(None) is None and make_model().mask(TASK) is None


def test_masks_and_masked_actions() -> None:
    model, z = make_model(TASKS), latents()
    assert model.action_masks.tolist() == [[1, 1], [1, 0], [1, 1]]
    assert model.mask(TASK).tolist() == [[1, 1], [1, 0], [1, 1], [1, 0]]
    noise = normal(4, 2, seed=1)
    sample = model.prior_sample(z, noise, TASK)
    for action in (model.prior_action(z, None, TASK), model.prior_action(z, noise, TASK), sample.action):
        assert not action[TASK == 1, 1].any() and action[TASK == 1, 0].all() and action[TASK != 1].all()
    # What the missing action's noise is must not matter
    other = noise.clone()
    other[TASK == 1, 1] = 100.0
    for ours, theirs in zip(sample, model.prior_sample(z, other, TASK), strict=True):
        assert th.equal(ours, theirs)


def test_every_head_reads_the_task() -> None:
    model, z, action = make_model(TASKS), latents(1).expand(2, -1), normal(1, 2).expand(2, -1)
    task = th.tensor([0, 2])
    outputs = {
        "encoder": model.encode(normal(1, 5).expand(2, -1), task),
        "dynamics": model.next(z, action, task),
        "reward": model.predict_reward(z, action, task),
        "value": model.value(z, action, task)[0],
        "prior": model.prior_action(z, None, task),
        "energy": model.energy(model.join(z, action, task)),
        "termination": model.termination(model.join(z, None, task)),
    }
    for name, output in outputs.items():
        assert not th.allclose(output[0], output[1], rtol=0, atol=1e-9), name


def test_tasks_broadcast_over_leading_dimensions() -> None:
    model, z, action = make_model(TASKS), normal(3, 4, 6, 16), normal(3, 4, 6, 2)
    task = TASK[:, None]
    flat = model.next(z.flatten(0, 2), action.flatten(0, 2), task.expand(3, 4, 6).flatten())
    th.testing.assert_close(model.next(z, action, task).flatten(0, 2), flat)
    joined = model.join(z, action, task)
    assert joined.shape == (3, 4, 6, 16 + 12 + 2)
    assert th.equal(joined[..., :16], z) and th.equal(joined[..., -2:], action)


# --- prior ----------------------------------------------------------------------------------------------------------


def test_log_std_stays_within_its_bounds() -> None:
    model = make_model(log_std_min=-3.0, log_std_max=1.0)
    for raw, expected in ((-1e4, -3.0), (1e4, 1.0), (0.0, -1.0)):
        with th.no_grad():
            model.prior[-1].weight.zero_()
            model.prior[-1].bias.fill_(raw)
        th.testing.assert_close(model.prior_params(latents())[1], th.full((4, 2), expected))


def test_log_prob_is_that_of_the_squashed_gaussian() -> None:
    model, z, noise = make_model(), latents(), normal(4, 2, seed=2)
    mean, log_std = model.prior_params(z)
    sample = model.prior_sample(z, noise)
    transforms = [th.distributions.TanhTransform()]
    squashed = th.distributions.TransformedDistribution(th.distributions.Normal(mean, log_std.exp()), transforms)
    raw = mean + log_std.exp() * noise
    th.testing.assert_close(sample.action, raw.tanh())
    expected = squashed.log_prob(raw.tanh()).sum(-1, keepdim=True)
    th.testing.assert_close(sample.log_prob, expected, rtol=1e-3, atol=1e-3)
    assert th.equal(model.prior_action(z, noise), sample.action)
    th.testing.assert_close(model.prior_action(z), mean.tanh())


def test_scaled_entropy() -> None:
    """The entropy, scaled by the number of actions times the unsquashed density."""
    model, z, noise = make_model(TASKS), latents(), normal(4, 2, seed=2)
    mean, log_std = model.prior_params(z, TASK)
    sample = model.prior_sample(z, noise, TASK)
    mask = model.mask(TASK)
    density = (-0.5 * (noise * mask).pow(2) - log_std - 0.5 * math.log(2 * math.pi)).sum(-1, keepdim=True)
    count = mask.sum(-1, keepdim=True)
    assert count.flatten().tolist() == [2, 1, 2, 1] and mean.shape == (4, 2)
    th.testing.assert_close(sample.scaled_entropy, -density * count, rtol=1e-4, atol=1e-4)


# --- heads ----------------------------------------------------------------------------------------------------------


@th.no_grad()
def test_value_uses_the_chosen_ensemble() -> None:
    model, z, action = make_model(), latents(), normal(4, 2)
    values = model.value(z, action)
    assert values.shape == (3, 4, 1)
    model.target_critics.biases[-1].add_(normal(3, 1, 21))
    assert th.equal(values, model.value(z, action))
    picked = th.tensor([2, 1])
    online, target = (model.value(z, action, None, net.select(picked)) for net in (model.critics, model.target_critics))
    th.testing.assert_close(online, values[picked])
    assert not th.allclose(online, target)


@th.no_grad()
def test_energy_is_scaled_by_its_statistics() -> None:
    model, joined = make_model(), normal(50, 18)
    model.energy_mean.fill_(0.2)
    model.energy_std.fill_(0.05)
    expected = ((model.energy(joined) - 0.2) / 0.05).clamp(-5, 5)
    th.testing.assert_close(model.scale_energy(model.require_energy()(joined)), expected)
    assert expected.abs().max() == 5
    with pytest.raises(ValueError, match="energy_coef=0"):
        make_model(with_energy=False).require_energy()


def test_targets_start_as_a_copy_without_gradient() -> None:
    th.manual_seed(0)
    model = make_model(dropout=0.1)
    assert not any(parameter.requires_grad for parameter in model.target_critics.parameters())
    online, target = model.critics.state_dict(), model.target_critics.state_dict()
    assert th.equal(online["weights.0"], target["weights.0"])
    assert online["weights.0"].data_ptr() != target["weights.0"].data_ptr()


def test_optional_heads() -> None:
    model = make_model(with_termination=False, with_energy=False, with_score=False)
    assert model.termination is None and model.energy is None and model.score is None
    assert not any(name.startswith(("termination", "energy.", "score")) for name in model.state_dict())


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [({"n_critics": 1}, "n_critics"), ({"simnorm_dim": 5}, "latent_dim"), ({"score_prediction": "noise"}, "noise")],
)
def test_wrong_arguments_are_named(kwargs: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_model(**kwargs)
