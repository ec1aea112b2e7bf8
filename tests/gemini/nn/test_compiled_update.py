"""The Adam step in compiled code: an operator, with the bits that it has outside of it."""

import torch
from adam_cases import buffers, hyper
from torch import Tensor

from gemini.nn.optimizer.kernels.arithmetic import scalars
from gemini.nn.optimizer.kernels.update import adam_update


def test_a_compiled_step_has_the_bits_of_an_eager_one() -> None:
    s = scalars(hyper(weight_decay=0.1), 3, grad_scale=0.3)

    def twice(param: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, out: Tensor) -> Tensor:
        for _ in range(2):
            adam_update("fp32", (param, exp_avg, exp_avg_sq), grad * 0.5, s, out)
        return param * 2

    found = []
    for function in (twice, torch.compile(twice, backend="aot_eager", fullgraph=True)):
        tensors = buffers(1000, seed=0)
        out = torch.zeros(1000, dtype=torch.bfloat16)
        found.append([function(*tensors, out), *tensors, out])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
