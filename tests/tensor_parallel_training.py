"""The bar of the tests of tensor parallelism: boosted, a model of DTensors trains as it does without us.

Ranks are a mesh of (dp, tp). Those of one row share the parameters as DTensors, those of one column the chunks. The
reference is the same model on one row alone, with the micro-batches of all rows in their order, in plain torch.
"""

from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from rank_training import Training, Where, assert_same, flat
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import LlamaConfig, LlamaForCausalLM
from world import World

import gemini
from gemini.boosted import boosted
from gemini.booster.plugin import GeminiPlugin
from gemini.nn.optimizer import HybridAdam

PLAN = {
    "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
    **{f"model.layers.*.self_attn.{name}_proj": ColwiseParallel() for name in "qkv"},
    "model.layers.*.self_attn.o_proj": RowwiseParallel(),
    "model.layers.*.mlp.gate_proj": ColwiseParallel(),
    "model.layers.*.mlp.up_proj": ColwiseParallel(),
    "model.layers.*.mlp.down_proj": RowwiseParallel(),
    "lm_head": ColwiseParallel(output_layouts=Replicate()),
}
"""Norms stay plain parameters, the same on all ranks."""
CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=32,
    tie_word_embeddings=False,
)


@cache
def mesh_of(dp: int) -> DeviceMesh:
    """All ranks, in ``dp`` rows."""
    return init_device_mesh("cpu", (dp, dist.get_world_size() // dp), mesh_dim_names=("dp", "tp"))


class TensorParallel(Training):
    """A tiny Llama whose matrices are cut over the ranks of a row."""

    dp = 2
    steps = 4

    def __init__(self, where: Where, **plugin: Any) -> None:
        self.mesh = mesh_of(self.dp)
        super().__init__(where, **plugin)

    def build(self) -> nn.Module:
        return parallelize_module(LlamaForCausalLM(CONFIG), self.mesh["tp"], PLAN)  # type: ignore[no-any-return]

    def make_plugin(self, **plugin: Any) -> GeminiPlugin:
        return super().make_plugin(process_group=self.mesh["dp"], **plugin)

    def make_optimizer(self, model: nn.Module) -> Any:
        self.leaves = dict(model.named_parameters())
        if self.is_managed:
            return super().make_optimizer(model)
        self.parts = {name: nn.Parameter(local(p.detach())) for name, p in self.leaves.items()}  # the same memory
        return HybridAdam(self.parts.values(), lr=1e-2, weight_decay=0.1)

    def own(self, step: int) -> range:
        first, every = (self.mesh["dp"].get_local_rank(), self.dp) if self.is_managed else (0, 1)
        return range(step * self.micro_batches + first, (step + 1) * self.micro_batches, every)

    def batch(self, number: int) -> Any:
        return torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(number))

    def loss(self, number: int) -> Tensor:
        batch = self.batch(number)
        return self.model(input_ids=batch, labels=batch).loss  # type: ignore[no-any-return]

    def update(self) -> None:
        if not self.is_managed:
            if self.max_norm:
                self.clip()
            for name, leaf in self.leaves.items():
                self.parts[name].grad = local(self.gradient(leaf))
                leaf.grad = None
        self.optimizer.step()
        self.optimizer.zero_grad()

    def gradient(self, leaf: Any) -> Any:
        """As the optimizer takes it: placed as the parameter is."""
        is_whole = not isinstance(leaf, DTensor) or leaf.grad.placements == leaf.placements
        return leaf.grad if is_whole else leaf.grad.redistribute(placements=leaf.placements)

    def clip(self) -> None:
        """As ``torch.nn.utils.clip_grad_norm_``, which takes no mix of DTensors and others."""
        leaves = list(self.leaves.values())
        for leaf in leaves:
            leaf.grad = self.gradient(leaf)
        norm = torch.linalg.vector_norm(torch.stack([whole(torch.linalg.vector_norm(p.grad)) for p in leaves]))
        for leaf in leaves:
            local(leaf.grad).mul_((self.max_norm / (norm + 1e-6)).clamp(max=1.0))
        self.ended.seen.append(norm.item())

    def end_step(self, step: int) -> None:
        if self.is_managed and self.max_norm:
            self.ended.seen.append(boosted(self.model).step.gradient_norm())

    def end(self) -> Any:
        if self.is_managed:
            ended = super().end()
            ended.weights = dict(gemini.named_tensors(self.model))
            return ended
        states = self.optimizer.state_dict()["state"]
        self.ended.states = {name: states[i] for i, name in enumerate(self.parts)}
        self.ended.weights = {name: whole(p.detach()).clone() for name, p in self.leaves.items()}
        self.ended.buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        return self.ended


def local(tensor: Any) -> Any:
    """What of a tensor is here, in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Any) -> Any:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def compare(kind: type[TensorParallel], options: dict[str, Any]) -> dict[int, float]:
    """Train with us, and without on each row. Returns the losses, by the number of the micro-batch."""
    expected = kind(Where.PLAIN, max_norm=options.get("max_norm", 0.0)).train()
    ours = kind(Where.RANKS, **options).train()
    assert ours.seen == expected.seen
    assert ours.losses == {number: expected.losses[number] for number in ours.losses}
    assert_same(ours.weights, expected.weights)
    assert_same(flat(ours.states), flat(expected.states))
    assert_same(ours.buffers, expected.buffers)
    return ours.losses


def check_tensor_parallel(world: World, kind: type[TensorParallel], **options: Any) -> None:
    """Ranks that share DTensors, and chunks, end as plain torch does; all micro-batches have been trained on."""
    losses = {number for ended in world.run(compare, kind, options) for number in ended}
    assert losses == set(range(kind.steps * kind.micro_batches))
