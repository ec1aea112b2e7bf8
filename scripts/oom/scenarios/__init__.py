"""All scenarios, in the order in which they run."""

from outcome import Scenario

from . import lazy_boost_peak, plain_dies_gemini_trains

ALL: tuple[Scenario, ...] = (plain_dies_gemini_trains.SCENARIO, lazy_boost_peak.SCENARIO)
