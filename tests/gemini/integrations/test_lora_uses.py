"""What people do with adapters of peft: each has the numbers that it has on a plain model."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted import PLACES, Run, check, config, tokens
from torch import Tensor
from torch.nn import functional

from gemini.lazy import LazyInitContext

pytestmark = pytest.mark.filterwarnings("ignore")  # peft's and transformers' own, about each other
peft = pytest.importorskip("peft", reason="peft is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

transformers.utils.logging.disable_progress_bar()

Program = Callable[[Run], None]


def trained(**options: Any) -> Program:
    def program(run: Run) -> None:
        model, optimizer = run.boost(run.adapted(config(**options)))
        run.train(model, optimizer, 3)
        run.see_weights(model)

    return program


def of_another_method(make: Callable[[], Any]) -> Program:
    def program(run: Run) -> None:
        model, optimizer = run.boost(run.adapted(make()))
        run.train(model, optimizer)
        run.see_weights(model)

    return program


def merged_and_unmerged(run: Run) -> None:
    model, optimizer = run.boost(run.adapted(config(use_dora=run.dtype is torch.float32)))
    for step in range(2):
        model.merge_adapter()
        run.see_logits(f"merged {step}", model)
        model.unmerge_adapter()
        run.train(model, optimizer, 1)
    run.see_weights(model)


def merged_and_saved(run: Run) -> None:
    model, optimizer = run.boost(run.adapted(config()))
    run.train(model, optimizer)
    merged = model.merge_and_unload()
    run.see_logits("merged", merged)
    if run.is_managed:
        run.booster.save_model(merged, str(run.folder / "merged"))
    else:
        merged.save_pretrained(run.folder / "merged")
    run.see_logits("read", transformers.LlamaForCausalLM.from_pretrained(run.folder / "merged", dtype=run.dtype))


def merged_before_the_first_step(run: Run) -> None:
    model, _ = run.boost(run.adapted(config(modules_to_save=["lm_head"])))
    merged = model.merge_and_unload(safe_merge=True)
    run.see_weights(merged)


def preferences_over_the_disabled_adapter(run: Run) -> None:
    """Direct preference optimisation, as trl does it: the reference is the model without its adapter."""

    def likelihood(model: Any, batch: Tensor) -> Tensor:
        logits = model(input_ids=batch).logits[:, :-1].float().log_softmax(-1)
        return logits.gather(-1, batch[:, 1:, None]).squeeze(-1).sum(-1)

    def loss_of(model: Any, batch: Tensor) -> Tensor:
        with torch.no_grad(), model.disable_adapter():
            reference = likelihood(model, batch)
        chosen, rejected = likelihood(model, batch) - reference
        return -functional.logsigmoid(0.1 * (chosen - rejected))

    base = run.base()
    base.gradient_checkpointing_enable()
    base.enable_input_require_grads()
    model, optimizer = run.boost(run.adapted(config(task_type="CAUSAL_LM"), base=base))
    run.train(model, optimizer, 3, loss_of)
    run.see_weights(model)


def several_adapters(run: Run) -> None:
    model = run.adapted(config(), base=None)
    model.add_adapter("other", config(r=2))
    model, optimizer = run.boost(model)
    run.train(model, optimizer)
    model.add_weighted_adapter(["default", "other"], [0.3, 0.7], "mean", combination_type="cat")
    for name in ("other", "mean"):
        model.set_adapter(name)
        run.see_logits(name, model)
    model.delete_adapter("mean")
    model.set_adapter("default")
    run.train(model, optimizer)
    model.eval()
    with torch.no_grad():
        run.seen["mixed"] = model(input_ids=tokens(9), adapter_names=["default", "other"]).logits
    run.see_weights(model)


def an_adapter_added_after_boost(run: Run) -> None:
    model, optimizer = run.boost(run.adapted(config()))
    run.train(model, optimizer, 1)
    model.add_adapter("late", config(r=2))
    model.set_adapter("late")
    optimizer.add_param_group({"params": [p for name, p in model.named_parameters() if ".late." in name]})
    run.train(model, optimizer)
    run.see_weights(model)


def an_adapter_loaded_after_boost(run: Run) -> None:
    run.adapted(config(r=2)).save_pretrained(run.folder / "saved")
    model, optimizer = run.boost(run.adapted(config()))
    run.train(model, optimizer, 1)
    model.load_adapter(run.folder / "saved", "late")
    model.set_adapter("late")
    run.see_logits("late", model)
    model.set_adapter("default")
    run.train(model, optimizer, 1)
    run.see_weights(model)


def the_second_of_two_adapters_trains_later(run: Run) -> None:
    model = run.adapted(config())
    model.add_adapter("other", config(r=2))
    model, optimizer = run.boost(model)
    run.train(model, optimizer, 1)
    model.set_adapter("other")
    optimizer.add_param_group({"params": [p for name, p in model.named_parameters() if ".other." in name]})
    run.train(model, optimizer)
    with model.disable_adapter():
        run.see_logits("base", model)
    run.see_weights(model)


def a_folder_that_trains_on(run: Run) -> None:
    model, optimizer = run.boost(run.adapted(config()))
    run.train(model, optimizer)
    folder = str(run.folder / "saved")
    if run.is_managed:
        run.booster.save_lora_as_pretrained(model, folder, use_safetensors=True)
        again = run.booster.enable_lora(run.base(), folder)
    else:
        model.save_pretrained(folder)
        again = peft.PeftModel.from_pretrained(run.base(), folder, is_trainable=True)
    model, optimizer = run.boost(again)
    run.train(model, optimizer)
    run.see_weights(model)


def a_lazy_base(run: Run) -> None:
    with LazyInitContext() if run.is_managed else nullcontext():
        base = run.base()
    torch.manual_seed(1)
    model, optimizer = run.boost(run.booster.enable_lora(base, config(use_dora=True, init_lora_weights=True)))
    run.train(model, optimizer)
    run.see_weights(model)
    model.save_pretrained(run.folder / "saved")
    with LazyInitContext() if run.is_managed else nullcontext():
        base = run.base()
    model, optimizer = run.boost(run.booster.enable_lora(base, run.folder / "saved"))
    run.train(model, optimizer)
    run.see_weights(model, "again")


def a_trainer_of_transformers(run: Run) -> None:
    from gemini.integrations.hugging_face import GeminiTrainerMixin

    class Managed(GeminiTrainerMixin, transformers.Trainer):
        pass

    arguments = transformers.TrainingArguments(
        output_dir=run.folder / "runs", per_device_train_batch_size=2, max_steps=2, save_steps=1, report_to=[],
        use_cpu=True, optim="adamw_torch_fused", disable_tqdm=True, logging_steps=10,
    )  # fmt: skip
    data = [{"input_ids": each, "labels": each} for step in range(4) for each in tokens(step)]
    model = run.adapted(config(task_type="CAUSAL_LM"))
    trainer: Any = transformers.Trainer(model, arguments, train_dataset=data)
    if run.is_managed:
        trainer = Managed(model, arguments, train_dataset=data, gemini_plugin=run.booster.plugin)
    trainer.train()
    saved = peft.PeftModel.from_pretrained(run.base(), run.folder / "runs" / "checkpoint-2")
    run.see_weights(saved, "saved")
    run.see_weights(model)


PROGRAMS: dict[str, Program] = {
    "all-linear": trained(target_modules="all-linear", use_rslora=True, lora_bias=True),
    "dora": trained(use_dora=True),
    "modules beside it": trained(modules_to_save=["lm_head"], bias="lora_only"),
    "tokens": trained(trainable_token_indices=[1, 2, 3]),
    "embeddings": trained(target_modules=["embed_tokens", "q_proj"]),
    "ia3": of_another_method(
        lambda: peft.IA3Config(
            task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
        )
    ),
    "prefix": of_another_method(lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)),
    "prompt": of_another_method(
        lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=32)
    ),
}
for use in (
    merged_before_the_first_step, merged_and_unmerged, merged_and_saved, preferences_over_the_disabled_adapter,
    several_adapters, an_adapter_added_after_boost, an_adapter_loaded_after_boost,
    the_second_of_two_adapters_trains_later, a_folder_that_trains_on, a_lazy_base, a_trainer_of_transformers,
):  # fmt: skip
    PROGRAMS[use.__name__] = use


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", ["modules beside it", "tokens", *list(PROGRAMS)[-9:]])
def test_a_use_of_adapters_has_the_numbers_of_plain_peft(name: str, tmp_path: Path) -> None:
    check(PROGRAMS[name], "disk", "keep", tmp_path)


@pytest.mark.heavy
@pytest.mark.parametrize("precision", ["fp32", "keep"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_use_of_adapters_has_the_numbers_of_plain_peft_in_every_place(
    name: str, place: str, precision: str, tmp_path: Path
) -> None:
    check(PROGRAMS[name], place, precision, tmp_path)


@pytest.mark.parametrize("place", ["resident", "device"])
@pytest.mark.parametrize("program", [merged_and_unmerged, merged_before_the_first_step])
def test_adapters_are_merged_alike_in_every_place(program: Program, place: str, tmp_path: Path) -> None:
    check(program, place, "fp32", tmp_path)
