"""Uses of the optimizer: its states, groups, hooks and state dicts."""

import copy
import io
from typing import Any

import torch
from outside.harness import Catalogue, Training
from outside.models import WIDTH, adamw
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

states = Catalogue("states")
use = states.add


@use()
def counted(run: Training) -> Any:
    state = run.optimizer.state
    return len(state), bool(state), all(p in state for p in run.given_parameters), len(list(state.keys()))


@use()
def moments_of_each_parameter(run: Training) -> Any:
    return [
        (run.optimizer.state[p]["exp_avg"], run.optimizer.state[p]["exp_avg_sq"], float(run.optimizer.state[p]["step"]))
        for p in run.given_parameters
    ]


@use()
def moments_by_items(run: Training) -> Any:
    return [(p.shape[0], s["exp_avg"].norm(), s["exp_avg_sq"].sum()) for p, s in run.optimizer.state.items()]


@use()
def names_of_states(run: Training) -> Any:
    return [sorted(s) for s in run.optimizer.state.values()], run.optimizer.state.get(torch.zeros(1), {})


@use()
def moments_kept_over_a_step(run: Training) -> Any:
    kept = [run.optimizer.state[p]["exp_avg"].clone() for p in run.parameters]
    run.step()
    return kept, [(run.optimizer.state[p]["exp_avg"] - k).norm() for p, k in zip(run.parameters, kept, strict=True)]


@use()
def updates_measured_against_weights(run: Training) -> Any:
    return [
        (s["exp_avg"] / (s["exp_avg_sq"].sqrt() + 1e-8)).norm().item() / p.detach().norm().item()
        for p, s in run.optimizer.state.items()
    ]


@use()
def all_reset_by_clear(run: Training) -> Any:
    run.optimizer.state.clear()
    return len(run.optimizer.state)


@use()
def all_reset_by_a_new_dict(run: Training) -> Any:
    from collections import defaultdict

    run.optimizer.state = defaultdict(dict)


@use()
def some_popped(run: Training) -> Any:
    for p in run.given_parameters[::2]:
        run.optimizer.state.pop(p, None)
    return len(run.optimizer.state)


@use()
def one_deleted(run: Training) -> Any:
    del run.optimizer.state[run.model[3].weight]
    return run.model[3].weight in run.optimizer.state


@use()
def one_reset_by_an_empty_dict(run: Training) -> Any:
    run.optimizer.state[run.model[3].weight] = {}
    run.optimizer.state[run.model[4].weight].clear()


@use()
def zeroed_in_place(run: Training) -> Any:
    for state in run.optimizer.state.values():
        state["exp_avg"].zero_()
        state["exp_avg_sq"].mul_(0.5)


@use()
def rows_zeroed_in_place(run: Training) -> Any:
    """As for words that are new, or neurons that are reborn."""
    for layer in run.model:
        run.optimizer.state[layer.weight]["exp_avg"][3:5] = 0
        run.optimizer.state[layer.weight]["exp_avg_sq"].data[3:5].fill_(1e-4)


@use()
def replaced(run: Training) -> Any:
    for state in run.optimizer.state.values():
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = torch.zeros_like(state[name])


@use()
def swapped_between_parameters(run: Training) -> Any:
    a, b = run.optimizer.state[run.model[2].weight], run.optimizer.state[run.model[9].weight]
    a["exp_avg"], b["exp_avg"] = b["exp_avg"], a["exp_avg"]


@use()
def steps_counted_anew(run: Training) -> Any:
    for state in run.optimizer.state.values():
        state["step"] = torch.tensor(0.0)


@use()
def steps_counted_anew_in_place(run: Training) -> Any:
    for state in run.optimizer.state.values():
        state["step"].zero_()


@use()
def one_step_count_edited(run: Training) -> Any:
    run.optimizer.state[run.model[3].weight]["step"].fill_(100)
    run.step()
    return [float(s["step"]) for s in run.optimizer.state.values()]


@use()
def state_dict_saved_and_loaded(run: Training) -> Any:
    file = io.BytesIO()
    torch.save(run.optimizer.state_dict(), file)
    run.train(2)
    file.seek(0)
    run.optimizer.load_state_dict(torch.load(file))


@use()
def state_dict_copied_and_loaded(run: Training) -> Any:
    saved = copy.deepcopy(run.optimizer.state_dict())
    run.step()
    run.optimizer.load_state_dict(saved)
    return [g["lr"] for g in run.optimizer.param_groups]


@use()
def taken_to_an_unmanaged_optimizer(run: Training) -> Any:
    other = run.unmanaged()
    other.load_state_dict(run.model.state_dict())
    optimizer = adamw(other.parameters())
    optimizer.load_state_dict(run.optimizer.state_dict())
    run.kind.loss(other, torch.ones(4, WIDTH)).backward()
    optimizer.step()
    return dict(other.state_dict())


@use()
def taken_from_an_unmanaged_optimizer(run: Training) -> Any:
    other = run.unmanaged()
    optimizer = adamw(other.parameters())
    for _ in range(3):
        run.kind.loss(other, torch.ones(4, WIDTH)).backward()
        optimizer.step()
        optimizer.zero_grad()
    run.model.load_state_dict(other.state_dict())
    run.optimizer.load_state_dict(optimizer.state_dict())


@use()
def read_through_distributed_checkpoints(run: Training) -> Any:
    found = get_optimizer_state_dict(run.model, run.optimizer, options=StateDictOptions(full_state_dict=True))
    return {name: (s["exp_avg"], s["exp_avg_sq"], float(s["step"])) for name, s in found["state"].items()}  # type: ignore[union-attr]


@use()
def read_through_distributed_checkpoints_before_training(run: Training) -> Any:
    """It takes a step with a rate of zero where there are no states; here there are."""
    get_optimizer_state_dict(run.model, run.optimizer)
    return [float(s["step"]) for s in run.optimizer.state_dict()["state"].values()]


@use()
def model_read_through_distributed_checkpoints(run: Training) -> Any:
    return dict(get_model_state_dict(run.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)))


@use()
def written_through_distributed_checkpoints(run: Training) -> Any:
    saved = get_optimizer_state_dict(run.model, run.optimizer)
    saved = {
        "state": {n: {k: v.clone() for k, v in s.items()} for n, s in saved["state"].items()},  # type: ignore[union-attr]
        "param_groups": saved["param_groups"],
    }
    weights = {name: value.clone() for name, value in get_model_state_dict(run.model).items()}
    run.train(2)
    set_optimizer_state_dict(run.model, run.optimizer, saved)
    set_model_state_dict(run.model, weights)


@use()
def both_read_through_distributed_checkpoints(run: Training) -> Any:
    weights, optimizer = get_state_dict(run.model, run.optimizer)
    return sorted(weights), sorted(optimizer["state"])


@use()
def rates_edited(run: Training) -> Any:
    for group in run.optimizer.param_groups:
        group["lr"] = 3e-3
        group["weight_decay"] = 0.0
        group["betas"] = (0.8, 0.95)


@use()
def rates_edited_through_the_optimizer_given_to_boost(run: Training) -> Any:
    """Schedulers made before boost hold it."""
    for group in run.given_optimizer.param_groups:
        group["lr"] *= 0.5
    run.step()
    return [group["lr"] for group in run.optimizer.param_groups]


@use()
def a_scheduler_made_after_boost(run: Training) -> Any:
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(run.optimizer, 5)
    seen = []
    for _ in range(3):
        run.step()
        scheduler.step()
        seen.append(scheduler.get_last_lr())
    return seen


@use()
def a_scheduler_of_rate_and_momentum(run: Training) -> Any:
    scheduler = torch.optim.lr_scheduler.OneCycleLR(run.optimizer, 2e-2, total_steps=10)
    seen = []
    for _ in range(3):
        run.step()
        scheduler.step()
        seen.append((scheduler.get_last_lr(), run.optimizer.param_groups[0]["betas"]))
    return seen


@use()
def a_group_added(run: Training) -> Any:
    more = nn.Linear(WIDTH, WIDTH).to(run.device)
    run.optimizer.add_param_group({"params": list(more.parameters()), "lr": 1e-3})
    for _ in range(2):
        run.backward(more(run.model(run.batch())).square().mean())
        run.optimizer.step()
        run.optimizer.zero_grad()
    return list(more.parameters()), len(run.optimizer.param_groups)


@use()
def frozen_and_unfrozen_with_a_reset(run: Training) -> Any:
    part = run.given_parameters[:8]
    for p in part:
        p.requires_grad_(False)
    run.train(2)
    for p in part:
        p.requires_grad_(True)
        run.optimizer.state.pop(p, None)
    run.step()
    return [float(run.optimizer.state[p]["step"]) for p in run.parameters]


@use()
def hooks_around_steps(run: Training) -> Any:
    seen: list[Any] = []

    def note(*_: Any) -> None:
        seen.append(run.model[3].bias.sum().item())

    handles = [run.optimizer.register_step_pre_hook(note), run.optimizer.register_step_post_hook(note)]
    run.train(2)
    for handle in handles:
        handle.remove()
    return seen


@use()
def hooks_around_state_dicts(run: Training) -> Any:
    seen: list[str] = []

    def renamed(optimizer: Any, saved: Any) -> Any:
        seen.append("saved")
        return {**saved, "more": 1}

    def loading(optimizer: Any, saved: Any) -> Any:
        seen.append("loading")
        return {name: value for name, value in saved.items() if name != "more"}

    handles = [
        run.optimizer.register_state_dict_pre_hook(lambda optimizer: seen.append("saving")),
        run.optimizer.register_state_dict_post_hook(renamed),
        run.optimizer.register_load_state_dict_pre_hook(loading),
        run.optimizer.register_load_state_dict_post_hook(lambda optimizer: seen.append("loaded")),
    ]
    saved = run.optimizer.state_dict()
    run.step()
    run.optimizer.load_state_dict(saved)
    for handle in handles:
        handle.remove()
    return seen, "more" in saved


@use()
def names_kept_in_groups(run: Training) -> Any:
    """As an optimizer has them that was given ``named_parameters()``."""
    saved = run.optimizer.state_dict()
    for group in saved["param_groups"]:
        group["param_names"] = [f"p{i}" for i in group["params"]]
    run.optimizer.load_state_dict(saved)
    found = run.optimizer.state_dict()["param_groups"]
    for group in run.optimizer.param_groups:
        group.pop("param_names", None)
    return [group.get("param_names") for group in found]


@use()
def options_of_groups(run: Training) -> Any:
    for index, group in enumerate(run.optimizer.param_groups):
        group["name"] = f"group {index}"
    seen = [group["name"] for group in run.optimizer.state_dict()["param_groups"]]
    for group in run.optimizer.param_groups:
        del group["name"]
    return seen, sorted(
        k for k in ("lr", "betas", "eps", "weight_decay", "params") if k in run.optimizer.param_groups[0]
    )


@use()
def printed(run: Training) -> Any:
    return "lr: 0.01" in repr(run.optimizer), "weight_decay: 0.1" in str(run.optimizer)


@use()
def states_of_the_optimizer_given_to_boost(run: Training) -> Any:
    return len(run.given_optimizer.state)


@use()
def bytes_of_states(run: Training) -> Any:
    return sum(s[name].nbytes for s in run.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq"))


@use()
def states_put_on_the_device_by_hand(run: Training) -> Any:
    """As older scripts do after loading."""
    for state in run.optimizer.state.values():
        for name, value in state.items():
            if torch.is_tensor(value):
                state[name] = value.to(run.device)


@use()
def copied_deeply(run: Training) -> Any:
    found = {i: copy.deepcopy(dict(run.optimizer.state[p])) for i, p in enumerate(run.given_parameters)}
    run.step()
    return [(s["exp_avg"], s["exp_avg_sq"]) for s in found.values()]


@use()
def a_group_split_in_two(run: Training) -> Any:
    """By hand: no decay for biases, as is often added later."""
    group = run.optimizer.param_groups[0]
    biases = [p for p in group["params"] if p.dim() == 1]
    group["params"] = [p for p in group["params"] if p.dim() > 1]
    run.optimizer.add_param_group({"params": biases, "weight_decay": 0.0})
    run.train(2)
    return [len(group["params"]) for group in run.optimizer.param_groups]


@use()
def parameters_taken_out_of_a_group(run: Training) -> Any:
    group = run.optimizer.param_groups[0]
    taken, group["params"] = group["params"][:4], group["params"][4:]
    for p in taken:
        del run.optimizer.state[p]
    run.step()
    return len(run.optimizer.state)


@use()
def a_parameter_replaced_in_its_group(run: Training) -> Any:
    """As after growing a layer."""
    new = nn.Parameter(torch.full_like(run.model[3].weight, 0.01))
    old, run.model[3].weight = run.model[3].weight, new
    group = run.optimizer.param_groups[0]
    group["params"] = [new if p is old else p for p in group["params"]]
    run.optimizer.state.pop(old, None)
    run.train(2)
    return new


@use()
def defaults_edited(run: Training) -> Any:
    """They count for groups that are added later, and for those alone."""
    run.optimizer.defaults["lr"] = 5e-3
    run.step()
    return run.optimizer.param_groups[0]["lr"], run.optimizer.defaults["lr"]


@use()
def rates_by_layer(run: Training) -> Any:
    """A scheduler whose rate is a tensor's would be another matter; this is a number in each step."""
    seen = []
    for step in range(3):
        for group in run.optimizer.param_groups:
            group["lr"] = 1e-2 / (step + 1)
        run.step()
        seen.append([float(s["step"]) for s in run.optimizer.state_dict()["state"].values()])
    return seen
