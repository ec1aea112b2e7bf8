"""The path of `PipelineGraph`, which ColossalAI's Llama example imports."""
