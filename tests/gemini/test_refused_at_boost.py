"""What cannot be boosted is refused by name, with the way out, and model and optimizer are as they were."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.lazy import LazyInitContext
from gemini.nn.optimizer import HybridAdam

WIDTH = 8


def build() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(3)])


def booster(**plugin: Any) -> Booster:
    return Booster(plugin=GeminiPlugin(precision="fp32", telemetry=False, **{"host_memory": "8MiB", **plugin}))


def check_refused(model: Any, optimizer: Any, error: type[Exception], says: str) -> None:
    before = {name: (p, p.data_ptr(), type(p)) for name, p in model.named_parameters() if type(p) is nn.Parameter}
    values = {name: p.detach().clone() for name, (p, *_) in before.items() if not p.is_meta}
    classes = [type(module) for module in model.modules()]
    with pytest.raises(error, match=says):
        booster().boost(model, optimizer)
    assert before == {
        name: (p, p.data_ptr(), type(p)) for name, p in model.named_parameters() if type(p) is nn.Parameter
    }
    assert all(torch.equal(value, before[name][0]) for name, value in values.items())
    assert classes == [type(module) for module in model.modules()]


def scripted() -> nn.Module:
    model = build()
    model[1] = torch.jit.script(model[1])
    return model


def traced() -> nn.Module:
    model = build()
    model[1] = torch.jit.trace(build(), torch.ones(2, WIDTH))
    return model


def with_alias(change: Callable[[nn.Sequential], None]) -> Callable[[], nn.Module]:
    def build_it() -> nn.Module:
        model = build()
        change(model)
        return model

    return build_it


def one_memory(model: nn.Sequential) -> None:
    model[1].weight.data = model[0].weight.data


def part_of_memory(model: nn.Sequential) -> None:
    model[2].bias.data = model[0].weight.data[:, 3]


def buffer_of_memory(model: nn.Sequential) -> None:
    model[1].register_buffer("shown", model[0].weight.data)


def expanded(model: nn.Sequential) -> None:
    model[1].bias = nn.Parameter(torch.ones(1).expand(WIDTH))


def lazily_one_memory() -> nn.Module:
    with LazyInitContext():
        return with_alias(one_memory)()


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return build()


def partly_on_meta() -> nn.Module:
    model = build()
    model[2].to("meta")
    return model


def in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return build()


def lazy_linear() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LazyLinear(WIDTH))


def lazy_linear_in_the_context() -> nn.Module:
    with LazyInitContext():
        return lazy_linear()


def lazy_batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LazyBatchNorm1d(affine=False))


class Wrapper(torch.Tensor):
    """A tensor whose values lie in another, as quantised and sharded ones do."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "Wrapper":
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        unwrapped = [arg.inner if isinstance(arg, Wrapper) else arg for arg in args]
        result = func(*unwrapped, **(kwargs or {}))
        return Wrapper(result) if isinstance(result, torch.Tensor) else result


def wrapped() -> nn.Module:
    model = build()
    model[1].weight = nn.Parameter(Wrapper(torch.ones(WIDTH, WIDTH)))
    return model


MODELS = [
    (scripted, "1 is a torch.jit.ScriptModule"), (traced, "1 is a torch.jit.ScriptModule"),
    (with_alias(one_memory), "0.weight and 1.weight.*one parameter"),
    (with_alias(part_of_memory), "0.weight and 2.bias"), (with_alias(buffer_of_memory), "0.weight and 1.shown"),
    (lazily_one_memory, "0.weight and 1.weight"), (with_alias(expanded), "1.bias share memory"),
    (on_meta, "0.weight is on the meta device.*LazyInitContext"), (partly_on_meta, "2.weight is on the meta device"),
    (in_inference_mode, "0.weight was made inside torch.inference_mode"),
    (lazy_linear, "1.weight has no shape yet.*call the model once"),
    (lazy_linear_in_the_context, "1.weight has no shape yet"), (lazy_batch_norm, "buffer 1.running_mean has no shape"),
    (wrapped, "1.weight is a Wrapper.*before it is sharded"),
    (lambda: nn.Sequential(nn.Linear(WIDTH, 4), nn.Embedding(4, 4, sparse=True)), "1 with sparse=False"),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_models_that_chunks_cannot_hold_are_refused() -> None:
    for make, says in MODELS:
        check_refused(make(), None, ValueError, says)


def test_a_model_that_accelerate_offloads_is_refused_and_works_without_its_hooks() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = build()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    check_refused(model, None, ValueError, "remove_hook_from_submodules")
    accelerate.hooks.remove_hook_from_submodules(model)
    model, *_ = booster().boost(model)
    assert torch.equal(model(torch.ones(2, WIDTH)), build()(torch.ones(2, WIDTH)))


def test_distributed_wrappers_are_refused(tmp_path: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        check_refused(nn.parallel.DistributedDataParallel(build()), None, ValueError, "DistributedDataParallel.*inside")
        sharded = build()
        torch.distributed.fsdp.fully_shard(sharded, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        check_refused(sharded, None, ValueError, "FSDP")
    finally:
        torch.distributed.destroy_process_group()


def test_boost_is_refused_where_tensors_are_not_tensors() -> None:
    for mode, says in (
        (LazyInitContext, "LazyInitContext.*leave the context"),
        (torch.inference_mode, "inference_mode"),
        (lambda: torch.device("meta"), "default device is meta"),
    ):
        model = build()
        with mode():  # type: ignore[operator]
            check_refused(model, None, ValueError, says)


def test_boost_under_other_contexts_changes_nothing() -> None:
    def train(mode: Any) -> list[float]:
        model: Any = build()
        optimizer: Any = HybridAdam(model.parameters(), lr=0.1)
        with mode():
            model, optimizer, *_ = booster().boost(model, optimizer)
        losses = []
        for step in range(3):
            loss = model(torch.full((2, WIDTH), step + 1.0)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    expected = train(torch.enable_grad)
    for mode in (torch.no_grad, lambda: torch.device("cpu"), lambda: torch.autocast("cpu", torch.bfloat16)):
        assert train(mode) == expected


def test_boosted_models_and_their_parts_are_not_boosted_again() -> None:
    teacher, *_ = booster().boost(build())
    expected = {name: value.clone() for name, value in teacher.state_dict().items()}
    plain: Any = build()
    plain[1].weight = teacher[1].weight
    held = nn.ModuleDict({"teacher": teacher, "student": nn.Linear(WIDTH, WIDTH)})
    for model, says in (
        (teacher, "this model has been boosted already"),
        (held, "teacher has been boosted already.*in a list"),
        (teacher[1], "this is part of a model that has been boosted"),
        (nn.Sequential(nn.Linear(WIDTH, WIDTH), teacher[1]), "1 is part of a model that has been boosted"),
        (plain, "1.weight lives in the chunks of another boosted model"),
        (nn.ParameterList([teacher[0].bias]), "0 lives in the chunks"),
    ):
        with pytest.raises(ValueError, match=says):
            booster().boost(model)
    assert all(torch.equal(value, expected[name]) for name, value in teacher.state_dict().items())
    student = nn.Module()
    student.layer, student.teacher = nn.Linear(WIDTH, WIDTH), [teacher]  # type: ignore[assignment]
    booster().boost(student)


def test_an_optimizer_must_be_the_models_own() -> None:
    model, other = build(), build()
    for optimizer, says in (
        (HybridAdam(other.parameters()), "none of the 6 parameters .* is one of the model's 6"),
        (torch.optim.SGD(nn.Linear(2, 2).parameters()), "none of the 2 parameters"),
    ):
        check_refused(model, optimizer, ValueError, says)
    boosted, boosted_optimizer, *_ = booster().boost(other, HybridAdam(other.parameters()))
    check_refused(model, boosted_optimizer, ValueError, "boosted already, with another model")
    both = torch.optim.AdamW([*model.parameters(), *boosted.parameters()])
    check_refused(model, both, ValueError, "6 of the 12 parameters .*another boosted model")


def test_an_optimizer_of_more_than_the_model_is_accepted() -> None:
    model, criterion = build(), nn.Linear(WIDTH, 1)
    optimizer: Any = HybridAdam([*model.parameters(), *criterion.parameters()], lr=0.1)
    model, optimizer, *_ = booster().boost(model, optimizer)  # type: ignore[assignment]
    before = criterion.weight.detach().clone()
    criterion(model(torch.ones(2, WIDTH))).sum().backward()
    optimizer.step()
    assert not torch.equal(criterion.weight, before)


def test_collections_of_what_is_given_once_are_no_dataloaders() -> None:
    a, b = build(), build()
    adams = [HybridAdam(a.parameters()), HybridAdam(b.parameters())]
    schedulers = [torch.optim.lr_scheduler.ConstantLR(adam) for adam in adams]
    for arguments, says in (
        ((a, [*adams, a]), "list of optimizers and other things: give several optimizers of one model as a list"),
        ((a, (*adams, None)), "tuple of optimizers"),
        ((a, {"g": adams[0]}), "dict of optimizers"),
        ((a, [{"optimizer": adams[0], "lr_scheduler": schedulers[0]}]), "list of optimizers"),
        ((a, adams[0], schedulers), "list of learning rate schedulers"),
        (([a, b], adams[0]), "list of models, expected one"),
        (({"g": a, "d": b},), "dict of models"),
    ):
        with pytest.raises(TypeError, match=says):
            booster().boost(*arguments)
    with pytest.raises(ValueError, match="none of the 6 parameters of this HybridAdam is one of the model's"):
        booster().boost(a, adams)
    batches = [{"x": torch.ones(2)}, {"x": torch.ones(2)}]
    assert booster().boost(a, adams[0], None, batches)[3] is batches


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_a_torch_optimizer_keeps_its_states_where_boost_fails(kind: type[torch.optim.Optimizer]) -> None:
    model, reference = build(), build()
    ours, plain = (kind(m.parameters(), lr=0.1) for m in (model, reference))  # type: ignore[call-arg]
    for m, optimizer in ((model, ours), (reference, plain)):
        m(torch.ones(2, WIDTH)).sum().backward()
        optimizer.step()
    with pytest.raises(torch.OutOfMemoryError):
        booster(device_memory=100).boost(model, ours)
    for m, optimizer in ((model, ours), (reference, plain)):
        m(torch.ones(2, WIDTH)).sum().backward()
        optimizer.step()
    assert ours.param_groups[0].keys() == plain.param_groups[0].keys()
    assert all(map(torch.equal, model.parameters(), reference.parameters()))


def test_an_optimizer_without_any_parameter_that_trains_is_told_of() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = HybridAdam(model[0].parameters())
    model[0].requires_grad_(False)
    with pytest.warns(UserWarning, match=r"none of the 2 that train \(the first is 1\.weight\)"):
        Booster(plugin=GeminiPlugin(telemetry=False)).boost(model, optimizer)
