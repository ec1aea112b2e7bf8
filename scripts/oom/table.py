"""Results for people, on stdout."""

from collections.abc import Mapping, Sequence
from typing import Any

from matrix.cases import Case
from outcome import Report, Scenario
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gemini.sizes import format_bytes


def list_scenarios(scenarios: Sequence[Scenario]) -> None:
    width = max(len(scenario.name) for scenario in scenarios)
    for scenario in scenarios:
        print(f"{scenario.name:<{width}}  {'quick' if scenario.quick else '     '}  {scenario.summary}")


def list_cases(cases: Sequence[Case], known: Mapping[str, Mapping[str, Any]]) -> None:
    """The cases of the matrix; of those with a baseline how much of it a chunk is."""
    for case in cases:
        baseline = known.get(case.name)
        said = "no baseline"
        if baseline is not None:
            share = baseline["chunk_bytes"] / baseline["peak_bytes"]
            cap, count = format_bytes(baseline["cap_bytes"]), baseline["evictions"]
            said = f"cap {cap}, {count} evictions, a chunk is {share:.1%} of the peak"
        print(f"  {case.name:<44}  {said}")


def show(reports: Sequence[Report]) -> None:
    console = Console(markup=False, highlight=False, emoji=False)
    for report in reports:
        table = Table.grid(padding=(0, 2), pad_edge=False)
        for _ in range(4):
            table.add_column(overflow="fold")
        table.add_row(*(Text(word, style="dim") for word in ("", "what", "expected", "got")))
        for check in report.checks:
            verdict = Text("ok", style="green") if check.passed else Text("FAIL", style="bold red")
            table.add_row(verdict, check.what, check.expected, check.got)
        console.print()
        console.print(Text(report.name, style="bold"))
        console.print(table)
    failed = [report.name for report in reports if not report.passed]
    console.print()
    console.print(Text(f"FAILED: {', '.join(failed)}", style="bold red") if failed else Text("all as expected"))
