"""The Triton kernel: bit-equal to the reference on CPU."""

import itertools

import pytest
import torch
from adam_cases import (
    GRAD_DTYPES,
    OUT_DTYPES,
    Draw,
    Update,
    adam_fp32,
    adam_reference,
    buffers,
    hyper,
    random_bits,
    result,
    same_bits,
    spread,
)

from gemini.chunk import halves, joined, marked, unmarked
from gemini.nn.optimizer.hybrid_adam import HybridAdam
from gemini.nn.optimizer.kernels.arithmetic import scalars
from gemini.nn.optimizer.kernels.update import adam_update
from gemini.nn.optimizer.rules.moments import packed, slots

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

HYPERS = [hyper(), hyper(weight_decay=0.1), hyper(weight_decay=0.1, decoupled=False), hyper(beta1=0.3, beta2=0.5)]


@pytest.mark.parametrize("update", [adam_fp32, adam_reference])
@pytest.mark.parametrize("draw", [spread, random_bits])
def test_on_cuda_both_realisations_give_the_bits_of_the_cpu(update: Update, draw: Draw) -> None:
    for h, grad_dtype, out_dtype in itertools.product(HYPERS, GRAD_DTYPES, OUT_DTYPES):
        tensors = buffers(10_007, seed=0, draw=draw)
        tensors[3] = tensors[3].to(grad_dtype)
        s = scalars(h, 3, grad_scale=0.3)
        expected = result(adam_reference, tensors, s, out_dtype)
        got = result(update, [t.cuda() for t in tensors], s, out_dtype)
        assert all(same_bits(a.cpu(), b) for a, b in zip(got, expected, strict=True)), (h, grad_dtype, out_dtype)


@pytest.mark.parametrize("states", ["bf16", "8bit"])
@pytest.mark.parametrize("draw", [spread, random_bits])
def test_on_cuda_reduced_states_have_the_bits_of_the_cpu(states: str, draw: Draw) -> None:
    for h, grad_dtype in itertools.product(HYPERS, GRAD_DTYPES):
        param, exp_avg, exp_avg_sq, grad = buffers(10_007, seed=0, draw=draw)
        kept = packed(states, {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq})
        on_cpu = [param, *(kept[slot.name] for slot in slots(states)), grad.to(grad_dtype)]
        on_cuda = [tensor.cuda() for tensor in on_cpu]
        s = scalars(h, 3, grad_scale=0.3)
        adam_update(states, on_cpu[:-1], on_cpu[-1], s)
        adam_update(states, on_cuda[:-1], on_cuda[-1], s)
        for a, b in zip(on_cuda, on_cpu, strict=True):
            assert torch.equal(a.cpu(), b) if b.dtype is torch.uint8 else same_bits(a.cpu(), b), (h, grad_dtype)


@pytest.mark.parametrize("draw", [spread, random_bits])
def test_on_cuda_split_masters_have_the_bits_of_the_cpu(draw: Draw) -> None:
    for h, grad_dtype in itertools.product(HYPERS, GRAD_DTYPES):
        param, exp_avg, exp_avg_sq, grad = buffers(10_007, seed=0, draw=draw)
        high, low, mark = halves(param)
        on_cpu = [high, low, exp_avg, marked(exp_avg_sq, mark), grad.to(grad_dtype)]
        on_cuda = [tensor.cuda() for tensor in on_cpu]
        s = scalars(h, 3, grad_scale=0.3)
        adam_update("split", on_cpu[:-1], on_cpu[-1], s)
        adam_update("split", on_cuda[:-1], on_cuda[-1], s)
        ours, theirs = (
            [joined(high.cpu(), low.cpu(), v.cpu()), m.cpu(), unmarked(v.cpu()), high.cpu()]
            for high, low, m, v, _ in (on_cuda, on_cpu)
        )
        assert all(same_bits(a, b) for a, b in zip(ours, theirs, strict=True)), (h, grad_dtype)


def test_cuda_runs_the_kernels_and_not_the_references() -> None:
    from gemini.nn.optimizer.kernels import cuda_kernel
    from gemini.nn.optimizer.kernels.forms import FORMS
    from gemini.nn.optimizer.kernels.update import KERNELS

    for form in FORMS:
        assert KERNELS["cuda", form] is cuda_kernel.BY_FORM[form]


def test_training_on_cuda_gives_the_weights_of_the_cpu() -> None:
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        start = torch.randn(33, 65).to(dtype)
        params = [start.clone().requires_grad_(), start.clone().cuda().requires_grad_()]
        optimizers = [HybridAdam([p], weight_decay=0.1) for p in params]
        for _ in range(10):
            grad = torch.randn(33, 65).to(dtype)
            for param, optimizer in zip(params, optimizers, strict=True):
                param.grad = grad.to(param.device)
                optimizer.step()
        assert torch.equal(params[0].detach(), params[1].detach().cpu())
