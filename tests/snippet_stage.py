"""What blocks of Python in the documents find in place: small models, data and folders, under the usual names.

A block is a part of a script of the reader, who has a ``model``, a ``folder``, a ``dataloader``. Each name that a block
reads and does not make is made here; a name that is not here fails the test of its page.
"""

import ast
import builtins
import importlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import nn

import gemini
from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.lazy import LazyInitContext
from gemini.nn.optimizer import HybridAdam

CONFIG = transformers.GPT2Config(
    n_embd=32, n_layer=2, n_head=2, vocab_size=64, n_positions=32, use_cache=False, bos_token_id=0, eos_token_id=0
)
LLAMA = transformers.LlamaConfig(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, vocab_size=64, use_cache=False
)
TOKENS = torch.arange(32).reshape(2, 16)


class Lion(torch.optim.Optimizer):
    """An optimizer of a third party, as the page on optimizers has it."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    average = self.state[parameter].setdefault("exp_avg", torch.zeros_like(parameter))
                    parameter.sub_(group["lr"] * average.lerp(parameter.grad, 0.1).sign())
                    average.lerp_(parameter.grad, 0.01)


class Lamb(torch.optim.AdamW):
    """Stands for one that looks at a whole parameter; the page only registers it."""


PLAIN: dict[str, Any] = {
    "torch": torch,
    "transformers": transformers,
    "gemini": gemini,
    "Booster": Booster,
    "GeminiPlugin": GeminiPlugin,
    "LazyInitContext": LazyInitContext,
    "HybridAdam": HybridAdam,
    "GPT2LMHeadModel": transformers.GPT2LMHeadModel,
    "LlamaForCausalLM": transformers.LlamaForCausalLM,
    "AutoModelForCausalLM": transformers.AutoModelForCausalLM,
    "LoraConfig": peft.LoraConfig,
    "lora_config": peft.LoraConfig(r=2, target_modules="all-linear"),
    "config": CONFIG,
    "Lamb": Lamb,
    "Lion": Lion,
    "evaluate": lambda model: None,
    "resume": False,
    "weight": nn.Parameter(torch.eye(64)),
    "data": [{"input_ids": row, "labels": row} for row in TOKENS],
    "batch": {"input_ids": TOKENS, "labels": TOKENS},
    "dataloader": [{"input_ids": TOKENS, "labels": TOKENS}] * 2,
}


class Stage:
    """The names that the blocks of one page share.

    Parameters
    ----------
    folder
        Where the page's blocks may write.
    """

    def __init__(self, folder: Path) -> None:
        self.names: dict[str, Any] = {"__name__": "a page"}
        self._folder = folder
        self._ours: set[str] = set()

    def furnish(self, code: str) -> list[str]:
        """Make what the code reads and nobody has made. Returns the names that are not known here."""
        boosts = ".boost(" in code
        if boosts:  # a model is boosted once, and this block begins another training
            for name in self._ours:
                self.names.pop(name, None)
        unknown = []
        for name in read_names(code):
            if name not in self.names:
                made = self._made(name, boosts)
                if made is None:
                    unknown.append(name)
                else:
                    self._ours.add(name)
                    self.names[name] = made
        return unknown

    def _made(self, name: str, boosts: bool) -> Any:
        if name in PLAIN:
            return PLAIN[name]
        if name == "folder":
            transformers.LlamaForCausalLM(LLAMA).save_pretrained(self._folder / "base")
            return str(self._folder / "base")
        if name == "pretrained_path":
            transformers.GPT2LMHeadModel(CONFIG).save_pretrained(self._folder / "pretrained")
            return str(self._folder / "pretrained")
        if name == "loader":
            rows = [{"input_ids": row, "labels": row} for row in TOKENS.repeat(2, 1)]
            return GeminiPlugin(telemetry=False).prepare_dataloader(rows, batch_size=2)
        if name == "lightning":
            return importlib.import_module("lightning")
        if name == "args":
            return transformers.TrainingArguments(
                output_dir=str(self._folder / "trainer"), max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True
            )
        if name in ("model", "optimizer", "booster", "scheduler"):
            self._train(boosts)
            return self.names[name]
        return None

    def _train(self, boosts: bool) -> None:
        made = set(self.names)
        booster = self.names.setdefault("booster", Booster(plugin=GeminiPlugin(precision="fp32", telemetry=False)))
        model = self.names.setdefault("model", transformers.GPT2LMHeadModel(CONFIG))
        optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-3)
        if not boosts:
            self.names["model"], optimizer, *_ = booster.boost(model, optimizer)
        self.names.setdefault("optimizer", optimizer)
        self.names.setdefault("scheduler", torch.optim.lr_scheduler.ConstantLR(self.names["optimizer"]))
        self._ours |= set(self.names) - made


def read_names(code: str) -> list[str]:
    """Names that the code reads before it makes them, in the order in which they are read."""
    return list(dict.fromkeys(_reads(ast.parse(code).body, set(dir(builtins)))))


def _reads(body: Iterable[ast.stmt], made: set[str]) -> Iterator[str]:
    for statement in body:
        inner = [*getattr(statement, "body", []), *getattr(statement, "orelse", [])]
        if isinstance(statement, ast.FunctionDef):
            yield from _reads(inner, made | {statement.name} | {each.arg for each in statement.args.args})
        else:
            heads = [child for child in ast.iter_child_nodes(statement) if child not in inner]
            nodes = [node for head in heads for node in ast.walk(head)]
            comprehended = {
                node.id
                for each in nodes
                if isinstance(each, ast.comprehension)
                for node in ast.walk(each.target)
                if isinstance(node, ast.Name)
            }
            reads = [node for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)]
            if isinstance(statement, ast.AugAssign) and isinstance(statement.target, ast.Name):
                reads.append(statement.target)
            yield from (node.id for node in reads if node.id not in made | comprehended)
            made |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
            yield from _reads(inner, made)
        if isinstance(statement, ast.FunctionDef | ast.ClassDef):
            made.add(statement.name)
        elif isinstance(statement, ast.Import | ast.ImportFrom):
            made |= {(alias.asname or alias.name).partition(".")[0] for alias in statement.names}
