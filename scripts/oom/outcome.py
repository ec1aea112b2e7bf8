"""What a scenario is asked and what it answers."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

DEFAULT_BASELINES = Path(__file__).resolve().parent / "baselines.json"


class Failure(Exception):
    """A scenario could not be run to its end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How scenarios are to run."""

    small: bool = False
    """Small models, with baselines of their own."""
    headroom_ratio: float | None = None
    """Overrides the limit: times the bytes of the parameters, or of the chunks in RAM."""
    baselines: Path = DEFAULT_BASELINES
    updating: bool = False
    """What is measured becomes the baseline."""
    cases: tuple[str, ...] = ()
    """Of the matrix: only these."""
    every_case: bool = False
    """Of the matrix: the whole product."""
    jobs: int | None = None
    """Of the matrix: how many cases at a time; None: one for each core."""
    sabotage: str | None = None
    """Of the matrix: ``FILE:FUNCTION``, called before our training, to see the case fail."""


@dataclass(frozen=True, slots=True)
class Check:
    """One expectation."""

    what: str
    expected: str
    got: str
    passed: bool

    def named(self, of: str) -> "Check":
        """The same check of one of several."""
        return replace(self, what=f"{of}: {self.what}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What came of one scenario."""

    name: str
    checks: tuple[Check, ...]
    facts: dict[str, Any] = field(default_factory=dict)
    """Whatever else was measured, for ``--json``."""
    peaks: dict[str, int] = field(default_factory=dict)
    """Bytes that are compared with the baseline."""

    @classmethod
    def failed(cls, name: str, why: str) -> "Report":
        return cls(name=name, checks=(Check("runs", "to its end", why, False),))

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def with_checks(self, *checks: Check) -> "Report":
        return replace(self, checks=self.checks + checks)

    def as_json(self) -> dict[str, Any]:
        return {"passed": self.passed, **asdict(self)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Scenario:
    """Something that must hold when memory is short."""

    name: str
    summary: str
    quick: bool
    """Continuous integration runs it."""
    run: Callable[[Settings], Report]
