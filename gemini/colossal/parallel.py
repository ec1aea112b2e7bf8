"""Settings of ColossalAI's tensor and pipeline parallelism, which its scripts import and give to other plugins."""

from typing import Any


class _Elsewhere:
    """A setting of ColossalAI that nothing here takes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(
            f"{type(self).__name__} is ColossalAI's and not part of gemini: for tensor parallelism split the model "
            "with torch.distributed.tensor.parallel.parallelize_module before boosting it with GeminiPlugin(); there "
            "are no pipelines"
        )


class ShardConfig(_Elsewhere):
    """How ColossalAI's Shardformer cuts a model. Raises NotImplementedError."""


class PipelineGradientCheckpointConfig(_Elsewhere):
    """Which layers of a pipeline's stages are recomputed. Raises NotImplementedError."""


class PipelineGraph(_Elsewhere):
    """A schedule of a pipeline. Raises NotImplementedError."""
