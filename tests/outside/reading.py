"""Uses that read parameters."""

import copy
import hashlib
import io
import pickle
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy
import torch
from outside.harness import Catalogue
from outside.models import WIDTH
from outside.placements import Refusal
from outside.running import Training, in_another_thread
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

reading = Catalogue("reading")
use = reading.add

ONLY_EAGER = Refusal(
    (RuntimeError, NotImplementedError, TypeError, ValueError), r"detach|clone|functional_call|state_dict"
)
"""For transforms that reach the memory of a parameter without asking it."""


@use()
def a_list_kept_from_before_boost(run: Training) -> Any:
    return [p.detach().clone() for p in run.given_parameters]


@use()
def a_list_kept_over_a_step(run: Training) -> Any:
    kept = run.parameters
    run.step()
    return [p.sum().item() for p in kept]


@use()
def param_groups(run: Training) -> Any:
    return [p.norm() for group in run.optimizer.param_groups for p in group["params"]]


@use()
def param_groups_of_the_optimizer_given_to_boost(run: Training) -> Any:
    return [p.norm() for group in run.given_optimizer.param_groups for p in group["params"]]


@use("blocks")
def named_parameters(run: Training) -> Any:
    return {name: p.detach().square().mean().item() for name, p in run.model.named_parameters()}


@use("blocks")
def parameters_of_a_block(run: Training) -> Any:
    return [p.abs().sum().item() for p in run.model.blocks[1].parameters()]


@use()
def parameters_to_vector(run: Training) -> Any:
    return nn.utils.parameters_to_vector(run.model.parameters())


@use()
def parameters_to_vector_of_a_kept_list(run: Training) -> Any:
    return nn.utils.parameters_to_vector(run.given_parameters)


@use()
def attributes_by_name(run: Training) -> Any:
    return [layer.weight.norm().item() for layer in run.model]


@use()
def all_layers_by_name_held_at_once(run: Training) -> Any:
    held = [layer.weight.view(-1) for layer in run.model]
    return [view.sum().item() for view in held]


@use()
def norms_in_one_tensor(run: Training) -> Any:
    return torch.stack([p.detach().norm() for p in run.parameters]).norm()


@use()
def norms_by_foreach(run: Training) -> Any:
    return torch._foreach_norm([p.detach() for p in run.parameters]), torch._foreach_norm(run.parameters)


@use()
def total_norm(run: Training) -> Any:
    return nn.utils.get_total_norm(run.parameters), nn.utils.get_total_norm(run.given_parameters, float("inf"))


@use(needs_host=True)
def numpy_arrays(run: Training) -> Any:
    return [p.detach().numpy().copy() for p in run.parameters]


@use(needs_host=True)
def numpy_asarray(run: Training) -> Any:
    return [numpy.asarray(p.detach()).sum() for p in run.given_parameters], numpy.array(run.model[0].weight.tolist())


@use()
def lists(run: Training) -> Any:
    return run.model[0].weight.tolist(), list(run.model[3].bias), [float(x) for x in run.model[9].bias]


@use()
def one_element(run: Training) -> Any:
    p = run.given_parameters[2]
    return p[0, 0].item(), float(p[1, 2]), p.data[3, 4].item(), f"{p[0, 0]:.8f}", f"{p.mean().item():.6f}"


@use(needs_host=True)  # the text names the device
def printed(run: Training) -> Any:
    return [repr(run.given_parameters[i]) for i in (0, 1, 16, 19)] + [str(p) for p in run.parameters]


@use()
def compared_with_each_other(run: Training) -> Any:
    first, second = run.given_parameters[0], run.given_parameters[10]
    return first == second, first > second, (first != 0).all(), torch.equal(first, second), torch.equal(first, first)


@use()
def indexed(run: Training) -> Any:
    weight = run.given_parameters[4]
    return weight[0], weight[:, 1], weight[weight > 0], weight[..., -1], weight[[1, 2]], [row.sum() for row in weight]


@use()
def arithmetic(run: Training) -> Any:
    a, b = run.given_parameters[0], run.given_parameters[18]
    return a + b, a * 2, 1 - a, -a, a @ b, a.pow(2), abs(a), a / b.abs().add(1), a // 1, torch.maximum(a, b)


@use()
def copied_deeply(run: Training) -> Any:
    copies = [copy.deepcopy(p) for p in run.given_parameters]
    assert all(isinstance(c, nn.Parameter) and c.requires_grad for c in copies)
    run.step()
    return copies


@use()
def copied_deeply_in_a_dict(run: Training) -> Any:
    copies = copy.deepcopy({"all": run.given_parameters, "again": run.given_parameters[0]})
    return copies["again"] is copies["all"][0], copies


@use()
def copied_shallowly(run: Training) -> Any:
    return [copy.copy(p.data) for p in run.given_parameters]


@use()
def pickled(run: Training) -> Any:
    loaded = pickle.loads(pickle.dumps(run.given_parameters))
    return [type(p).__name__ for p in loaded], [p.requires_grad for p in loaded], loaded


@use()
def saved_by_torch(run: Training) -> Any:
    file = io.BytesIO()
    torch.save(dict(run.model.named_parameters()), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@use()
def data_saved_by_torch(run: Training) -> Any:
    """A file holds whole storages: one parameter's must not hold its chunk."""
    file = io.BytesIO()
    torch.save(run.given_parameters[5].data, file)
    size = len(file.getvalue())
    file.seek(0)
    return torch.load(file, weights_only=True), size < 2048 + run.given_parameters[5].nbytes


@use()
def converted(run: Training) -> Any:
    p = run.given_parameters[0]
    return p.clone(), p.detach(), p.data, p.cpu(), p.double(), p.to(torch.bfloat16), p.half(), p.float(), p.type_as(p)


@use()
def seen_in_other_shapes(run: Training) -> Any:
    p = run.given_parameters[0]
    return (
        p.view(-1), p.T, p.reshape(16, -1), p.flatten(), p.unsqueeze(0), p.transpose(0, 1), p.permute(1, 0), p.mT,
        p.expand(2, WIDTH, WIDTH), p.chunk(2), p.split(8), p.unbind(), p.narrow(0, 1, 2),
        p.as_strided((4, 4), (WIDTH, 1)),
    )  # fmt: skip


@use()
def linear_outside_of_forward(run: Training) -> Any:
    layer = run.model[5]
    return functional.linear(torch.ones(2, WIDTH, device=run.device), layer.weight, layer.bias)


@use()
def modules_called_one_by_one(run: Training) -> Any:
    x = torch.ones(2, WIDTH, device=run.device)
    for layer in run.model:
        x = layer(x)
    return x


@use()
def functional_call_with_its_own_parameters(run: Training) -> Any:
    parameters = dict(run.model.named_parameters())
    return functional_call(run.model, parameters, torch.ones(2, WIDTH, device=run.device))


@use()
def functional_call_with_other_parameters(run: Training) -> Any:
    parameters = {name: p.detach() * 0.5 for name, p in run.model.named_parameters()}
    return functional_call(run.model, parameters, torch.ones(2, WIDTH, device=run.device))


@use()
def functional_call_of_another_model(run: Training) -> Any:
    other = run.unmanaged().to(run.device)
    return functional_call(other, dict(run.model.named_parameters()), torch.ones(2, WIDTH, device=run.device))


@use()
def gradients_by_autograd(run: Training) -> Any:
    return torch.autograd.grad(run.loss(), run.parameters)


@use()
def gradients_of_one_weight_by_autograd(run: Training) -> Any:
    return torch.autograd.grad(run.loss(), run.model[4].weight, retain_graph=True)


@use()
def penalty_made_before_forward(run: Training) -> Any:
    penalty = sum(p.square().sum() for p in run.given_parameters)
    run.backward(run.loss() + 1e-2 * penalty)
    run.optimizer.step()
    run.optimizer.zero_grad()


@use()
def penalty_made_after_forward(run: Training) -> Any:
    run.backward(run.loss() + 1e-3 * sum(p.abs().sum() for p in run.parameters))
    run.optimizer.step()
    run.optimizer.zero_grad()


@use()
def penalty_alone(run: Training) -> Any:
    run.backward(sum(p.square().sum() for p in run.given_parameters))
    run.optimizer.step()
    run.optimizer.zero_grad()


@use()
def orthogonality_penalty(run: Training) -> Any:
    eye = torch.eye(WIDTH, device=run.device)
    penalty = sum((layer.weight @ layer.weight.T - eye).square().sum() for layer in run.model)
    run.backward(run.loss() + 1e-3 * penalty)
    run.optimizer.step()
    run.optimizer.zero_grad()


@use()
def distance_to_earlier_weights(run: Training) -> Any:
    """As elastic weight consolidation and L2-SP have it."""
    anchors = [p.detach().clone() for p in run.parameters]
    run.step()
    run.backward(run.loss() + sum((p - a).square().sum() for p, a in zip(run.parameters, anchors, strict=True)))
    run.optimizer.step()
    run.optimizer.zero_grad()


@use()
def gradient_penalty(run: Training) -> Any:
    loss = run.loss()
    gradients = torch.autograd.grad(loss, run.parameters, create_graph=True)
    run.backward(loss + sum(g.square().sum() for g in gradients))
    run.optimizer.step()
    run.optimizer.zero_grad()


@use()
def hessian_vector_product(run: Training) -> Any:
    parameters = [layer.weight for layer in run.model]
    gradients = torch.autograd.grad(run.loss(), parameters, create_graph=True)
    product = sum((g * p.detach()).sum() for g, p in zip(gradients, parameters, strict=True))
    return torch.autograd.grad(product, parameters)


@use()
def histograms(run: Training) -> Any:
    return [
        (p.histc(10), p.min(), p.max(), p.mean(), p.std(), p.median(), p.abs().quantile(0.9))
        for p in map(Tensor.detach, run.given_parameters)
    ]


@use(needs_host=True)
def dlpack(run: Training) -> Any:
    return [torch.from_dlpack(p.detach()).clone() for p in run.given_parameters]


@use()
def checks_for_nan(run: Training) -> Any:
    return (
        [p.isnan().any().item() for p in run.given_parameters],
        all(torch.isfinite(p).all() for p in run.parameters),
        any(bool(torch.isinf(p.data).any()) for p in run.given_parameters),
    )


@use("blocks")
def state_dict(run: Training) -> Any:
    return dict(run.model.state_dict())


@use("blocks")
def state_dict_with_its_variables(run: Training) -> Any:
    saved = run.model.state_dict(keep_vars=True)
    return [v.requires_grad for v in saved.values()], dict(saved)


@use("blocks")
def state_dict_of_a_block(run: Training) -> Any:
    return dict(run.model.blocks[2].state_dict()), dict(run.model.blocks[2].state_dict(prefix="part.", keep_vars=True))


@use("blocks")
def state_dicts_of_children(run: Training) -> Any:
    return {name: dict(child.state_dict()) for name, child in run.model.named_children()}


@use("blocks")
def state_dict_copied_deeply(run: Training) -> Any:
    best = copy.deepcopy(run.model.state_dict())
    run.step()
    return dict(best)


@use()
def hash_of_a_checkpoint(run: Training) -> Any:
    digest = hashlib.sha256()
    for name, value in sorted(run.model.state_dict().items()):
        digest.update(name.encode() + value.cpu().numpy().tobytes())
    return digest.hexdigest()


@use(needs_host=True)
def hash_of_parameters(run: Training) -> Any:
    digest = hashlib.sha256()
    for p in run.given_parameters:
        digest.update(p.detach().numpy().tobytes())
    return digest.hexdigest()


@use()
def average_of_weights_by_hand(run: Training) -> Any:
    average = [p.detach().clone() for p in run.parameters]
    for _ in range(3):
        run.step()
        with torch.no_grad():
            for a, p in zip(average, run.parameters, strict=True):
                a.lerp_(p, 0.1)
    return average


@use()
def average_of_weights_by_foreach(run: Training) -> Any:
    average = [p.detach().clone() for p in run.given_parameters]
    run.step()
    torch._foreach_mul_(average, 0.9)
    torch._foreach_add_(average, [p.detach() for p in run.given_parameters], alpha=0.1)
    run.step()
    with torch.no_grad():
        torch._foreach_lerp_(average, run.given_parameters, 0.1)
    return average


@use("normalised", needs_host=True)  # on a device it takes another formula
def averaged_model(run: Training) -> Any:
    average = AveragedModel(run.unmanaged().to(run.device))
    for _ in range(2):
        average.update_parameters(run.model)
        run.step()
    average.update_parameters(run.model)
    return dict(average.module.state_dict())


@use("normalised")
def averaged_model_by_foreach(run: Training) -> Any:
    average = AveragedModel(run.unmanaged().to(run.device), multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for _ in range(2):
        average.update_parameters(run.model)
        run.step()
    average.update_parameters(run.model)
    return dict(average.module.state_dict())


@use()
def distance_to_another_model(run: Training) -> Any:
    other = run.unmanaged().to(run.device)
    return [
        ((p - q).norm().item(), torch.equal(p, q), torch.allclose(p, q), functional.cosine_similarity(p, q, dim=0))
        for p, q in zip(run.given_parameters, other.parameters(), strict=True)
    ]


@use()
def copied_into_another_model(run: Training) -> Any:
    other = run.unmanaged().to(run.device)
    with torch.no_grad():
        for theirs, ours in zip(other.parameters(), run.parameters, strict=True):
            theirs.copy_(ours)
    run.step()
    return dict(other.state_dict())


@use()
def loaded_into_another_model(run: Training) -> Any:
    other = run.unmanaged().to(run.device)
    other.load_state_dict(run.model.state_dict())
    run.step()
    return dict(other.state_dict())


@use()
def loaded_into_another_module_part_by_part(run: Training) -> Any:
    other = run.unmanaged().to(run.device)
    for theirs, ours in zip(other, run.model, strict=True):
        theirs.load_state_dict(ours.state_dict())
    return dict(other.state_dict())


@use()
def target_network_updated_softly(run: Training) -> Any:
    """As in DDPG: the target follows slowly, through ``.data``."""
    target = run.unmanaged().to(run.device)
    for _ in range(2):
        run.step()
        for t, p in zip(target.parameters(), run.model.parameters(), strict=True):
            t.data.copy_(t.data * 0.9 + p.data * 0.1)
    return list(target.parameters())


@use()
def tensors_made_like_it(run: Training) -> Any:
    made = []
    for p in run.given_parameters:
        made += [torch.zeros_like(p), torch.ones_like(p), p.new_zeros(3), torch.full_like(p, 2), p.new_tensor([1.0])]
        assert torch.empty_like(p).shape == p.shape and p.new_empty(2).dtype == p.dtype
    return made, torch.rand_like(run.given_parameters[0]), torch.randn_like(run.given_parameters[19])


@use()
def described(run: Training) -> Any:
    return [
        (p.shape[0], p.dim(), p.numel(), len(p), p.dtype, p.stride(), p.is_contiguous(), p.element_size() * p.numel(),
         p.nbytes, p.is_leaf, p.requires_grad, p.grad is None, p.grad_fn is None, p.layout == torch.strided, p.ndim,
         p.is_floating_point(), p.storage_offset(), p.size(-1), p.device.type == torch.device(run.device).type)
        for p in run.given_parameters
    ]  # fmt: skip


@use("gpt2")
def counted(run: Training) -> Any:
    return (
        sum(p.numel() for p in run.model.parameters() if p.requires_grad),
        run.model.num_parameters(),
        run.model.get_memory_footprint(),
        run.model.dtype,
    )


@use("tied")
def ties_told_by_identity(run: Training) -> Any:
    parameters = run.given_parameters
    return len(parameters), len({id(p) for p in parameters}), run.model.head.weight is run.model.embedding.weight


@use("tied")
def ties_told_by_address(run: Training) -> Any:
    """The parameters are held, so that no address is used again."""
    every = dict(run.model.named_parameters(remove_duplicate=False))
    return len(every), len({p.data_ptr() for p in every.values()})


@use("tied")
def ties_told_by_storage(run: Training) -> Any:
    """As libraries for checkpoints find tensors that share memory."""
    every = dict(run.model.named_parameters(remove_duplicate=False))
    held = [p.untyped_storage() for p in every.values()]
    return len({storage.data_ptr() for storage in held})


@use()
def a_storage(run: Training) -> Any:
    p = run.given_parameters[7]
    return p.untyped_storage().nbytes() == p.nbytes, p.data_ptr() != 0, p.data_ptr() == p.detach().data_ptr()


@use()
def a_switch_of_requires_grad(run: Training) -> Any:
    frozen = run.given_parameters[:6]
    for p in frozen:
        p.requires_grad_(False)
    run.step()
    seen = [p.requires_grad for p in run.parameters], [p.norm() for p in frozen]
    for p in frozen:
        p.requires_grad = True
    return seen


@use(needs_host=True)  # they name the device
def types(run: Training) -> Any:
    return [
        (isinstance(p, nn.Parameter), isinstance(p, Tensor), torch.is_tensor(p), type(p).__name__, p.type())
        for p in run.given_parameters
    ]


@use()
def keys_of_dicts_and_sets(run: Training) -> Any:
    names = {p: name for name, p in run.model.named_parameters()}
    found = [names[p] for p in run.given_parameters]
    run.step()
    return found, [names[p] for p in run.given_parameters], len(set(run.parameters) | set(run.given_parameters))


@use()
def weak_references(run: Training) -> Any:
    references = [weakref.ref(p) for p in run.given_parameters]
    names = weakref.WeakKeyDictionary({p: name for name, p in run.model.named_parameters()})
    run.step()
    return [reference().sum() for reference in references], len(names)


@use()
def another_thread(run: Training) -> Any:
    def log() -> Any:
        norms = [p.norm().item() for p in run.given_parameters]
        return norms, {name: p.detach().mean() for name, p in run.model.named_parameters()}

    return in_another_thread(log)


@use()
def two_threads_at_once(run: Training) -> Any:
    def log() -> Any:
        return [[p.detach().sum().item() for p in run.given_parameters] for _ in range(3)]

    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(log) for _ in range(2)]
        return [one.result(60) for one in both]


@use()
def under_inference_mode(run: Training) -> Any:
    with torch.inference_mode():
        norms = [p.norm().item() for p in run.given_parameters]
        output = run.model(torch.ones(2, WIDTH, device=run.device))
    return norms, output


@use()
def under_no_grad(run: Training) -> Any:
    with torch.no_grad():
        return [p.sum() for p in run.given_parameters], [layer.weight.norm() for layer in run.model]


@use()
def under_autocast(run: Training) -> Any:
    with torch.autocast(torch.device(run.device).type, dtype=torch.bfloat16):
        return (
            run.given_parameters[0] @ run.given_parameters[2],
            run.model[9].weight.norm(),
            run.model[1](torch.ones(2, WIDTH, device=run.device)),
        )


@use()
def all_in_one_tensor(run: Training) -> Any:
    weights = torch.stack([layer.weight for layer in run.model])
    flat = torch.cat([p.detach().flatten() for p in run.given_parameters])
    return weights.mean(0), flat.norm(), torch.cat([p.view(-1) for p in run.given_parameters])


@use()
def data_kept_over_a_step(run: Training) -> Any:
    """What ``.data`` and ``detach()`` return shows later updates too."""
    data = [p.data for p in run.given_parameters]
    detached = [p.detach() for p in run.given_parameters]
    run.step()
    return [d.clone() for d in data], [d.clone() for d in detached]


@use()
def views_kept_over_a_step(run: Training) -> Any:
    views = [layer.weight.view(-1)[:8] for layer in run.model], [p.T for p in run.given_parameters[::2]]
    run.step()
    return views


@use(needs_host=True)
def arrays_kept_over_a_step(run: Training) -> Any:
    arrays = [p.detach().numpy() for p in run.given_parameters]
    run.step()
    return [array.copy() for array in arrays]


@use()
def clones_kept_over_a_step(run: Training) -> Any:
    clones = {name: p.data.clone() for name, p in run.model.named_parameters()}
    run.step()
    return clones, [(p - clones[name]).norm() for name, p in run.model.named_parameters()]


@use()
def linear_algebra(run: Training) -> Any:
    weights = [p.detach() for p in run.given_parameters[::2]]
    return [(torch.linalg.matrix_norm(w), torch.linalg.vector_norm(w, 1), w.trace(), w.diagonal()) for w in weights]


@use()
def singular_values(run: Training) -> Any:
    return [torch.linalg.svdvals(p) for p in run.given_parameters[:6:2]]


@use()
def between_forward_and_backward(run: Training) -> Any:
    loss = run.loss()
    seen = [p.norm().item() for p in run.given_parameters]
    run.backward(loss)
    run.optimizer.step()
    run.optimizer.zero_grad()
    return seen


@use()
def between_backward_and_step(run: Training) -> Any:
    run.backward()
    seen = [(p.norm().item(), p.data.sum()) for p in run.given_parameters]
    run.optimizer.step()
    run.optimizer.zero_grad()
    return seen


@use()
def right_after_step(run: Training) -> Any:
    run.backward()
    run.optimizer.step()
    seen = [p.sum().item() for p in run.given_parameters]
    run.optimizer.zero_grad()
    return seen


@use(refusal=ONLY_EAGER, may_be_equal=True)
def mapped_over_by_vmap(run: Training) -> Any:
    weight = run.given_parameters[8]
    return torch.vmap(lambda row: row.norm())(weight), torch.vmap(torch.dot)(weight, weight)


@use(refusal=ONLY_EAGER, may_be_equal=True)
def derivative_by_func(run: Training) -> Any:
    parameters = dict(run.model.named_parameters())
    x = torch.ones(2, WIDTH, device=run.device)
    return torch.func.grad(lambda ps: functional_call(run.model, ps, x).square().mean())(parameters)


@use(refusal=Refusal(RuntimeError, "same python structure", is_torchs=True), may_be_equal=True)
def jvp_by_func(run: Training) -> Any:
    weight = run.given_parameters[8]
    return torch.func.jvp(lambda w: w.square().sum(), (weight,), (torch.ones_like(weight),))


@use()
def stacked_by_func(run: Training) -> Any:
    parameters, _ = torch.func.stack_module_state([run.model[0], run.model[1]])
    return parameters


@use()
def per_sample_gradients(run: Training) -> Any:
    parameters = {name: p.detach() for name, p in run.model.named_parameters()}
    samples = torch.eye(WIDTH, device=run.device)[:3]

    def loss(parameters: Any, x: Tensor) -> Tensor:
        return functional_call(run.model, parameters, (x.unsqueeze(0),)).square().mean()

    return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, samples)


@use()
def operators_of_aten(run: Training) -> Any:
    p = run.given_parameters[6]
    return torch.ops.aten.add(p, 1.0), torch.ops.aten.linalg_vector_norm.default(p), torch._C._VariableFunctions.neg(p)


@use()
def results_written_out(run: Training) -> Any:
    a, b = run.given_parameters[0], run.given_parameters[2]
    with torch.no_grad():
        return torch.add(a, b, out=torch.empty_like(a)), torch.mm(a, b, out=torch.empty_like(a))


@use()
def a_custom_function(run: Training) -> Any:
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
            return gradient * ctx.saved_tensors[0] * 2

    run.backward(run.loss() + sum(Doubled.apply(p).sum() for p in run.given_parameters[::4]))
    run.optimizer.step()
    run.optimizer.zero_grad()


@use()
def a_loss_of_weights_checkpointed(run: Training) -> Any:
    from torch.utils.checkpoint import checkpoint

    penalty = checkpoint(lambda w: (w @ w).square().mean(), run.given_parameters[4], use_reentrant=False)
    run.backward(run.loss() + penalty)
    run.optimizer.step()
    run.optimizer.zero_grad()


@use("encoder", needs_host=True)
def evaluated_by_a_fast_path(run: Training) -> Any:
    """`nn.TransformerEncoderLayer` uses another kernel, and gets other bits, where its parameters are plain ones."""
    run.model.eval()
    with torch.no_grad():
        seen = run.model(run.batch()), run.model(run.batch())
    run.model.train()
    return seen


@use("encoder", needs_host=True)  # on a device torch takes another kernel for attention
def attention_weights_by_hand(run: Training) -> Any:
    attention = run.model.layers[0].self_attn
    query, key, value = attention.in_proj_weight.chunk(3)
    return (query @ key.T).softmax(-1), value.norm(), attention.out_proj.weight.T


@use(refusal=ONLY_EAGER, may_be_equal=True)
def traced_by_jit(run: Training) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(run.model, torch.ones(2, WIDTH, device=run.device), check_trace=False)
    run.step()
    return traced(torch.ones(2, WIDTH, device=run.device))


@use(refusal=ONLY_EAGER, may_be_equal=True)
def traced_symbolically(run: Training) -> Any:
    traced = torch.fx.symbolic_trace(run.model)
    run.step()
    return traced(torch.ones(2, WIDTH, device=run.device)), dict(traced.state_dict())


@use()
def iterated_over_lazily(run: Training) -> Any:
    """A generator that is half used when training goes on."""
    parameters = run.model.parameters()
    seen = [next(parameters).sum().item() for _ in range(5)]
    run.step()
    return seen, [p.sum().item() for p in parameters]


@use()
def grouped_by_dtype_and_device(run: Training) -> Any:
    """As `torch.optim` and DDP's buckets do it."""
    from torch.utils._foreach_utils import _group_tensors_by_device_and_dtype

    groups = _group_tensors_by_device_and_dtype([run.given_parameters])
    return [len(tensors[0]) for tensors, _ in groups.values()], [p.sum() for ts, _ in groups.values() for p in ts[0]]


@use()
def flattened_by_pytree(run: Training) -> Any:
    from torch.utils import _pytree

    leaves, _ = _pytree.tree_flatten(dict(run.model.named_parameters()))
    return _pytree.tree_map(lambda p: p.detach() * 2, leaves)
