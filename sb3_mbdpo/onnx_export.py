"""ONNX files of the policies that act without search, so that a robot needs neither PyTorch nor this package.

An exported policy takes observations as the environment gives them and returns actions in the environment's units; what
training did to observations (one-hot entries, images in [0, 1], the statistics of VecNormalize) is part of the graph.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch as th
from gymnasium import spaces
from torch import nn

from sb3_mbdpo.normalization import Normalization
from sb3_mbdpo.saving import whole_files
from sb3_mbdpo.score import score_plan
from sb3_mbdpo.tasks import TASK_KEY

if TYPE_CHECKING:
    from sb3_mbdpo.mbdpo import MBDPO
    from sb3_mbdpo.policies import MBDPOPolicy

OPSET = 18
# Rows of the inputs with which the graph is recorded; it takes any number
RECORDED_ROWS = 2
PARTS = ("encoder", "dynamics", "reward", "termination", "critics", "prior", "energy", "score")
INPUT = "observation"


class _Input(NamedTuple):
    """An input of a graph: its name, and an example."""

    name: str
    example: th.Tensor


class ExportedPolicy(nn.Module):
    """
    Observations and the previous plan to actions and the next plan, the deterministic way.

    :param policy: Policy
    :param act_mode: "score" or "prior"
    :param statistics: Mean and variance of normalised observations by key
    :param clip: Bound of normalised observations
    :param epsilon: Added to the variance
    """

    low: th.Tensor
    high: th.Tensor

    def __init__(
        self,
        policy: MBDPOPolicy,
        act_mode: str,
        statistics: dict[str, tuple[np.ndarray, np.ndarray]],
        clip: float,
        epsilon: float,
    ):
        super().__init__()
        self.policy, self.act_mode, self.clip = policy, act_mode, clip
        # Names of their own: keys may hold dots, which names of buffers may not
        self.normalized = {key: i for i, key in enumerate(statistics)}
        for i, (mean, var) in enumerate(statistics.values()):
            # In double precision, as VecNormalize computes
            self.register_buffer(f"mean_{i}", th.from_numpy(np.asarray(mean, np.float64)))
            self.register_buffer(f"scale_{i}", th.from_numpy(np.sqrt(np.asarray(var, np.float64) + epsilon)))
        space = cast(spaces.Box, policy.action_space)
        self.register_buffer("low", th.from_numpy(space.low.astype(np.float32)).flatten())
        self.register_buffer("high", th.from_numpy(space.high.astype(np.float32)).flatten())
        self.action_shape = space.shape
        self.keys = list(policy.observation_space.spaces) if isinstance(policy.observation_space, spaces.Dict) else None

    def _normalize(self, key: str, value: th.Tensor) -> th.Tensor:
        if key not in self.normalized:
            return value
        i = self.normalized[key]
        scaled = (value.double() - getattr(self, f"mean_{i}")) / getattr(self, f"scale_{i}")
        return scaled.clamp(-self.clip, self.clip).float()

    def forward(self, *inputs: th.Tensor) -> tuple[th.Tensor, ...]:
        """
        :param inputs: Observations in the order of the keys, and for "score" the plan of the previous decision
            [B, H, A], zeros at an episode's first step
        :return: actions [B, *action_shape]; for "score" also the plan
        """
        policy, model = self.policy, self.policy.world_model
        count = 1 if self.keys is None else len(self.keys)
        parts = [self._normalize(key, value) for key, value in zip(self.keys or [INPUT], inputs[:count], strict=True)]
        obs: Any = parts[0] if self.keys is None else dict(zip(self.keys, parts, strict=True))
        task = policy.tasks_of(obs)
        z = model.encode(policy.preprocess(obs), task)
        if self.act_mode == "prior":
            return (self._unscaled(model.prior_action(z, None, task)),)
        previous = inputs[count]
        # A plan of zeros is a cold start, so nothing has to be restarted
        warm = th.zeros_like(previous[:, 0, 0]) > 0.5
        plan = score_plan(model, policy.search_config.schedule, z, previous, warm, task)
        return self._unscaled(plan[:, 0]), plan

    def _unscaled(self, scaled: th.Tensor) -> th.Tensor:
        action = self.low + 0.5 * (scaled.clamp(-1, 1) + 1.0) * (self.high - self.low)
        action = th.minimum(th.maximum(action, self.low), self.high)
        return action.reshape(-1, *self.action_shape)


def export_onnx(model: MBDPO, path: str | Path, act_mode: str | None = None) -> Path:
    """
    Write the policy as one ONNX file.

    Inputs are the observation ("observation", or the keys of a Dict) as the environment gives it with a batch
    dimension, and for ``act_mode="score"`` "plan" [B, H, A], the output "next_plan" of the previous decision: zeros at
    an episode's first step. Outputs are "action" [B, *action_shape] and "next_plan".

    :param model: Model
    :param path: File to write
    :param act_mode: "score" or "prior"; None: the model's own, or "score" where it searches and has a score network
    :return: The file
    :raises ValueError: for "search", or "score" without a score network
    :raises ImportError: if ``onnx`` is not installed
    """
    model._follow_arguments()
    mode = act_mode or _default_mode(model)
    if mode not in ("score", "prior"):
        raise ValueError(f'A search cannot be exported: pass act_mode="score" or "prior", got {mode!r}.')
    if mode == "score" and model.policy.world_model.score is None:
        raise ValueError('This model has no score network: export act_mode="prior".')
    statistics = Normalization.of(model._vec_normalize_env) or model._normalization
    means = {} if statistics is None else statistics.observation_statistics()
    settings = {"clip_obs": 10.0, "epsilon": 1e-8} if statistics is None else statistics.settings
    policy = _exportable(model)
    exported = ExportedPolicy(policy, mode, means, settings["clip_obs"], settings["epsilon"])
    inputs = _observation_inputs(policy)
    outputs = ["action"]
    if mode == "score":
        inputs.append(_Input("plan", th.zeros(RECORDED_ROWS, *policy.plan_shape)))
        outputs.append("next_plan")
    target = Path(path)
    with whole_files(target.parent) as staging:
        _export(exported, inputs, outputs, staging / target.name)
    return target


def export_world_model(model: MBDPO, folder: str | Path, parts: Sequence[str] | None = None) -> dict[str, Path]:
    """
    Write parts of the world model, an ONNX file each: "encoder" takes observations as the environment gives them, the
    others "latent" [B, L], where they need it "action" [B, A] in [-1, 1], and in multi-task models "task" [B]. Rewards
    and values are decoded to numbers; "prior" gives the mode, "score" a clean plan of the noised "plan" and "tau".

    :param model: Model
    :param folder: Folder to write to
    :param parts: Some of :data:`PARTS`; None: all that the model has
    :return: Files by part
    :raises ValueError: for a part that there is not
    """
    policy = _exportable(model)
    has = [part for part in PARTS if getattr(policy.world_model, part) is not None]
    unknown = [part for part in parts or () if part not in has]
    if unknown:
        raise ValueError(f"This model has no {unknown}: it has {has}.")
    files = {}
    with whole_files(folder) as staging:
        for part in parts or has:
            module = ExportedPart(policy, part)
            _export(module, module.inputs(), [part], staging / f"{part}.onnx")
            files[part] = Path(folder, f"{part}.onnx")
    return files


class ExportedPart(nn.Module):
    """
    One part of the world model on inputs of its own.

    :param policy: Policy
    :param part: One of :data:`PARTS`
    """

    alpha_bars: th.Tensor

    def __init__(self, policy: MBDPOPolicy, part: str):
        super().__init__()
        self.policy, self.part = policy, part
        self.multitask = policy.task_set is not None
        # Not the schedule's own table: what is made while the graph is recorded must not be kept there
        self.register_buffer("alpha_bars", th.tensor(policy.search_config.schedule.alpha_bars))

    def inputs(self) -> list[_Input]:
        """
        :return: Inputs of the graph
        """
        if self.part == "encoder":
            return _observation_inputs(self.policy)
        model, rows = self.policy.world_model, RECORDED_ROWS
        inputs = [_Input("latent", th.zeros(rows, model.latent_dim))]
        if self.part in ("dynamics", "reward", "critics", "energy"):
            inputs.append(_Input("action", th.zeros(rows, model.action_dim)))
        if self.part == "score":
            inputs += [_Input("plan", th.zeros(rows, *self.policy.plan_shape)), _Input("tau", th.ones(rows).long())]
        return inputs + ([_Input("task", th.zeros(rows).long())] if self.multitask else [])

    def forward(self, *inputs: th.Tensor) -> th.Tensor:
        """
        :param inputs: In the order of :meth:`inputs`
        :return: The part's output
        """
        model, part = self.policy.world_model, self.part
        if part == "encoder":
            space = self.policy.observation_space
            obs: Any = dict(zip(space.spaces, inputs, strict=True)) if isinstance(space, spaces.Dict) else inputs[0]
            return model.encode(self.policy.preprocess(obs), self.policy.tasks_of(obs))
        task = inputs[-1] if self.multitask else None
        z = inputs[0]
        if part == "dynamics":
            return model.next(z, inputs[1], task)
        if part == "reward":
            return model.predict_reward(z, inputs[1], task)
        if part == "critics":
            return model.value(z, inputs[1], task)
        if part == "energy":
            return model.scale_energy(model.require_energy()(model.join(z, inputs[1], task)))
        if part == "prior":
            return model.prior_action(z, None, task)
        if part == "termination":
            assert model.termination is not None
            return model.termination(model.join(z, None, task)).sigmoid()
        assert model.score is not None
        alpha_bar = self.alpha_bars[inputs[2]][:, None, None]
        plan = model.score.clean_plan(model.join(z, None, task), inputs[1], inputs[2], alpha_bar)
        mask = model.mask(task)
        return plan if mask is None else plan * mask[:, None]


def _default_mode(model: MBDPO) -> str:
    mode = model.policy.act_mode
    if mode != "search":
        return mode
    return "score" if model.policy.world_model.score is not None else "prior"


def _exportable(model: MBDPO) -> MBDPOPolicy:
    """A copy of the policy in main memory, in evaluation mode."""
    policy = type(model.policy)(**model.policy._get_constructor_parameters())
    policy.load_state_dict(model.policy.state_dict())
    policy.to("cpu").set_training_mode(False)
    return policy


def _observation_inputs(policy: MBDPOPolicy) -> list[_Input]:
    space = policy.observation_space
    leaves = space.spaces if isinstance(space, spaces.Dict) else {INPUT: space}
    return [_Input(key, _example(leaf, key)) for key, leaf in leaves.items()]


def _example(space: spaces.Space, key: str) -> th.Tensor:
    """Zeros of a space's shape, in the type in which its observations are given: floats of 32 bits, bytes, or int64."""
    if key == TASK_KEY or isinstance(space, (spaces.Discrete, spaces.MultiDiscrete)):
        return th.zeros(RECORDED_ROWS, *(space.shape or ()), dtype=th.long)
    dtype = th.uint8 if space.dtype == np.uint8 else th.float32
    return th.zeros(RECORDED_ROWS, *(space.shape or ()), dtype=dtype)


def _export(module: nn.Module, inputs: list[_Input], outputs: list[str], path: Path) -> None:
    try:
        import onnxscript  # noqa: F401  (what PyTorch writes the file with)
    except ImportError as error:
        raise ImportError('exporting needs onnx: run `pip install "sb3-mbdpo[onnx]"`') from error
    batch = th.export.Dim("batch")
    with _quietly(), th.no_grad():
        program = th.onnx.export(
            module.eval(),
            tuple(entry.example for entry in inputs),
            input_names=[entry.name for entry in inputs],
            output_names=outputs,
            dynamic_shapes={"inputs": tuple({0: batch} for _ in inputs)},
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
        assert program is not None
        program.save(str(path))


@contextmanager
def _quietly() -> Iterator[None]:
    """Without what the exporter says of packages that are not needed and of its own inner life."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
