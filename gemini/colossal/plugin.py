"""`Plugin`, the base of plugins, and ColossalAI's other plugins, which say what to use instead."""

from typing import Any, ClassVar

import torch
from torch.distributed import ProcessGroup

from .coordinator import size_of


class Plugin:
    """What scripts ask a plugin: how ranks are divided, and what it takes care of."""

    process_group: ProcessGroup | None = None
    """The ranks that train one model; None: all."""
    tp_size: int = 1
    """Ranks that share one tensor."""
    pp_size: int = 1
    """Stages of a pipeline."""
    extra_dp_size: int = 1
    """Groups of ranks that keep the same shards."""

    @property
    def dp_size(self) -> int:
        """Ranks that train on different data."""
        return size_of(self.process_group)

    @property
    def zero_size(self) -> int:
        """Ranks that keep one model together."""
        return self.dp_size // self.extra_dp_size

    def supported_devices(self) -> list[str]:
        """Types of devices that models train on: the CPU, and the accelerator that this torch is built for."""
        accelerator = torch.accelerator.current_accelerator()
        return ["cpu"] if accelerator is None else ["cpu", accelerator.type]

    def supported_precisions(self) -> list[str]:
        """What may be given as ``precision``."""
        raise NotImplementedError

    def control_device(self) -> bool:
        """True: the plugin decides where things run."""
        return True

    def control_precision(self) -> bool:
        """True: the precision is the plugin's argument, not the booster's."""
        return True

    def control_checkpoint_io(self) -> bool:
        """True: the booster saves and loads what the plugin manages."""
        return True

    def support_no_sync(self) -> bool:
        """True: gradients may add up over several backwards."""
        return True

    def support_lora(self) -> bool:
        """True: see `Booster.enable_lora`."""
        return True


class _Elsewhere(Plugin):
    """A plugin of ColossalAI that is not here. Scripts may import it and ask whether theirs is one."""

    _instead: ClassVar[str]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(f"{type(self).__name__} is ColossalAI's and not part of gemini: {self._instead}")


class TorchDDPPlugin(_Elsewhere):
    """Use ``GeminiPlugin(precision="fp32")``."""

    _instead = (
        'use GeminiPlugin(precision="fp32"), which computes the same and needs less memory, or wrap the model in '
        "torch.nn.parallel.DistributedDataParallel without a booster"
    )


class TorchFSDPPlugin(_Elsewhere):
    """Use ``GeminiPlugin()``."""

    _instead = (
        "use GeminiPlugin(), which shards parameters, gradients and optimizer states, or call "
        "torch.distributed.fsdp.fully_shard(model) without a booster"
    )


class LowLevelZeroPlugin(_Elsewhere):
    """Use ``GeminiPlugin(shard_param_frac=0.0)``."""

    _instead = (
        "use GeminiPlugin(shard_param_frac=0.0), which shards optimizer states and gradients as its stage 2, or "
        "GeminiPlugin(), which shards parameters as well"
    )


class HybridParallelPlugin(_Elsewhere):
    """Use ``GeminiPlugin()``."""

    _instead = (
        "use GeminiPlugin(), which shards what a model keeps instead of cutting its layers. For tensor parallelism "
        "split the model with torch.distributed.tensor.parallel.parallelize_module before boosting it; there are no "
        "pipelines"
    )


class MoeHybridParallelPlugin(HybridParallelPlugin):
    """Use ``GeminiPlugin()``."""

    _instead = (
        "use GeminiPlugin(), under which experts are fetched when they are used; experts that a rank does not use in a "
        "step are no error"
    )
