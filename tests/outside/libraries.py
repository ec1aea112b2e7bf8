"""Uses of libraries: peft, transformers, accelerate and Lightning between steps."""

import io
import os
from pathlib import Path
from typing import Any

import torch
from outside.harness import Catalogue, Refusal, Training
from outside.models import WORDS
from torch import nn

libraries = Catalogue("libraries")
use = libraries.add

BEFORE_BOOST = Refusal((RuntimeError, ValueError, NotImplementedError), r"before booster\.boost")


@use("lora")
def adapters_merged(run: Training) -> Any:
    run.model.merge_adapter()
    with torch.no_grad():
        seen = run.model(torch.ones(2, 64, device=run.device))
    run.model.unmerge_adapter()
    return seen


@use("lora")
def adapters_merged_over_a_state_dict(run: Training) -> Any:
    run.model.merge_adapter()
    seen = {name: value.clone() for name, value in run.model.state_dict().items()}
    run.model.unmerge_adapter()
    return seen


@use("lora", ends_training=True)
def adapters_merged_and_unloaded(run: Training) -> Any:
    """The model that is left has no adapters; nothing trains any more."""
    x = torch.ones(2, 64, device=run.device)
    merged = run.model.merge_and_unload()
    with torch.no_grad():
        output = merged(x)
    fresh = nn.Sequential(*[nn.Linear(64, 64) for _ in range(len(merged))])
    fresh.load_state_dict(merged.state_dict())
    return output, dict(merged.state_dict()), fresh(x.cpu())


@use("lora")
def adapters_switched_off(run: Training) -> Any:
    x = torch.ones(2, 64, device=run.device)
    with torch.no_grad(), run.model.disable_adapter():
        without = run.model(x)
    return without, run.model(x)


@use("lora")
def adapters_saved(run: Training) -> Any:
    import peft

    saved = peft.get_peft_model_state_dict(run.model)
    run.model.save_pretrained(run.folder + "/adapter")
    names = sorted(p.name for p in Path(run.folder, "adapter").iterdir())
    return saved, "adapter_model.safetensors" in names


@use("lora")
def adapters_loaded(run: Training) -> Any:
    import peft

    other = run.unmanaged()
    values = {name: value.to(run.device) for name, value in peft.get_peft_model_state_dict(other).items()}
    peft.set_peft_model_state_dict(run.model, values)


@use("lora")
def adapters_scaled(run: Training) -> Any:
    for module in run.model.modules():
        if hasattr(module, "scale_layer"):
            module.scale_layer(0.5)


@use("lora")
def adapters_counted(run: Training) -> Any:
    return run.model.get_nb_trainable_parameters(), [
        name for name, p in run.model.named_parameters() if p.requires_grad
    ]


@use("gpt2")
def embeddings_read(run: Training) -> Any:
    words = run.model.get_input_embeddings().weight
    return words.mean(0), run.model.get_output_embeddings().weight is words, words.detach().norm(dim=1)


@use("gpt2")
def embeddings_changed(run: Training) -> Any:
    """As where words get the mean of others."""
    with torch.no_grad():
        words = run.model.get_input_embeddings().weight
        words[3:5] = words.mean(0)
    run.model.transformer.wte.weight.data[7] = 0


@use("gpt2", refusal=BEFORE_BOOST)
def embeddings_resized(run: Training) -> Any:
    run.model.resize_token_embeddings(WORDS + 16)


@use("gpt2", refusal=BEFORE_BOOST, may_be_equal=True)
def embeddings_resized_to_what_they_are(run: Training) -> Any:
    run.model.resize_token_embeddings(WORDS)


@use("gpt2")
def ties_made_again(run: Training) -> Any:
    run.model.tie_weights()
    return len(run.parameters)


@use("gpt2")
def text_generated(run: Training) -> Any:
    run.model.eval()
    found = run.model.generate(
        torch.zeros(1, 3, dtype=torch.int64, device=run.device), max_new_tokens=6, do_sample=False
    )
    run.model.train()
    return found


@use("gpt2")
def saved_and_read_again(run: Training) -> Any:
    import transformers

    run.model.save_pretrained(run.folder + "/saved")
    again = transformers.GPT2LMHeadModel.from_pretrained(run.folder + "/saved")
    return dict(again.state_dict())


@use("gpt2")
def saved_in_the_midst_of_a_step(run: Training) -> Any:
    import transformers

    loss = run.loss()
    run.model.save_pretrained(run.folder + "/saved")
    run.backward(loss)
    run.optimizer.step()
    run.optimizer.zero_grad()
    return dict(transformers.GPT2LMHeadModel.from_pretrained(run.folder + "/saved").state_dict())


@use("gpt2")
def initialised_by_its_own_rules(run: Training) -> Any:
    for module in run.model.transformer.h[1].modules():
        run.model._init_weights(module)


@use("gpt2")
def parts_frozen_by_name(run: Training) -> Any:
    for name, p in run.model.named_parameters():
        p.requires_grad = "ln_" in name or "wpe" in name
    run.train(2)
    for p in run.model.parameters():
        p.requires_grad = True


@use("gpt2")
def gradient_checkpointing_switched_on(run: Training) -> Any:
    run.model.gradient_checkpointing_enable()
    run.train(2)
    run.model.gradient_checkpointing_disable()


@use("gpt2")
def written_by_safetensors(run: Training) -> Any:
    from safetensors.torch import load_model, save, save_model

    save_model(run.model, run.folder + "/model.safetensors")
    one = save({"bias": run.model.transformer.h[2].mlp.c_fc.bias.detach()})
    other = run.unmanaged()
    load_model(other, run.folder + "/model.safetensors")
    return dict(other.state_dict()), one


@use("gpt2")
def read_by_safetensors(run: Training) -> Any:
    from safetensors.torch import load_model, save_model

    other = run.unmanaged()
    save_model(other, run.folder + "/model.safetensors")
    load_model(run.model, run.folder + "/model.safetensors")


@use("gpt2")
def unwrapped_by_accelerate(run: Training) -> Any:
    from accelerate.utils import extract_model_from_parallel

    return extract_model_from_parallel(run.model) is run.model, [p.norm() for p in run.parameters]


@use("normalised")
def averaged_by_timms_rule(run: Training) -> Any:
    """A hand-written class that averages state dicts, as vision libraries have it."""
    average = {name: value.clone() for name, value in run.model.state_dict().items()}
    for _ in range(2):
        run.step()
        for name, value in run.model.state_dict().items():
            if value.is_floating_point():
                average[name].mul_(0.9).add_(value.to(average[name].device), alpha=0.1)
            else:
                average[name].copy_(value)
    return average


@use()
def a_module_summarised(run: Training) -> Any:
    from lightning.pytorch.utilities.model_summary import summarize

    class Holder(_lightning_module()):  # type: ignore[misc]
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

    summary = summarize(Holder(run.model))
    return summary.total_parameters, summary.trainable_parameters


@use()
def gradient_norms_logged_by_lightning(run: Training) -> Any:
    from lightning.pytorch.utilities import grad_norm

    run.backward()
    norms = grad_norm(run.model, norm_type=2)
    run.optimizer.step()
    run.optimizer.zero_grad()
    return {name: value if isinstance(value, torch.Tensor) else torch.tensor(value) for name, value in norms.items()}


@use()
def stepped_by_lightnings_wrapper(run: Training) -> Any:
    """Manual optimisation: the wrapper's ``zero_grad`` is what clears."""
    from lightning.pytorch.core.optimizer import LightningOptimizer

    wrapper = LightningOptimizer(run.optimizer)
    for _ in range(3):
        wrapper.zero_grad()
        run.backward()
        wrapper._optimizer.step()
    wrapper.zero_grad()
    return [group["lr"] for group in wrapper.param_groups]


@use()
def toggled_as_in_adversarial_training(run: Training) -> Any:
    """As `LightningModule.toggle_optimizer` freezes what another optimizer trains."""
    other = set(run.given_parameters[:8])
    for p in other:
        p.requires_grad_(False)
    run.backward()
    seen = [p.grad is None for p in run.parameters]
    run.optimizer.step()
    run.optimizer.zero_grad()
    for p in other:
        p.requires_grad_(True)
    return seen


@use()
def clipped_by_accelerate(run: Training) -> Any:
    from accelerate import Accelerator

    run.backward()
    norm = Accelerator(cpu=True).clip_grad_norm_(run.model.parameters(), 1e-3)
    run.optimizer.step()
    run.optimizer.zero_grad()
    return norm


@use("blocks")
def saved_through_distributed_checkpoints(run: Training) -> Any:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    folder = run.folder + "/dcp"
    dcp.save({"model": get_model_state_dict(run.model)}, checkpoint_id=folder)
    read = {"model": run.unmanaged().state_dict()}
    dcp.load(read, checkpoint_id=folder)
    return read["model"], os.path.isdir(folder)


@use("blocks")
def counted_by_flops(run: Training) -> Any:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run.model(run.batch())
    return counter.get_total_flops()


@use("blocks")
def seen_by_anomaly_mode(run: Training) -> Any:
    with torch.autograd.detect_anomaly(check_nan=True):
        run.step()


@use("blocks")
def the_whole_saved_by_torch(run: Training) -> Any:
    file = io.BytesIO()
    torch.save({"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict(), "epoch": 1}, file)
    run.train(2)
    file.seek(0)
    saved = torch.load(file)
    run.model.load_state_dict(saved["model"])
    run.optimizer.load_state_dict(saved["optimizer"])
    return saved["epoch"]


def _lightning_module() -> Any:
    import lightning

    return lightning.LightningModule
