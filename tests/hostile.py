"""Malformed and malicious repositories: each a valid checkpoint with one thing wrong."""

import io
import json
import os
import pickle
import struct
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from safetensors.torch import load, save

from tests.checkpoint_fakes import trained

MARKER = "code-was-run"
Files = dict[str, bytes]

# What the message of each says
CASES = {
    "no-config": "it has no config.json",
    "only-a-pickle": "model.pkl, which can run code when loaded and was not opened",
    "only-an-sb3-zip": "agent.zip, which can run code when loaded and was not opened",
    "config-no-json": "config.json is no JSON",
    "config-a-list": 'its "format" is not "sb3_mbdpo"',
    "config-of-another-library": 'its "format" is not "sb3_mbdpo"',
    "config-deeply-nested": "config.json is no JSON",
    "config-no-text": "config.json is no text",
    "config-huge": "at most 16,000,000 are read",
    "later-version": "of format version 99",
    "no-version": "of format version None",
    "missing-field": "missing ['action_space']",
    "unknown-field": "unknown ['hook']",
    "field-of-another-kind": "wrong kind in ['tasks']",
    "unknown-argument": "no arguments ['on_load']",
    "argument-of-another-type": "batch_size must be",
    "dotted-path-in-policy": "The policy is 'os.system'",
    "dotted-path-in-policy-kwargs": "nothing is imported by a name in a file",
    "class-off-the-list": "names the class 'Embedding'",
    "unknown-mark": "means nothing in a checkpoint",
    "unknown-policy": "policy must be one of",
    "absurd-buffer": "buffer_size=1000000000000000",
    "absurd-latent": "latent_dim']=1000000000000",
    "absurd-layers": "num_enc_layers']=1000000",
    "absurd-net-arch": "lists 100000 entries",
    "absurd-observations": "A Box space of shape=[1000000, 1000000]",
    "absurd-actions": "A Discrete space of n=1000000000000",
    "absurd-dtype": "dtype of a Box must be one of",
    "absurd-task-width": "A task of width 1000000000000",
    "absurd-task-table": "240 tasks of width 1,000,000 are absurd",
    "absurd-dict": "A Dict space of 60,000,000 entries is absurd",
    "absurd-search": "A search of",
    "huge-model-for-small-weights": "does not hold the model that config.json describes",
    "no-weights": "no model.safetensors",
    "weights-missing": "Missing: world_model.reward.0.linear.weight",
    "weights-extra": "too many: world_model.backdoor",
    "weights-mis-shaped": "world_model.prior_scale is F32[7] instead of F32[1]",
    "weights-of-another-type": "world_model.prior_scale is F64[1] instead of F32[1]",
    "weights-not-finite": "not finite in world_model.prior_scale",
    "weights-cut-short": "model.safetensors is damaged or cut short",
    "weights-a-pickle": "model.safetensors is damaged or cut short",
    "weights-header-lies": "model.safetensors is damaged or cut short",
    "weights-header-huge": "model.safetensors is damaged or cut short",
    "weights-of-another-save": "do not belong together",
    "optimizer-of-other-shapes": "optimizer.safetensors does not hold the state",
    "optimizer-huge": "are plenty: not read",
    "optimizer-strange-generator": "optimizer.safetensors cannot be read",
    "optimizer-generator-cut-short": "optimizer.safetensors cannot be read",
    "optimizer-strange-seed": "the seed is 'x'",
    "optimizer-incomplete": "instead of ['exp_avg', 'exp_avg_sq', 'step']",
    "normalization-of-other-observations": "statistics of other observations",
    "normalization-strange": "settings that are not those of VecNormalize",
    "negative-counters": "must be whole numbers",
    "discrete-actions": "Actions must be a Box",
}


class Trap:
    """Unpickling it would leave a file behind."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def hostile_files(target: Path) -> dict[str, Files]:
    """Files of each repository by the name of its case; code in them would make ``target``."""
    with tempfile.TemporaryDirectory() as folder:
        model = trained("normalized", steps=10)
        model.save_pretrained(folder, include_optimizer=True)
        good = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    trap = pickle.dumps(Trap(target))
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("data", json.dumps({"policy_class": {":type:": "x", ":serialized:": "gASV"}}))
        file.writestr("policy.pth", trap)
    others = {"model.pkl": trap, "agent.zip": archive.getvalue(), "policy.pth": trap}
    builder = _Builder(good)
    cases: dict[str, Files] = {
        "no-config": {"README.md": b"hello"},
        "only-a-pickle": {"model.pkl": trap},
        "only-an-sb3-zip": {"agent.zip": archive.getvalue()},
        "config-no-json": good | {"config.json": b"{'format': __import__('os').mkdir('x')}"},
        "config-a-list": good | {"config.json": b"[]"},
        "config-of-another-library": good | {"config.json": b'{"model_type": "bert"}'},
        "config-deeply-nested": good | {"config.json": b"[" * 100_000},
        "config-no-text": good | {"config.json": b"\xff\xfe\x00\xd8"},
        "config-huge": good | {"config.json": b" " * 16_000_001},
    }
    cases |= builder.configs() | builder.weights(trap) | builder.others()
    assert cases.keys() == CASES.keys(), cases.keys() ^ CASES.keys()
    # Traps lie beside everything, and are to be left alone
    return {name: (files if name.startswith(("no-c", "only")) else others | files) for name, files in cases.items()}


class _Builder:
    """Variants of a valid checkpoint."""

    def __init__(self, good: Files):
        self.good, self.config = good, json.loads(good["config.json"])

    def with_config(self, change: Callable[[dict[str, Any]], Any]) -> Files:
        config = json.loads(self.good["config.json"])
        change(config)
        return self.good | {"config.json": json.dumps(config).encode()}

    def with_argument(self, name: str, value: Any) -> Files:
        return self.with_config(lambda config: config["arguments"].update({name: value}))

    def configs(self) -> dict[str, Files]:
        box = {"type": "Box", "dtype": "float32", "low": -1.0, "high": 1.0}
        task = {"name": "a", "observation_dim": 10**12, "action_dim": 1}
        many = [{"name": str(index), "observation_dim": 10**6, "action_dim": 1} for index in range(240)]
        boxes = {key: box | {"shape": [10**7]} for key in "abcdef"}
        change, argument = self.with_config, self.with_argument
        return {
            "later-version": change(lambda config: config.update(format_version=99)),
            "no-version": change(lambda config: config.pop("format_version")),
            "missing-field": change(lambda config: config.pop("action_space")),
            "unknown-field": change(lambda config: config.update(hook="os.system")),
            "field-of-another-kind": change(lambda config: config.update(tasks=[])),
            "unknown-argument": argument("on_load", "print"),
            "argument-of-another-type": argument("batch_size", "many"),
            "dotted-path-in-policy": change(lambda config: config.update(policy={"$custom": "os.system"})),
            "dotted-path-in-policy-kwargs": argument("policy_kwargs", {"activation_fn": {"$custom": "os.system"}}),
            "class-off-the-list": argument("policy_kwargs", {"activation_fn": {"$class": "Embedding"}}),
            "unknown-mark": argument("policy_kwargs", {"activation_fn": {"$call": "os.system"}}),
            "unknown-policy": change(lambda config: config.update(policy="sb3_mbdpo.MlpPolicy")),
            "absurd-buffer": argument("buffer_size", 10**15),
            "absurd-latent": argument("policy_kwargs", {"latent_dim": 10**12}),
            "absurd-layers": argument("policy_kwargs", {"num_enc_layers": 10**6}),
            "absurd-net-arch": argument("policy_kwargs", {"net_arch": [8] * 100_000}),
            "absurd-observations": change(lambda c: c.update(observation_space=box | {"shape": [10**6, 10**6]})),
            "absurd-actions": change(lambda c: c.update(action_space={"type": "Discrete", "n": 10**12, "start": 0})),
            "absurd-dtype": change(lambda c: c.update(observation_space=box | {"shape": [3], "dtype": "V999999999"})),
            "absurd-task-width": change(lambda config: config.update(tasks={"tasks": [task]})),
            "absurd-task-table": change(lambda config: config.update(tasks={"tasks": many})),
            "absurd-dict": change(lambda c: c.update(observation_space={"type": "Dict", "spaces": boxes})),
            "absurd-search": change(lambda c: c["arguments"].update(n_samples=10**6, denoising_steps=10**4)),
            "huge-model-for-small-weights": argument("model_size", 317),
            "negative-counters": change(lambda config: config["state"].update(num_timesteps=-1)),
            "discrete-actions": change(lambda c: c.update(action_space={"type": "Discrete", "n": 3, "start": 0})),
        }

    def rewritten(self, name: str, change: Callable[[dict[str, th.Tensor]], Any], **metadata: str) -> Files:
        """A file of tensors with another content and a valid header."""
        tensors = load(self.good[name])
        change(tensors)
        known = json.loads(self.good[name][8 : 8 + struct.unpack("<Q", self.good[name][:8])[0]])["__metadata__"]
        return self.good | {name: save(tensors, known | metadata)}

    def weights(self, trap: bytes) -> dict[str, Files]:
        name, data = "model.safetensors", self.good["model.safetensors"]
        lie = json.dumps({"a": {"dtype": "F32", "shape": [10**11], "data_offsets": [0, 4 * 10**11]}}).encode()
        scale = "world_model.prior_scale"
        return {
            "no-weights": {key: value for key, value in self.good.items() if key != name},
            "weights-missing": self.rewritten(name, lambda t: t.pop("world_model.reward.0.linear.weight")),
            "weights-extra": self.rewritten(name, lambda t: t.update({"world_model.backdoor": th.zeros(3)})),
            "weights-mis-shaped": self.rewritten(name, lambda t: t.update({scale: th.ones(7)})),
            "weights-of-another-type": self.rewritten(name, lambda t: t.update({scale: th.ones(1).double()})),
            "weights-not-finite": self.rewritten(name, lambda t: t.update({scale: th.full((1,), th.inf)})),
            "weights-cut-short": self.good | {name: data[: len(data) // 2]},
            "weights-a-pickle": self.good | {name: trap},
            "weights-header-lies": self.good | {name: struct.pack("<Q", len(lie)) + lie + b"\0" * 64},
            "weights-header-huge": self.good | {name: struct.pack("<Q", 2**62) + data[8:]},
            "weights-of-another-save": self.rewritten(name, lambda _: None, fingerprint="0" * 32),
        }

    def others(self) -> dict[str, Files]:
        optimizer, normalization = "optimizer.safetensors", "normalization.safetensors"
        tensors = load(self.good[optimizer])
        moment = next(key for key, value in tensors.items() if key.endswith("exp_avg") and value.numel() > 100)
        size = len(self.good[optimizer])
        header = json.loads(self.good[optimizer][8 : 8 + struct.unpack("<Q", self.good[optimizer][:8])[0]])
        state = json.loads(header["__metadata__"]["state"])
        state["action_space"] = {"bit_generator": "PCG64", "state": "os.system"}
        seeded = json.loads(header["__metadata__"]["state"]) | {"seed": "x"}
        wide = np.zeros(40_000_000, np.uint8)
        assert size < len(wide)
        return {
            "optimizer-of-other-shapes": self.rewritten(optimizer, lambda t: t.update({moment: th.zeros(5, 5)})),
            "optimizer-huge": self.rewritten(optimizer, lambda t: t.update({"x": th.from_numpy(wide)})),
            "optimizer-strange-generator": self.rewritten(optimizer, lambda _: None, state=json.dumps(state)),
            "optimizer-generator-cut-short": self.rewritten(
                optimizer, lambda t: t.update({"policy_generator": th.zeros(16, dtype=th.uint8)})
            ),
            "optimizer-strange-seed": self.rewritten(optimizer, lambda _: None, state=json.dumps(seeded)),
            "optimizer-incomplete": self.rewritten(optimizer, lambda t: t.pop(moment)),
            "normalization-of-other-observations": self.rewritten(
                normalization, lambda t: t.update({"observation.mean": th.zeros(9).double()})
            ),
            "normalization-strange": self.rewritten(normalization, lambda _: None, settings='{"norm_obs": "yes"}'),
        }
