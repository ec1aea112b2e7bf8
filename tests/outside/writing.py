"""Uses that write parameters: in place, by assigning data, through views, by libraries, by loading."""

import io
from typing import Any

import torch
from outside.harness import Catalogue
from outside.models import WIDTH
from outside.placements import Refusal
from outside.running import Training, in_another_thread
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.optim.swa_utils import SWALR, AveragedModel, get_swa_avg_fn, update_bn

writing = Catalogue("writing")
use = writing.add

KEEPS_ITS_SHAPE = Refusal(
    (RuntimeError, ValueError, NotImplementedError), r"before booster\.boost|copy_|load_state_dict"
)
"""For what changes the memory under a parameter: its shape, its storage."""
KEEPS_ITS_STORAGE = Refusal(RuntimeError, r"storage that is not resizable", is_torchs=True)
"""For what changes the length of memory that was handed out."""


@use()
def clamped(run: Training) -> Any:
    """As the critic of a Wasserstein GAN is."""
    with torch.no_grad():
        for p in run.given_parameters:
            p.clamp_(-0.1, 0.1)


@use()
def clamped_in_every_step(run: Training) -> Any:
    for _ in range(3):
        run.step()
        for p in run.model.parameters():
            p.data.clamp_(-0.1, 0.1)
    return [p.abs().max() for p in run.parameters]


@use()
def multiplied_by_attribute(run: Training) -> Any:
    with torch.no_grad():
        for layer in run.model:
            layer.weight.mul_(0.9)
            layer.weight += 0.01
            layer.bias.zero_()


@use()
def multiplied_through_the_optimizer(run: Training) -> Any:
    with torch.no_grad():
        for group in run.optimizer.param_groups:
            for p in group["params"]:
                p.mul_(0.99)


@use()
def copied_into(run: Training) -> Any:
    other = run.unmanaged().to(run.device)
    with torch.no_grad():
        for p, q in zip(run.parameters, other.parameters(), strict=True):
            p.copy_(q)


@use()
def copied_from_a_neighbour(run: Training) -> Any:
    with torch.no_grad():
        run.model[3].weight.copy_(run.model[9].weight)
        run.model[9].bias.copy_(run.model[3].bias)


@use()
def added_by_foreach(run: Training) -> Any:
    with torch.no_grad():
        torch._foreach_add_(run.parameters, 0.01)
        torch._foreach_mul_(run.given_parameters, 0.9)


@use()
def data_added_by_foreach(run: Training) -> Any:
    torch._foreach_add_([p.data for p in run.given_parameters], 0.01)


@use()
def data_assigned(run: Training) -> Any:
    for p in run.given_parameters:
        p.data = p.data * 0.9


@use()
def data_assigned_and_read(run: Training) -> Any:
    seen = []
    for p in run.parameters:
        p.data = torch.ones_like(p) * 0.01
        seen.append(p.sum().item())
    return seen, [p.norm() for p in run.given_parameters]


@use()
def data_assigned_and_kept(run: Training) -> Any:
    """The assigned tensor is the parameter's memory from then on."""
    values = [p.detach() * 0.5 for p in run.parameters]
    for p, value in zip(run.parameters, values, strict=True):
        p.data = value
    run.step()
    return values


@use()
def data_in_place(run: Training) -> Any:
    for p in run.given_parameters:
        p.data.add_(0.01)
    for layer in run.model:
        layer.weight.data *= 0.9


@use()
def elements_of_data(run: Training) -> Any:
    for p in run.given_parameters[::2]:
        p.data[0] = 0.5
        p.data[:, 1] = p.data[:, 2]
        p.data[p.data > 0.1] = 0.1


@use()
def elements_under_no_grad(run: Training) -> Any:
    with torch.no_grad():
        for p in run.parameters[::2]:
            p[0] = 0
            p[1:3, 4] += 0.5
            p[p < -0.1] = -0.1
            p.masked_fill_(p == 0.5, 0.25)


@use()
def initialised_anew(run: Training) -> Any:
    nn.init.kaiming_uniform_(run.model[2].weight, a=2.2)
    nn.init.zeros_(run.model[2].bias)
    nn.init.orthogonal_(run.model[8].weight)
    nn.init.trunc_normal_(run.model[7].weight, std=0.02)
    run.model[5].reset_parameters()


@use("blocks")
def initialised_by_apply(run: Training) -> Any:
    def initialise(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.xavier_normal_(module.weight)
            if module.bias is not None:
                module.bias.data.fill_(0.01)
        elif isinstance(module, nn.Embedding):
            module.weight.data.normal_(0, 0.02)

    run.model.apply(initialise)


@use()
def vector_to_parameters(run: Training) -> Any:
    vector = nn.utils.parameters_to_vector(run.model.parameters())
    nn.utils.vector_to_parameters(vector.detach() * 0.9, run.model.parameters())


@use()
def vector_to_a_kept_list(run: Training) -> Any:
    total = sum(p.numel() for p in run.given_parameters)
    nn.utils.vector_to_parameters(torch.linspace(-0.1, 0.1, total, device=run.device), run.given_parameters)


@use(needs_host=True)
def through_numpy(run: Training) -> Any:
    for p in run.given_parameters:
        p.detach().numpy()[...] *= 0.5
    run.model[4].bias.data.numpy()[3] = 1.0


@use()
def through_detach(run: Training) -> Any:
    for p in run.given_parameters:
        p.detach().mul_(0.5)


@use(needs_host=True)
def through_dlpack(run: Training) -> Any:
    for p in run.given_parameters:
        torch.from_dlpack(p.detach()).mul_(0.5)


@use()
def through_views(run: Training) -> Any:
    with torch.no_grad():
        for p in run.given_parameters[::2]:
            p.view(-1)[:16].fill_(0.1)
            p.T[3].zero_()
            p.diagonal().add_(0.1)
            p.unbind()[5].neg_()


@use()
def through_views_kept_over_a_step(run: Training) -> Any:
    views = [p.detach().view(-1)[4:12] for p in run.given_parameters]
    run.step()
    for view in views:
        view.mul_(0.5)
    run.step()
    return views


@use()
def through_data_kept_over_steps(run: Training) -> Any:
    data = [p.data for p in run.parameters]
    for _ in range(3):
        run.step()
        for d in data:
            d.mul_(0.99)
    return data


@use(needs_host=True)
def through_arrays_kept_over_steps(run: Training) -> Any:
    arrays = [p.detach().numpy() for p in run.parameters]
    run.kept.append(arrays)
    for _ in range(2):
        run.step()
        for array in arrays:
            array *= 0.99


@use()
def between_forward_and_backward(run: Training) -> Any:
    """Through ``.data``: autograd does not notice, and takes the new values."""
    loss = run.loss()
    for p in run.parameters:
        p.data.mul_(0.9)
    run.backward(loss)
    run.optimizer.step()
    run.optimizer.zero_grad()


@use()
def between_backward_and_step(run: Training) -> Any:
    run.backward()
    with torch.no_grad():
        for p in run.given_parameters:
            p.mul_(0.9)
    run.optimizer.step()
    run.optimizer.zero_grad()


@use()
def noise_added_and_taken_away(run: Training) -> Any:
    """For the gradient at a disturbed place."""
    before = [p.detach().clone() for p in run.parameters]
    with torch.no_grad():
        for p in run.parameters:
            p.add_(torch.randn_like(p), alpha=0.01)
    run.backward()
    with torch.no_grad():
        for p, value in zip(run.parameters, before, strict=True):
            p.copy_(value)
    run.optimizer.step()
    run.optimizer.zero_grad()


@use()
def state_dict_loaded(run: Training) -> Any:
    other = run.unmanaged()
    loaded = run.model.load_state_dict(other.state_dict())
    return loaded.missing_keys, loaded.unexpected_keys


@use()
def state_dict_loaded_by_assigning(run: Training) -> Any:
    # In plain PyTorch this takes the parameters from the optimizer. A boosted model keeps its own: it makes no
    # difference.
    is_boosted = run.booster is not None
    values = {name: value.to(run.device) for name, value in run.unmanaged().state_dict().items()}
    run.model.load_state_dict(values, assign=is_boosted)
    return [p.norm() for p in run.parameters]


@use("blocks")
def state_dict_of_a_block_loaded(run: Training) -> Any:
    other = run.unmanaged()
    run.model.blocks[3].load_state_dict(other.blocks[3].state_dict())
    run.model.head.load_state_dict(other.head.state_dict())


@use("blocks")
def a_block_copied_to_another(run: Training) -> Any:
    run.model.blocks[4].load_state_dict(run.model.blocks[0].state_dict())


@use()
def a_part_of_a_state_dict_loaded(run: Training) -> Any:
    other = run.unmanaged().state_dict()
    loaded = run.model.load_state_dict({k: v for k, v in other.items() if k.startswith("1")}, strict=False)
    return sorted(loaded.missing_keys)


@use()
def rewound(run: Training) -> Any:
    """As in the search for lottery tickets: back to earlier weights, some of them zero."""
    early = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    run.train(2)
    with torch.no_grad():
        for name, p in run.model.named_parameters():
            mask = p.abs() > p.abs().median()
            p.data = early[name] * mask


@use()
def rewound_by_state_dict(run: Training) -> Any:
    early = {name: value.clone() for name, value in run.model.state_dict().items()}
    file = io.BytesIO()
    torch.save(early, file)
    run.train(2)
    file.seek(0)
    run.model.load_state_dict(torch.load(file))


@use()
def sharpness_aware_minimisation(run: Training) -> Any:
    for _ in range(2):
        run.backward()
        with torch.no_grad():
            norm = torch.stack([p.grad.norm() for p in run.parameters if p.grad is not None]).norm()
            climbed = []
            for p in run.parameters:
                assert p.grad is not None
                climb = p.grad * (0.05 / (norm + 1e-12))
                p.add_(climb)
                climbed.append(climb)
        run.optimizer.zero_grad()
        run.backward()
        with torch.no_grad():
            for p, climb in zip(run.parameters, climbed, strict=True):
                p.sub_(climb)
        run.optimizer.step()
        run.optimizer.zero_grad()


@use()
def sharpness_aware_minimisation_through_data(run: Training) -> Any:
    old = {}
    run.backward()
    for group in run.optimizer.param_groups:
        for p in group["params"]:
            old[p] = p.data.clone()
            p.data.add_(p.grad.sign(), alpha=0.01)
    run.optimizer.zero_grad()
    run.backward()
    for p, value in old.items():
        p.data = value
    run.optimizer.step()
    run.optimizer.zero_grad()


@use()
def lookahead(run: Training) -> Any:
    slow = [p.detach().clone() for p in run.parameters]
    for _ in range(2):
        run.train(2)
        with torch.no_grad():
            for s, p in zip(slow, run.parameters, strict=True):
                s.add_(p - s, alpha=0.5)
                p.copy_(s)
    return slow


@use("normalised")
def stochastic_weight_averaging(run: Training) -> Any:
    average = AveragedModel(run.unmanaged().to(run.device), avg_fn=get_swa_avg_fn())  # the same formula everywhere
    scheduler = SWALR(run.optimizer, swa_lr=0.005, anneal_epochs=2)
    for _ in range(2):
        run.step()
        scheduler.step()
        average.update_parameters(run.model)
    update_bn([run.batch() for _ in range(2)], average)
    run.model.load_state_dict(average.module.state_dict())
    return dict(average.state_dict())


@use()
def averages_swapped_in_for_evaluation(run: Training) -> Any:
    average = [p.detach().clone() * 0.99 for p in run.parameters]
    kept = [p.data for p in run.parameters]
    for p, a in zip(run.parameters, average, strict=True):
        p.data = a
    with torch.no_grad():
        seen = run.model(run.batch())
    for p, k in zip(run.parameters, kept, strict=True):
        p.data = k
    return seen


@use()
def averages_swapped_in_by_copies(run: Training) -> Any:
    average = [p.detach().clone() * 0.99 for p in run.parameters]
    kept = [p.data.clone() for p in run.parameters]
    for p, a in zip(run.parameters, average, strict=True):
        p.data.copy_(a)
    with torch.no_grad():
        seen = run.model(run.batch())
    for p, k in zip(run.parameters, kept, strict=True):
        p.data.copy_(k)
    return seen


@use()
def spectral_normalisation_by_hand(run: Training) -> Any:
    for _ in range(2):
        with torch.no_grad():
            for layer in run.model:
                layer.weight.div_(torch.linalg.matrix_norm(layer.weight, 2))
        run.step()


@use()
def weights_normalised_through_functional(run: Training) -> Any:
    for layer in run.model:
        layer.weight.data = nn.functional.normalize(layer.weight.data, dim=1)


@use()
def evolution_strategy(run: Training) -> Any:
    rewards = []
    with torch.no_grad():
        for _ in range(3):
            noise = [torch.randn_like(p) * 0.01 for p in run.parameters]
            for p, n in zip(run.parameters, noise, strict=True):
                p.add_(n)
            rewards.append(run.loss().item())
            for p, n in zip(run.parameters, noise, strict=True):
                p.sub_(n)
        for p, n in zip(run.parameters, noise, strict=True):
            p.add_(n, alpha=rewards[-1])
    return rewards


@use()
def plain_gradient_descent_by_hand(run: Training) -> Any:
    gradients = torch.autograd.grad(run.loss(), run.parameters)
    with torch.no_grad():
        for p, g in zip(run.parameters, gradients, strict=True):
            p -= 0.1 * g


@use()
def weight_decay_by_hand(run: Training) -> Any:
    run.backward()
    for p in run.parameters:
        p.data.mul_(1 - 1e-3)
    run.optimizer.step()
    run.optimizer.zero_grad()


@use()
def an_inner_loop_of_another_optimizer(run: Training) -> Any:
    """An unmanaged optimizer steps the parameters once, as a fine search does."""
    inner = torch.optim.SGD(run.given_parameters, lr=0.01)
    gradients = torch.autograd.grad(run.loss(), run.given_parameters)
    for p, g in zip(run.given_parameters, gradients, strict=True):
        p.grad = g
    inner.step()
    inner.zero_grad()
    run.optimizer.zero_grad()


@use()
def data_swapped(run: Training) -> Any:
    a, b = run.model[2].weight, run.model[8].weight
    a.data, b.data = b.data, a.data
    return a.norm(), b.norm()


@use()
def data_swapped_by_clones(run: Training) -> Any:
    a, b = run.model[2].weight, run.model[8].weight
    kept = a.detach().clone()
    with torch.no_grad():
        a.copy_(b)
        b.copy_(kept)


@use()
def random_values_in_place(run: Training) -> Any:
    with torch.no_grad():
        run.given_parameters[0].normal_(0, 0.1)
        run.given_parameters[16].uniform_(-0.1, 0.1)
        run.given_parameters[19].bernoulli_(0.5)


@use()
def written_out(run: Training) -> Any:
    a, b = run.given_parameters[4], run.given_parameters[16]
    with torch.no_grad():
        torch.mul(b, 0.5, out=a)
        torch.add(a, a, out=b)


@use()
def written_out_to_data(run: Training) -> Any:
    a, b = run.given_parameters[4], run.given_parameters[16]
    torch.mul(b.data, 0.5, out=a.data)


@use()
def negative_zeros(run: Training) -> Any:
    """A change that ``==`` does not see."""
    p = run.model[6].weight
    p.data.zero_()
    run.kept.append(p.data)
    run.kept[-1].neg_()
    return torch.signbit(p.detach())


@use()
def pruned_at_random(run: Training) -> Any:
    """As by hand: a mask that is applied after each step."""
    masks = [torch.rand_like(p) > 0.3 for p in run.parameters]
    for _ in range(2):
        run.step()
        with torch.no_grad():
            for p, mask in zip(run.parameters, masks, strict=True):
                p.mul_(mask)


@use()
def pruned(run: Training) -> Any:
    prune.l1_unstructured(run.model[4], "weight", amount=0.3)
    run.step()
    seen = run.model[4].weight.detach().clone()
    prune.remove(run.model[4], "weight")
    return seen


@use()
def pruned_globally(run: Training) -> Any:
    chosen = [(run.model[i], "weight") for i in (1, 7, 9)]
    prune.global_unstructured(chosen, prune.L1Unstructured, amount=0.4)
    run.step()
    for module, name in chosen:
        prune.remove(module, name)


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x

    def right_inverse(self, x: Tensor) -> Tensor:
        return x / 2


@use()
def parametrized(run: Training) -> Any:
    parametrize.register_parametrization(run.model[4], "weight", Doubled())
    run.step()
    seen = run.model[4].weight.detach().clone()
    parametrize.remove_parametrizations(run.model[4], "weight")
    return seen


@use()
def weight_norm(run: Training) -> Any:
    nn.utils.parametrizations.weight_norm(run.model[4])
    run.optimizer.add_param_group({"params": [run.model[4].parametrizations.weight.original0]})
    run.step()
    parametrize.remove_parametrizations(run.model[4], "weight")


@use(refusal=KEEPS_ITS_SHAPE)
def memory_shared_with_processes(run: Training) -> Any:
    run.model[4].weight.share_memory_()


@use(refusal=KEEPS_ITS_SHAPE, needs_host=True)  # on a device it does nothing
def the_whole_model_shared_with_processes(run: Training) -> Any:
    run.model.share_memory()


@use(refusal=KEEPS_ITS_SHAPE)
def resized(run: Training) -> Any:
    weight = run.model[4].weight.requires_grad_(False)
    try:
        weight.resize_(2 * WIDTH, WIDTH)
    finally:
        weight.requires_grad_(True)


@use(refusal=KEEPS_ITS_STORAGE)
def resized_through_data(run: Training) -> Any:
    """In plain PyTorch the parameter keeps its shape, and has a larger storage."""
    run.model[4].weight.data.resize_(2 * WIDTH, WIDTH)


@use()
def resized_while_it_trains(run: Training) -> Any:
    """Plain PyTorch refuses it; nothing may have changed."""
    try:
        run.model[4].weight.resize_(2 * WIDTH, WIDTH)
    except RuntimeError as error:
        return "require grad" in str(error)
    return None


@use()
def set_to_another_storage(run: Training) -> Any:
    with torch.no_grad():
        run.model[4].weight.set_(torch.full((WIDTH, WIDTH), 0.01, device=run.device))


@use(refusal=KEEPS_ITS_STORAGE)
def storage_freed(run: Training) -> Any:
    """As FSDP and offloading by hand do; with the values gone, there is no way on."""
    kept = run.model[4].weight.detach().clone()
    run.model[4].weight.untyped_storage().resize_(0)
    run.model[4].weight.untyped_storage().resize_(kept.nbytes)
    with torch.no_grad():
        run.model[4].weight.copy_(kept)


@use(refusal=KEEPS_ITS_SHAPE)
def data_of_another_shape(run: Training) -> Any:
    run.model[4].weight.data = torch.zeros(2 * WIDTH, WIDTH, device=run.device)
    run.model[4].weight.sum().item()


@use(refusal=KEEPS_ITS_SHAPE)
def data_of_another_dtype(run: Training) -> Any:
    run.model[4].weight.data = run.model[4].weight.data.double()
    run.model[4].weight.sum().item()


@use()
def transposed(run: Training) -> Any:
    with torch.no_grad():
        run.model[4].weight.copy_(run.model[4].weight.T.clone())
    run.model[5].weight.data = run.model[5].weight.data.t().contiguous()


@use()
def by_another_thread(run: Training) -> Any:
    def halve() -> None:
        with torch.no_grad():
            for p in run.given_parameters:
                p.mul_(0.5)

    in_another_thread(halve)


@use()
def in_a_forward_pre_hook(run: Training) -> Any:
    def clamp(module: Any, inputs: Any) -> None:
        with torch.no_grad():
            module.weight.clamp_(-0.15, 0.15)

    handles = [layer.register_forward_pre_hook(clamp) for layer in run.model]
    run.train(2)
    for handle in handles:
        handle.remove()


@use()
def in_a_hook_of_the_optimizer(run: Training) -> Any:
    def clamp(*_: Any) -> None:
        with torch.no_grad():
            for p in run.given_parameters:
                p.clamp_(-0.1, 0.1)

    handle = run.optimizer.register_step_post_hook(clamp)
    run.train(2)
    handle.remove()


@use()
def written_without_no_grad(run: Training) -> Any:
    """Plain PyTorch refuses it; nothing may have changed."""
    try:
        run.model[3].weight.mul_(0.5)
    except RuntimeError as error:
        return "leaf Variable" in str(error)
    return None


@use()
def written_in_inference_mode(run: Training) -> Any:
    with torch.inference_mode():
        for p in run.given_parameters:
            p.mul_(0.9)


@use()
def a_graph_that_a_write_makes_stale(run: Training) -> Any:
    """Plain PyTorch notices that a weight was changed in place between forward and backward, and says so."""
    loss = run.loss()
    with torch.no_grad():
        run.model[8].weight.mul_(0.9)
    try:
        run.backward(loss)
    except RuntimeError as error:
        seen = "modified by an inplace operation" in str(error)
    else:
        seen = False
    run.optimizer.zero_grad()
    return seen
