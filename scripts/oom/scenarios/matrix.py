"""The cases of the matrix, some at a time, each against its baseline."""

import os
import sys
import threading
from queue import Empty, SimpleQueue

import baseline
from matrix import cases
from matrix.cases import Case
from matrix.keeper import Keeper
from matrix.proof import measure, prove, taken
from outcome import Failure, Report, Scenario, Settings

_BASELINE_RUNS = 3


def run(settings: Settings) -> Report:
    """One report for all cases: its checks have the cases' names before them."""
    chosen = chosen_cases(settings)
    todo: SimpleQueue[Case] = SimpleQueue()
    for case in chosen:
        todo.put(case)
    reports: dict[str, Report] = {}
    known = baseline.matrix(settings.baselines)
    lock = threading.Lock()

    def work() -> None:
        with Keeper() as keeper:
            while True:
                try:
                    case = todo.get_nowait()
                except Empty:
                    return
                try:
                    if settings.updating:
                        found = measure(keeper, case, _BASELINE_RUNS)
                        with lock:
                            baseline.update_matrix(settings.baselines, {case.name: found})
                        report = taken(case, found)
                    else:
                        report = prove(keeper, case, known.get(case.name), settings.sabotage)
                except Failure as error:
                    report = Report.failed(case.name, str(error))
                with lock:
                    reports[case.name] = report
                    verdict = "ok" if report.passed else "FAIL"
                    print(f"  {len(reports)}/{len(chosen)} {case.name} {verdict}", file=sys.stderr, flush=True)

    jobs = min(len(chosen), settings.jobs or len(os.sched_getaffinity(0)))
    threads = [threading.Thread(target=work) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return joined([reports.get(case.name, Report.failed(case.name, "its process ended")) for case in chosen])


def joined(reports: list[Report]) -> Report:
    """One report of several."""
    return Report(
        name=SCENARIO.name,
        checks=tuple(check.named(report.name) for report in reports for check in report.checks),
        facts={report.name: report.facts for report in reports},
    )


def chosen_cases(settings: Settings) -> list[Case]:
    """Those that were named; else the covering selection, or all."""
    if settings.cases:
        return [cases.named(name) for name in settings.cases]
    return cases.all_cases() if settings.every_case else cases.covering()


SCENARIO = Scenario(
    name="matrix",
    summary="each pair of model, policy, tier, precision, init, ranks, activations: plain PyTorch fails, ours does not",
    quick=False,
    run=run,
)
