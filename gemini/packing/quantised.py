"""Which parameters of a model are kept in fewer bits."""

import sys
from collections.abc import Collection, Iterator

from torch import Tensor, nn

from ..quantization import Quantization
from ..torch_private import own_parameters


def quantised_parameters(model: nn.Module, quantization: Quantization, trained: Collection[int]) -> frozenset[int]:
    """Ids of the weights that `Quantization` is about.

    Parameters
    ----------
    trained
        Ids of the parameters that an optimizer updates.

    Raises
    ------
    ValueError
        If there is none.
    """
    named = list(model.named_modules())
    spared = {id(module) for root in _spared(model) for module in root.modules()}
    owners: dict[int, int] = {}
    for _, module in named:
        for parameter in own_parameters(module).values():
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    eligible = {
        id(weight): name
        for name, module in named
        if id(module) not in spared and not quantization.skips(name) and (weight := _weight(module)) is not None
        if owners[id(weight)] == 1
    }
    found = frozenset(key for key in eligible if key not in trained)
    if not found:
        trains = f"all {len(eligible)} weights of linear layers train" if eligible else "there is no such layer"
        raise ValueError(
            f"quantize={quantization.format!r} keeps frozen weights of linear layers in fewer bits, and {trains}: "
            "train adapters beside them (booster.enable_lora), freeze layers with requires_grad_(False) before "
            "booster.boost, or boost without quantize"
        )
    return found


def _weight(module: nn.Module) -> Tensor | None:
    """The weight of a linear layer."""
    transformers = sys.modules.get("transformers.pytorch_utils")
    kinds = (nn.Linear,) if transformers is None else (nn.Linear, transformers.Conv1D)
    return own_parameters(module).get("weight") if isinstance(module, kinds) else None


def _spared(model: nn.Module) -> Iterator[nn.Module]:
    """Modules that stay as they are with all that is in them: output layers and adapters."""
    inner = model
    while len(children := list(inner.children())) == 1:  # wrappers, such as peft's
        (inner,) = children
    if children and not isinstance(children[-1], nn.ModuleList | nn.ModuleDict) and _is_layer(children[-1]):
        yield children[-1]
    for module in model.modules():
        if callable(ask := getattr(module, "get_output_embeddings", None)) and isinstance(head := ask(), nn.Module):
            yield head
        for name in getattr(module, "adapter_layer_names", ()):  # of peft's layers
            if isinstance(adapters := getattr(module, name, None), nn.Module):
                yield adapters
        if isinstance(getattr(module, "modules_to_save", None), nn.ModuleDict):  # the module that peft trains instead
            yield module


def _is_layer(module: nn.Module) -> bool:
    """True for a linear layer, and for one that peft has wrapped."""
    return _weight(getattr(module, "base_layer", module)) is not None
