"""Captured calls compute what the others do. Where there is no GPU, a stand-in repeats calls as a graph would."""

import contextlib
import copy
import gc
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch as th
from torch.utils import _pytree as pytree

from sb3_mbdpo import MBDPO, MBDPOPolicy, hardware
from sb3_mbdpo.activations import Mish
from sb3_mbdpo.captured_updates import CapturedLearner
from sb3_mbdpo.cuda_graphs import CudaGraphs, copied
from tests.fakes import ACTIONS, MIXED, VECTOR, Leaning, ToyEnv, leaning_model, leaning_observations

# Numbers that float32 holds exactly: graphs read learning rates from tensors
RATES = {"learning_rate": 2**-10, "encoder_lr_scale": 0.5}
CUDA = th.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
CAPTURE = CudaGraphs._capture


class FakeGraph:
    """Repeats a call on the same arguments, and writes what it returns to the same places."""

    def __init__(self, function: Callable[..., Any], arguments: tuple[Any, ...]):
        self.function, self.arguments = function, arguments
        self.result: Any = None

    def replay(self) -> None:
        result = self.function(*self.arguments)
        if self.result is None:
            self.result = result
            return
        for place, value in zip(pytree.tree_leaves(self.result), pytree.tree_leaves(result), strict=True):
            if isinstance(place, th.Tensor):
                place.copy_(value)


class FakeCapture(NamedTuple):
    graph: FakeGraph
    arguments: list[th.Tensor]

    @property
    def result(self) -> Any:
        return self.graph.result


def fake_capture(function: Callable[..., Any], arguments: tuple[Any, ...], generator: th.Generator) -> FakeCapture:
    own = copied(arguments)
    return FakeCapture(
        FakeGraph(function, own), [leaf for leaf in pytree.tree_leaves(own) if isinstance(leaf, th.Tensor)]
    )


@pytest.fixture(autouse=True)
def graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls are captured, without what compiles them before: that is tested elsewhere."""
    monkeypatch.setattr(hardware.th, "compile", lambda function, **kwargs: function)
    hardware.compiled.cache_clear()
    if not CUDA:
        monkeypatch.setattr(CudaGraphs, "_capture", lambda self, *arguments: fake_capture(*arguments))
        monkeypatch.setattr(CudaGraphs, "_warm_up", lambda self, function, arguments: function(*arguments))
        monkeypatch.setattr(MBDPOPolicy, "captures", property(lambda self: self.compiled))
    yield
    hardware.compiled.cache_clear()


def make(compile: bool, space: Any = VECTOR, **kwargs: Any) -> MBDPO:
    env = ToyEnv(space, ACTIONS, lengths=(6,), terminates=True)
    policy = "MlpPolicy" if space is VECTOR else "MultiInputPolicy"
    defaults = {"preset": "debug", "seed": 0, "learning_starts": 10, "warmup_updates": 0, "score_interval": 2, **RATES}
    return MBDPO(policy, env, device=DEVICE, compile=compile, **(defaults | kwargs))


def observations(size: int = 3) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (size, 3)).astype(np.float32)


def assert_same_weights(first: MBDPO, second: MBDPO) -> None:
    # Sums run in another order on a GPU, and optimizers take small differences for large ones
    tolerance = {"rtol": 1e-2, "atol": 5e-3} if CUDA else {"rtol": 0.0, "atol": 0.0}
    for (name, a), b in zip(first.policy.state_dict().items(), second.policy.state_dict().values(), strict=True):
        th.testing.assert_close(a, b, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"learning_rate": lambda left: 2**-10 if left > 0.5 else 2**-11},
        {"warm_denoising_steps": 1, "policy_delay": 2, "energy_interval": 3, "bootstrap": "score"},
        {"space": MIXED, "learning_starts": 12, "batch_size": 8},
    ],
    ids=["plain", "schedule", "intervals", "dict"],
)
def test_captured_runs_learn_what_the_others_learn(kwargs: dict[str, Any]) -> None:
    models = [make(compile, **kwargs).learn(50) for compile in (False, True)]
    assert not len(models[0].policy.graphs) and len(models[1].policy.graphs) > 2
    assert type(models[1].learner) is CapturedLearner
    assert models[0]._n_updates == models[1]._n_updates > 30
    assert_same_weights(*models)
    replays = [model.replay_buffer.actions[: model.replay_buffer.size()] for model in models]
    np.testing.assert_allclose(*replays, atol=0.2 if CUDA else 0)


def test_captured_multi_task_runs_learn_what_the_others_learn() -> None:
    models = [leaning_model(compile=compile, device=DEVICE, **RATES).learn(45) for compile in (False, True)]
    assert_same_weights(*models)
    tasks = leaning_observations([0, 2, 1, 1])
    actions = [[model.predict(tasks, deterministic=True)[0] for _ in range(3)][-1] for model in models]
    np.testing.assert_allclose(*actions, atol=0.1 if CUDA else 0)


@pytest.mark.parametrize("act_mode", ["search", "score", "prior"])
def test_captured_plans_are_those_of_the_others(act_mode: str) -> None:
    models = [make(compile, act_mode=act_mode) for compile in (False, True)]
    for size in (1, 5, 1, 5, 1, 5):
        plans = [model.predict(observations(size), deterministic=True) for model in models]
        for a, b in zip(*plans, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)
    assert len(models[1].policy.graphs) == 2
    drawn = [[model.predict(observations(2))[0] for _ in range(4)] for model in models]
    np.testing.assert_allclose(*drawn, atol=1e-4)


def test_results_belong_to_the_caller() -> None:
    model = make(True)
    policy = model.policy
    policy.set_training_mode(False)
    results = []
    for i in range(4):
        obs = th.full((2, 3), i / 4, device=policy.device)
        plan, restart = th.zeros(2, *policy.plan_shape), th.ones(2, dtype=th.bool)
        results.append(policy.plan(obs, plan.to(policy.device), restart.to(policy.device)))
    plans = [result.plan.cpu().numpy() for result in results]
    assert all(not np.array_equal(plans[i], plans[j]) for i in range(4) for j in range(i))
    model.learn(30)
    model.policy.set_training_mode(True)
    losses = [model.learner.update(model.replay_buffer.sample(8), 1)["train/reward_loss"] for _ in range(4)]
    assert len({float(loss) for loss in losses}) == 4


def test_graphs_go_when_what_they_read_is_replaced(tmp_path: Path) -> None:
    model = make(True).learn(40)
    policy = model.policy
    assert len(policy.graphs) > 2
    before = model.get_parameters()
    replacements: dict[str, Callable[[], object]] = {
        "parameters": lambda: model.set_parameters(before, device=DEVICE),
        "generator": lambda: model.set_random_seed(3),
        "moved": lambda: policy.to(DEVICE),
        "optimizers": lambda: policy.rebuild_optimizers(model.lr_schedule),
    }
    for name, replace in replacements.items():
        for _ in range(3):
            model.predict(observations(), deterministic=True)
        assert len(policy.graphs) > 0, name
        replace()
        assert len(policy.graphs) == 0, name
    model.learn(20, reset_num_timesteps=False)
    assert all(bool(parameter.isfinite().all()) for parameter in policy.parameters())


def test_another_generator_is_another_graph() -> None:
    model = make(True).learn(40)
    policy, own = model.policy, model.policy.generator
    for _ in range(3):
        model.predict(observations())
    state = own.get_state()
    # As processes do that share updates, and act by draws of their own
    policy._generator = th.Generator(DEVICE).manual_seed(5)
    drawn = [model.predict(observations())[0] for _ in range(3)]
    policy._generator = th.Generator(DEVICE).manual_seed(5)
    assert all(np.allclose(a, model.predict(observations())[0], atol=1e-4) for a in drawn)
    assert th.equal(own.get_state(), state)


def test_graphs_go_when_tasks_or_parts_change() -> None:
    model = leaning_model(compile=True, device=DEVICE).learn(30)
    assert len(model.policy.graphs) > 0
    model.set_trainable(["heads"])
    assert len(model.policy.graphs) == 0
    model.learn(20, reset_num_timesteps=False)
    assert len(model.policy.graphs) > 0
    model.add_task(Leaning(), name="new", like=model.tasks.names[0], learning_starts=5)
    assert len(model.policy.graphs) == 0
    model.learn(20)
    assert len(model.policy.graphs) > 0


@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_compiled_and_captured_computes_the_same(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As users have it: torch.compile, aligned widths, the kernel of the dynamics, inside of graphs."""
    monkeypatch.undo()
    hardware.compiled.cache_clear()
    # Small models have another activation, which has no kernel
    settings = {"search_dtype": dtype, "update_dtype": dtype, "policy_kwargs": {"activation_fn": Mish}}
    models = [make(compile, **settings) for compile in (False, True)]
    for model in models:
        model.learn(12)
        model.policy.set_training_mode(True)
    models[1].set_parameters(models[0].get_parameters(), device=DEVICE)
    tolerance = {"float32": 1e-3, "bfloat16": 0.1}[dtype]
    for _ in range(3):
        plans = [model.predict(observations(), deterministic=True)[1] for model in models]
    np.testing.assert_allclose(*plans, atol=tolerance)
    for model in models:
        model.policy.set_training_mode(True)
    samples = models[0].replay_buffer.sample(8)
    for index in (1, 1, 1):
        reports = [model.learner.update(samples, index) for model in models]
    for name, value in reports[0].items():
        th.testing.assert_close(value, reports[1][name], rtol=0.2, atol=0.05, msg=name)


def test_no_garbage_is_collected_in_the_middle_of_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """An old graph among it would end the capture."""
    seen: list[bool] = []

    class Graph:
        def register_generator_state(self, generator: th.Generator) -> None:
            seen.append(gc.isenabled())

    monkeypatch.setattr(th.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(th.cuda, "graph", lambda graph, pool, stream: contextlib.nullcontext())
    monkeypatch.setattr(th.cuda, "graph_pool_handle", lambda: (0, 1))
    entry = CAPTURE(CudaGraphs(), lambda x: seen.append(gc.isenabled()) or x + 1, (th.ones(2),), th.Generator())
    assert seen == [True, False] and gc.isenabled() and entry.result.tolist() == [2, 2]
    with pytest.raises(ZeroDivisionError):
        CAPTURE(CudaGraphs(), lambda x: 1 // 0, (th.ones(2),), th.Generator())
    assert gc.isenabled()


def test_copies_begin_without_graphs() -> None:
    policy = make(True).learn(40).policy
    assert len(policy.graphs) > 0
    assert len(copy.deepcopy(policy.graphs)) == len(pickle.loads(pickle.dumps(policy.graphs))) == 0


def test_saved_optimizers_know_nothing_of_graphs(tmp_path: Path) -> None:
    model = make(True).learn(40)
    model.save(tmp_path / "model")
    for state in (model.policy.optimizer.state_dict(), model.policy.prior_optimizer.state_dict()):
        assert all(type(group["lr"]) is float and not group["capturable"] for group in state["param_groups"])
    loaded = MBDPO.load(tmp_path / "model", device="cpu", env=model.get_env(), compile=False)
    loaded.learn(20)
    again = MBDPO.load(tmp_path / "model", device=DEVICE, env=model.get_env()).learn(20)
    assert len(again.policy.graphs) > 2


def test_learning_rates_are_followed() -> None:
    model = make(True).learn(40)
    policy = model.policy
    policy.set_training_mode(True)
    before = copy.deepcopy(policy.world_model.dynamics.state_dict())
    optimizers = (policy.optimizer, policy.prior_optimizer, policy.score_optimizer)
    for group in (group for optimizer in optimizers if optimizer is not None for group in optimizer.param_groups):
        group["lr"] = 0.0
    count = len(policy.graphs)
    for _ in range(2):
        model.learner.update(model.replay_buffer.sample(int(model.batch_size)), model.score_interval * 10)
    assert len(policy.graphs) == count > 0
    for name, value in policy.world_model.dynamics.state_dict().items():
        assert th.equal(value, before[name]), name


@pytest.mark.parametrize("policy_kwargs", [{"optimizer_class": th.optim.SGD}, {"optimizer_kwargs": {"foreach": True}}])
def test_optimizers_that_cannot_be_captured(policy_kwargs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="compile=True on a GPU captures whole updates"):
        make(True, policy_kwargs=policy_kwargs)


def test_accumulated_gradients_are_not_captured() -> None:
    model = make(True, gradient_accumulation=2, score_batch_size=4).learn(20)
    assert not isinstance(model.learner, CapturedLearner) and model._n_updates > 5


@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_nothing_in_an_update_or_a_search_waits_for_the_device() -> None:
    model = make(False).learn(40)
    policy = model.policy
    samples = model.replay_buffer.sample(8)
    obs, plan = th.zeros(2, 3, device="cuda"), th.zeros(2, *policy.plan_shape, device="cuda")
    restart = th.ones(2, dtype=th.bool, device="cuda")
    # Its candidates are drawn once
    policy.plan(obs, plan, restart, deterministic=True)
    th.cuda.set_sync_debug_mode("error")
    try:
        policy.set_training_mode(True)
        model.learner.update(samples, 0)
        policy.set_training_mode(False)
        policy.plan(obs, plan, restart)
        policy.plan(obs, plan, restart, deterministic=True)
    finally:
        th.cuda.set_sync_debug_mode("default")
