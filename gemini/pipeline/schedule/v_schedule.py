"""A schedule of a pipeline, where ColossalAI has it. It raises."""

from gemini.colossal.parallel import PipelineGraph

__all__ = ["PipelineGraph"]
