"""Every private name of torch that we use; no other file has one.

Each says what it is for, why no public name will do, and what to do should torch drop it. What we rely on is tested in
``tests/test_torch_private.py``, the first to run with another version of torch.
"""

import gc
import pathlib
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import timedelta
from functools import cache
from operator import attrgetter, methodcaller
from types import CodeType, FrameType, FunctionType
from typing import TYPE_CHECKING, Any

import torch
import torch._compile
import torch.utils.dlpack
from torch import Tensor, UntypedStorage, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules import module as _modules
from torch.nn.modules.module import _IncompatibleKeys as IncompatibleKeys
from torch.overrides import _get_current_function_mode as current_function_mode
from torch.overrides import _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, _get_current_dispatch_mode_stack
from torch.utils._pytree import register_pytree_node, tree_flatten, tree_leaves, tree_map, tree_unflatten

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

__all__ = [
    # Documented in torch's own notes on extending it, under private names.
    "FakeTensorMode",
    "TorchDispatchMode",
    "register_pytree_node",
    "tree_flatten",
    "tree_leaves",
    "tree_map",
    "tree_unflatten",
    # What ``load_state_dict`` returns: to return the same. If it goes: a namedtuple of two lists.
    "IncompatibleKeys",
    # The innermost mode: one may leave only while it is that. If it goes: leave without asking, in a ``try``.
    "current_function_mode",
]

# -- autograd's engine and graph

NO_BACKWARD = -1
current_backward: Callable[[], int] = torch._C._current_graph_task_id
"""The backward that this thread runs, `NO_BACKWARD` outside of one. torch tells nowhere else of reentrant and failed
backwards. If it goes: count in an ``autograd.Function`` before the loss, which users would have to call."""

current_node: Callable[[], Any] = torch._C._current_autograd_node
"""The node that this thread runs in a backward; None outside of one, and at its end.
If it goes: have the hooks before nodes keep the numbers of their nodes.

A backward runs that node next that was made last of those that are ready (`number_of`).
"""

at_end_of_backward: Callable[[Callable[[], None]], None] = torch.autograd.Variable._execution_engine.queue_callback
"""Have something called at the end of the backward that runs. FSDP2 uses it, too; public hooks belong to nodes.
If it goes: hooks on the leaves that come last, which the graph would have to be searched for."""

will_run: Callable[[Any], bool] = torch._C._will_engine_execute_node
"""Whether the backward that runs comes to a node; raises RuntimeError in ``torch.autograd.grad``.
Public code can only wait and see. If it goes: updates in backward wait for the end of the backward."""

next_number: Callable[[], int] = torch._C._autograd._get_sequence_nr
"""The number of the next autograd node that this thread makes.
If it goes: see `number_of`."""


number_of: Callable[[Any], int] = methodcaller("_sequence_nr")
"""The number of a node, by which a call's own nodes are known. The largest of 64 bits for an ``AccumulateGrad``.
If it goes: collect the nodes of results in a ``TorchFunctionMode``, which costs each operation a microsecond."""


def is_result_of_new_node(tensor: Tensor) -> bool:
    """True in a hook for saved tensors if the node that saves a tensor is the one that has made it.

    torch tells its hooks nothing of nodes; but what a node saves of others was made by older nodes. An
    ``autograd.Function`` that makes nodes in its forward is taken for an older one, and its graph holds itself until a
    backward. If the names go: all are detached, and ``x.data = y`` is not followed.
    """
    node = tensor.grad_fn
    return node is not None and bool(number_of(node) >= next_number() - 1)


base_of: Callable[[Tensor], Tensor | None] = attrgetter("_base")
"""What a tensor is a view of, for autograd: after a change in place its node is on the way of the view's gradient.
If it goes: units whose results are views count as not contained."""


def saving_is_taken() -> bool:
    """True where hooks for saved tensors are on already, or must not be: a pair of hooks hides those around it.

    Public names only put hooks on. If they go: ours hide the user's, which do not see what the model saves.
    """
    hooks: Any = torch._C._autograd
    return not hooks._saved_tensors_hooks_is_enabled() or hooks._top_saved_tensors_default_hooks(True) is not None


def saving_hooks() -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    """The innermost pair of hooks for saved tensors. If it goes: see `saving_is_taken`."""
    hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return None if hooks is None else (hooks[0], hooks[1])


shown_in_profile: Callable[[str], AbstractContextManager[None]] = torch._C._profiler._RecordFunctionFast
"""A part of what ``torch.profiler`` shows, by its name. ``record_function`` takes microseconds also when nobody looks.
If it goes: ``torch.profiler.record_function``."""

# -- what tensors and storages are, and who holds them

version_of: Callable[[Tensor], int] = attrgetter("_version")
"""How often a tensor was changed in place. Public names only raise it (``torch.autograd.graph.increment_version``).
If it goes: compare values with home, as for ``p.data``."""


def use_count(tensor: Tensor) -> int:
    """References to a tensor from C++: more than one means that an autograd graph holds it.

    If it goes: refuse `swap_content` for tensors that have been used already.
    """
    return tensor._use_count()  # type: ignore[attr-defined, no-any-return]


swap_content: Callable[[Tensor, Tensor], None] = torch._C._swap_tensor_impl
"""Exchange what two tensor objects stand for. ``torch.utils.swap_tensors`` does it, but not with weak references.
If it goes: ``swap_tensors``, and objects with weak references are refused."""

fits_in_place: Callable[[Tensor, Tensor], bool] = torch._has_compatible_shallow_copy_type
"""Whether ``a.data = b`` is possible. torch raises otherwise, but also for other reasons.
If it goes: try and catch the error."""

make_parameter: Callable[[type, Tensor, bool], Any] = Tensor._make_subclass
"""A leaf of a given subclass of ``nn.Parameter`` over the memory of a tensor; ``as_subclass`` gives no leaf.
If it goes: ``detach().as_subclass(cls).requires_grad_()``, which is slower."""

make_wrapper: Callable[..., Any] = Tensor._make_wrapper_subclass
"""A tensor without memory of a given subclass, on any device. Documented in torch's notes, with its private name.
If it goes: lazy tensors have to be meta tensors that lie about their device."""

typed_storage: Callable[[Tensor], Any] = Tensor._typed_storage
"""Gives out a tensor's memory, as ``untyped_storage`` does: to be refused or followed, never called.
If it goes: delete it."""

rebuild_parameter: Callable[..., nn.Parameter] = torch._utils._rebuild_parameter
"""Makes a parameter when it is unpickled. In files that other processes read without us, so a function of torch.
If it goes: what ``nn.Parameter.__reduce_ex__`` writes then."""

rebuild_parameter_with_state: Callable[..., nn.Parameter] = torch._utils._rebuild_parameter_with_state
"""`rebuild_parameter` for parameters with attributes."""

TENSOR_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
"""Attributes that hold a tensor's hooks. ``register_hook`` adds one; no public name tells of them.
If they go: hooks do not follow a lazy tensor that becomes real, and must be refused."""


def put_hook_last(parameter: Tensor, kind: type) -> bool:
    """Have a parameter's hook of a kind run after all others that run when a gradient was added. Returns whether there
    are others.

    torch runs them in the order in which they were registered. If it goes: hooks of users do not see gradients on disk.
    """
    hooks = getattr(parameter, TENSOR_HOOKS[1], None) or {}
    if len(hooks) > 1 and not isinstance(next(reversed(hooks.values())), kind):
        for key in [key for key, hook in hooks.items() if isinstance(hook, kind)]:
            hooks[key] = hooks.pop(key)
    return len(hooks) > 1


def storage_key(storage: UntypedStorage) -> int:
    """Return the same number for two objects of one storage.

    Its address is none: storages without memory share it. If ``_cdata`` goes: compare ``data_ptr`` and ``nbytes``.
    """
    return storage._cdata  # type: ignore[no-any-return]


def storage_offset_in_file(storage: UntypedStorage) -> int | None:
    """Where in a file of ``torch.save`` the bytes of a storage begin that ``torch.load(map_location="meta")`` has made.

    torch documents the attribute as an early feature. If it goes: map the file, and compare addresses.
    """
    return getattr(storage, "_checkpoint_offset", None)


def storage_uses(storage: UntypedStorage) -> int:
    """How many references a storage has in C++: more than at first, and somebody holds the memory.

    Public names count Python's references only. If it goes: memory that was lent counts as held until the step's end.
    """
    return torch._C._storage_Use_Count(storage._cdata)


def swap_memory(storage: UntypedStorage, other: UntypedStorage) -> None:
    """Exchange the memory of two storages, for all tensors that lie in them.

    ``set_`` acts on one tensor. If it goes: assigned data is copied, and its holder sees no update.
    """
    storage._swap_data_ptr_(other)  # type: ignore[attr-defined]


def alias_of(tensor: Tensor) -> Tensor:
    """Return a tensor over the same memory, under a storage of its own.

    Through a capsule: given a tensor, ``from_dlpack`` asks for the name of its device, and knows only some of them.
    If it goes: ``from_dlpack(tensor)``, and devices that it does not know lend copies.
    """
    with torch.no_grad():
        return torch.utils.dlpack.from_dlpack(torch._C._to_dlpack(tensor.detach()))


def parameter_class_wanted_by(frame: FrameType) -> type | None:
    """The class that ``nn.Parameter.__new__`` was asked for, if ``frame`` runs it.

    It sets ``_is_param`` on a tensor of a class of its own, whatever subclass was asked for. If that changes: lazy
    parameters and copies of parameters that are away become plain ``nn.Parameter``.
    """
    if frame.f_code is not nn.Parameter.__new__.__code__:
        return None
    return frame.f_locals.get("cls")


# -- what torch does with an operation

without_subclasses = torch._C.DisableTorchFunctionSubclass
"""A context in which ``__torch_function__`` of tensor subclasses is not asked. In torch's notes on extending it.
If it goes: ``as_subclass(Tensor)`` of every argument."""

without_torch_function = torch._C.DisableTorchFunction
"""A context in which neither subclasses nor modes are asked.
If it goes: `without_subclasses`, and the observer has to be told."""


def modes() -> list[Any]:
    """The modes that see this thread's operations, but for a default device.

    If it goes: none are seen, and a block that runs under one is computed again without it.
    """
    of_functions = [mode for mode in _get_current_function_mode_stack() if not isinstance(mode, DeviceContext)]
    return of_functions + _get_current_dispatch_mode_stack()


@contextmanager
def without_modes() -> Iterator[None]:
    """A context without any `modes`, and without a default device that a context has set.

    If it goes: modes that are on in a backward see what that computes again.
    """
    popped = [_pop_mode() for _ in _get_current_function_mode_stack()]
    try:
        with _disable_current_modes():
            yield
    finally:
        for mode in reversed(popped):
            _push_mode(mode)


attention_order: Callable[[], list[int]] = torch._C._get_sdp_priority_order
set_attention_order: Callable[[list[int]], None] = torch._C._set_sdp_priority_order
"""Which of the kernels for attention is taken first; ``sdpa_kernel(..., set_priority=True)`` sets it.
If they go: a forward that runs again takes the first one of then."""

without_transforms = torch._C._DisableFuncTorch
"""A context without ``torch.func``'s transforms: memory that moves is no part of what they record.
If it goes: a boosted model's parameters are refused under a transform."""

below_autograd = torch._C._AutoDispatchBelowADInplaceOrView
"""A context in which operations reach ``__torch_dispatch__`` without autograd: lazy tensors have no graph.
If it goes: ``torch.no_grad``, and views of lazy tensors have to be unmade."""


def is_transformed() -> bool:
    """True under ``vmap``, ``grad`` and their like. If it goes: enter `without_transforms` always (a microsecond)."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def arguments_of(operator: Any) -> list[Any]:
    """The declared arguments of an operator, with ``alias_info``. If it goes: the names that end with ``_``."""
    return operator._schema.arguments  # type: ignore[no-any-return]


def name_of(operator: Any) -> str:
    """The name of an operator without its overload. If it goes: cut it out of ``operator.name()``, which is public."""
    return operator._overloadpacket.__name__  # type: ignore[no-any-return]


@cache
def is_composite(operator: Any) -> bool:
    """True if torch takes the operator apart itself. If it goes: call ``decompose`` and see whether it can."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), "CompositeImplicitAutograd"))


# -- compiled modules

never_compiled: Callable[..., Any] = torch._compile._disable_dynamo
"""A decorator: not to be compiled. ``torch.compiler.disable`` imports the compiler at once, which takes seconds.
If it goes: ``torch.compiler.disable``."""

is_traced: Callable[[], bool] = torch._C._is_tracing
"""True while ``torch.jit.trace`` records; asked at each visit. If it goes: ``torch.jit.is_tracing``, two calls more."""

COMPILED_CALL = "_compiled_call_impl"
"""Where ``module.compile()`` puts the compiled call of a module; its hooks are compiled with it.
If it goes: such modules are refused, and ``torch.compile(module)`` is not."""


def is_compiled(module: nn.Module) -> bool:
    """True for what ``torch.compile(module)`` returns and for a module that had its own ``compile`` called."""
    if getattr(module, COMPILED_CALL, None) is not None:
        return True
    compiler = sys.modules.get("torch._dynamo.eval_frame")  # not imported here: compiling imports it
    return compiler is not None and isinstance(module, compiler.OptimizedModule)


COMPILED_PREFIX = "_orig_mod."
"""What ``torch.compile(module)`` puts into the names of a state dict. torch's own checkpoints leave it out, too."""


def compiled_in(module: nn.Module) -> nn.Module:
    """The module that ``torch.compile(module)`` was given, of what it returned; any other module itself."""
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    is_wrapper = compiler is not None and isinstance(module, compiler.OptimizedModule)
    return own_modules(module)["_orig_mod"] or module if is_wrapper else module


# -- modules and optimizers

APPLY = "_apply"
"""The method of ``nn.Module`` that ``.to()``, ``.half()``, ``share_memory()`` and their like come to.
If it goes: override each of them."""


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The module's own parameters by name, to be read or replaced.

    ``parameters()`` can be overridden, and on a boosted model waits for updates. If ``_parameters`` goes:
    ``nn.Module.named_parameters(module, recurse=False, remove_duplicate=False)`` and ``setattr``.
    """
    return module._parameters


def own_buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """`own_parameters` for buffers."""
    return module._buffers


def persistent_buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """`own_buffers` that belong into a ``state_dict``. Public names tell it only through ``state_dict``, which users
    override. If ``_non_persistent_buffers_set`` goes: ``nn.Module.state_dict(module)``, without that of children."""
    return {name: buffer for name, buffer in module._buffers.items() if name not in module._non_persistent_buffers_set}


def own_modules(module: nn.Module) -> dict[str, nn.Module | None]:
    """The children by name, to be replaced for a while. If ``_modules`` goes: ``named_children()`` and ``setattr``."""
    return module._modules


def forward_hooks(module: nn.Module) -> list[Callable[..., Any]]:
    """The hooks that run before and after a module's forward. If they go: no block is known to be free of hooks."""
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]


_WITHIN_CALLS = frozenset(code for code in nn.Module._call_impl.__code__.co_consts if isinstance(code, CodeType))
"""Of the functions that a call of a module makes for itself. If ``_call_impl`` goes: arguments live a little longer."""


def forget_arguments(frame: FrameType) -> None:
    """Let go the arguments of a module's call that an exception has ended.

    They are in the closure of a function that was made for this call, and a cleared frame still has its function.
    """
    if frame.f_code in _WITHIN_CALLS:
        for function in gc.get_referents(frame):
            if isinstance(function, FunctionType) and function.__code__ is frame.f_code:
                for cell in function.__closure__ or ():
                    with suppress(ValueError):  # it is empty
                        del cell.cell_contents


def global_forward_hooks() -> list[Callable[..., Any]]:
    """The hooks of ``register_module_forward_hook`` and the like. If they go: see `forward_hooks`."""
    return [*_modules._global_forward_pre_hooks.values(), *_modules._global_forward_hooks.values()]


LOAD_LOCALLY = "_load_from_state_dict"
"""The method in which a module takes its own entries of a state dict; users override it to read what is older.
If it goes: look at the hooks alone."""


def load_hooks(module: nn.Module) -> list[Callable[..., Any]]:
    """The hooks of a module on ``load_state_dict``, as they were registered. If they go: none can be found, and every
    model has to be loaded by its own ``load_state_dict``."""
    before = [getattr(hook, "hook", hook) for hook in module._load_state_dict_pre_hooks.values()]
    return [*before, *module._load_state_dict_post_hooks.values()]


def put_hooks_last(module: nn.Module, kind: type) -> None:
    """Have hooks of a kind that run before a load run after all others. If it goes: register them anew."""
    hooks = module._load_state_dict_pre_hooks
    for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, "hook", hook), kind)]:
        hooks[key] = hooks.pop(key)


def metadata_of(state_dict: Any) -> dict[str, Any] | None:
    """Versions of modules, on what ``state_dict()`` returns; None on a plain dict. If it goes: nothing to carry on."""
    return getattr(state_dict, "_metadata", None)


def with_metadata(values: dict[str, Any], metadata: dict[str, Any]) -> dict[str, Any]:
    """What ``state_dict()`` would return, with this beside the values. If it goes: `metadata_of`."""
    state_dict = OrderedDict(values)
    state_dict._metadata = metadata  # type: ignore[attr-defined]
    return state_dict


OPTIMIZER_HOOKS = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)
"""Attributes that hold an optimizer's hooks: who takes its place goes on with them.
If they go: hooks have to be registered after boost."""


def mark_stepped(optimizer: torch.optim.Optimizer) -> None:
    """Tell schedulers that ``optimizer.step()`` ran; they warn if not. If ``_opt_called`` goes: they ask otherwise."""
    setattr(optimizer, "_opt_called", True)  # noqa: B010 - torch does not declare it


# -- process groups


def group_timeout(group: Any) -> timedelta:
    """How long a process group waits for its ranks. torch takes it and does not tell it.

    If it goes: an argument of our own beside the group."""
    backend = group._get_backend(group._device_types[0])
    timeout: timedelta = backend.options._timeout
    return timeout


def default_store() -> "Store":
    """The store of keys and values by which the processes of the default group have found each other.

    A group gives out no store under a public name. If ``_get_default_store`` goes: a store of our own, for which rank 0
    has to find a port.
    """
    from torch.distributed.distributed_c10d import _get_default_store  # not every build of torch has it

    return _get_default_store()


# -- distributed tensors

LOCAL_TENSOR = "_local_tensor"
"""Attribute in which a `DTensor` keeps this rank's part; ``to_local()`` gives out another tensor over its memory.
If it goes: a parameter's part is in memory beside its chunk for as long as somebody keeps the old parameter."""


# -- files of torch.distributed.checkpoint


def stored_at(file: str, offset: int, length: int) -> Any:
    """How the metadata of a checkpoint say where something is. If it goes: leave writing to ``FileSystemWriter``, which
    holds all that it has written."""
    from torch.distributed.checkpoint import filesystem

    return filesystem._StorageInfo(file, offset, length)


@cache
def checkpoint_classes() -> Mapping[tuple[str, str], Any]:
    """What a pickle of the metadata of a checkpoint may name, by module and name: only what holds values.

    If one goes: read the checkpoints that name it with the torch that wrote them.
    """
    from torch.distributed.checkpoint import filesystem, metadata

    words = "Metadata TensorStorageMetadata BytesStorageMetadata TensorProperties ChunkStorageMetadata"
    names = [*words.split(), "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING"]
    places = [(module, kind) for module in ("pathlib", "pathlib._local") for kind in ("Posix", "Windows")]
    return {
        **{(metadata.__name__, name): getattr(metadata, name) for name in names},
        (filesystem.__name__, "_StorageInfo"): filesystem._StorageInfo,
        ("torch", "Size"): torch.Size,
        ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
        ("collections", "OrderedDict"): OrderedDict,
        # The folder that it was written to. Pure: those of another system cannot be made here.
        **{(module, f"{kind}Path"): getattr(pathlib, f"Pure{kind}Path") for module, kind in places},
    }


# -- files of torch.save

rebuild_tensor: Callable[..., Tensor] = torch._utils._rebuild_tensor_v2
"""What a file of ``torch.save`` says of a tensor: storage, offset, size, strides, requires_grad, hooks. Files of all
versions since 1.0 name it. If it goes: write the files with ``torch.save``, which wants all tensors in RAM."""

rebuild_tensor_of_dtype: Callable[..., Tensor] = torch._utils._rebuild_tensor_v3
"""The same for dtypes whose storages have no class of their own; the dtype comes last."""

# -- operations on lists of tensors

FOREACH: Mapping[str, Callable[..., Any]] = {
    name: getattr(torch, f"_foreach_{name}") for name in ("norm", "mul_", "clamp_min_", "clamp_max_")
}
"""What ``torch.nn.utils.clip_grad_norm_`` and ``clip_grad_value_`` do to all gradients of a device in one call. If one
goes: look in torch/nn/utils/clip_grad.py for what does it now."""
