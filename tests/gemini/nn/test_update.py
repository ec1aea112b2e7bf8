"""What adam_update accepts and refuses."""

import pytest
import torch
from adam_cases import adam_fp32, adam_reference, buffers, hyper, result

from gemini.nn.optimizer.kernels.arithmetic import scalars
from gemini.nn.optimizer.kernels.update import adam_update

SCALARS = scalars(hyper(weight_decay=0.1), 3)


def test_it_writes_the_parameter_the_moments_and_the_copy_but_not_the_gradient() -> None:
    tensors = buffers(100, seed=0)
    grad = tensors[3].clone()
    out = torch.empty(100, dtype=torch.bfloat16)
    expected = result(adam_reference, tensors, SCALARS, torch.bfloat16)
    adam_fp32(tensors[:3], tensors[3], SCALARS, out)
    assert all(torch.equal(a, b) for a, b in zip([*tensors[:3], out], expected, strict=True))
    assert torch.equal(tensors[3], grad)


def test_buffers_that_require_gradients_are_fine() -> None:
    tensors = buffers(100, seed=0)
    expected = result(adam_reference, tensors, SCALARS)
    tensors[0].requires_grad_()
    adam_update("fp32", tensors[:3], tensors[3], SCALARS)
    assert torch.equal(tensors[0].detach(), expected[0])


def test_updated_buffers_can_still_be_resized() -> None:
    # tensor.numpy() would forbid it for good, and full copies of chunks are resized between 0 and their size.
    tensors = [*buffers(100, seed=0), torch.empty(100, dtype=torch.bfloat16)]
    adam_fp32(tensors[:3], tensors[3], SCALARS, tensors[4])
    for tensor in tensors:
        tensor.untyped_storage().resize_(0)
        assert tensor.untyped_storage().nbytes() == 0


def test_empty_buffers_are_fine() -> None:
    adam_fp32([torch.empty(0)] * 3, torch.empty(0), SCALARS, torch.empty(0, dtype=torch.bfloat16))


@pytest.mark.parametrize("position", range(4))
@pytest.mark.parametrize("dtype", [torch.float64, torch.int32])
def test_a_wrong_dtype_is_named(position: int, dtype: torch.dtype) -> None:
    tensors = buffers(10, seed=0)
    tensors[position] = tensors[position].to(dtype)
    with pytest.raises(TypeError, match=("param", "exp_avg", "exp_avg_sq", "grad")[position] + " must be"):
        adam_update("fp32", tensors[:3], tensors[3], SCALARS)


def test_moments_of_float16_or_of_two_dtypes_are_refused() -> None:
    tensors = buffers(8, seed=0)
    param, exp_avg, exp_avg_sq, grad = tensors
    with pytest.raises(TypeError, match=r"exp_avg must be torch.float32, got torch.float16"):
        adam_update("fp32", (param, exp_avg.half(), exp_avg_sq.half()), grad, SCALARS)
    with pytest.raises(TypeError, match=r"exp_avg_sq must be torch.bfloat16, got torch.float32"):
        adam_update("bf16", (param, exp_avg.bfloat16(), exp_avg_sq), grad, SCALARS)


@pytest.mark.parametrize(
    "wrong", [torch.zeros(11), torch.zeros(10, 1), torch.zeros(20)[::2], torch.zeros(10, device="meta")]
)
def test_a_wrong_shape_stride_or_device_is_refused_before_anything_is_written(wrong: torch.Tensor) -> None:
    for position in (1, 2, 3, 4):
        tensors = [*buffers(10, seed=0), torch.empty(10)]
        tensors[position] = wrong
        before = tensors[0].clone()
        with pytest.raises(ValueError, match="|".join(["elements", "one-dimensional", "is on"])):
            adam_fp32(tensors[:3], tensors[3], SCALARS, tensors[4])
        assert torch.equal(tensors[0], before)
