"""What we rely on in names of torch that are private: the first tests to run with another version of torch."""

import pickle
import re
import sys
import traceback
import warnings
import weakref
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist

from gemini import torch_private as private

LARGEST = (1 << 64) - 1
ROOT = Path(__file__).resolve().parent.parent


class Told(Tensor):
    """A tensor whose class notes the operations that torch asks it about."""

    asked: list[str] = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        Told.asked.append(func.__name__)
        return super().__torch_function__(func, types, args, kwargs or {})


class Mode(torch.overrides.TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.asked.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", private.FOREACH)
def test_operations_on_lists_ask_the_class_of_their_tensors(name: str, told: Tensor) -> None:
    numbers = () if name == "norm" else (2.0,)
    private.FOREACH[name]([told, told], *numbers)
    assert Told.asked == [f"_foreach_{name}"]


@pytest.fixture
def told() -> Tensor:
    tensor = torch.ones(2).as_subclass(Told)
    Told.asked.clear()
    return tensor


def in_backward(call: Callable[[], object]) -> list[object]:
    """What ``call`` returns during a backward."""
    found: list[object] = []
    x = torch.ones(2, requires_grad=True)
    y = x * 2
    y.register_hook(lambda gradient: found.append(call()))
    y.sum().backward()
    return found


def test_the_oldest_torch_is_declared_once_and_this_one_is_not_older() -> None:
    declared = re.findall(r'"torch>=(\d+)\.(\d+)"', (ROOT / "pyproject.toml").read_text())
    kept = re.findall(r">= \((\d+), (\d+)\)' 2>", (ROOT / "scripts" / "_env.sh").read_text())
    assert len(declared) == 1
    assert kept == declared
    assert tuple(map(int, torch.__version__.split(".")[:2])) >= tuple(map(int, declared[0]))


def test_a_call_that_failed_lets_go_its_arguments() -> None:
    class Raises(nn.Module):
        def forward(self, x: Tensor) -> None:
            raise MemoryError

    module, there = Raises(), torch.ones(2)
    module.register_forward_hook(lambda *_: None)  # torch then makes a function for the call
    gone = weakref.ref(there)
    try:
        module(there)
    except MemoryError as error:
        del there
        traceback.clear_frames(error.__traceback__)
        for frame, _ in list(traceback.walk_tb(error.__traceback__))[1:]:
            private.forget_arguments(frame)
        del frame, _
        assert gone() is None


# -- autograd's engine and graph


def test_each_backward_has_a_number() -> None:
    assert private.current_backward() == -1
    (first,), (second,) = in_backward(private.current_backward), in_backward(private.current_backward)
    assert isinstance(first, int) and first >= 0
    assert second != first


def test_a_call_comes_at_the_end_of_backward() -> None:
    order = []
    x = torch.ones(2, requires_grad=True)
    x.register_post_accumulate_grad_hook(lambda _: order.append("last gradient"))
    y = x * 2
    y.register_hook(lambda _: private.at_end_of_backward(lambda: order.append("end")))
    y.sum().backward()
    assert order == ["last gradient", "end"]


def test_a_backward_runs_the_node_made_last_of_those_that_are_ready() -> None:
    assert private.current_node() is None
    x, run = torch.ones(2, requires_grad=True), []
    branches = [x * factor for factor in range(5)]
    total = torch.stack([branch.sin() for branch in (*branches[::2], *branches[1::2])]).sum()
    made = {branch.grad_fn for branch in branches}
    for node in made:
        assert node is not None
        node.register_prehook(lambda _: run.append(private.current_node()))
    total.backward()
    assert set(run) == made
    assert [private.number_of(node) for node in run] == sorted(map(private.number_of, made), reverse=True)


def test_a_gradient_that_is_put_into_a_parameter_has_the_highest_number_of_all() -> None:
    x, numbers = torch.ones(2, requires_grad=True), []
    x.register_post_accumulate_grad_hook(lambda _: numbers.append(private.number_of(private.current_node())))
    (x * 2).sum().backward()
    assert numbers == [LARGEST]


def test_the_engine_says_which_nodes_will_run() -> None:
    x, other = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    inside, outside = x * 2, other * 2
    found = []
    y = inside * 3
    y.register_hook(lambda _: found.extend(private.will_run(t.grad_fn) for t in (inside, outside)))
    y.sum().backward()
    assert found == [True, False]


def test_autograd_grad_refuses_to_say_which_parameters_get_a_gradient() -> None:
    x = torch.ones(2, requires_grad=True)
    (accumulate, _), *_ = (x * 2).grad_fn.next_functions  # type: ignore[union-attr]
    y = x * 2

    def ask(gradient: Tensor) -> None:
        with pytest.raises(RuntimeError):
            private.will_run(accumulate)

    y.register_hook(ask)
    torch.autograd.grad(y.sum(), x)


def test_nodes_are_numbered_in_the_order_in_which_they_are_made() -> None:
    x = torch.ones(2, requires_grad=True)
    begin = private.next_number()
    y = x * 2
    z = y + 1
    assert [private.number_of(t.grad_fn) for t in (y, z)] == [begin, begin + 1]
    assert private.next_number() == begin + 2


def test_a_node_that_accumulates_has_the_largest_number() -> None:
    ((accumulate, _), *_) = (torch.ones(2, requires_grad=True) * 2).grad_fn.next_functions  # type: ignore[union-attr]
    assert private.number_of(accumulate) == LARGEST


def test_a_view_tells_its_base() -> None:
    x = torch.ones(4)
    assert private.base_of(x[1:]) is x
    assert private.base_of(x) is None


def test_a_profile_shows_what_it_is_told_to_show() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        with private.shown_in_profile("a part of ours"):
            torch.ones(2).sum()
    assert "a part of ours" in {event.name for event in profile.events()}


# -- what tensors and storages are, and who holds them


def test_a_change_in_place_raises_the_version_and_that_of_views() -> None:
    x = torch.ones(2)
    view, data = x[:1], x.data
    before = private.version_of(x)
    x.add_(1)
    assert private.version_of(x) == private.version_of(view) == before + 1
    data.add_(1)
    assert private.version_of(x) == before + 1
    torch.autograd.graph.increment_version(x)
    assert private.version_of(x) == before + 2


def test_a_class_is_asked_before_its_version_is_told(told: Tensor) -> None:
    private.version_of(told)
    assert Told.asked == ["__get__"]


def test_a_graph_counts_as_a_use_of_a_tensor() -> None:
    x = nn.Parameter(torch.ones(2))
    assert private.use_count(x) == 1
    y = x * 2
    assert private.use_count(x) > 1
    del y
    assert private.use_count(x) == 1


def test_two_tensors_exchange_their_content_and_keep_weak_references() -> None:
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.zeros(3))
    reference = weakref.ref(a)
    private.swap_content(a, b)
    assert a.tolist() == [0, 0, 0]
    assert b.tolist() == [1, 1]
    assert reference() is a


def test_data_of_another_kind_of_device_does_not_fit() -> None:
    x = torch.ones(2)
    assert private.fits_in_place(x, torch.ones(3))
    assert not private.fits_in_place(x, torch.ones(2).to_sparse())


def test_a_parameter_of_a_subclass_is_a_leaf_in_the_same_memory() -> None:
    class Mine(nn.Parameter):
        pass

    data = torch.ones(2)
    made = private.make_parameter(Mine, data, True)
    assert type(made) is Mine
    assert made.is_leaf and made.requires_grad
    assert made.data_ptr() == data.data_ptr()


def test_a_wrapper_has_layout_and_device_and_no_memory() -> None:
    class Wrapper(Tensor):
        @classmethod
        def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            raise AssertionError(func)

    device = torch.device("cuda:1")
    made = private.make_wrapper(
        Wrapper, (2, 3), strides=(1, 2), storage_offset=0, dtype=torch.int8, device=device, requires_grad=False
    )
    assert type(made) is Wrapper
    assert (made.shape, made.stride(), made.dtype, made.device) == ((2, 3), (1, 2), torch.int8, device)


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")
def test_a_typed_storage_gives_out_memory() -> None:
    x = torch.ones(2)
    assert private.typed_storage(x).data_ptr() == x.data_ptr()
    assert private.typed_storage.__name__ == "_typed_storage"


def test_parameters_are_rebuilt_without_us() -> None:
    parameter = private.rebuild_parameter(torch.ones(2), False, {})
    assert type(parameter) is nn.Parameter and not parameter.requires_grad
    parameter = private.rebuild_parameter_with_state(torch.ones(2), True, {}, {"mark": 1})
    assert parameter.mark == 1  # type: ignore[attr-defined]
    plain = nn.Parameter(torch.ones(2))
    assert plain.__reduce_ex__(pickle.HIGHEST_PROTOCOL)[0] is private.rebuild_parameter
    plain.mark = 1  # type: ignore[attr-defined]
    assert plain.__reduce_ex__(pickle.HIGHEST_PROTOCOL)[0] is private.rebuild_parameter_with_state


def test_hooks_of_a_tensor_lie_in_its_attributes_and_follow_when_they_are_assigned() -> None:
    seen = []
    x, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    assert [getattr(x, name) for name in private.TENSOR_HOOKS] == [None, None]
    x.register_hook(lambda _: seen.append("gradient"))
    x.register_post_accumulate_grad_hook(lambda _: seen.append("accumulated"))
    for name in private.TENSOR_HOOKS:
        setattr(other, name, getattr(x, name))
    other.sum().backward()
    assert seen == ["gradient", "accumulated"]


def test_a_storage_is_known_by_its_key() -> None:
    x, y = torch.empty(0), torch.empty(0)
    assert private.storage_key(x.untyped_storage()) == private.storage_key(x.view(0).untyped_storage())
    assert private.storage_key(x.untyped_storage()) != private.storage_key(y.untyped_storage())


def test_torch_tells_where_in_a_file_a_storage_begins(tmp_path: Path) -> None:
    torch.save({"x": torch.arange(3.0), "y": torch.arange(5.0)[1:]}, tmp_path / "file.pt")
    for name, values in (("x", torch.arange(3.0)), ("y", torch.arange(5.0))):
        storage = torch.load(tmp_path / "file.pt", map_location="meta")[name].untyped_storage()
        offset = private.storage_offset_in_file(storage)
        assert offset is not None
        data = bytearray((tmp_path / "file.pt").read_bytes()[offset : offset + storage.nbytes()])
        assert torch.equal(torch.frombuffer(data, dtype=torch.float32), values)
    assert private.storage_offset_in_file(torch.ones(2).untyped_storage()) is None


def test_tensors_and_graphs_count_as_uses_of_a_storage() -> None:
    x = torch.ones(2)
    storage = x.untyped_storage()
    before = private.storage_uses(storage)
    view = x[:1]
    assert private.storage_uses(storage) == before + 1
    del view
    weight = torch.ones(2, requires_grad=True)
    y = weight * x.detach()
    assert private.storage_uses(storage) == before + 1
    del y
    assert private.storage_uses(storage) == before


def test_storages_exchange_their_memory_for_all_of_their_tensors() -> None:
    a, b = torch.ones(2), torch.zeros(2)
    view, first, second = a[1:], a.data_ptr(), b.data_ptr()
    private.swap_memory(a.untyped_storage(), b.untyped_storage())
    assert (a.data_ptr(), b.data_ptr()) == (second, first)
    assert (a.tolist(), view.tolist(), b.tolist()) == ([0, 0], [0], [1, 1])


def test_an_alias_has_the_same_memory_and_another_storage() -> None:
    x = nn.Parameter(torch.ones(4))
    alias = private.alias_of(x[1:])
    assert alias.data_ptr() == x[1:].data_ptr()
    assert private.storage_key(alias.untyped_storage()) != private.storage_key(x.untyped_storage())
    assert not alias.requires_grad


def test_a_parameter_asks_a_tensor_of_another_class_for_the_class_that_is_wanted() -> None:
    wanted = []

    class Mine(nn.Parameter):
        pass

    class Other(Tensor):
        @property
        def _is_param(self) -> bool:
            return True

        @_is_param.setter
        def _is_param(self, value: bool) -> None:
            assert value
            wanted.append(private.parameter_class_wanted_by(sys._getframe(1)))

    nn.Parameter(torch.ones(2).as_subclass(Other))
    Mine(torch.ones(2).as_subclass(Other))
    assert wanted == [nn.Parameter, Mine]
    assert private.parameter_class_wanted_by(sys._getframe()) is None


# -- what torch does with an operation


def test_subclasses_are_not_asked_and_modes_are(told: Tensor) -> None:
    with Mode() as mode:
        with private.without_subclasses():
            torch.add(told, 1)
    assert Told.asked == []
    assert mode.asked == ["add"]


def test_neither_subclasses_nor_modes_are_asked(told: Tensor) -> None:
    with Mode() as mode:
        with private.without_torch_function():
            torch.add(told, 1)
    assert Told.asked == mode.asked == []


def test_a_transform_is_seen_and_can_be_left() -> None:
    seen = []
    plain = torch.ones(3)

    def call(x: Tensor) -> Tensor:
        seen.append(private.is_transformed())
        with private.without_transforms():
            seen.append((plain + 1).tolist())
        return x * 2

    torch.func.vmap(call)(torch.ones(2, 3))
    assert seen == [True, [2, 2, 2]]
    assert not private.is_transformed()


def test_below_autograd_nothing_gets_a_graph() -> None:
    x = torch.ones(2, requires_grad=True)
    with private.below_autograd():
        y = x * 2
    assert y.grad_fn is None and not y.requires_grad


def test_the_innermost_mode_is_told() -> None:
    with Mode() as outer:
        assert private.current_function_mode() is outer
        with Mode() as inner:
            assert private.current_function_mode() is inner
    assert private.current_function_mode() is None


def test_operators_tell_what_they_write_and_what_they_are_made_of() -> None:
    operator = torch.ops.aten.add_.Tensor
    arguments = private.arguments_of(operator)
    assert [a.name for a in arguments] == ["self", "other", "alpha"]
    assert [a.alias_info is not None and a.alias_info.is_write for a in arguments] == [True, False, False]
    assert private.name_of(operator) == "add_"
    assert private.is_composite(torch.ops.aten.linear.default) is True
    assert private.is_composite(operator) is False


def test_a_dispatch_mode_sees_operators_below_autograd() -> None:
    class Seeing(private.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    seen: list[Any] = []
    with Seeing():
        torch.ones(2, requires_grad=True) * 2
    assert seen == [torch.ops.aten.ones.default, torch.ops.aten.mul.Tensor]


def test_a_fake_tensor_computes_shapes() -> None:
    with private.FakeTensorMode():
        assert torch.nn.functional.linear(torch.empty(2, 3), torch.empty(4, 3)).shape == (2, 4)


def test_trees_are_flattened_mapped_and_put_together() -> None:
    tree = {"a": [1, (2,)], "b": 3}
    leaves, spec = private.tree_flatten(tree)
    assert leaves == private.tree_leaves(tree) == [1, 2, 3]
    assert private.tree_unflatten([4, 5, 6], spec) == {"a": [4, (5,)], "b": 6}
    assert private.tree_map(lambda leaf: -leaf, tree) == {"a": [-1, (-2,)], "b": -3}


def test_a_class_can_be_a_node_of_trees() -> None:
    class Pair:
        def __init__(self, a: int, b: int) -> None:
            self.both = [a, b]

    private.register_pytree_node(Pair, lambda pair: (pair.both, None), lambda both, context: Pair(*both))
    assert private.tree_leaves([Pair(1, 2), 3]) == [1, 2, 3]


# -- compiled modules


def test_the_compiler_leaves_out_what_is_never_compiled() -> None:
    seen = []

    @private.never_compiled
    def call(x: Tensor) -> Tensor:
        seen.append(torch.compiler.is_compiling())
        return x + 1

    doubled = torch.compile(lambda x: call(x) * 2, backend="eager")(torch.ones(2))
    assert doubled.tolist() == [4, 4]
    assert seen == [False]


def test_a_module_that_compiled_itself_is_seen_and_its_call_can_be_replaced() -> None:
    module = nn.Linear(2, 2)
    assert not private.is_compiled(module)
    module.__dict__[private.COMPILED_CALL] = lambda x: x  # as module.compile() does
    x = torch.ones(2)
    assert private.is_compiled(module)
    assert module(x) is x


# -- modules and optimizers


def test_conversions_of_a_module_come_to_one_method() -> None:
    came = []
    module = nn.Linear(2, 2)
    original = getattr(module, private.APPLY)
    module.__dict__[private.APPLY] = lambda fn, recurse=True: came.append(recurse) or original(fn, recurse)
    module.to(torch.float64)
    module.half()
    module.share_memory()
    module.to_empty(device="cpu", recurse=False)
    assert came == [True, True, True, False]


def test_parameters_buffers_and_children_can_be_replaced() -> None:
    module = nn.Sequential(nn.BatchNorm1d(2, affine=False), nn.Linear(2, 2, bias=False))
    norm, linear = module
    weight, mean = nn.Parameter(torch.ones(2, 2)), torch.ones(2)
    private.own_parameters(linear)["weight"] = weight
    private.own_buffers(norm)["running_mean"] = mean
    assert linear.weight is weight and norm.running_mean is mean
    assert private.own_parameters(linear) == {"weight": weight, "bias": None}
    assert list(private.own_buffers(norm)) == ["running_mean", "running_var", "num_batches_tracked"]
    norm.register_buffer("fleeting", torch.ones(2), persistent=False)
    assert list(private.persistent_buffers(norm)) == ["running_mean", "running_var", "num_batches_tracked"]
    private.own_modules(module)["1"] = None
    assert list(module.children()) == [norm]


def test_a_state_dict_carries_versions_of_modules() -> None:
    metadata = private.metadata_of(nn.BatchNorm1d(2).state_dict())
    assert metadata is not None and metadata[""]["version"] == 2
    assert private.metadata_of({}) is None


def test_loading_returns_missing_and_unexpected_keys() -> None:
    returned = nn.Linear(2, 2, bias=False).load_state_dict({"more": torch.ones(1)}, strict=False)
    assert type(returned) is private.IncompatibleKeys
    assert returned == private.IncompatibleKeys(["weight"], ["more"])


def test_hooks_of_an_optimizer_lie_in_its_attributes() -> None:
    optimizer = torch.optim.SGD([torch.ones(1, requires_grad=True)])
    optimizer.register_step_pre_hook(print)
    optimizer.register_step_post_hook(print)
    optimizer.register_state_dict_pre_hook(print)
    optimizer.register_state_dict_post_hook(print)
    optimizer.register_load_state_dict_pre_hook(print)
    optimizer.register_load_state_dict_post_hook(print)
    assert [list(getattr(optimizer, name).values()) for name in private.OPTIMIZER_HOOKS] == [[print]] * 6


def test_a_scheduler_is_content_with_an_optimizer_that_is_marked() -> None:
    optimizer = torch.optim.SGD([torch.ones(1, requires_grad=True)])
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    private.mark_stepped(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler.step()


def test_the_timeout_of_a_process_group_is_the_one_it_was_made_with(tmp_path: Path) -> None:
    seconds = timedelta(seconds=77)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1, timeout=seconds)
    try:
        assert private.group_timeout(dist.group.WORLD) == seconds
    finally:
        dist.destroy_process_group()


def test_the_store_of_a_process_group_takes_the_first_value_of_a_key(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert private.default_store().compare_set("key", "", "first") == b"first"
        assert private.default_store().compare_set("key", "", "second") == b"first"
    finally:
        dist.destroy_process_group()


def test_a_distributed_tensor_without_its_local_one_has_let_go_of_the_memory(tmp_path: Path) -> None:
    from torch.distributed.tensor import DTensor, Replicate, init_device_mesh

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        local = torch.ones(2)
        uses = private.storage_uses(local.untyped_storage())
        distributed = DTensor.from_local(local, init_device_mesh("cpu", (1,)), [Replicate()])
        assert getattr(distributed, private.LOCAL_TENSOR).data_ptr() == local.data_ptr()
        assert private.storage_uses(local.untyped_storage()) == uses + 1
        delattr(distributed, private.LOCAL_TENSOR)
        assert private.storage_uses(local.untyped_storage()) == uses
        with pytest.raises(AttributeError):
            distributed.to_local()
    finally:
        dist.destroy_process_group()


def test_a_node_s_own_result_is_told_from_what_it_saves_of_others() -> None:
    found: list[bool] = []

    def pack(tensor: Tensor) -> Tensor:
        found.append(private.is_result_of_new_node(tensor))
        return tensor.detach()

    class Saves(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            y = x * 2
            ctx.save_for_backward(x, y)
            return y

    x = torch.ones(2, requires_grad=True) * 1
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        for run in (torch.exp, torch.sin, lambda x: torch.relu_(x * 1), lambda x: torch.exp_((x * 1)[1:]), Saves.apply):
            run(x)
    assert found == [True, False, True, True, False, True]


def test_modes_are_seen_and_can_be_left_for_a_while() -> None:
    class Below(private.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {})) * 2

    with torch.device("meta"), Mode() as mode, Below() as below:
        assert private.modes() == [mode, below]
        mode.asked.clear()
        with private.without_modes():
            assert private.modes() == []
            assert torch.ones(1).item() == 1.0
        assert not mode.asked
        assert private.modes() == [mode, below]
        assert torch.ones(1).device.type == "meta"
    assert private.modes() == []


def test_the_order_of_kernels_for_attention_can_be_set() -> None:
    before = private.attention_order()
    private.set_attention_order(before[::-1])
    assert private.attention_order() == before[::-1]
    private.set_attention_order(before)
    assert private.attention_order() == before


def test_a_hook_on_added_gradients_can_be_put_last() -> None:
    class Ours:
        def __call__(self, parameter: Tensor) -> None:
            order.append("ours")

    order: list[str] = []
    x = torch.ones(2, requires_grad=True)
    assert not private.put_hook_last(x, Ours)
    x.register_post_accumulate_grad_hook(Ours())
    assert not private.put_hook_last(x, Ours)
    handle = x.register_post_accumulate_grad_hook(lambda _: order.append("theirs"))
    x.register_hook(lambda gradient: order.append(f"others: {private.put_hook_last(x, Ours)}"))
    x.sum().backward()
    handle.remove()
    x.sum().backward()
    assert order == ["others: True", "theirs", "ours", "others: False", "ours"]
