"""Local attention for GPUs against the dense definition; without a GPU, Triton's kernels run in its interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.kernels.flex import attend_flex, needed_blocks
from vitrail.kernels.triton_local import attend_triton
from vitrail.kernels.window import window_mask

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="Triton needs a GPU, or TRITON_INTERPRET=1"
)

# Grid, window, prefix tokens, width of a head: grids and windows that tiles divide and that they do not.
CASES = (
    ((5, 7), 3, 1, 16),
    ((5, 7), 15, 5, 48),
    ((9, 13), 7, 0, 64),
    ((9, 13), 1, 1, 16),
    pytest.param((16, 16), 7, 5, 16, marks=pytest.mark.slow),
)


def dense(q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int], window: int, num_prefix: int) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=window_mask(grid, window, num_prefix).to(DEVICE))


def draw(grid: tuple[int, int], num_prefix: int, width: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return q, k, v as views of one packed projection, 2 images and 2 heads, and a gradient laid out otherwise."""
    tokens = num_prefix + grid[0] * grid[1]
    packed = torch.randn(2, tokens, 3, 2, width, device=DEVICE)
    grad = torch.randn(2, tokens, 2, width, device=DEVICE).transpose(1, 2)
    return [x.to(dtype) for x in (*packed.permute(2, 0, 3, 1, 4).unbind(0), grad)]


def run(attend, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, *shape) -> tuple[Tensor, ...]:
    """Return the result and the gradients of q, k and v."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = attend(q, k, v, *shape)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), grad)


@needs_triton
@pytest.mark.parametrize(("grid", "window", "num_prefix", "width"), CASES)
def test_triton_is_the_dense_definition(grid, window, num_prefix, width):
    inputs = draw(grid, num_prefix, width)
    expected = run(dense, *(x.double() for x in inputs), grid, window, num_prefix)
    for got, want in zip(run(attend_triton, *inputs, grid, window, num_prefix), expected, strict=True):
        torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)


@needs_triton
def test_triton_in_16_bits_errs_no_more_than_the_dense_form():
    dtype = (
        torch.float16 if INTERPRETED else torch.bfloat16
    )  # the interpreter multiplies bfloat16 as if it were integers
    inputs, shape = draw((9, 10), 1, 32, dtype), ((9, 10), 5, 1)
    expected = run(dense, *(x.double() for x in inputs), *shape)
    ours, theirs = run(attend_triton, *inputs, *shape), run(dense, *inputs, *shape)
    for got, other, want in zip(ours, theirs, expected, strict=True):
        assert got.dtype == dtype
        assert (got - want).abs().max() <= 1.5 * (other - want).abs().max()
        assert (got - want).square().mean() <= 1.5 * (other - want).square().mean()


@needs_triton
def test_triton_gives_the_same_bits_twice_whatever_the_strides():
    q, k, v, grad = draw((5, 7), 2, 16)
    first = run(attend_triton, q, k, v, grad, (5, 7), 3, 2)
    for again in (
        run(attend_triton, q, k, v, grad, (5, 7), 3, 2),
        run(attend_triton, q.contiguous(), k.mT.contiguous().mT, v, grad.mT.contiguous().mT, (5, 7), 3, 2),
    ):
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


@needs_triton
def test_triton_stays_finite_where_scores_are_far_apart():
    q, k, v, grad = draw((5, 6), 1, 16)
    # Scores of some hundreds: far above where exp overflows, and not so large that rounding one moves the weights.
    inputs, shape = (8 * q, 8 * k, v, grad), ((5, 6), 3, 1)
    assert (inputs[0] @ inputs[1].transpose(-2, -1)).max() / 4 > 200
    expected = run(dense, *(x.double() for x in inputs), *shape)
    for got, want in zip(run(attend_triton, *inputs, *shape), expected, strict=True):
        torch.testing.assert_close(got.double(), want, atol=1e-3, rtol=1e-3)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("width", [24, 80, 128])
@pytest.mark.parametrize("num_prefix", [3, 17, 70])
def test_triton_takes_any_prefix_and_width(num_prefix, width):
    inputs = draw((7, 18), num_prefix, width)
    expected = run(dense, *(x.double() for x in inputs), (7, 18), 9, num_prefix)
    for got, want in zip(run(attend_triton, *inputs, (7, 18), 9, num_prefix), expected, strict=True):
        torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the tests above run here")
@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not on this platform")
@pytest.mark.slow
@pytest.mark.parametrize("speed", ["not slow", "slow"])
def test_triton_in_its_interpreter(speed):
    # Triton reads the variable when it is imported, and PyTorch's compiler imports it for other tests of this process.
    command = [sys.executable, "-m", "pytest", __file__, "-k", "test_triton", "-m", speed]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


@pytest.mark.slow
def test_nothing_imports_triton_before_it_is_used():
    code = "import sys, vitrail.kernels.triton_local; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.skipif(INTERPRETED, reason="FlexAttention does not use Triton's interpreter")
@pytest.mark.filterwarnings("ignore:flex_attention called without")  # on CPUs it is not fused, which is fine in a test
@pytest.mark.parametrize(("grid", "window", "num_prefix", "width"), CASES)
def test_flex_is_the_dense_definition(grid, window, num_prefix, width):
    inputs = draw(grid, num_prefix, width)
    if torch.cuda.is_available():
        got = run(attend_flex, *inputs, grid, window, num_prefix)
    else:  # no backward there
        got = (attend_flex(*inputs[:3], grid, window, num_prefix),)
    expected = run(dense, *(x.double() for x in inputs), grid, window, num_prefix)
    for ours, want in zip(got, expected, strict=False):
        torch.testing.assert_close(ours.double(), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("grid", [(5, 7), (16, 16), (28, 30), (3, 200), (200, 3)])
@pytest.mark.parametrize("num_prefix", [0, 1, 130])
def test_flex_needs_the_blocks_in_which_someone_sees_someone(grid, num_prefix):
    for window in (1, 7, 31):
        mask = window_mask(grid, window, num_prefix).cpu().float()
        blocks = F.max_pool2d(mask[None], 128, ceil_mode=True)[0] > 0
        assert torch.equal(needed_blocks(grid, window, num_prefix), blocks)


PROGRAM = """
import sys, torch
from torch.testing import assert_close
sys.path.insert(0, sys.argv[1])
import test_gpu_kernels as tests
torch.manual_seed(0)
inputs, shape = tests.draw((4, 5), 1, 16), ((4, 5), 3, 1)
attend = getattr(tests, sys.argv[2])
compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
for _ in range(2):  # the first call makes the mask, the second finds it
    got, expected = (way(*inputs[:3], *shape) for way in (compiled, attend))
    assert_close(got, expected)
if attend is tests.attend_triton:
    for got, expected in zip(*(tests.run(way, *inputs, *shape) for way in (compiled, attend)), strict=True):
        assert torch.equal(got, expected) and got.stride() == expected.stride()
    q, k, v = (x.detach().requires_grad_() for x in inputs[:3])
    torch.library.opcheck(torch.ops.vitrail.local_attention_triton.default, (q, k, v, 4, 5, 3, 1))
print("agreed")
"""


@pytest.mark.slow
@pytest.mark.parametrize("form", ["attend_flex", "attend_triton"])
def test_is_part_of_a_compiled_graph(form):
    # In a process of its own: the executed shape annotations of the tests are no part of what users compile.
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, str(Path(__file__).parent), form]
    interpret = form == "attend_triton" and not torch.cuda.is_available()
    environment = {**os.environ, "TRITON_INTERPRET": str(int(interpret))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "agreed", done.stderr[-3000:]
