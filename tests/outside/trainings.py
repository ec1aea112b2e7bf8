"""Trainings that a library runs from beginning to end: transformers' Trainer and Lightning."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from outside.harness import Placement, Verdict, described, differing, frozen
from outside.models import WIDTH, gpt2, layers, mean_square
from torch import nn
from torch.utils.data import DataLoader, Dataset

from gemini.booster.plugin import GeminiPlugin

TOPIC = "trainings"


@dataclass(frozen=True)
class LibraryTraining:
    """A training as a script has it; what it returns must be the same without a plugin and with one."""

    name: str
    build: Callable[[], nn.Module]
    run: Callable[[Any, GeminiPlugin | None, str], Any]
    """Takes the model, the plugin (none in plain PyTorch) and a folder."""
    topic: str = TOPIC
    needs_host: bool = True
    """The library decides where batches go."""

    def judge(self, placement: Placement, folder: str) -> Verdict:
        try:
            plugin = placement.plugin(self._fresh(), folder)
            ours = frozen(self.run(self._fresh(), plugin, f"{folder}/ours"))
        except Exception as error:
            return Verdict("ERROR", described(error))
        plain = frozen(self.run(self._fresh(), None, f"{folder}/plain"))
        found = differing("returned", ours, plain)
        return Verdict("WRONG", found) if found else Verdict("equal")

    def _fresh(self) -> nn.Module:
        torch.manual_seed(0)
        return self.build()


class Sequences(Dataset[Any]):
    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = torch.randint(0, 64, (12,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": tokens}


class Vectors(Dataset[Any]):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.randn(WIDTH, generator=torch.Generator().manual_seed(index))


def arguments(folder: str, **changes: Any) -> Any:
    import transformers

    fixed = {
        "output_dir": folder, "per_device_train_batch_size": 4, "max_steps": 3, "logging_steps": 1, "report_to": [],
        "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "learning_rate": 1e-2, "weight_decay": 0.1,
        "optim": "adamw_torch_fused", "seed": 3, "max_grad_norm": 0.1,
    }  # fmt: skip
    return transformers.TrainingArguments(**{**fixed, **changes})


def trainer(model: Any, plugin: GeminiPlugin | None, args: Any, **options: Any) -> Any:
    import transformers

    from gemini.integrations.hugging_face import GeminiTrainerMixin

    class ManagedTrainer(GeminiTrainerMixin, transformers.Trainer):  # type: ignore[misc, name-defined]
        pass

    if plugin is None:
        return transformers.Trainer(model=model, args=args, train_dataset=Sequences(), **options)
    return ManagedTrainer(model=model, args=args, train_dataset=Sequences(), gemini_plugin=plugin, **options)


def logged(trainer: Any) -> list[Any]:
    names = ("loss", "grad_norm", "learning_rate", "eval_loss")
    return [{name: float(entry[name]) for name in names if name in entry} for entry in trainer.state.log_history]


def one_trainer(model: Any, plugin: GeminiPlugin | None, folder: str) -> Any:
    run = trainer(model, plugin, arguments(folder))
    run.train()
    return logged(run), run.args.max_grad_norm, dict(model.state_dict())


def two_trainers_with_the_same_arguments(model: Any, plugin: GeminiPlugin | None, folder: str) -> Any:
    """The second goes on with the first one's model, under an optimizer of its own."""
    args = arguments(folder)
    seen = []
    for _ in range(2):
        run = trainer(model, plugin, args)
        run.train()
        seen.append(logged(run))
    return seen, args.max_grad_norm, dict(model.state_dict())


def evaluated_between(model: Any, plugin: GeminiPlugin | None, folder: str) -> Any:
    args = arguments(folder, eval_strategy="steps", eval_steps=1, gradient_accumulation_steps=2)
    run = trainer(model, plugin, args, eval_dataset=Sequences())
    run.train()
    run.evaluate()
    return logged(run), run.predict(Sequences()).metrics["test_loss"]


def weights_read_in_a_callback(model: Any, plugin: GeminiPlugin | None, folder: str) -> Any:
    import transformers

    norms = []

    class Reads(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        def on_step_end(self, *args: Any, model: Any, **kwargs: Any) -> None:
            norms.append([p.norm().item() for p in model.parameters()])
            with torch.no_grad():
                for p in model.parameters():
                    p.clamp_(-0.2, 0.2)

    run = trainer(model, plugin, arguments(folder), callbacks=[Reads()])
    run.train()
    return norms, logged(run), dict(model.state_dict())


def lightning_module(model: Any, manual: bool, schedule: bool = False) -> Any:
    import lightning

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = model
            self.automatic_optimization = not manual
            self.seen: list[Any] = []

        def training_step(self, batch: Any, index: int) -> Any:
            loss = mean_square(self.net, batch)
            self.seen.append(loss.item())
            if manual:
                optimizer: Any = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
                if schedule:
                    self.lr_schedulers().step()  # type: ignore[union-attr]
                self.seen.append(optimizer.param_groups[0]["lr"])
            return loss

        def on_train_epoch_end(self) -> None:
            self.seen.append([p.norm().item() for p in self.net.parameters()])

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1, fused=True)
            return ([optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]) if schedule else optimizer

    return Module()


def fit(module: Any, plugin: GeminiPlugin | None, folder: str, **options: Any) -> None:
    import lightning

    from gemini.integrations.lightning import GeminiStrategy

    strategy = "auto" if plugin is None else GeminiStrategy(plugin, module="net")
    lightning.Trainer(
        max_epochs=1, accelerator="cpu", devices=1, strategy=strategy, logger=False, enable_progress_bar=False,
        enable_checkpointing=False, enable_model_summary=False, default_root_dir=folder, **options,
    ).fit(module, DataLoader(Vectors(), 4))  # fmt: skip


def lightnings_manual_optimisation(model: Any, plugin: GeminiPlugin | None, folder: str) -> Any:
    module = lightning_module(model, manual=True)
    fit(module, plugin, folder)
    return module.seen, dict(model.state_dict())


def lightnings_manual_optimisation_with_a_schedule(model: Any, plugin: GeminiPlugin | None, folder: str) -> Any:
    module = lightning_module(model, manual=True, schedule=True)
    fit(module, plugin, folder)
    return module.seen, dict(model.state_dict())


def lightnings_own_loop(model: Any, plugin: GeminiPlugin | None, folder: str) -> Any:
    module = lightning_module(model, manual=False)
    fit(module, plugin, folder, accumulate_grad_batches=2)
    return module.seen, dict(model.state_dict())


def two_fits_of_one_module(model: Any, plugin: GeminiPlugin | None, folder: str) -> Any:
    module = lightning_module(model, manual=False)
    for _ in range(2):
        fit(module, plugin, folder)
    return module.seen, dict(model.state_dict())


TRAININGS: dict[str, LibraryTraining] = {
    name: LibraryTraining(name, build, run)
    for build, runs in (
        (gpt2, (one_trainer, two_trainers_with_the_same_arguments, evaluated_between, weights_read_in_a_callback)),
        (
            layers,
            (
                lightnings_manual_optimisation,
                lightnings_manual_optimisation_with_a_schedule,
                lightnings_own_loop,
                two_fits_of_one_module,
            ),
        ),
    )
    for run in runs
    for name in [f"{TOPIC}: {run.__name__.replace('_', ' ')}"]
}
