"""The number of ranks never changes numbers: losses, weights and states are those of one process, bit for bit."""

import warnings
from typing import Any

import pytest
import torch
from rank_training import TIERS, Training, Where, check_exact
from torch import Tensor, nn

from gemini.booster.plugin import GeminiPlugin
from gemini.nn.optimizer import HybridAdam
from gemini.quantization import Quantization


class Lazy(Training):
    lazy = True


class OfTransformers(Training):
    """A language model. Odd micro-batches have other lengths."""

    lazy = True
    vocabulary = 40

    def batch(self, number: int) -> Tensor:
        generator = torch.Generator().manual_seed(number)
        return torch.randint(0, self.vocabulary, (1, 6 + number % 2), generator=generator)

    def loss(self, number: int) -> Tensor:
        tokens = self.batch(number)
        return self.model(input_ids=tokens, labels=tokens).loss  # type: ignore[no-any-return]


class Gpt2(OfTransformers):
    """Input and output embeddings are one parameter; dropout is seeded for each micro-batch."""

    def build(self) -> nn.Module:
        from transformers import GPT2Config, GPT2LMHeadModel

        return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=self.vocabulary, n_positions=8))


class Llama(OfTransformers):
    def build(self) -> nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM

        return LlamaForCausalLM(LlamaConfig(**_TEXT, vocab_size=self.vocabulary))


class Mixtral(OfTransformers):
    """Of eight experts a token uses two: each rank uses others, and some are used by one rank only."""

    def build(self) -> nn.Module:
        from transformers import MixtralConfig, MixtralForCausalLM

        return MixtralForCausalLM(MixtralConfig(**_TEXT, vocab_size=self.vocabulary, num_local_experts=8))


_TEXT: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8,
    "intermediate_size": 32, "max_position_embeddings": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MODELS = [Gpt2, Llama, Mixtral]
OF_MODELS = {
    "resident": {},
    "streamed": {**TIERS["streamed"], "device_memory": "64KiB"},
    "disk": {**TIERS["disk"], "host_memory": "384KiB"},
}


class InBf16(Training):
    precision = "bf16"


class Overflowing(Training):
    """In fp16: of the second step's gradients one is infinite, on one rank."""

    precision = "fp16"

    def loss(self, number: int) -> Tensor:
        loss = super().loss(number)
        return loss * 1e30 if number == 5 else loss

    def end_step(self, step: int) -> None:
        self.ended.seen.append(self.model.memory_stats()["step/skipped_count"])


class NotSynced(Training):
    """The first backward of each rank in a step stays with it: its own gradients are summed first."""

    def accumulate(self, step: int) -> None:
        if self.where is Where.RANKS:
            first, *others = self.own(step)
            with self.booster.no_sync(self.model):
                self.micro_step(first)
            for number in others:
                self.micro_step(number)
            return
        totals: list[Tensor | None] = [None for _ in self.model.parameters()]
        for rank in range(2):
            for number in range(step * self.micro_batches + rank, (step + 1) * self.micro_batches, 2):
                self.micro_step(number)
            for i, parameter in enumerate(self.model.parameters()):
                assert parameter.grad is not None
                totals[i] = parameter.grad if totals[i] is None else totals[i] + parameter.grad
                parameter.grad = None
        for parameter, total in zip(self.model.parameters(), totals, strict=True):
            parameter.grad = total


class MeanOfRanks(Training):
    """Each rank's share of the gradients is a half, as where one process divides its losses."""

    def micro_step(self, number: int) -> None:
        if self.where is Where.RANKS:
            super().micro_step(number)
            return
        torch.manual_seed(number)
        loss = self.loss(number)
        self.backward(loss / 2)
        self.ended.losses[number] = loss.item()

    def make_plugin(self, **plugin: Any) -> Any:
        return super().make_plugin(gradient_reduction="mean", **plugin)


class WithSgd(Training):
    def make_optimizer(self, model: nn.Module) -> Any:
        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)


class With8BitStates(Training):
    def make_optimizer(self, model: nn.Module) -> Any:
        return HybridAdam(model.parameters(), lr=1e-2, states="8bit")


class WithBf16States(Training):
    def make_optimizer(self, model: nn.Module) -> Any:
        return HybridAdam(model.parameters(), lr=1e-2, states="bf16")


class WithGroups(Training):
    def make_optimizer(self, model: nn.Module) -> Any:
        weights = [p for p in model.parameters() if p.dim() > 1]
        others = [p for p in model.parameters() if p.dim() == 1]
        return HybridAdam([{"params": weights, "weight_decay": 0.1}, {"params": others, "lr": 1e-3}], lr=1e-2)


# kind, what it is compared with, options: a case for each thing that has its own way through the ranks
CASES: dict[str, tuple[type[Training], Where, dict[str, Any]]] = {
    "on disk": (Training, Where.PLAIN, TIERS["disk"]),
    "lazy, clipped": (Lazy, Where.PLAIN, {**TIERS["streamed"], "max_norm": 0.05}),
    "bf16, clipped": (InBf16, Where.ALONE, {**TIERS["streamed"], "max_norm": 0.05}),
    "bf16, masters split": (InBf16, Where.ALONE, {"split_master": True}),
    "no_sync": (NotSynced, Where.PLAIN, TIERS["streamed"]),
    "mean": (MeanOfRanks, Where.PLAIN, {}),
    "SGD": (WithSgd, Where.PLAIN, {}),
    "groups": (WithGroups, Where.PLAIN, {}),
    "8-bit states": (With8BitStates, Where.ALONE, {}),
    "bf16 states": (WithBf16States, Where.ALONE, {}),
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_train_as_one_process(worlds, case):
    kind, reference, options = CASES[case]
    check_exact(worlds(2), kind, reference, **options)


@pytest.mark.parametrize("kind", MODELS)
def test_models_of_transformers_do_so(worlds, kind):
    for rank in check_exact(worlds(2), kind, **OF_MODELS["streamed"]):
        assert rank.stats["move/evict_count"] > 0


def test_an_overflow_on_one_rank_skips_the_step_of_all(worlds):
    ranks = check_exact(worlds(2), Overflowing, Where.ALONE, initial_scale=16)
    assert [rank.seen for rank in ranks] == [[0, 1, 1]] * 2


@pytest.mark.heavy
@pytest.mark.parametrize("case", CASES)
def test_four_ranks_train_as_one_process(worlds, case):
    kind, reference, options = CASES[case]
    if kind is not NotSynced and kind is not MeanOfRanks:
        check_exact(worlds(4), kind, reference, **options)


@pytest.mark.heavy
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("tiers", OF_MODELS)
@pytest.mark.parametrize("is_lazy", [True, False], ids=["lazy", "eager"])
@pytest.mark.parametrize("kind", MODELS)
def test_every_model_everywhere(worlds, kind, is_lazy, tiers, size):
    check_exact(worlds(size), kind, lazy=is_lazy, steps=6, micro_batches=8, **OF_MODELS[tiers])


@pytest.mark.heavy
def test_eight_ranks_train_as_one_process(worlds):
    check_exact(worlds(8), Gpt2, micro_batches=8, **OF_MODELS["streamed"])


def test_models_are_dropped_and_boosted_again_two_at_a_time(worlds):
    worlds(2).run(boost_many)


def boost_many() -> None:
    for _ in range(3):
        first, second = Training(Where.RANKS), Lazy(Where.RANKS)
        ended = second.train(), first.train()
        assert ended[0].losses == ended[1].losses
        assert all(torch.equal(ended[0].weights[name], ended[1].weights[name]) for name in ended[0].weights)


class Adapted(Gpt2):
    """LoRA by peft: most parameters are frozen."""

    lazy = False

    def build(self) -> nn.Module:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by a name that changes
            adapted: nn.Module = get_peft_model(super().build(), config)  # type: ignore[arg-type]
        return adapted

    def make_optimizer(self, model: nn.Module) -> Any:
        return HybridAdam([p for p in model.parameters() if p.requires_grad], lr=1e-2)


class OnQuantisedBase(Adapted):
    """Adapters beside layers in four bits. Without management these have the values of their codes."""

    def build(self) -> nn.Module:
        model = super().build()
        for name, parameter in model.named_parameters() if self.where is Where.PLAIN else ():
            if ".h." in name and parameter.dim() == 2 and "lora_" not in name:
                parameter.data = Quantization("nf4").rounded(parameter)
        return model

    def make_plugin(self, **plugin: Any) -> GeminiPlugin:
        return super().make_plugin(quantize="nf4", **plugin)


class Generating(Llama):
    """After each step every rank generates, to a length of its own, with activations checkpointed in training."""

    use_reentrant = False

    def build(self) -> nn.Module:
        model: Any = super().build()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # its name changes
            model.gradient_checkpointing_enable({"use_reentrant": self.use_reentrant})
        return model  # type: ignore[no-any-return]

    def end_step(self, step: int) -> None:
        self.model.eval()
        prompt = torch.ones(1, 2, dtype=torch.int64)
        tokens = self.model.generate(prompt, max_new_tokens=1 + 3 * self.rank, do_sample=False)
        self.ended.seen.append(tokens[0, :3].tolist())
        self.model.train()


class GeneratingReentrant(Generating):
    use_reentrant = True


@pytest.mark.parametrize("kind", [Adapted, OnQuantisedBase, Generating, GeneratingReentrant])
def test_so_do_adapters_and_models_that_generate_and_recompute(worlds, kind):
    check_exact(worlds(2), kind, **OF_MODELS["streamed"])
