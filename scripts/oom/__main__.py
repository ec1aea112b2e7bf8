"""``scripts/oom_regression``: what must hold when memory is short, tried out in capped child processes."""

import argparse
import json
import sys
from pathlib import Path

import baseline
import scenarios
import table
from matrix import capacity, cases
from outcome import DEFAULT_BASELINES, Failure, Report, Settings

_EPILOG = """\
A baseline is a peak that was measured once; a later run may be above it by the
tolerance that stands beside it in baselines.json.
exit codes: 0 all as expected, 1 a regression or a scenario that could
not be run, 2 wrong usage.
"""


def main() -> int:
    options = _parser().parse_args()
    only = "matrix" if options.case or options.all else options.only
    chosen = [s for s in scenarios.ALL if (not options.quick or s.quick) and only in (None, s.name)]
    if options.list:
        table.list_scenarios(scenarios.ALL)
        table.list_cases(cases.all_cases() if options.all else cases.covering(), baseline.matrix(options.baselines))
        return 0
    if options.capacity:
        return capacity.main(options.capacity, options.cap, options.seconds)
    if not chosen:
        print(f"no scenario {only!r}" + (" among the quick ones" if options.quick else ""), file=sys.stderr)
        return 2
    settings = Settings(
        small=options.small,
        headroom_ratio=options.headroom_ratio,
        baselines=options.baselines,
        updating=options.update_baseline,
        cases=tuple(options.case or ()),
        every_case=options.all,
        jobs=options.jobs,
        sabotage=options.sabotage,
    )
    known = {} if options.update_baseline else baseline.load(options.baselines, settings)
    reports = []
    for scenario in chosen:
        print(f"{scenario.name}: {scenario.summary} ...", file=sys.stderr, flush=True)
        try:
            report = scenario.run(settings)
        except Failure as error:
            report = Report.failed(scenario.name, str(error))
        reports.append(baseline.compared(report, known.get(scenario.name, {}), updating=options.update_baseline))
    table.show(reports)
    passed = all(report.passed for report in reports)
    if options.json is not None:
        content = {"passed": passed, "scenarios": [report.as_json() for report in reports]}
        options.json.write_text(json.dumps(content, indent=2) + "\n")
    if options.update_baseline and passed:
        baseline.update(options.baselines, settings, reports)
        print(f"baselines written to {options.baselines}", file=sys.stderr)
    return 0 if passed else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/oom_regression",
        description="Run scenarios under a hard memory cap, each in processes of its own.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--list", action="store_true", help="name the scenarios and end")
    parser.add_argument("--quick", action="store_true", help="only those that continuous integration runs")
    parser.add_argument("--only", metavar="NAME", choices=[s.name for s in scenarios.ALL], help="only this one")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write everything measured to FILE")
    parser.add_argument("--update-baseline", action="store_true", help="take what is measured as the new baseline")
    parser.add_argument(
        "--baselines",
        metavar="FILE",
        type=Path,
        default=DEFAULT_BASELINES,
        help="other baselines than the repository's",
    )
    parser.add_argument("--small", action="store_true", help="small models: to test this script, not the package")
    parser.add_argument(
        "--headroom-ratio",
        type=float,
        metavar="X",
        help="another limit, to see a scenario fail",
    )
    matrix = parser.add_argument_group("matrix")
    matrix.add_argument("--case", metavar="NAME", action="append", help="only this one (more than once: these)")
    matrix.add_argument("--all", action="store_true", help="the whole product, and not only a selection with each pair")
    matrix.add_argument("--jobs", type=int, metavar="N", help="cases at a time (one for each core)")
    matrix.add_argument("--sabotage", metavar="FILE:FUNCTION", help="called before our trainings, to see them fail")
    search = parser.add_argument_group("capacity")
    search.add_argument(
        "--capacity", choices=["layers", "batch"], help="find the largest that trains under --cap, plain and ours"
    )
    search.add_argument("--cap", metavar="SIZE", default="400MiB", help="above what a warm process has (%(default)s)")
    search.add_argument(
        "--seconds", type=float, default=120.0, metavar="N", help="for each of the two searches (%(default)s)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
