from typing import Any

import numpy as np
import pytest
import torch as th

from sb3_mbdpo import MBDPO, hardware
from sb3_mbdpo.hardware import DTYPES, LARGEST_LEARNED_BLOCK, compiled, has_fast_bfloat16, resolve_dtype
from sb3_mbdpo.two_hot import TwoHot
from tests.fakes import ACTIONS, VECTOR, ToyEnv, leaning_model, leaning_observations

CPU = th.device("cpu")


def make(**kwargs: object) -> MBDPO:
    env = ToyEnv(VECTOR, ACTIONS, lengths=(6,), terminates=True)
    return MBDPO("MlpPolicy", env, preset="debug", seed=0, learning_starts=10, device="cpu", **kwargs)


def observations(size: int = 3) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (size, 3)).astype(np.float32)


# --- number types ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("able", "expected"),
    [
        ({"avx512_bf16": True}, True),
        ({"avx512_bf16": False, "amx_bf16": True}, True),
        ({"avx2": True}, False),
        ({}, False),
    ],
)
def test_auto_is_bfloat16_where_it_is_fast(
    monkeypatch: pytest.MonkeyPatch, able: dict[str, bool], expected: bool
) -> None:
    monkeypatch.setattr(th.cpu, "get_capabilities", lambda: able, raising=False)
    assert has_fast_bfloat16(CPU) is expected
    assert resolve_dtype("search_dtype", "auto", CPU) == ("bfloat16" if expected else "float32")
    # An explicit choice wins
    assert [resolve_dtype("search_dtype", name, CPU) for name in DTYPES[1:]] == ["float32", "bfloat16"]


def test_without_knowledge_of_the_cpu_auto_is_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(th.cpu, "get_capabilities", raising=False)
    assert resolve_dtype("search_dtype", "auto", CPU) == "float32"
    assert not has_fast_bfloat16(th.device("mps"))


def test_presets_and_arguments_choose_the_type() -> None:
    assert make().policy.search_config.dtype == th.float32
    model = make(search_dtype="bfloat16")
    assert model.policy.search_config.dtype == th.bfloat16
    assert all(parameter.dtype == th.float32 for parameter in model.policy.parameters())
    with pytest.raises(ValueError, match='search_dtype must be "auto", "float32" or "bfloat16", got \'float16\''):
        make(search_dtype="float16")


def test_bfloat16_acts_nearly_alike_and_learns() -> None:
    models = [make(search_dtype=name) for name in ("float32", "bfloat16")]
    for model in models:
        model.learn(60)
    models[1].set_parameters(models[0].get_parameters())
    exact, rounded = (model.predict(observations(64), deterministic=True)[0] for model in models)
    drawn_anew = models[0].predict(observations(64))[0]
    # Where two candidates are worth the same, rounding may choose the other: on average it moves plans far less than
    # other candidates do
    moved = np.abs(exact - rounded)
    assert 0 < moved.mean() < 0.2 * np.abs(exact - drawn_anew).mean() and np.quantile(moved, 0.9) < 0.2
    assert exact.dtype == rounded.dtype == np.float32


def test_type_survives_saving(tmp_path: object) -> None:
    make(search_dtype="bfloat16").save(f"{tmp_path}/model")
    loaded = MBDPO.load(f"{tmp_path}/model", device="cpu")
    assert loaded.search_dtype == "bfloat16" and loaded.policy.search_config.dtype == th.bfloat16


def test_mixed_precision_updates_are_close_and_keep_float32_weights() -> None:
    reports = []
    for name in ("float32", "bfloat16"):
        model = make(update_dtype=name).learn(10)
        model.policy.set_training_mode(True)
        reports.append(model.learner.update(model.replay_buffer.sample(8)))
        tensors = [*model.policy.parameters(), *(t for s in model.policy.optimizer.state.values() for t in s.values())]
        assert all(tensor.dtype == th.float32 for tensor in tensors)
    assert reports[0].keys() == reports[1].keys()
    for name, value in reports[0].items():
        assert reports[1][name].dtype == th.float32, name
        th.testing.assert_close(reports[1][name], value, rtol=0.05, atol=0.02, msg=name)
    assert any(not th.equal(value, reports[1][name]) for name, value in reports[0].items())
    with pytest.raises(ValueError, match="update_dtype must be"):
        make(update_dtype="half")


def test_decoding_is_exact_in_mixed_precision() -> None:
    two_hot = TwoHot(101)
    logits = 30 * two_hot.encode(th.tensor([[123.4], [-0.7]]))
    with th.autocast("cpu", th.bfloat16):
        mixed = two_hot.decode(logits)
    th.testing.assert_close(mixed, two_hot.decode(logits))


def test_updates_in_float32_are_so_within_mixed_precision_too() -> None:
    model, seen = make(update_dtype="float32").learn(10), []
    model.policy.world_model.reward.register_forward_hook(lambda _, args, logits: seen.append(logits.dtype))
    with th.autocast("cpu", th.bfloat16):
        model.train(1, 8)
    assert seen and set(seen) == {th.float32}


def test_a_step_shows_in_the_losses_that_follow() -> None:
    """Mixed precision keeps casts of the weights; none may outlive the step that changes them."""
    model = make(update_dtype="bfloat16", learning_rate=0.1).learn(10)
    world, seen = model.policy.world_model, []
    latents, actions = th.rand(5, world.latent_dim), th.zeros(5, 2)
    learner = model.learner
    update_prior = learner.update_prior

    def look(*args: Any) -> Any:
        with th.no_grad(), learner._autocast():
            seen.append(world.next(latents, actions))
        return update_prior(*args)

    learner.update_prior = look  # type: ignore[method-assign]
    model.policy.set_training_mode(True)
    learner.update(model.replay_buffer.sample(8))
    with th.no_grad(), th.autocast("cpu", th.bfloat16):
        th.testing.assert_close(seen[0], world.next(latents, actions))


def test_the_paper_preset_searches_in_the_fast_type(monkeypatch: pytest.MonkeyPatch) -> None:
    for fast, expected in ((True, th.bfloat16), (False, th.float32)):
        monkeypatch.setattr(th.cpu, "get_capabilities", lambda fast=fast: {"avx512_bf16": fast}, raising=False)
        env = ToyEnv(VECTOR, ACTIONS)
        model = MBDPO("MlpPolicy", env, preset="paper", model_size=0.02, buffer_size=10, device="cpu")
        assert model.search_dtype == "auto" and model.policy.search_config.dtype == expected


def test_freed_memory_is_asked_for_once_a_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    empty = th.empty
    monkeypatch.setattr(hardware.th, "empty", lambda *args, **kwargs: sizes.append(args[0]) or empty(*args, **kwargs))
    make()
    # glibc learns from blocks of up to 32 MiB
    assert sizes.count(LARGEST_LEARNED_BLOCK) == 1 and 31e6 < LARGEST_LEARNED_BLOCK < 32 * 2**20


# --- compiling ------------------------------------------------------------------------------------------------------


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[th.fx.GraphModule]:
    """Graphs as they are captured; they run as they are, without a C++ compiler and its minutes."""
    found: list[th.fx.GraphModule] = []

    def backend(graph: th.fx.GraphModule, inputs: list[th.Tensor]) -> object:
        found.append(graph)
        return graph.forward

    compile = th.compile
    monkeypatch.setattr(th, "compile", lambda function, **kwargs: compile(function, backend=backend, fullgraph=True))
    th.compiler.reset()
    compiled.cache_clear()
    yield found
    th.compiler.reset()
    compiled.cache_clear()


def test_compiled_model_computes_the_same(graphs: list[th.fx.GraphModule]) -> None:
    reports, actions = [], []
    for compile in (False, True):
        model = make(compile=compile).learn(10)
        assert not graphs
        actions.append(model.predict(observations(), deterministic=True)[0])
        model.policy.set_training_mode(True)
        reports.append(model.learner.update(model.replay_buffer.sample(8)))
    np.testing.assert_allclose(*actions, atol=1e-4)
    assert reports[0].keys() == reports[1].keys() and "train/prior_loss" in reports[0]
    for name, value in reports[0].items():
        th.testing.assert_close(value, reports[1][name], rtol=1e-4, atol=1e-6, msg=name)
    # Rollouts of the prior, denoising steps, encoder, targets, world model, prior
    assert len(graphs) >= 6


@pytest.mark.parametrize("kwargs", [{"activation_checkpointing": True}, {"gradient_accumulation": 2}])
def test_compiled_model_computes_the_same_in_less_memory(
    graphs: list[th.fx.GraphModule], kwargs: dict[str, Any]
) -> None:
    reports = []
    for compile in (False, True):
        model = make(compile=compile, score_batch_size=4, **kwargs).learn(10)
        model.policy.set_training_mode(True)
        assert model.replay_buffer is not None and not graphs
        reports.append(model.learner.update(model.replay_buffer.sample(8)))
    for name, value in reports[0].items():
        th.testing.assert_close(value, reports[1][name], rtol=1e-4, atol=1e-6, msg=name)
    assert len(graphs) >= 3


def test_nothing_is_compiled_anew_while_learning(graphs: list[th.fx.GraphModule]) -> None:
    model = make(compile=True)
    model.learn(40)
    before = len(graphs)
    model.learn(40, reset_num_timesteps=False)
    for _ in range(3):
        model.predict(observations(1))
    assert len(graphs) == before


def test_compiled_score_network_acts_the_same(graphs: list[th.fx.GraphModule]) -> None:
    model = make(act_mode="score", compile=True).learn(10)
    decisions: dict[bool, list[np.ndarray]] = {}
    for compile in (False, True):
        model.policy.compiled, decisions[compile] = compile, []
        assert not graphs
        for rows in (1, 3, 5):
            action, state = model.predict(observations(rows), deterministic=True)
            decisions[compile] += [action, state, *model.predict(observations(rows), state, deterministic=True)]
    # Few rows are filled up to eight; a single one is repeated without being copied, which is another layout
    assert len(graphs) == 2
    for ours, theirs in zip(*decisions.values(), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_compiled_multi_task_model_computes_the_same(graphs: list[th.fx.GraphModule]) -> None:
    reports, actions, counts = [], [], []
    for compile in (False, True):
        model = leaning_model(compile=compile).learn(15)
        actions.append(model.predict(leaning_observations([0, 2, 1, 1]), deterministic=True)[0])
        model.policy.set_training_mode(True)
        reports.append(model.learner.update(model.replay_buffer.sample(16)))
        # Other tasks in the batch are no reason to compile again
        counts.append(len(graphs))
        model.learn(9, reset_num_timesteps=False)
        assert len(graphs) == counts[-1]
    assert counts[0] == 0 and counts[1] >= 4
    np.testing.assert_allclose(*actions, atol=2e-3)
    for name, value in reports[0].items():
        th.testing.assert_close(value, reports[1][name], rtol=1e-2, atol=1e-4, msg=name)
