"""What people do to ``optimizer.state`` between two steps, as functions of an optimizer and its parameters."""

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Parameters = list[Any]
Use = Callable[[Any, Parameters], Any]

SAFE = ("exp_avg", "momentum_buffer", "prev", "sum", "square_avg")
"""States that may have any value without making parameters NaN."""


def clear(optimizer: Any, ps: Parameters) -> Any:
    optimizer.state.clear()
    return len(optimizer.state), bool(optimizer.state), list(optimizer.state), ps[0] in optimizer.state


def pop_all(optimizer: Any, ps: Parameters) -> Any:
    popped = [optimizer.state.pop(p, None) for group in optimizer.param_groups for p in group["params"]]
    return [sorted(state) for state in popped], [tensors(state) for state in popped], optimizer.state.pop(ps[0], 5)


def delete_one(optimizer: Any, ps: Parameters) -> Any:
    del optimizer.state[ps[1]]
    return ps[1] in optimizer.state, ps[2] in optimizer.state, len(optimizer.state)


def assign_nothing_to_one(optimizer: Any, ps: Parameters) -> Any:
    optimizer.state[ps[0]] = {}
    return dict(optimizer.state[ps[0]])


def clear_one(optimizer: Any, ps: Parameters) -> Any:
    optimizer.state[ps[0]].clear()
    return len(optimizer.state[ps[0]])


def new_defaultdict(optimizer: Any, ps: Parameters) -> Any:
    optimizer.state = defaultdict(dict)
    return len(optimizer.state), optimizer.state.get(ps[0])


def new_dict_with_some(optimizer: Any, ps: Parameters) -> Any:
    optimizer.state = defaultdict(dict, {p: optimizer.state[p] for p in ps[::2]})
    return len(optimizer.state), [p in optimizer.state for p in ps]


def pop_items(optimizer: Any, ps: Parameters) -> Any:
    while optimizer.state:
        optimizer.state.popitem()
    return len(optimizer.state)


def zeros_for_all(optimizer: Any, ps: Parameters) -> Any:
    for _, state in list(optimizer.state.items()):
        for name in state:
            state[name] = torch.zeros_like(state[name])
    return everything(optimizer)


def zero_in_place(optimizer: Any, ps: Parameters) -> Any:
    for state in optimizer.state.values():
        for value in state.values():
            value.zero_()
    return everything(optimizer)


def count_from_zero(optimizer: Any, ps: Parameters) -> Any:
    for state in optimizer.state.values():
        state["step"].zero_()
    return len(optimizer.state)


def scale_in_place(optimizer: Any, ps: Parameters) -> Any:
    for p in ps:
        for name in floats(optimizer.state[p]):
            optimizer.state[p][name].mul_(0.5)
    return everything(optimizer)


def scale_by_assignment(optimizer: Any, ps: Parameters) -> Any:
    for p in ps:
        for name in floats(optimizer.state[p]):
            optimizer.state[p][name] = optimizer.state[p][name] * 0.5
    return everything(optimizer)


def augmented(optimizer: Any, ps: Parameters) -> Any:
    for p in ps:
        for name in floats(optimizer.state[p]):
            optimizer.state[p][name] *= 0.25
        if "step" in optimizer.state[p]:
            optimizer.state[p]["step"] += 3
    return everything(optimizer)


def foreach(optimizer: Any, ps: Parameters) -> Any:
    for name in floats(optimizer.state[ps[0]]):
        torch._foreach_mul_([optimizer.state[p][name] for p in ps], 0.5)
        torch._foreach_add_(
            [optimizer.state[p][name] for p in ps], torch._foreach_abs([optimizer.state[p][name] for p in ps])
        )
    return everything(optimizer)


def elements(optimizer: Any, ps: Parameters) -> Any:
    name = floats(optimizer.state[ps[0]])[0]
    held = optimizer.state[ps[0]][name]
    held[0] = 0.5
    held[1].fill_(0.25)
    held[2, 3:9] *= 0.5
    held[held > 0.4] = 0.125
    return held, held[0], held[1, 4].item()


def views(optimizer: Any, ps: Parameters) -> Any:
    name = next(name for name in SAFE if name in optimizer.state[ps[0]])
    held = optimizer.state[ps[0]][name]
    held.view(-1)[5:70].mul_(3)
    held.t()[2].add_(0.5)
    first, *_, last = held.unbind(0)
    last.copy_(first)
    held.chunk(2)[1][0].mul_(2)
    held.reshape(-1).as_strided((4,), (2,)).zero_()
    return held, last, held.view(torch.int32)[0]


def data_and_detach(optimizer: Any, ps: Parameters) -> Any:
    for p in ps:
        name = floats(optimizer.state[p])[-1]
        optimizer.state[p][name].data.mul_(0.5)
        optimizer.state[p][name].detach().add_(0.125)
        optimizer.state[p][name].data = optimizer.state[p][name].data * 2
        optimizer.state[p][name].data = optimizer.state[p][name].data.to("cpu")  # the well-known "optimizer to device"
    return everything(optimizer)


def into_out(optimizer: Any, ps: Parameters) -> Any:
    state = optimizer.state[ps[0]]
    for name in floats(state):
        torch.mul(state[name], 0.5, out=state[name])
        torch.nn.init.constant_(optimizer.state[ps[1]][name], 0.25)
    return everything(optimizer)


def from_the_parameter(optimizer: Any, ps: Parameters) -> Any:
    name = floats(optimizer.state[ps[0]])[0]
    with torch.no_grad():
        optimizer.state[ps[0]][name].lerp_(torch.full_like(optimizer.state[ps[0]][name], 2.0), 0.25)
        optimizer.state[ps[2]][name].addcmul_(optimizer.state[ps[4]][name], optimizer.state[ps[6]][name], value=3)
    return everything(optimizer)


def held_over_a_change(optimizer: Any, ps: Parameters) -> Any:
    name = floats(optimizer.state[ps[0]])[0]
    old = optimizer.state[ps[0]][name]
    optimizer.state[ps[0]][name] = torch.zeros_like(old)
    seen = old.clone(), optimizer.state[ps[0]][name].clone()
    old.mul_(0.5)  # nobody's any more
    again = optimizer.state[ps[0]][name].clone()
    optimizer.state[ps[2]][name] = old
    return seen, again, old.clone(), everything(optimizer)


def put_aside_and_back(optimizer: Any, ps: Parameters) -> Any:
    aside, of_one = optimizer.state, optimizer.state[ps[0]]
    optimizer.state = defaultdict(dict)
    between = len(optimizer.state), len(aside), tensors(of_one)
    optimizer.state = aside
    of_one = optimizer.state[ps[1]]
    optimizer.state[ps[1]] = {}
    gone = len(optimizer.state[ps[1]])
    optimizer.state[ps[1]] = of_one
    return between, gone, everything(optimizer)


def shallow_copy_back(optimizer: Any, ps: Parameters) -> Any:
    kept = optimizer.state.copy()
    of_one = optimizer.state[ps[0]].copy()
    optimizer.state.clear()
    optimizer.state.update(kept)
    optimizer.state[ps[1]].update({name: value * 1 for name, value in of_one.items() if value.dim() == 0})
    return everything(optimizer)


def deep_copy_back(optimizer: Any, ps: Parameters) -> Any:
    kept = {p: copy.deepcopy(dict(optimizer.state[p])) for p in ps}
    for state in optimizer.state.values():
        for value in state.values():
            value.zero_()
    optimizer.state.update(kept)
    return everything(optimizer), [type(value) for value in kept[ps[0]].values()]


def swap_two(optimizer: Any, ps: Parameters) -> Any:
    a, b = optimizer.state[ps[0]], optimizer.state[ps[2]]
    optimizer.state[ps[0]], optimizer.state[ps[2]] = b, a
    return everything(optimizer)


def map_over(optimizer: Any, ps: Parameters) -> Any:
    # Lightning and accelerate move states to a device like this, keeping the types of what they find.
    for p, state in optimizer.state.items():
        optimizer.state[p] = type(state)(OrderedDict((name, value.to("cpu")) for name, value in state.items()))
    return everything(optimizer)


def whole_new_values(optimizer: Any, ps: Parameters) -> Any:
    for p in ps:
        state = optimizer.state[p]
        optimizer.state[p] = {name: value + 1 if name == "step" else value.abs() for name, value in state.items()}
    return everything(optimizer)


def notes(optimizer: Any, ps: Parameters) -> Any:
    optimizer.state[ps[0]]["my_note"] = "kept"
    optimizer.state[ps[0]]["norms"] = torch.ones(3)
    optimizer.state[ps[0]]["norms"].add_(1)
    found = list(optimizer.state[ps[0]])[-2:], optimizer.state[ps[0]]["norms"], optimizer.state[ps[0]].pop("my_note")
    saved = optimizer.state_dict()
    optimizer.load_state_dict(copy.deepcopy(saved))
    loaded = optimizer.state[ps[0]].pop("norms")
    return found, saved["state"][0]["norms"], loaded, list(optimizer.state[ps[0]])


def of_nobody(optimizer: Any, ps: Parameters) -> Any:
    optimizer.state["global"]["count"] = 3
    optimizer.state["global"]["count"] += 1
    saved = optimizer.state_dict()["state"]["global"]
    return saved, "global" in optimizer.state, optimizer.state.get("nothing"), len(optimizer.state)


def read(optimizer: Any, ps: Parameters) -> Any:
    state = optimizer.state
    entries = [(name, value.dtype, value.shape, value.device) for s in state.values() for name, value in s.items()]
    norms = [value.float().norm().item() for s in state.values() for value in s.values()]
    same = state == state, state[ps[0]] == state[ps[0]], state[ps[0]] is state[ps[0]], isinstance(state[ps[0]], dict)
    merged = {**state[ps[0]]}
    text = repr(state[ps[1]])
    arrays = [value.numpy().sum().item() for value in merged.values()]
    return entries, norms, same, tensors(merged), text, arrays, [p in state for p in ps], everything(optimizer)


def move_momentum(optimizer: Any, ps: Parameters) -> Any:
    # A restart that keeps what it knows: the second value of each from the first.
    for p in ps:
        names = floats(optimizer.state[p])
        optimizer.state[p][names[-1]].copy_(optimizer.state[p][names[0]].square())
    return everything(optimizer)


EDITS: dict[str, Use] = {
    use.__name__: use
    for use in (
        *(read, clear, pop_all, delete_one, assign_nothing_to_one, clear_one, new_defaultdict, new_dict_with_some),
        *(pop_items, zeros_for_all, zero_in_place, count_from_zero, scale_in_place, scale_by_assignment, augmented),
        *(foreach, elements, views, data_and_detach, into_out, from_the_parameter, held_over_a_change),
        *(put_aside_and_back, shallow_copy_back, deep_copy_back, swap_two, map_over, whole_new_values, notes),
        *(of_nobody, move_momentum),
    )
}


def floats(state: Any) -> list[str]:
    """What there is for each element."""
    return [name for name in state if name != "step" and isinstance(state[name], Tensor)]


def tensors(state: Any) -> dict[str, Any]:
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()}


def everything(optimizer: Any) -> list[dict[str, Any]]:
    """Every state, read through the mapping."""
    return [tensors(state) for state in optimizer.state.values()]


def same(a: Any, b: Any) -> bool:
    """Equal, tensors bit for bit."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)
