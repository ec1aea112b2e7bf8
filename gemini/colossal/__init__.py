"""What ColossalAI's users import and call, so that their scripts change ``colossalai`` to ``gemini`` and nothing else.

The names live here; modules where ColossalAI has them (``gemini.cluster``, ``gemini.utils`` and so on) hand them on.
Nothing here knows the rest of the package, and of the rest only what users call knows this folder.

::

    coordinator    DistCoordinator: which process this is
    accelerator    the device that computes, over torch.accelerator
    logger         a logger that knows ranks
    script         small things that scripts call
    timer          Timer, MultiTimer
    schedules      learning rate schedules
    plugin         the base of plugins, and ColossalAI's other plugins, which say what to use instead
    parallel       settings of tensor and pipeline parallelism, which raise
    boosted        what ColossalAI's wrappers of a model and an optimizer have
"""
