"""What cannot be boosted, said before anything has changed: each error names the module or the parameter and the way
out."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.optim import Optimizer

from ..lazy import is_lazy
from ..lazy.session import is_recording
from ..nn.optimizer.managed import ManagedOptimizer
from ..nn.optimizer.unmanaged.fitting import overlaps_itself
from ..packing.packing import managed_parameters
from ..tensor_parallel import is_sharded
from .aliases import sharing
from .alive import is_managed
from .module import GeminiModule
from .parts import is_part

_OFFLOADING_HOOKS = ("AlignDevicesHook", "CpuOffload", "UserCpuOffloadHook", "LayerwiseCastingHook")
"""What accelerate and diffusers put on modules whose weights they bring for each call."""


def refuse_model(model: nn.Module) -> None:
    """Raise for what no option makes possible.

    Raises
    ------
    ValueError
        Nothing has been changed.
    """
    _refuse_mode()
    for refuse in (_refuse_boosted, _refuse_modules, _refuse_tensors, _refuse_aliases):
        refuse(model)


def refuse_optimizer(model: nn.Module, optimizer: Optimizer) -> None:
    """Raise for an optimizer that is another model's.

    Raises
    ------
    ValueError
        Nothing has been changed.
    """
    for part in getattr(optimizer, "parts", ()):
        refuse_optimizer(model, part)
    name = type(optimizer).__name__
    if getattr(optimizer, "_managed", None) is not None:
        raise ValueError(
            f"this {name} has been boosted already, with another model; build one for this model's parameters"
        )
    own = {id(parameter) for parameter in model.parameters()}
    given = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    foreign = [p for p in given if id(p) not in own]
    if taken := [p for p in foreign if is_managed(p)]:
        raise ValueError(
            f"{len(taken)} of the {len(given)} parameters of this {name} (the first of shape "
            f"{tuple(taken[0].shape)}) are those of another boosted model, whose optimizer updates them; "
            "build an optimizer for each model"
        )
    if len(foreign) == len(given):
        raise ValueError(
            f"none of the {len(given)} parameters of this {name} is one of the model's {len(own)}. Build it after "
            "whatever replaces parameters (to_empty, resizing, wrapping) with the model's own: "
            f"{name}(model.parameters()). To train something else beside the model, boost the model alone and step "
            "that optimizer yourself"
        )
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if trained and not any(parameter.requires_grad for parameter in given):
        warnings.warn(
            f"the optimizer has only frozen parameters, and none of the {len(trained)} that train (the first is "
            f"{next(iter(trained))}): no step will change anything. Build it after what adds parameters, such as "
            "booster.enable_lora",
            UserWarning,
            stacklevel=2,
        )


def refuse_sharing(model: nn.Module) -> None:
    """Raise where one rank would change parameters, or have gradients, that the others do not see.

    Raises
    ------
    ValueError
        Nothing has been changed.
    """
    managed = managed_parameters(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name not in managed and not any(parameter is each for each in managed.values()):
            raise ValueError(
                f"the gradient of the parameter {name} ({parameter.dtype}) would not be summed over the ranks: only "
                "those of float32, bfloat16 and float16 are. Convert its module before booster.boost (module.float()), "
                "or freeze it (requires_grad_(False))"
            )
    if renormalised := _renormalised(model):
        raise ValueError(
            f"max_norm in {', '.join(renormalised)} changes weights in each forward, on each rank those that its batch "
            "uses, and with several ranks all need the same weights; build it with max_norm=None, and renormalise on "
            "all ranks between steps: with torch.no_grad(): weight.renorm_(2, 0, max_norm)"
        )


def refuse_whole(model: nn.Module, name: str, ranks: int) -> None:
    """Raise where an optimizer that looks at whole parameters would find parts of them."""
    if ranks > 1:
        raise ValueError(
            f"{name} looks at whole parameters, and with {ranks} ranks each keeps a part of every chunk; train with "
            "one process, or with an element-wise optimizer (HybridAdam)"
        )
    if parts := [name for name, parameter in model.named_parameters() if is_sharded(parameter)]:
        raise ValueError(
            f"{name} looks at whole parameters, and {parts[0]} is a DTensor, of which this rank has a part; train with "
            "an element-wise optimizer (HybridAdam)"
        )


def refuse_split_master(model: nn.Module, optimizer: ManagedOptimizer | None) -> None:
    """Raise where masters cannot be in two halves, or would be changed in place."""
    if optimizer is not None:
        slots = {slot for group in optimizer.param_groups for slot in optimizer.rules.of_group(group).slots(group)}
        if not any(slot.has_spare_sign for slot in slots):
            kept = ", ".join(sorted(f"{slot.name} in {slot.dtype}" for slot in slots)) or "nothing"
            raise ValueError(
                f"split_master=True needs HybridAdam with states='fp32', in whose second moment there is a bit to "
                f"spare; {optimizer.rules.name} here keeps {kept}"
            )
    if renormalised := [name for name in _renormalised(model) if model.get_submodule(name).weight.requires_grad]:
        raise ValueError(
            f"split_master=True cannot go with max_norm in {', '.join(renormalised)}: it changes weights in place; "
            "boost without split_master"
        )


def _renormalised(model: nn.Module) -> list[str]:
    """The names of embeddings that change their weights in forward."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None
    ]


def _refuse_mode() -> None:
    if is_recording():
        raise ValueError(
            "boost was called inside LazyInitContext, which records instead of computing; leave the context first: it "
            "is for building the model and its optimizer"
        )
    if torch.is_inference_mode_enabled():
        raise ValueError(
            "boost was called inside torch.inference_mode, where tensors are made that can never be trained; boost "
            "outside of it, and use torch.inference_mode for the calls of the model"
        )
    if torch.empty(0).is_meta:
        raise ValueError(
            "boost was called while the default device is meta, where tensors have no memory; leave the "
            "torch.device('meta') context (or torch.set_default_device(None)) first"
        )


def _refuse_boosted(model: nn.Module) -> None:
    if isinstance(model, GeminiModule):
        raise ValueError("this model has been boosted already; boost it once, with its optimizer")
    keep_apart = (
        "boost the whole once, before any part of it; or keep what is boosted outside of the module that is to be "
        "boosted (in a list, self.teacher = [teacher], and not as a submodule)"
    )
    for name, module in model.named_modules():
        if isinstance(module, GeminiModule):
            raise ValueError(f"{name} has been boosted already and is part of this model; {keep_apart}")
        # Without parameters it is no matter: models of transformers share one activation, say.
        if is_part(module) and next(module.parameters(), None) is not None:
            what = f"{name} is" if name else "this is"
            raise ValueError(f"{what} part of a model that has been boosted already; {keep_apart}")
    for name, parameter in model.named_parameters():
        if is_managed(parameter):
            raise ValueError(
                f"{name} lives in the chunks of another boosted model, which shares it with this one; {keep_apart}, or "
                "give this model a copy: nn.Parameter(parameter.detach().clone())"
            )


def _refuse_modules(model: nn.Module) -> None:
    sparse = [n for n, m in model.named_modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag) and m.sparse]
    if sparse:
        raise ValueError(f"sparse gradients cannot live in chunks: build {', '.join(sparse)} with sparse=False")
    for name, module in model.named_modules():
        where = name or "the model"
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f"{where} is a torch.jit.ScriptModule, in which no hooks can be; boost the module that it was made "
                "from, and use torch.compile in place of torch.jit.script"
            )
        wrapper = _parallel_wrapper(module)
        if wrapper is not None:
            raise ValueError(
                f"{where} is wrapped in {wrapper}, which keeps parameters and gradients by itself; boost the module "
                "inside of it"
            )
        hook = _offloading_hook(module)
        if hook is not None:
            raise ValueError(
                f"{where} has accelerate's {hook}, which brings and takes its weights at each call, as chunks do; "
                "call accelerate.hooks.remove_hook_from_submodules(model) first, or load the model without "
                "device_map and without cpu_offload, inside LazyInitContext where it is too large for RAM"
            )


def _parallel_wrapper(module: nn.Module) -> str | None:
    if isinstance(module, nn.parallel.DistributedDataParallel):
        return "DistributedDataParallel"
    if isinstance(module, nn.DataParallel) and module.device_ids:
        return "DataParallel"
    for cls in type(module).__mro__:  # not imported for asking
        if cls.__module__.startswith("torch.distributed.fsdp") and cls.__name__ in (
            "FullyShardedDataParallel",
            "FSDPModule",
        ):
            return "FSDP"
    return None


def _offloading_hook(module: nn.Module) -> str | None:
    hook = getattr(module, "_hf_hook", None)
    for one in (hook, *getattr(hook, "hooks", ())):
        if type(one).__name__ in _OFFLOADING_HOOKS:
            return type(one).__name__
    return None


def _refuse_tensors(model: nn.Module) -> None:
    for name, tensor, kind in _named_tensors(model):
        for is_so, why in _FAULTS if kind == "parameter" else _FAULTS_OF_BUFFERS:
            if is_so(tensor):
                raise ValueError(f"the {kind} {name} {why(tensor)}")
    for name, parameter in managed_parameters(model).items():
        if not is_lazy(parameter) and overlaps_itself(parameter):
            raise ValueError(
                f"several elements of the parameter {name} share memory (strides {parameter.stride()}), so they cannot "
                "be updated one by one; give it memory of its own: p.data = p.data.clone(), or make it smaller and "
                "expand it in forward"
            )


_UNINITIALISED = (UninitializedParameter, UninitializedBuffer)


def _is_wrapper(tensor: Tensor) -> bool:
    """True for subclasses with a dispatch of their own: their values are not in memory of theirs."""
    own = type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__
    return own and not is_lazy(tensor) and not isinstance(tensor, _UNINITIALISED)


_FAULTS: tuple[tuple[Callable[[Tensor], bool], Callable[[Tensor], str]], ...] = (
    (
        lambda tensor: isinstance(tensor, _UNINITIALISED),
        lambda tensor: (
            "has no shape yet, as nn.Lazy* modules have none before their first call; call the model once before "
            "boost, outside of LazyInitContext: with torch.no_grad(): model(batch)"
        ),
    ),
    (
        lambda tensor: not is_lazy(tensor) and tensor.is_meta,
        lambda tensor: (
            "is on the meta device and has no values; build the model inside LazyInitContext() instead of "
            "torch.device('meta'), or give it memory and weights first: model.to_empty(device='cpu'), "
            "model.load_state_dict(...)"
        ),
    ),
    (
        _is_wrapper,
        lambda tensor: (
            f"is a {type(tensor).__name__}, a tensor subclass whose values lie in other tensors, so chunks cannot hold "
            "them; boost the model before it is sharded or quantised, or give it plain parameters "
            "(DTensor.full_tensor(), dequantize())"
        ),
    ),
    (
        lambda tensor: not is_lazy(tensor) and tensor.is_inference(),
        lambda tensor: (
            "was made inside torch.inference_mode and can never be trained; build or load the model outside of it"
        ),
    ),
)
"""What a parameter must not be, and what is said about it."""
_FAULTS_OF_BUFFERS = _FAULTS[:2]


def _refuse_aliases(model: nn.Module) -> None:
    tensors = {name: tensor for name, tensor, _ in _named_tensors(model) if tensor.layout is torch.strided}
    managed = {id(parameter) for parameter in managed_parameters(model).values()}
    pair = sharing(tensors)
    if pair is not None and any(id(tensors[name]) in managed for name in pair):
        first, second = pair
        raise ValueError(
            f"{first} and {second} are two tensors with the same memory, and each would get its own in a chunk; make "
            "them one parameter (a.weight = b.weight, which is kept), or give one a copy: p.data = p.data.clone()"
        )


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Any, str]]:
    for name, parameter in model.named_parameters():
        yield name, parameter, "parameter"
    for name, buffer in model.named_buffers():
        yield name, buffer, "buffer"
