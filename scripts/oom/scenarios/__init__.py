"""All scenarios, in the order in which they run."""

from outcome import Scenario

from . import (
    batch_too_large,
    budgets_held,
    lazy_boost_peak,
    lora_on_disk,
    matrix,
    nothing_but_offload_dir,
    plain_dies_gemini_trains,
    pretrained_larger_than_limit,
)

ALL: tuple[Scenario, ...] = (
    plain_dies_gemini_trains.SCENARIO,
    budgets_held.SCENARIO,
    batch_too_large.SCENARIO,
    lazy_boost_peak.SCENARIO,
    *lora_on_disk.SCENARIOS,
    pretrained_larger_than_limit.SCENARIO,
    nothing_but_offload_dir.SCENARIO,
    matrix.SCENARIO,
)
