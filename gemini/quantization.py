"""`Quantization`: what a user says about keeping frozen weights in fewer bits."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .arguments.brief import brief
from .arguments.checked import accepted, check
from .arguments.rules import OneOf
from .chunk import FORMATS, BlockFormat, dequantise, quantise

_DECLARED = "_gemini_quantization"
"""The attribute of a model that says how to boost it."""


@dataclass(frozen=True, slots=True)
class Quantization:
    """How the frozen linear layers of a model are kept: in few bits on HOST or DISK, dequantised when they are used.

    Of ``torch.nn.Linear`` and of transformers' ``Conv1D`` the weights are, if no optimizer trains them. These are not:
    biases, norms and embeddings, the output layer (what ``get_output_embeddings`` gives, or the last layer of a model),
    weights that several modules share, adapters of peft.
    """

    format: str = "nf4"
    """``"nf4"``: NormalFloat with 4 bits (QLoRA), 0.5625 bytes a parameter. ``"int8"``: 1.0625 bytes. In both, 64
    elements that lie one after the other in memory share a scale. See [Note: Block formats] for the arithmetic."""
    skip: tuple[str, ...] = ()
    """Further modules to leave as they are: names, or ends of names that begin after a dot."""

    def __post_init__(self) -> None:
        check({"format": OneOf(tuple(FORMATS))}, {"format": self.format})
        if not (isinstance(self.skip, tuple) and all(isinstance(name, str) and name for name in self.skip)):
            raise TypeError(f"skip must be a tuple of names of modules, got {brief(self.skip)}")

    @classmethod
    def of(cls, given: object) -> "Quantization | None":
        """What the argument ``quantize`` of a function means: the name of a format (True: NF4), all of it, or nothing.

        Raises
        ------
        ValueError, TypeError
            If it means nothing that is known.
        """
        if given is None or isinstance(given, Quantization):
            return given
        if isinstance(given, bool):
            return cls() if given else None
        if not isinstance(given, str):
            names = ", ".join(map(repr, FORMATS))
            raise TypeError(f"quantize must be {names}, a gemini.Quantization or None, got {brief(given)}")
        return cls(accepted("quantize", OneOf(tuple(FORMATS)), given))

    @classmethod
    def of_bitsandbytes(cls, config: Any) -> "Quantization | None":
        """What a ``BitsAndBytesConfig`` of transformers means, or what accelerate has like it.

        That scales are quantised, too, is left out: they are float32 here.

        Raises
        ------
        ValueError
            If it asks for a form that is not known here.
        """
        skip = tuple(getattr(config, "llm_int8_skip_modules", None) or getattr(config, "skip_modules", None) or ())
        kind = getattr(config, "bnb_4bit_quant_type", None)
        if getattr(config, "load_in_4bit", False) and kind == "nf4":
            return cls("nf4", skip)
        if getattr(config, "load_in_4bit", False) or getattr(config, "load_in_8bit", False):
            asked = f"4 bits of the type {kind!r}" if getattr(config, "load_in_4bit", False) else "LLM.int8"
            raise ValueError(
                f"bnb_quantization_config asks for {asked}, and known are 4 bits of the type 'nf4': give "
                "quantize='nf4', or quantize='int8' for 8 bits with a scale for each 64 elements"
            )
        return None

    @classmethod
    def for_model(cls, model: nn.Module, own: "Quantization | None") -> "Quantization | None":
        """What holds for a model: ``own``, or what was declared of it or a part of it.

        Raises
        ------
        ValueError
            If different things were said.
        """
        said = {vars(module)[_DECLARED] for module in model.modules() if _DECLARED in vars(module)}
        said |= {own} if own is not None else set()
        if len(said) > 1:
            raise ValueError(
                f"different things were said about this model: {', '.join(sorted(map(str, said)))}. Give quantize to "
                "GeminiPlugin or to booster.enable_lora, or the same to both"
            )
        return next(iter(said), None)

    @property
    def form(self) -> BlockFormat:
        return FORMATS[self.format]

    def skips(self, module: str) -> bool:
        """True if the user has named this module, or one that it is in."""
        return any(f".{module}.".find(f".{name}.") >= 0 for name in self.skip)

    def rounded(self, weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The values that a weight has once it is kept so; the weight stays as it is.

        Blocks are cut as the weight lies in memory, from its first element on: of a contiguous one row by row. A model
        with these weights trains to the same numbers as the boosted one.

        Parameters
        ----------
        dtype
            The compute dtype, to which the weight is rounded first; None: its own.
        """
        flat = weight.detach().as_strided((weight.numel(),), (1,)) if _is_dense(weight) else weight.detach().flatten()
        dtype = dtype or weight.dtype
        parts = [
            dequantise(*quantise(part.to(dtype), self.form), self.form, dtype)[: part.numel()]
            for part in flat.cpu().split(_PIECE_NUMEL)
        ]
        values = torch.cat(parts).to(weight.device)
        return values.as_strided(weight.shape, weight.stride()) if _is_dense(weight) else values.view(weight.shape)


_PIECE_NUMEL = 1 << 20


def _is_dense(weight: Tensor) -> bool:
    """True if a tensor's elements fill a run of memory, in whatever order of the dimensions."""
    expected = 1
    for stride, size in sorted(zip(weight.stride(), weight.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def declare(model: nn.Module, quantization: Quantization) -> None:
    """Have `boost` keep the frozen layers of a model, or of one that it becomes a part of, in this way."""
    vars(model)[_DECLARED] = quantization
