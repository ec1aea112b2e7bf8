"""Uses that change modules: parts converted, copied, frozen, added, removed, called alone."""

import copy
import io
import pickle
from typing import Any

import torch
from outside.harness import Catalogue, Refusal, Training
from outside.models import WIDTH, adamw
from torch import nn

surgery = Catalogue("surgery")
use = surgery.add

CONVERTED_BEFORE = Refusal(RuntimeError, r"before booster\.boost|precision=")
"""For what moves or converts parameters that are in chunks."""

COPIED_BY_VALUES = Refusal((RuntimeError, TypeError), r"state_dict|save_model|named_tensors")
"""For what copies modules together with the chunks behind them."""

BOOSTED_ONCE = Refusal((RuntimeError, ValueError, TypeError), r"boost it once|before|unmanaged|state_dict|one model")
"""For a second boost of parameters that are in chunks."""


@use("blocks", refusal=CONVERTED_BEFORE)
def the_head_in_double(run: Training) -> Any:
    run.model.head.double()


@use("blocks", refusal=CONVERTED_BEFORE)
def a_block_in_half(run: Training) -> Any:
    run.model.blocks[1].half()


@use("blocks", refusal=CONVERTED_BEFORE)
def a_block_in_another_dtype(run: Training) -> Any:
    run.model.blocks[1].to(torch.bfloat16)


@use("blocks", refusal=CONVERTED_BEFORE, may_be_equal=True)
def a_block_there_and_back(run: Training) -> Any:
    """In plain PyTorch doubles hold all digits, and optimizer states keep the parameters they belong to."""
    run.model.blocks[1].double().float()


@use("blocks", refusal=CONVERTED_BEFORE)
def a_block_made_empty(run: Training) -> Any:
    run.model.blocks[1].to_empty(device="meta")


@use(refusal=CONVERTED_BEFORE)
def the_model_in_half(run: Training) -> Any:
    run.model.half()


@use(refusal=CONVERTED_BEFORE)
def the_model_on_another_device(run: Training) -> Any:
    run.model.to("meta")


@use("blocks", refusal=CONVERTED_BEFORE, may_be_equal=True)
def the_model_where_it_is(run: Training) -> Any:
    """Scripts call it to be sure."""
    run.model.to(run.device)
    run.model.float()


@use("blocks", refusal=CONVERTED_BEFORE, may_be_equal=True)
def a_block_where_it_is(run: Training) -> Any:
    run.model.blocks[1].to(run.device).float()


@use("blocks")
def a_wrapper_converted(run: Training) -> Any:
    """Of a module that has a boosted one in it only the rest could be converted; that is refused as a whole."""

    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.first, self.inner = nn.Linear(2, 2), inner

    if run.booster is None:
        return True
    wrapper = Wrapper(run.model)
    try:
        wrapper.double()
    except RuntimeError as error:
        return CONVERTED_BEFORE.fits(error) and all(p.dtype == torch.float32 for p in run.model.parameters())
    return False


@use(refusal=BOOSTED_ONCE)
def boosted_as_a_part_of_another_module(run: Training) -> Any:
    whole = nn.ModuleDict({"teacher": run.model, "student": nn.Linear(WIDTH, WIDTH)})
    assert run.booster is not None
    run.booster.boost(whole, adamw(whole["student"].parameters()))


@use(refusal=BOOSTED_ONCE)
def boosted_twice(run: Training) -> Any:
    assert run.booster is not None
    run.booster.boost(run.model, adamw(run.model.parameters()))


@use("blocks", refusal=BOOSTED_ONCE)
def a_part_boosted_again(run: Training) -> Any:
    assert run.booster is not None
    run.booster.boost(run.model.blocks, adamw(run.model.blocks.parameters()))


@use("gpt2")
def a_second_model_of_its_class(run: Training) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        second = type(run.model)(run.model.config)
    return dict(second.state_dict()), len(list(second.parameters())), type(second).__name__


@use("blocks")
def a_second_model_without_arguments(run: Training) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        second = run.model.__class__()
    second.load_state_dict(run.model.state_dict())
    return second(torch.zeros(1, 2, dtype=torch.int64))


@use("blocks", refusal=COPIED_BY_VALUES)
def the_model_copied_deeply(run: Training) -> Any:
    copy.deepcopy(run.model)


@use("blocks", refusal=COPIED_BY_VALUES)
def the_model_pickled(run: Training) -> Any:
    pickle.dumps(run.model)


@use("blocks", refusal=COPIED_BY_VALUES, may_be_equal=True)
def the_optimizer_copied_deeply(run: Training) -> Any:
    return copy.deepcopy(run.optimizer).state_dict()["state"][0]["exp_avg"]


@use("blocks", refusal=COPIED_BY_VALUES, may_be_equal=True)
def a_part_copied_deeply(run: Training) -> Any:
    copied = copy.deepcopy(run.model.blocks[1])
    run.step()
    return dict(copied.state_dict()), copied(torch.ones(2, WIDTH, device=run.device))


@use("blocks", refusal=COPIED_BY_VALUES, may_be_equal=True)
def a_part_pickled(run: Training) -> Any:
    return dict(pickle.loads(pickle.dumps(run.model.blocks[1])).state_dict())


@use("blocks", refusal=COPIED_BY_VALUES, may_be_equal=True)
def a_part_saved_as_a_module(run: Training) -> Any:
    file = io.BytesIO()
    torch.save(run.model.head, file)
    file.seek(0)
    return torch.load(file, weights_only=False).weight


@use("blocks", refusal=COPIED_BY_VALUES, may_be_equal=True)
def an_average_of_a_boosted_model(run: Training) -> Any:
    """`AveragedModel` copies the model it is given."""
    from torch.optim.swa_utils import AveragedModel

    average = AveragedModel(run.model)
    run.step()
    average.update_parameters(run.model)
    return list(average.module.state_dict().values())


@use("blocks")
def a_fresh_part_filled_with_values(run: Training) -> Any:
    """What takes the place of copying a part."""
    fresh = type(run.model.blocks[1])().to(run.device)
    fresh.load_state_dict(run.model.blocks[1].state_dict())
    run.step()
    return dict(fresh.state_dict())


@use("blocks")
def seen_by_apply(run: Training) -> Any:
    norms: list[Any] = []

    def note(module: nn.Module) -> None:
        norms.extend(p.norm().item() for p in module.parameters(recurse=False))

    run.model.apply(note)
    return norms


@use("normalised")
def switched_to_evaluation_and_back(run: Training) -> Any:
    run.model.eval()
    with torch.no_grad():
        seen = run.model(run.batch())
    run.model.train()
    return seen, [m.training for m in run.model]


@use("blocks")
def a_block_in_evaluation(run: Training) -> Any:
    run.model.blocks[2].eval()
    run.step()
    run.model.blocks[2].train()


@use("blocks")
def a_block_frozen_for_a_while(run: Training) -> Any:
    run.model.blocks[2].requires_grad_(False)
    run.train(2)
    seen = [p.norm() for p in run.model.blocks[2].parameters()]
    run.model.blocks[2].requires_grad_(True)
    run.step()
    return seen


@use("blocks")
def frozen_between_forward_and_backward(run: Training) -> Any:
    loss = run.loss()
    run.model.head.requires_grad_(False)
    run.backward(loss)
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.model.head.requires_grad_(True)


@use()
def a_module_added(run: Training) -> Any:
    more = nn.Linear(WIDTH, WIDTH)
    with torch.no_grad():
        more.weight.copy_(torch.eye(WIDTH))
    run.model.append(more.to(run.device))
    run.optimizer.add_param_group({"params": list(more.parameters())})
    run.step()
    return dict(run.model[-1].state_dict()), len(run.model)


@use()
def a_module_added_that_nobody_trains(run: Training) -> Any:
    run.model.add_module("more", nn.Linear(WIDTH, WIDTH).to(run.device))
    run.step()
    return dict(run.model.state_dict())


@use()
def a_layer_removed(run: Training) -> Any:
    del run.model[5]
    run.step()
    return len(run.model), len(run.parameters)


@use("blocks")
def a_block_dropped(run: Training) -> Any:
    dropped = run.model.blocks[-1]
    run.model.blocks = run.model.blocks[:-1]
    run.step()
    return dict(dropped.state_dict()), len(run.model.blocks)


@use("blocks")
def blocks_in_another_order(run: Training) -> Any:
    run.model.blocks = nn.ModuleList(list(run.model.blocks)[::-1])
    run.step()
    return [p.norm() for p in run.model.blocks[0].parameters()]


@use()
def a_slice_of_it(run: Training) -> Any:
    """A new `nn.Sequential` of some of its layers."""
    part = run.model[:4]
    return part(torch.ones(2, WIDTH, device=run.device)), dict(part.state_dict()), len(list(part.parameters()))


@use()
def trained_through_a_slice(run: Training) -> Any:
    part = nn.Sequential(*list(run.model.children())[:6])
    run.backward(part(run.batch()).square().mean())
    run.optimizer.step()
    run.optimizer.zero_grad()


@use()
def a_layer_replaced_by_nothing(run: Training) -> Any:
    run.model[5] = nn.Identity()
    run.step()
    return len(run.parameters)


@use()
def a_layer_replaced_by_another(run: Training) -> Any:
    new = nn.Linear(WIDTH, WIDTH).to(run.device)
    run.model[5] = new
    run.step()
    return dict(run.model.state_dict())


@use()
def a_layer_replaced_and_trained(run: Training) -> Any:
    run.model[5] = nn.Linear(WIDTH, WIDTH).to(run.device)
    run.optimizer.add_param_group({"params": list(run.model[5].parameters()), "lr": 1e-3})
    run.train(2)
    return dict(run.model.state_dict())


@use()
def weights_tied(run: Training) -> Any:
    run.model[7].weight = run.model[0].weight
    run.train(2)
    return len(run.parameters), run.model[7].weight.norm()


@use("blocks")
def head_and_embedding_tied(run: Training) -> Any:
    run.model.head.weight = run.model.embedding.weight
    run.train(2)
    return len(run.parameters)


@use("tied")
def head_and_embedding_untied(run: Training) -> Any:
    run.model.head.weight = nn.Parameter(run.model.embedding.weight.detach().clone())
    run.optimizer.add_param_group({"params": [run.model.head.weight]})
    run.train(2)
    return len(run.parameters)


@use()
def parameters_swapped(run: Training) -> Any:
    run.model[7].weight, run.model[0].weight = run.model[0].weight, run.model[7].weight
    run.train(2)
    return run.model[0].weight.norm(), run.model[7].weight.norm()


@use()
def a_parameter_replaced(run: Training) -> Any:
    """Plain PyTorch trains the old one no more, and the new one not yet."""
    run.model[3].weight = nn.Parameter(torch.full((WIDTH, WIDTH), 0.01, device=run.device))
    run.train(2)
    return run.model[3].weight


@use()
def a_parameter_replaced_by_setattr(run: Training) -> Any:
    setattr(run.model[3], "bias", nn.Parameter(run.model[3].bias.detach() * 2))  # noqa: B010
    run.step()
    return run.model[3].bias


@use()
def a_bias_deleted(run: Training) -> Any:
    run.model[3].bias = None
    run.step()
    return sorted(run.model.state_dict())


@use()
def a_parameter_registered(run: Training) -> Any:
    run.model[3].register_parameter("scale", nn.Parameter(torch.ones(WIDTH, device=run.device)))
    run.optimizer.add_param_group({"params": [run.model[3].scale]})
    handle = run.model[3].register_forward_hook(lambda module, inputs, output: output * module.scale)
    run.train(2)
    seen = run.model[3].scale.detach().clone()
    handle.remove()
    return seen


@use()
def a_parameter_deleted_and_registered_again(run: Training) -> Any:
    kept = run.model[3].weight
    del run.model[3].weight
    run.model[3].register_parameter("weight", kept)
    run.train(2)
    return kept.norm()


@use()
def a_parameter_held_as_a_plain_attribute(run: Training) -> Any:
    """As weight norm of old and pruning do: the name becomes a tensor that a hook makes anew."""
    layer = run.model[3]
    kept = layer.weight
    del layer.weight
    layer.register_parameter("weight_of_it", kept)

    def remake(module: Any, inputs: Any) -> None:
        module.weight = module.weight_of_it * 0.5

    handle = layer.register_forward_pre_hook(remake)
    run.train(2)
    handle.remove()
    del layer.weight
    del layer.weight_of_it
    layer.weight = kept


@use()
def a_forward_hook_that_reads_weights(run: Training) -> Any:
    seen: list[Any] = []
    handles = [
        layer.register_forward_hook(lambda module, inputs, output: seen.append(module.weight.norm().item()))
        for layer in run.model
    ]
    run.train(2)
    for handle in handles:
        handle.remove()
    return seen


@use()
def a_forward_hook_that_reads_the_next_layers_weights(run: Training) -> Any:
    seen: list[Any] = []
    handles = [
        layer.register_forward_hook(lambda *_, index=index: seen.append(run.given_parameters[2 * index].sum().item()))
        for index, layer in enumerate(list(run.model[1:]))
    ]
    run.train(2)
    for handle in handles:
        handle.remove()
    return seen


@use()
def a_backward_hook_that_reads_weights(run: Training) -> Any:
    seen: list[Any] = []
    handles = [
        layer.register_full_backward_hook(lambda module, *_: seen.append(module.weight.detach().norm().item()))
        for layer in run.model
    ]
    run.train(2)
    for handle in handles:
        handle.remove()
    return seen


@use("blocks")
def blocks_called_by_hand(run: Training) -> Any:
    tokens = run.batch()
    x = run.model.embedding(tokens)
    for block in run.model.blocks:
        x = block(x)
    run.backward(run.model.head(x).square().mean())
    run.optimizer.step()
    run.optimizer.zero_grad()


@use("blocks")
def a_block_alone(run: Training) -> Any:
    x = torch.ones(2, WIDTH, device=run.device)
    run.backward(run.model.blocks[3](x).square().mean())
    run.optimizer.step()
    run.optimizer.zero_grad()
    with torch.no_grad():
        return run.model.blocks[3](x), run.model.blocks[0].norm(x)


@use("blocks")
def a_part_shared_with_another_model(run: Training) -> Any:
    """Both are trained by one loss: an encoder with a second head."""
    torch.manual_seed(5)
    second = nn.Sequential(run.model.embedding, run.model.blocks[0], nn.Linear(WIDTH, 16).to(run.device))
    run.optimizer.add_param_group({"params": list(second[2].parameters())})
    run.backward(second(run.batch()).square().mean() + run.loss())
    run.optimizer.step()
    run.optimizer.zero_grad()
    return dict(second[2].state_dict())


@use("blocks")
def a_wrapper_trained(run: Training) -> Any:
    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Any) -> Any:
            return self.inner(x).square().mean()

    wrapper = Wrapper(run.model)
    seen = sorted(wrapper.state_dict()), [p.norm() for p in wrapper.parameters()]
    run.backward(wrapper(run.batch()))
    run.optimizer.step()
    run.optimizer.zero_grad()
    return seen


@use("normalised")
def buffers_reset(run: Training) -> Any:
    for module in run.model:
        if isinstance(module, nn.BatchNorm1d):
            module.reset_running_stats()
            module.momentum = 0.5
    run.step()
    return dict(run.model.named_buffers())


@use()
def a_method_patched(run: Training) -> Any:
    layer = run.model[4]
    forward = layer.forward
    layer.forward = lambda x: forward(x) * 2 + layer.bias
    run.train(2)
    del layer.forward


@use("blocks")
def attributes_of_its_own(run: Training) -> Any:
    run.model.epoch = 3
    run.model.blocks[0].note = "first"
    run.step()
    return run.model.epoch, run.model.blocks[0].note, "epoch" in vars(run.model), type(run.model).__name__


@use("blocks")
def looked_over(run: Training) -> Any:
    return (
        [name for name, _ in run.model.named_modules()],
        [name for name, _ in run.model.named_parameters()],
        [name for name, _ in run.model.named_children()],
        run.model.get_parameter("blocks.1.wide.weight").norm(),
        run.model.get_submodule("blocks.2.norm").weight.sum(),
        repr(run.model) == repr(run.unmanaged()),
        hasattr(run.model, "head"),
        isinstance(run.model, type(run.unmanaged())),
    )
