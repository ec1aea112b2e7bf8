"""The mixed precision that a trainer's arguments ask for, beside the precision of a model's chunks.

``GeminiPlugin(precision="bf16")`` computes with copies of the parameters in bf16 and keeps fp32 masters, as DeepSpeed
does when a trainer asks it for ``bf16=True``. The trainer alone would have fp32 parameters under ``torch.autocast``:
``GeminiPlugin(precision="fp32")`` has them, too, and then the trainer adds its autocast, with the numbers of a plain
trainer.
"""

import logging

logger = logging.getLogger(__name__)

NONE = "no"
_AUTOCAST = ("fp32", "keep")
"""Precisions in which the trainer's own bf16 autocast goes over the parameters as over those of a plain model."""


def default_precision(asked: str) -> str:
    """The precision of a plugin that nobody has given, under a trainer that asks for this mixed precision."""
    return asked if asked in ("bf16", "fp16") else "bf16"


def accelerators(asked: str, precision: str) -> str:
    """The mixed precision that is left for the trainer's accelerator.

    Parameters
    ----------
    asked
        ``"no"``, ``"bf16"``, ``"fp16"``, ``"fp8"``: of the trainer's arguments, or of ``accelerate launch``.
    precision
        That of the model's chunks.

    Raises
    ------
    ValueError
        If the two contradict each other.
    """
    if asked == NONE:
        return NONE
    if asked == precision:
        logger.info(
            "%s=True of the trainer: GeminiPlugin(precision=%r) computes with %s copies of fp32 masters, without "
            'autocast; for autocast over fp32 parameters give GeminiPlugin(precision="fp32")',
            asked, asked, asked,
        )  # fmt: skip
        return NONE
    if asked == "bf16" and precision in _AUTOCAST:
        logger.info("bf16=True of the trainer: autocast over the parameters of GeminiPlugin(precision=%r)", precision)
        return asked
    if asked in ("bf16", "fp16"):
        raise ValueError(
            f'the trainer asks for {asked}=True, and the model computes in GeminiPlugin(precision="{precision}"): give '
            f'precision="{asked}", or leave {asked} off'
        )
    raise ValueError(f"the trainer asks for mixed precision {asked!r}, which GeminiPlugin does not have: leave it off")


def check_full_eval(asked: str, precision: str) -> None:
    """Raise if a trainer is to evaluate in another precision than that of the model's chunks."""
    if asked != precision:
        raise ValueError(
            f"{asked}_full_eval=True would convert the model, which computes in GeminiPlugin(precision="
            f'"{precision}"): give precision="{asked}", or leave {asked}_full_eval off'
        )
