import pytest
import torch as th
from torch.nn import functional as F

from sb3_mbdpo.evaluator import fuses_simplicial_norm
from sb3_mbdpo.hardware import HAS_TRITON
from sb3_mbdpo.layers import SimNorm, mlp

needs_triton = pytest.mark.skipif(not (th.cuda.is_available() and HAS_TRITON), reason="needs a CUDA device, Triton")


def test_a_cpu_has_no_use_for_kernels() -> None:
    layer = mlp(6, [16], 16, SimNorm(8))[-1]
    with th.no_grad():
        assert not fuses_simplicial_norm(layer, th.zeros(2, 16))


@needs_triton
@pytest.mark.parametrize("dtype", [th.float32, th.bfloat16])
@pytest.mark.parametrize(("width", "more"), [(512, 8), (48, 0), (96, 16)])
def test_one_kernel_computes_what_the_modules_do(width: int, more: int, dtype: th.dtype) -> None:
    from sb3_mbdpo.triton_kernels import simplicial_norm

    draw = th.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> th.Tensor:
        return th.randn(*shape, generator=draw, device="cuda")

    x, tail = normal(300, width).to(dtype), normal(300, more).to(dtype)
    bias, gain, shift = (normal(width) for _ in range(3))
    found = simplicial_norm(x, bias, gain, shift, tail, 8, 1e-5)
    normed = F.layer_norm(x.float() + bias, (width,), gain, shift, 1e-5)
    expected = th.cat([SimNorm(8)(normed), tail.float()], dim=-1)
    assert found.dtype == dtype
    tolerance = 1e-5 if dtype == th.float32 else 5e-3
    th.testing.assert_close(found.float(), expected, rtol=tolerance, atol=tolerance)
