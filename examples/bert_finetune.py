"""Fine-tune a BERT to classify sentences, and evaluate it on others.

python examples/bert_finetune.py
torchrun --nproc-per-node 2 examples/bert_finetune.py
"""

import argparse
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from reference_text import PAD, TopicSentences
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AlbertConfig, AlbertForSequenceClassification, BertConfig, BertForSequenceClassification

import gemini
from gemini.accelerator import get_accelerator
from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.cluster import DistCoordinator
from gemini.nn.lr_scheduler import LinearWarmupLR
from gemini.nn.optimizer import HybridAdam

WEIGHT_DECAY = 0.01
WARMUP_FRACTION = 0.1
MODELS: dict[str, tuple[Any, Any]] = {
    "bert": (BertConfig, BertForSequenceClassification),
    "albert": (AlbertConfig, AlbertForSequenceClassification),
}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_type", choices=MODELS, default="bert")
    parser.add_argument("--hidden_size", type=int, default=128)
    parser.add_argument("--num_layers", type=int, default=2)
    parser.add_argument("--num_epochs", type=int, default=3)
    parser.add_argument("--batch_size", type=int, default=32, help="sentences in each step of each rank")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--precision", choices=("bf16", "fp16", "fp32"), default="bf16")
    parser.add_argument("--target_f1", type=float, help="fail if the model does not reach it")
    return parser.parse_args(arguments)


def to_device(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    device = get_accelerator().get_current_device()
    return {name: value.to(device) for name, value in batch.items()}


def summed_over_ranks(values: Tensor) -> list[float]:
    if dist.is_initialized():
        dist.all_reduce(values)
    return values.tolist()


def build(options: argparse.Namespace) -> nn.Module:
    config_class, model_class = MODELS[options.model_type]
    config = config_class(
        vocab_size=2000,
        hidden_size=options.hidden_size,
        embedding_size=options.hidden_size,
        num_hidden_layers=options.num_layers,
        num_attention_heads=max(1, options.hidden_size // 32),
        intermediate_size=4 * options.hidden_size,
        max_position_embeddings=64,
        num_labels=TopicSentences.num_labels,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=None,
    )
    return model_class(config)


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Biases and the weights of layer norms do not decay."""
    no_decay = ("bias", "LayerNorm.weight", "layer_norm.weight")
    decays, stays = [], []
    for name, parameter in model.named_parameters():
        (stays if name.endswith(no_decay) else decays).append(parameter)
    return [{"params": decays, "weight_decay": WEIGHT_DECAY}, {"params": stays, "weight_decay": 0.0}]


def train_epoch(bar: Any, model: Any, optimizer: Any, criterion: Any, lr_scheduler: Any, booster: Booster) -> float:
    """Train on the batches of a progress bar. Returns the mean loss of all ranks."""
    model.train()
    total = torch.zeros(2, device=get_accelerator().get_current_device())
    for batch in bar:
        loss = criterion(model(**to_device(batch)))
        booster.backward(loss / booster.plugin.dp_size, optimizer)  # gradients are summed over ranks
        optimizer.step()
        optimizer.zero_grad()
        lr_scheduler.step()
        total += torch.stack((loss.detach().float(), torch.ones_like(total[0])))
        bar.set_postfix(loss=loss.item())
    summed, count = summed_over_ranks(total)
    return summed / count


@torch.no_grad()
def evaluate(model: Any, criterion: Any, loader: DataLoader[Any]) -> dict[str, float]:
    """Loss, accuracy and F1 over the sentences of all ranks."""
    model.eval()
    total = torch.zeros(6, device=get_accelerator().get_current_device())
    for batch in loader:
        batch = to_device(batch)
        outputs = model(**batch)
        found, labels = outputs.logits.argmax(dim=1), batch["labels"]
        right, is_positive = found == labels, labels == 1
        counts = (right, right & is_positive, ~right & is_positive, ~right & ~is_positive)
        total[:4] += torch.stack([each.sum() for each in counts]).float()
        total[4] += criterion(outputs).float() * len(labels)
        total[5] += len(labels)
    right_count, true_positive, false_negative, false_positive, loss, count = summed_over_ranks(total)
    f1 = 2 * true_positive / max(1.0, 2 * true_positive + false_positive + false_negative)
    return {"loss": loss / count, "accuracy": right_count / count, "f1": f1}


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    gemini.launch_from_torch(seed=42)
    coordinator = DistCoordinator()
    booster = Booster(plugin=GeminiPlugin(precision=options.precision, initial_scale=2**5, max_norm=1.0))
    prepare = booster.plugin.prepare_dataloader
    train_loader = prepare(TopicSentences("train"), options.batch_size, shuffle=True, drop_last=True)
    test_loader = prepare(TopicSentences("test"), options.batch_size)

    model: Any = build(options)
    optimizer: Any = HybridAdam(groups(model), lr=options.learning_rate * coordinator.world_size, eps=1e-8)
    total_steps = len(train_loader) * options.num_epochs
    lr_scheduler: Any = LinearWarmupLR(optimizer, total_steps, warmup_steps=int(WARMUP_FRACTION * total_steps))

    model, optimizer, criterion, _, lr_scheduler = booster.boost(
        model, optimizer, criterion=lambda outputs: outputs.loss, lr_scheduler=lr_scheduler
    )
    for epoch in range(1, options.num_epochs + 1):
        title = f"Epoch [{epoch}/{options.num_epochs}]"
        with tqdm(train_loader, desc=title, disable=not coordinator.is_master()) as bar:
            loss = train_epoch(bar, model, optimizer, criterion, lr_scheduler, booster)
        coordinator.print_on_master(f"epoch {epoch} loss: {loss:.4f}")

    results = evaluate(model, criterion, test_loader)
    coordinator.print_on_master("test " + ", ".join(f"{name}: {value:.4f}" for name, value in results.items()))
    if options.target_f1 is not None and results["f1"] < options.target_f1:
        raise SystemExit(f"the F1 score is {results['f1']:.4f}, below the target {options.target_f1}")


if __name__ == "__main__":
    main()
