"""Uses of gradients: clearing them in every way, editing, replacing and keeping them."""

from typing import Any

import torch
from outside.harness import Catalogue
from outside.models import WIDTH
from outside.placements import Refusal
from outside.running import Training, in_another_thread
from torch import Tensor, nn

gradients = Catalogue("gradients")
use = gradients.add

BY_AUTOGRAD = Refusal(RuntimeError, r"torch\.autograd\.grad")
"""For gradients that have a graph of their own: a chunk keeps numbers."""


def steps(run: Training, clear: Any, count: int = 3) -> None:
    """Train with another way of clearing, before each forward."""
    for _ in range(count):
        clear()
        run.backward()
        run.optimizer.step()
    clear()


def steps_cleared_between(run: Training, clear: Any, count: int = 3) -> None:
    """Train with another way of clearing, between forward and backward."""
    for _ in range(count):
        loss = run.loss()
        clear()
        run.backward(loss)
        run.optimizer.step()
    clear()


@use()
def cleared_by_none(run: Training) -> Any:
    def clear() -> None:
        for p in run.model.parameters():
            p.grad = None

    steps(run, clear)


@use()
def cleared_by_none_in_a_kept_list(run: Training) -> Any:
    def clear() -> None:
        for p in run.given_parameters:
            p.grad = None

    steps(run, clear)


@use()
def cleared_by_none_between_forward_and_backward(run: Training) -> Any:
    def clear() -> None:
        for p in run.given_parameters:
            p.grad = None

    steps_cleared_between(run, clear)


@use()
def cleared_by_zero(run: Training) -> Any:
    def clear() -> None:
        for p in run.model.parameters():
            if p.grad is not None:
                p.grad.zero_()

    steps(run, clear)
    return [p.grad for p in run.parameters]


@use()
def cleared_by_zero_between_forward_and_backward(run: Training) -> Any:
    def clear() -> None:
        for p in run.given_parameters:
            if p.grad is not None:
                p.grad.detach_()
                p.grad.zero_()

    steps_cleared_between(run, clear)


@use()
def cleared_by_foreach(run: Training) -> Any:
    def clear() -> None:
        grads = [p.grad for p in run.parameters if p.grad is not None]
        if grads:
            torch._foreach_zero_(grads)

    steps(run, clear)


@use()
def cleared_by_data(run: Training) -> Any:
    def clear() -> None:
        for p in run.parameters:
            if p.grad is not None:
                p.grad.data.fill_(0)

    steps(run, clear)


@use()
def cleared_by_del(run: Training) -> Any:
    def clear() -> None:
        for p in run.model.parameters():
            if p.grad is not None:
                del p.grad

    steps(run, clear)


@use()
def cleared_by_the_model(run: Training) -> Any:
    steps(run, run.model.zero_grad)


@use()
def cleared_to_zero_by_the_model(run: Training) -> Any:
    steps(run, lambda: run.model.zero_grad(set_to_none=False))
    return [p.grad for p in run.parameters]


@use()
def cleared_to_zero_by_the_optimizer(run: Training) -> Any:
    steps(run, lambda: run.optimizer.zero_grad(set_to_none=False))
    return [p.grad for p in run.parameters]


@use("blocks")
def cleared_by_each_module(run: Training) -> Any:
    def clear() -> None:
        run.model.embedding.zero_grad()
        for block in run.model.blocks:
            block.zero_grad()
        run.model.head.zero_grad(set_to_none=False)

    steps(run, clear)


@use("blocks")
def cleared_by_one_block_only(run: Training) -> Any:
    steps(run, run.model.blocks[2].zero_grad)
    run.optimizer.zero_grad()


@use()
def cleared_by_a_wrapper_of_the_model(run: Training) -> Any:
    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

    steps(run, Wrapper(run.model).zero_grad)


@use()
def cleared_by_the_optimizer_given_to_boost(run: Training) -> Any:
    steps(run, run.given_optimizer.zero_grad)


@use()
def cleared_by_another_optimizer(run: Training) -> Any:
    steps(run, torch.optim.SGD(run.given_parameters, lr=0.1).zero_grad)


@use()
def cleared_by_an_optimizer_that_copies_its_attributes(run: Training) -> Any:
    """As Lightning wraps an optimizer: a subclass of its class, with its ``__dict__``."""
    kind = type(run.optimizer)
    wrapper = object.__new__(type("Wrapped" + kind.__name__, (kind,), {}))
    wrapper.__dict__ = {
        name: value
        for name, value in run.optimizer.__dict__.items()
        if name not in ("step", "_managed") and not name.startswith("__")
    }
    steps(run, wrapper.zero_grad)


@use()
def in_one_flat_buffer(run: Training) -> Any:
    """As optimizers that scale or exchange all gradients at once lay them out."""
    parameters, start = run.given_parameters, 0
    flat = torch.zeros(sum(p.numel() for p in parameters), device=run.device)
    for p in parameters:
        p.grad = flat[start : start + p.numel()].view_as(p)
        start += p.numel()
    for _ in range(2):
        run.backward()
        flat.mul_(0.5)
        run.optimizer.step()
        flat.zero_()
    run.optimizer.zero_grad()
    return flat.norm()


@use()
def stepped_by_an_optimizer_that_wraps_another(run: Training) -> Any:
    class Wrapper:
        def __init__(self, optimizer: Any) -> None:
            self.optimizer = optimizer

        def __getattr__(self, name: str) -> Any:
            return getattr(self.optimizer, name)

    wrapper = Wrapper(run.optimizer)
    for _ in range(2):
        wrapper.zero_grad()
        run.backward()
        wrapper.step()
    wrapper.zero_grad()


@use()
def cleared_in_the_middle_of_accumulation(run: Training) -> Any:
    run.backward()
    run.backward()
    for p in run.parameters:
        p.grad = None
    run.backward()
    run.optimizer.step()
    run.optimizer.zero_grad()


@use()
def some_cleared_in_the_middle_of_accumulation(run: Training) -> Any:
    run.backward()
    for p in run.given_parameters[::3]:
        p.grad = None
    run.backward()
    run.optimizer.step()
    run.optimizer.zero_grad()


@use()
def one_bad_micro_batch_dropped(run: Training) -> Any:
    """Gradients so far are kept by hand, and put back."""
    run.backward()
    run.backward()
    kept = [p.grad.clone() for p in run.parameters]
    run.backward()
    for p, k in zip(run.parameters, kept, strict=True):
        p.grad = k
    run.optimizer.step()
    run.optimizer.zero_grad()


@use()
def accumulated_over_three_micro_batches(run: Training) -> Any:
    for _ in range(2):
        for _ in range(3):
            run.backward(run.loss() / 3)
        run.optimizer.step()
        for p in run.parameters:
            p.grad = None


@use()
def never_cleared(run: Training) -> Any:
    for _ in range(3):
        run.backward()
        run.optimizer.step()
    run.optimizer.zero_grad()


@use()
def replaced_by_a_half(run: Training) -> Any:
    run.backward()
    for p in run.parameters:
        p.grad = p.grad * 0.5
    run.optimizer.step()
    run.optimizer.zero_grad()


@use()
def replaced_in_a_kept_list(run: Training) -> Any:
    run.backward()
    for p in run.given_parameters:
        p.grad = torch.ones_like(p)
    run.optimizer.step()
    run.optimizer.zero_grad()


@use()
def halved_in_place(run: Training) -> Any:
    run.backward()
    for p in run.parameters:
        p.grad.mul_(0.5)
    run.optimizer.step()
    run.optimizer.zero_grad()


@use()
def added_to_through_data(run: Training) -> Any:
    run.backward()
    for p in run.given_parameters:
        p.grad.data.add_(1e-3)
        p.grad.data = p.grad.data * 2
    run.optimizer.step()
    run.optimizer.zero_grad()


@use()
def halved_by_foreach(run: Training) -> Any:
    run.backward()
    torch._foreach_mul_([p.grad for p in run.parameters], 0.5)
    run.optimizer.step()
    run.optimizer.zero_grad()


@use()
def clipped_by_norm(run: Training) -> Any:
    norms = []
    for _ in range(2):
        run.backward()
        norms.append(nn.utils.clip_grad_norm_(run.model.parameters(), 1e-3))
        run.optimizer.step()
        run.optimizer.zero_grad()
    return norms


@use()
def clipped_by_norm_in_a_kept_list(run: Training) -> Any:
    run.backward()
    norm = nn.utils.clip_grad_norm_(run.given_parameters, 1e-3, norm_type=float("inf"), foreach=True)
    run.optimizer.step()
    run.optimizer.zero_grad()
    return norm


@use()
def clipped_by_value(run: Training) -> Any:
    run.backward()
    nn.utils.clip_grad_value_(run.model.parameters(), 1e-5)
    run.optimizer.step()
    run.optimizer.zero_grad()


@use()
def clipped_by_hand(run: Training) -> Any:
    run.backward()
    norm = torch.sqrt(sum(p.grad.detach().square().sum() for p in run.parameters))  # type: ignore[arg-type]
    for p in run.parameters:
        p.grad.mul_(1e-3 / (norm + 1e-6))
    run.optimizer.step()
    run.optimizer.zero_grad()
    return norm


@use()
def clipped_by_layer(run: Training) -> Any:
    run.backward()
    norms = [nn.utils.clip_grad_norm_(layer.parameters(), 1e-4) for layer in run.model]
    run.optimizer.step()
    run.optimizer.zero_grad()
    return norms


@use()
def centralised(run: Training) -> Any:
    run.backward()
    for p in run.parameters:
        if p.dim() > 1:
            p.grad.sub_(p.grad.mean(dim=1, keepdim=True))
    run.optimizer.step()
    run.optimizer.zero_grad()


@use()
def assigned_from_autograd(run: Training) -> Any:
    found = torch.autograd.grad(run.loss(), run.parameters)
    for p, g in zip(run.parameters, found, strict=True):
        p.grad = g
    run.optimizer.step()
    run.optimizer.zero_grad()


@use()
def set_without_backward(run: Training) -> Any:
    for p in run.parameters:
        p.grad = torch.full_like(p, 1e-3)
    seen = [p.grad.sum() for p in run.parameters]
    run.optimizer.step()
    run.optimizer.zero_grad()
    return seen


@use()
def some_set_without_backward(run: Training) -> Any:
    run.model[5].weight.grad = torch.ones(WIDTH, WIDTH, device=run.device)
    run.optimizer.step()
    run.optimizer.zero_grad()


@use()
def backward_on_top_of_one_that_was_set(run: Training) -> Any:
    for p in run.given_parameters[::2]:
        p.grad = torch.full_like(p, 1e-3)
    run.backward()
    run.optimizer.step()
    run.optimizer.zero_grad()


@use()
def kept_over_a_step(run: Training) -> Any:
    """Clearing to None leaves what somebody else holds."""
    run.backward()
    kept = [p.grad for p in run.parameters]
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.step()
    return kept


@use()
def kept_and_zeroed(run: Training) -> Any:
    """Clearing to zero does not."""
    run.backward()
    kept = [p.grad for p in run.parameters]
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=False)
    seen = [k.clone() for k in kept]
    run.optimizer.zero_grad()
    return seen


@use()
def kept_and_accumulated_into(run: Training) -> Any:
    """The same tensor in one backward and the next."""
    run.backward()
    kept = [p.grad for p in run.parameters]
    run.backward()
    seen = [k.clone() for k in kept]
    run.optimizer.step()
    run.optimizer.zero_grad()
    return seen


@use()
def one_layer_frozen_by_none(run: Training) -> Any:
    for _ in range(2):
        run.backward()
        run.model[4].weight.grad = None
        run.given_parameters[16].grad = None
        run.optimizer.step()
        run.optimizer.zero_grad()


@use()
def noise(run: Training) -> Any:
    run.backward()
    for p in run.parameters:
        p.grad += 1e-4 * torch.randn_like(p.grad)
    run.optimizer.step()
    run.optimizer.zero_grad()


@use()
def signs(run: Training) -> Any:
    run.backward()
    for p in run.parameters:
        p.grad.sign_()
    run.optimizer.step()
    run.optimizer.zero_grad()


@use()
def changed_in_tensor_hooks(run: Training) -> Any:
    handles = [p.register_hook(lambda g: g - g.mean()) for p in run.given_parameters]
    run.train(2)
    for handle in handles:
        handle.remove()


@use()
def changed_after_accumulation(run: Training) -> Any:
    def halve(p: Tensor) -> None:
        assert p.grad is not None
        p.grad.mul_(0.5)

    handles = [p.register_post_accumulate_grad_hook(halve) for p in run.given_parameters]
    try:
        run.train(2)
    finally:
        for handle in handles:
            handle.remove()


@use()
def read_after_accumulation(run: Training) -> Any:
    norms: dict[int, list[Any]] = {}

    def note(index: int, p: Tensor) -> None:
        assert p.grad is not None
        norms.setdefault(index, []).append(p.grad.norm().item())

    handles = [
        p.register_post_accumulate_grad_hook(lambda p, index=index: note(index, p))
        for index, p in enumerate(run.given_parameters)
    ]
    try:
        run.train(2)
    finally:
        for handle in handles:
            handle.remove()
    return [norms[index] for index in sorted(norms)]


@use()
def a_step_skipped_after_backward(run: Training) -> Any:
    run.backward()
    run.optimizer.zero_grad()
    run.backward()
    for p in run.given_parameters:
        p.grad = None
    run.step()


@use()
def a_step_skipped_where_gradients_are_not_finite(run: Training) -> Any:
    skipped = 0
    for bad in (False, True, False):
        loss = run.loss()
        run.backward(loss * float("inf") if bad else loss)
        if all(bool(p.grad.isfinite().all()) for p in run.parameters if p.grad is not None):
            run.optimizer.step()
        else:
            skipped += 1
        for p in run.parameters:
            p.grad = None
    return skipped


@use()
def unscaled_by_hand(run: Training) -> Any:
    run.backward(run.loss() * 1024)
    for group in run.optimizer.param_groups:
        for p in group["params"]:
            p.grad.div_(1024)
    run.optimizer.step()
    run.optimizer.zero_grad()


@use()
def swapped(run: Training) -> Any:
    run.backward()
    a, b = run.model[2].weight, run.model[9].weight
    a.grad, b.grad = b.grad, a.grad
    run.optimizer.step()
    run.optimizer.zero_grad()


@use()
def two_backwards_of_a_graph(run: Training) -> Any:
    loss = run.loss()
    loss.backward(retain_graph=True)
    run.backward(loss)
    run.optimizer.step()
    run.optimizer.zero_grad()


@use()
def two_losses_one_after_the_other(run: Training) -> Any:
    output = run.model(run.batch())
    output.square().mean().backward(retain_graph=True)
    first = [p.grad.norm() for p in run.parameters]
    for p in run.parameters:
        p.grad = None
    run.backward(output.abs().mean())
    run.optimizer.step()
    run.optimizer.zero_grad()
    return first


@use()
def norms_of_each_for_a_log(run: Training) -> Any:
    seen = []
    for _ in range(2):
        run.backward()
        seen.append({name: p.grad.norm().item() for name, p in run.model.named_parameters()})
        run.optimizer.step()
        run.optimizer.zero_grad()
    return seen


@use()
def read_before_there_are_any(run: Training) -> Any:
    before = [p.grad is None for p in run.parameters]
    loss = run.loss()
    between = [p.grad is None for p in run.given_parameters]
    run.backward(loss)
    after = [p.grad is None for p in run.given_parameters]
    run.optimizer.step()
    stepped = [p.grad.sum() for p in run.given_parameters]
    run.optimizer.zero_grad()
    return before, between, after, stepped, [p.grad is None for p in run.parameters]


@use()
def described(run: Training) -> Any:
    run.backward()
    seen = [(tuple(p.grad.shape), p.grad.dtype, p.grad.is_contiguous(), p.grad.requires_grad) for p in run.parameters]
    run.optimizer.step()
    run.optimizer.zero_grad()
    return seen


@use()
def in_one_vector(run: Training) -> Any:
    run.backward()
    seen = (
        torch.cat([p.grad.flatten() for p in run.parameters]),
        nn.utils.get_total_norm([p.grad for p in run.parameters]),
    )
    run.optimizer.step()
    run.optimizer.zero_grad()
    return seen


@use()
def projected_where_they_conflict(run: Training) -> Any:
    """As for several tasks: the gradients of two losses, each by its own backward."""
    found = []
    for _ in range(2):
        run.backward()
        found.append([p.grad.clone() for p in run.parameters])
        run.optimizer.zero_grad()
    for p, a, b in zip(run.parameters, *found, strict=True):
        overlap = (a * b).sum()
        p.grad = a + b if overlap >= 0 else a + b - overlap / b.square().sum() * b
    run.optimizer.step()
    run.optimizer.zero_grad()


@use()
def copied_to_another_model(run: Training) -> Any:
    """As where one process collects what the others found."""
    other = run.unmanaged().to(run.device)
    run.backward()
    for theirs, ours in zip(other.parameters(), run.parameters, strict=True):
        theirs.grad = ours.grad.clone()
    run.optimizer.zero_grad()
    for theirs, ours in zip(other.parameters(), run.parameters, strict=True):
        ours.grad = theirs.grad
    run.optimizer.step()
    run.optimizer.zero_grad()
    return [p.grad for p in other.parameters()]


@use()
def of_a_batch_without_a_part(run: Training) -> Any:
    """Layers that took no part have no gradient, and are not stepped."""
    x = run.batch()
    for layer in run.model[:6]:
        x = layer(x)
    run.backward(x.square().mean())
    seen = [p.grad is None for p in run.parameters]
    run.optimizer.step()
    run.optimizer.zero_grad()
    return seen


@use()
def in_an_optimizer_that_steps_in_a_closure(run: Training) -> Any:
    def closure() -> Tensor:
        for p in run.parameters:
            p.grad = None
        return run.backward()

    seen = run.optimizer.step(closure)
    run.optimizer.zero_grad()
    return seen.item()


@use()
def scaled_by_torchs_scaler(run: Training) -> Any:
    scaler = torch.amp.GradScaler(torch.device(run.device).type, init_scale=1024.0, growth_interval=2)
    norms = []
    for _ in range(3):
        run.backward(scaler.scale(run.loss()))
        scaler.unscale_(run.optimizer)
        norms.append(nn.utils.clip_grad_norm_(run.model.parameters(), 1e-3))
        scaler.step(run.optimizer)
        scaler.update()
        run.optimizer.zero_grad()
    return norms, scaler.get_scale()


@use()
def of_some_inputs_only(run: Training) -> Any:
    run.loss().backward(inputs=[run.model[3].weight, run.given_parameters[1]])
    seen = [p.grad is None for p in run.parameters]
    run.optimizer.step()
    run.optimizer.zero_grad()
    return seen


@use()
def by_autograds_own_function(run: Training) -> Any:
    torch.autograd.backward([run.loss(), run.loss()])
    run.optimizer.step()
    run.optimizer.zero_grad()


@use(refusal=BY_AUTOGRAD, may_be_equal=True)
def with_a_graph_of_their_own(run: Training) -> Any:
    run.loss().backward(create_graph=True)
    penalty = sum(p.grad.square().sum() for p in run.parameters)
    for p in run.parameters:
        p.grad = None
    run.backward(penalty)
    run.optimizer.step()
    run.optimizer.zero_grad()


@use()
def of_another_shape(run: Training) -> Any:
    """Plain PyTorch refuses it; nothing may have changed."""
    try:
        run.model[3].weight.grad = torch.zeros(3, device=run.device)
    except RuntimeError as error:
        return "expected shape" in str(error) or "size" in str(error)
    return None


@use()
def stepped_by_another_optimizer_for_a_while(run: Training) -> Any:
    other = torch.optim.SGD(run.model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        other.zero_grad()
        run.backward()
        other.step()
    other.zero_grad()
    return [s["momentum_buffer"] for s in other.state.values()]


@use()
def of_frozen_layers(run: Training) -> Any:
    """A gradient from before a layer was frozen stays, and is stepped with, until it is cleared."""
    run.backward()
    run.model[2].requires_grad_(False)
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.step()
    run.model[2].requires_grad_(True)


@use()
def clipped_in_two_parts(run: Training) -> Any:
    run.backward()
    total = nn.utils.get_total_norm([p.grad for p in run.given_parameters])
    nn.utils.clip_grads_with_norm_(run.given_parameters, 1e-3, total)
    run.optimizer.step()
    run.optimizer.zero_grad()
    return total


@use()
def looked_at_by_another_thread(run: Training) -> Any:
    run.backward()
    seen = in_another_thread(lambda: [p.grad.norm().item() for p in run.given_parameters])
    run.optimizer.step()
    run.optimizer.zero_grad()
    return seen


@use()
def backward_in_another_thread(run: Training) -> Any:
    loss = run.loss()
    in_another_thread(lambda: run.backward(loss))
    run.optimizer.step()
    run.optimizer.zero_grad()


@use()
def a_whole_step_in_another_thread(run: Training) -> Any:
    in_another_thread(run.step)
    return [p.norm() for p in run.parameters]
