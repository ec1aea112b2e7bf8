"""Settings of tensor parallelism, where ColossalAI has them. They raise."""

from .colossal.parallel import PipelineGradientCheckpointConfig, ShardConfig

__all__ = ["PipelineGradientCheckpointConfig", "ShardConfig"]
