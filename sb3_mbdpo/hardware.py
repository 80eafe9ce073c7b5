"""What the machine at hand can do, and how to let it."""

import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar, cast

import torch as th
from torch.utils.checkpoint import checkpoint

Result = TypeVar("Result")
DTYPES = ("auto", "float32", "bfloat16")
# Just below the largest block from which glibc learns (32 MiB)
LARGEST_LEARNED_BLOCK = 32_000_000
# Whether kernels for CUDA devices can be compiled here
HAS_TRITON = importlib.util.find_spec("triton") is not None
# Variants of one function, of shapes and settings, that are compiled before others run as they are
STATIC_VARIANTS = 64


def has_fast_bfloat16(device: th.device) -> bool:
    """
    Whether a device multiplies bfloat16 matrices faster than float32 ones.

    :param device: Torch device
    :return: True where the present GPU knows bfloat16, and for CPUs with AVX512-BF16 or AMX; False where it cannot be
        told
    """
    if device.type == "cuda":
        return th.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or not hasattr(th.cpu, "get_capabilities"):
        return False
    able = th.cpu.get_capabilities()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def on_accelerator(x: th.Tensor) -> bool:
    """
    :param x: A tensor
    :return: Whether it lies elsewhere than on a CPU
    """
    return not x.is_cpu


def uses_kernels(x: th.Tensor) -> bool:
    """
    Whether our Triton kernels do what lies between matrix products. torch.compile needs the same C compiler that Triton
    does, so that kernels can be built wherever something is compiled for a GPU.

    :param x: What a layer reads
    :return: True while compiling for a CUDA device, without gradient
    """
    return HAS_TRITON and x.device.type == "cuda" and th.compiler.is_compiling() and not th.is_grad_enabled()


def resolve_dtype(argument: str, name: str, device: th.device) -> str:
    """
    :param argument: Name of the argument, for the error
    :param name: "float32", "bfloat16", or "auto": bfloat16 where it is fast
    :param device: Where the products are computed
    :return: "float32" or "bfloat16"
    :raises ValueError: for another name
    """
    if name not in DTYPES:
        raise ValueError(f'{argument} must be "auto", "float32" or "bfloat16", got {name!r}.')
    if name == "auto":
        name = "bfloat16" if has_fast_bfloat16(device) else "float32"
    return name


def keep_freed_memory() -> None:
    """
    Have the C library keep freed blocks of up to 32 MB for the next tensor instead of returning them to the system.

    Pages that come back from the system are cleared one by one: on a CPU that costs a wide search a good part of its
    time. glibc learns the size of blocks worth keeping from the largest that was freed so far; this frees one,
    whose pages are never touched. Elsewhere nothing happens.
    """
    th.empty(LARGEST_LEARNED_BLOCK, dtype=th.uint8)


def recomputed(wanted: bool, function: Callable[..., Result], *args: Any) -> Result:
    """
    Call a function; where wanted, what it computes on the way is not kept for the backward pass but computed again
    there, so that of its memory only the arguments' is left in between. Gradients are the same.

    :param wanted: Whether to do so
    :param function: Function of tensors that draws nothing at random
    :param args: Its arguments
    :return: What it returns
    """
    if not (wanted and th.is_grad_enabled()):
        return function(*args)
    return cast(Result, checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False))


@cache
def compiled(function: Callable[..., Any], static: bool = False) -> Callable[..., Any]:
    """
    A function compiled with torch.compile, once in a process, at its first call with each shape.

    :param function: Function of tensors
    :param static: Compile each shape for itself, up to ``STATIC_VARIANTS`` of them; otherwise further numbers of rows
        are compiled together, for any number
    :return: The compiled function
    """
    if not static:
        return th.compile(function)
    fixed = th.compile(function, dynamic=False)

    def call(*args: Any, **kwargs: Any) -> Any:
        # torch's own limit of eight shapes is lifted for these functions alone
        with th._dynamo.config.patch(recompile_limit=STATIC_VARIANTS):
            return fixed(*args, **kwargs)

    return call
