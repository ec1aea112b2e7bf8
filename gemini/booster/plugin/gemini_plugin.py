"""`GeminiPlugin`: ColossalAI's keywords, translated into a `GeminiConfig`."""

import logging
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from gemini.arguments.checked import checked
from gemini.boosted import boosted
from gemini.booster.arguments import PLUGIN
from gemini.boosting.boost import boost_model
from gemini.chunk import Communicator
from gemini.colossal.boosted import give_names
from gemini.config import KEEP, PRECISIONS, GeminiConfig
from gemini.lease.budget import Budget
from gemini.nn.optimizer.acceptance import accepted, unchanged_on_failure
from gemini.nn.optimizer.joint import whole_of
from gemini.planning.placement import AutoPlacementPolicy, PlacementPolicy, StaticPlacementPolicy
from gemini.quantization import Quantization
from gemini.ranks import group_of, join
from gemini.signals import uninterrupted
from gemini.step.managed_step import ChunkedStep

from .dp_plugin_base import DPPluginBase

logger = logging.getLogger(__name__)

_MEBI = 1 << 20


class GeminiPlugin(DPPluginBase):
    """Trains a model in chunks on device, host and disk. ``GeminiPlugin()`` finds everything out by itself.

    Parameters
    ----------
    chunk_config_dict
        ``{world size: {"chunk_size": elements}}``: skips the search.
    placement_policy
        ``"auto"`` fills device, host and disk in this order; ``"static"`` keeps fixed fractions on the device.
    enable_gradient_accumulation
        Accepted: gradients always add up until ``zero_grad``.
    max_prefetch
        How many chunks may be on their way ahead of use.
    shard_param_frac
        Accepted: masters and states are sharded always; full copies stay while there is room for them, as with 0, and
        are gathered anew where there is not, as with 1.
    offload_optim_frac, offload_param_frac
        With ``"static"``: share of the bytes of homes (of full copies) kept off the device, exact to one chunk.
    warmup_non_model_data_ratio, steady_cuda_cap_ratio
        Where ``device_memory`` is not given: the share of the device's free memory that a run may use, and the share of
        that kept for activations.
    precision
        ``"bf16"``, ``"fp16"`` (with a dynamic loss scale) or ``"fp32"``: dtype of parameters in use and of gradients.
        Masters and moments are fp32 always. ``"keep"``: each parameter in the dtype that the model gives it, and inputs
        as they are, as plain PyTorch computes (without a loss scale): a frozen base in bf16 with adapters in fp32, as
        peft makes them, say.
    pin_memory
        Page-lock homes in RAM (CUDA).
    search_range_m, hidden_dim, min_chunk_size_m
        Chunk sizes to try: from ``min_chunk_size_m`` over ``search_range_m`` (in 2**20 elements) in steps of
        ``hidden_dim`` elements. By default the range follows the model and the room there is.
    initial_scale, min_scale, growth_factor, backoff_factor, growth_interval, hysteresis, max_scale
        The loss scale of fp16.
    max_norm, norm_type
        Clip the gradients' 2-norm in every step; 0 for never.
    verbose
        Log what was decided.
    force_outputs_fp32
        Convert the model's floating-point outputs to fp32.
    device_memory, host_memory, disk_memory
        Bytes of model data per tier, as a number or ``"24GiB"``; None finds out.
    budget
        A `gemini.Budget` that several boosted models share; where it says nothing and the arguments above say nothing,
        models take what the machine has, and leave room for each other and for other runs on it.
    offload_dir
        Folder of the disk tier; None: no disk tier.
    snapshot_memory
        Bytes of ``host_memory`` for copies of what changes in an asynchronous save; None: half of what is free.
    disk_checksums
        Compare what is read from disk with a CRC-32 of what was written: other bytes are an error. Costs some CPU time.
    update_in_backward
        The optimizer updates each chunk as soon as backward needs it no more, so that the gradients are never all in
        memory at once; `optimizer.step()` does the rest. Same numbers; it buys room, not time. Without clipping,
        loss scale and accumulation only, and a backward that fails when some chunks have been updated leaves them so:
        then the model refuses to go on until a checkpoint is loaded.
    split_master
        Keep fp32 masters as the bf16 copy that units use and the 16 bits that it has no room for, where both are in the
        memory that computes: 2 bytes a parameter less, no copies to make, a faster step. Same numbers. For `HybridAdam`
        with fp32 states in bf16; then parameters must not be changed in place between steps (an error says so, but not
        of changes through ``p.data``, which must be assigned to).
    quantize
        Keep frozen linear layers in fewer bits: ``"nf4"`` (0.5625 bytes a parameter), ``"int8"`` (1.0625), or a
        `gemini.Quantization`, which also says which layers. `Booster.enable_lora` takes the same argument.
    activation_policy
        What becomes of the tensors that the model saves for its backward: ``"keep"``; ``"offload"``: they leave for RAM
        (from a device of its own) or for ``offload_dir`` while forward runs, and come back ahead of backward;
        ``"recompute"``: each block's forward runs again in backward; ``"auto"``: block by block what memory demands, in
        the least time, and nothing where everything fits. None: they are kept until memory runs out and homes cannot
        make way any more, from then on it is ``"auto"``. Same numbers; longer sequences and larger batches.
    process_group
        The ranks that train the model together: a group, or a ``DeviceMesh`` of one dimension, or of two (replicate,
        shard); None for all of them. All build the same model, call `Booster.boost`, and take the same steps.
    hybrid_shard_size
        How many ranks, one after the other, share one model, each with a part of every chunk: those of one machine,
        say. Others keep it once more, and only gradients travel between them. None: all share one. 1: each keeps all.
    gradient_reduction
        ``"sum"`` (default): several ranks give the bits of one process that accumulates all their batches. ``"mean"``
        divides by the number of ranks, as DDP, FSDP and ColossalAI do.
    sync_module_states
        Start with the values of rank 0 on all ranks. Without it they must be alike, which is checked.
    telemetry
        True writes a run for ``gemini-stat``, a path says where, False writes nothing.

    Raises
    ------
    ValueError, TypeError
        For arguments that make no sense.
    NotImplementedError
        For ColossalAI's arguments that mean something this package does not do; the message names the alternative.
    """

    @checked(PLUGIN)
    def __init__(
        self,
        chunk_config_dict: Mapping[int, Mapping[str, Any]] | None = None,
        chunk_init_device: torch.device | None = None,
        placement_policy: str = "auto",
        enable_gradient_accumulation: bool = False,
        max_prefetch: int = 2,
        shard_param_frac: float = 1.0,
        offload_optim_frac: float = 0.0,
        offload_param_frac: float = 0.0,
        warmup_non_model_data_ratio: float = 0.5,
        steady_cuda_cap_ratio: float = 0.9,
        precision: str = "bf16",
        master_weights: bool = True,
        pin_memory: bool = True,
        force_outputs_fp32: bool = False,
        strict_ddp_mode: bool = False,
        search_range_m: int = 32,
        hidden_dim: int | None = None,
        min_chunk_size_m: float | None = None,
        memstats: Any = None,
        gpu_margin_mem_ratio: float = 0.0,
        initial_scale: float = 2**16,
        min_scale: float = 1,
        growth_factor: float = 2,
        backoff_factor: float = 0.5,
        growth_interval: int = 1000,
        hysteresis: int = 2,
        max_scale: float = 2**32,
        max_norm: float = 0.0,
        norm_type: float = 2.0,
        tp_size: int = 1,
        extra_dp_size: int = 1,
        enable_all_optimization: bool = False,
        enable_fused_normalization: bool = False,
        enable_flash_attention: bool = False,
        enable_sequence_parallelism: bool = False,
        enable_jit_fused: bool = False,
        enable_async_reduce: bool = True,
        use_fp8: bool = False,
        fp8_communication: bool = False,
        verbose: bool = False,
        *,
        device_memory: int | str | None = None,
        host_memory: int | str | None = None,
        disk_memory: int | str | None = None,
        budget: Budget | None = None,
        offload_dir: str | Path | None = None,
        disk_checksums: bool = False,
        snapshot_memory: int | str | None = None,
        update_in_backward: bool = False,
        split_master: bool = False,
        quantize: str | Quantization | None = None,
        activation_policy: str | None = None,
        telemetry: bool | str | Path = True,
        process_group: dist.ProcessGroup | DeviceMesh | None = None,
        hybrid_shard_size: int | None = None,
        gradient_reduction: str = "sum",
        sync_module_states: bool = False,
    ) -> None:
        _refuse_foreign(
            tp_size=(tp_size != 1, "split the model with torch.distributed.tensor before boosting it"),
            extra_dp_size=(extra_dp_size != 1, "there is one data-parallel dimension"),
            use_fp8=(use_fp8, "use precision='bf16'"),
            fp8_communication=(fp8_communication, "use precision='bf16'"),
            master_weights=(not master_weights, "masters are fp32 always: small updates would be rounded away"),
            norm_type=(norm_type != 2.0, "use optimizer.clip_grad_by_norm(max_norm, norm_type) before the step"),
        )
        _warn_without_effect(
            enable_all_optimization=enable_all_optimization,
            enable_fused_normalization=enable_fused_normalization,
            enable_flash_attention=enable_flash_attention,
            enable_sequence_parallelism=enable_sequence_parallelism,
            enable_jit_fused=enable_jit_fused,
        )
        self.process_group, of_mesh = group_of(process_group)
        self.hybrid_shard_size = hybrid_shard_size if hybrid_shard_size is not None else of_mesh
        self.gradient_reduction = gradient_reduction
        if update_in_backward and enable_gradient_accumulation:
            raise ValueError(
                "update_in_backward=True cannot go with enable_gradient_accumulation=True: gradients are used up "
                "within each backward; choose one of them"
            )
        if not min_scale <= initial_scale <= max_scale:
            raise ValueError(
                f"initial_scale must be from min_scale to max_scale, got {initial_scale} and {min_scale}, {max_scale}"
            )
        meant: dict[str, Any] = {  # the rules have made bytes, elements and paths of what the user wrote
            "device_memory": device_memory,
            "host_memory": host_memory,
            "disk_memory": disk_memory,
            "snapshot_memory": snapshot_memory,
            "chunk_numel": chunk_config_dict,
            "offload_dir": offload_dir,
            "telemetry": telemetry,
        }
        self.config = GeminiConfig(
            precision=precision,
            policy=_policy(placement_policy, offload_optim_frac, offload_param_frac),
            budget=budget,
            disk_checksums=disk_checksums,
            search_range=_search_range(min_chunk_size_m, search_range_m),
            search_step=hidden_dim,
            max_prefetch=max_prefetch,
            pin_memory=pin_memory,
            max_norm=max_norm,
            update_in_backward=update_in_backward,
            split_master=split_master,
            quantization=Quantization.of(quantize),
            activation_policy=activation_policy,
            force_outputs_fp32=force_outputs_fp32,
            steady_device_ratio=steady_cuda_cap_ratio,
            warmup_non_model_ratio=warmup_non_model_data_ratio,
            scaler={
                "scale": initial_scale,
                "min_scale": min_scale,
                "max_scale": max_scale,
                "growth_factor": growth_factor,
                "backoff_factor": backoff_factor,
                "growth_interval": growth_interval,
                "hysteresis": hysteresis,
            },
            sync_module_states=sync_module_states,
            verbose=verbose,
            **meant,
        )

    def supported_precisions(self) -> list[str]:
        return [*PRECISIONS, KEEP]

    def support_no_sync(self) -> bool:
        return not self.config.update_in_backward

    @uninterrupted
    def configure(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer] | None,
        criterion: Any,
        dataloader: Any,
        lr_scheduler: Any,
    ) -> tuple[Any, Any, Any, Any, Any]:
        """What `Booster.boost` calls, with each object in its place."""
        with unchanged_on_failure(optimizer):
            managed = accepted(optimizer) if optimizer is not None else None
            config = replace(self.config, communicator=self.join_ranks())
            result = boost_model(model, managed, config)
        give_names(result)
        # A scheduler made for a torch optimizer goes on as it is: both optimizers have the same group objects.
        if self.config.verbose:
            logger.info("boosted\n%s", result.memory_summary())
        return result, managed, criterion, dataloader, lr_scheduler

    def join_ranks(self) -> Communicator:
        """The communicator of one boosted model: all ranks of the process group call this at once."""
        return join(self.process_group, self.hybrid_shard_size, self.gradient_reduction)

    def backward(self, loss: Tensor, optimizer: Optimizer | Sequence[Optimizer]) -> None:
        """See `Booster.backward`."""
        _step_of(optimizer).backward(loss)

    def no_sync(
        self, model: nn.Module | None = None, optimizer: Optimizer | None = None
    ) -> AbstractContextManager[None]:
        """See `Booster.no_sync`."""
        if self.config.update_in_backward:
            raise ValueError(
                "no_sync is for accumulating gradients, and update_in_backward=True uses them up within each backward; "
                "boost without it"
            )
        if not dist.is_initialized() or dist.get_world_size(self.process_group) == 1:
            return nullcontext()
        if model is not None:
            return boosted(model).manager.together.communicator.no_sync()
        if optimizer is not None:
            return _step_of(optimizer).manager.together.communicator.no_sync()
        raise TypeError("with several ranks no_sync needs the model or the optimizer: booster.no_sync(model)")


def _step_of(optimizer: Optimizer | Sequence[Optimizer]) -> ChunkedStep:
    whole = whole_of(optimizer)
    step = getattr(optimizer if whole is None else whole, "_managed", None)
    if not isinstance(step, ChunkedStep):
        raise TypeError(f"expected the optimizer that boost returned, got {type(optimizer).__name__}")
    return step


def _refuse_foreign(**asked: tuple[bool, str]) -> None:
    for name, (is_asked, alternative) in asked.items():
        if is_asked:
            raise NotImplementedError(f"{name} is not supported; {alternative}")


_INSTEAD = {
    "enable_all_optimization": "torch.compile and attn_implementation='sdpa'",
    "enable_fused_normalization": "torch.compile on the blocks",
    "enable_flash_attention": "attn_implementation='sdpa' when the model is built",
    "enable_sequence_parallelism": "shorter sequences or activation checkpointing",
    "enable_jit_fused": "torch.compile on the blocks",
}


def _warn_without_effect(**asked: bool) -> None:
    """ColossalAI's scripts pass these always, and without tensor parallelism it does not look at them either."""
    for name, is_asked in asked.items():
        if is_asked:
            warnings.warn(
                f"{name} has no effect, as in ColossalAI without tensor parallelism; use {_INSTEAD[name]}", stacklevel=4
            )


def _search_range(min_chunk_size_m: float | None, search_range_m: int) -> tuple[int, int] | None:
    """Chunk sizes to try, in elements."""
    if min_chunk_size_m is None:
        return None
    low = int(min_chunk_size_m * _MEBI)
    return low, low + search_range_m * _MEBI


def _policy(name: str, offload_optim_frac: float, offload_param_frac: float) -> PlacementPolicy:
    if name == "auto":
        return AutoPlacementPolicy()
    if name == "static":
        return StaticPlacementPolicy(offload_optim_frac=offload_optim_frac, offload_param_frac=offload_param_frac)
    share = 1.0 if name == "cpu" else 0.0
    warnings.warn(
        f"placement_policy={name!r} is ColossalAI's old name; write placement_policy='static', "
        f"offload_optim_frac={share}, offload_param_frac={share}",
        DeprecationWarning,
        stacklevel=4,
    )
    return StaticPlacementPolicy(offload_optim_frac=share, offload_param_frac=share)
