"""The job from beginning to end: build, train, save, generate, sum up."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.text import Text

from gemini.boosted import boosted
from gemini.errors import OutOfMemory
from gemini.initialize import launch_from_torch
from gemini.sizes import format_bytes
from gemini.train.generate import generate
from gemini.train.interrupt import Interrupt
from gemini.train.options import Options
from gemini.train.report import Progress, Report
from gemini.train.session import Session, build, bytes_per_parameter, model_data_bytes, offload_folder
from gemini.train.text import Corpus

_TIERS = ("device", "host", "disk")
_PROMPT = b"The "
_SAMPLE_SECONDS = 15.0

OnStep = Callable[[Session], None]


def run(options: Options, report: Report, on_step: OnStep | None = None) -> tuple[int, dict[str, Any]]:
    """Do all of it.

    Parameters
    ----------
    on_step
        Called after every step, for tests.

    Returns
    -------
    The exit code (0, or 128 + signal) and the content of ``--json``.
    """
    launch_from_torch({})
    corpus = Corpus.load(options.text)
    corpus.check(options.seq_len)
    with offload_folder(options.offload_dir) as folder:
        _announce(options, corpus, report)
        with report.working("making the model"):
            session = build(options, folder)
        try:
            return _train_and_report(session, corpus, report, on_step)
        except BaseException as error:
            # The telemetry would take a run whose error we print for one that ended well.
            if (telemetry := boosted(session.model).telemetry) is not None:
                telemetry.close(None if isinstance(error, KeyboardInterrupt) else "crashed")
            raise


def _train_and_report(
    session: Session, corpus: Corpus, report: Report, on_step: OnStep | None
) -> tuple[int, dict[str, Any]]:
    options = session.options
    _show_budget(session, report)
    interrupt = Interrupt(_acknowledge)
    checkpoint, is_first = Path(session.ranks.of_first(str(options.checkpoint_folder))), session.ranks.is_first
    seconds, speed = _train(session, corpus, report, interrupt, checkpoint, on_step)
    stats = session.stats()
    _check_peaks(stats)
    report.heading("result")
    if session.losses:
        report.facts(_outcome(session, stats, seconds, speed))
    with report.working("writing the checkpoint"):
        session.save(checkpoint)
    if is_first:
        report.facts([("checkpoint", f"{checkpoint} (transformers' GPT2LMHeadModel loads it)")])
    sample = None
    if is_first and interrupt.signal is None and options.sample_length:
        sample = _sample(session, report)
    run_folder = _end_telemetry(session, stats)
    if is_first and interrupt.signal is None and run_folder is not None:
        report.heading("gemini-stat")
        _show_dashboard(run_folder, options)
    if interrupt.signal is not None:
        report.line(f"interrupted after step {session.step} of {options.steps}; to go on:", "yellow")
        report.line(f"python -m gemini.train --resume {checkpoint}")
    code = 0 if interrupt.signal is None else 128 + interrupt.signal
    return code, _as_json(session, stats, speed, sample, checkpoint, run_folder)


def _train(
    session: Session, corpus: Corpus, report: Report, interrupt: Interrupt, checkpoint: Path, on_step: OnStep | None
) -> tuple[float, float]:
    """Seconds that it took, tokens per second."""
    options = session.options
    report.heading("training")
    if session.step >= options.steps:
        report.line(f"{options.resume} has taken {session.step} steps already; --steps asks for more", "yellow")
    ranks, stops = session.ranks, False
    tokens_per_step = options.batch_size * options.seq_len * ranks.count
    begin = time.monotonic()
    with interrupt, Progress(report, session.step, options.steps, tokens_per_step) as progress:
        while session.step < options.steps and not stops:
            number = session.step * ranks.count + ranks.rank
            batch = corpus.batch(options.seed, number, options.batch_size, options.seq_len)
            progress.update(session.train_step(*batch))
            if on_step is not None:
                on_step(session)
            # A signal may come to the ranks in different steps; they end after the same one.
            stops = ranks.mean(float(interrupt.signal is not None), session.device) > 0
            if options.save_every and session.step % options.save_every == 0 and session.step < options.steps:
                session.save(checkpoint)
        boosted(session.model).manager.settle()  # the last updates are part of the work
        end = time.monotonic()
        return end - begin, progress.tokens_per_second(end)


def _acknowledge() -> None:
    # Not print: a signal may come in the middle of another one.
    os.write(2, b"\n finishing this step, then writing the checkpoint; once more to stop at once\n")


def _announce(options: Options, corpus: Corpus, report: Report) -> None:
    count = options.model.parameter_count()
    report.title(
        "gemini.train",
        f"GPT of {count / 1e6:.1f} M parameters",
        f"{options.layers} layers x {options.hidden}, {options.heads} heads, {options.precision}",
    )
    compute = bytes_per_parameter(options) - 12
    per_step = f"{options.batch_size} x {options.seq_len} bytes"
    report.facts(
        [
            ("text", f"{corpus.name}, {len(corpus) / 1e6:.2f} MB; {options.steps} steps of {per_step}"),
            (
                "model data",
                Text.assemble(
                    (format_bytes(model_data_bytes(options)), "bold"),
                    f": 12 bytes a parameter of fp32 states, {compute} of {options.precision} gradient",
                ),
            ),
        ]
    )


def _show_budget(session: Session, report: Report) -> None:
    stats, sources = session.stats(), session.budget_sources()
    report.heading("budget for model data")
    capacity = {tier: int(stats[f"{tier}/capacity_bytes"]) for tier in _TIERS}
    report.rows([(tier, format_bytes(capacity[tier]), sources[tier]) for tier in _TIERS])
    unified = bool(stats["memory/unified"])
    need = model_data_bytes(session.options)
    for name, room in (("host", capacity["host"]), ("device", 0 if unified else capacity["device"])):
        if 0 < room < need:
            excess = f"the model data are {need / room:.1f} times what {name} may hold"
            report.facts([("", Text(excess, style="bold yellow"))])
    on_disk = int(stats["disk/used_bytes"])
    if on_disk:
        report.facts([("", f"{format_bytes(on_disk)} of them live on disk")])
    if session.step:
        report.facts([("resumed", f"{session.options.resume}, after step {session.step}")])


def _check_peaks(stats: Mapping[str, int | float]) -> None:
    over = [tier for tier in _TIERS if stats[f"{tier}/peak_bytes"] > stats[f"{tier}/capacity_bytes"]]
    if over:
        raise OutOfMemory(f"the peak of {', '.join(over)} was above its capacity: please report this bug")


def _outcome(
    session: Session, stats: Mapping[str, int | float], seconds: float, speed: float
) -> list[tuple[str, str | Text]]:
    # One batch is small: its loss alone would say more of the batch than of the model.
    several = max(1, len(session.losses) // 10)
    first, last = session.losses[0], sum(session.losses[-several:]) / several
    over = f" over the last {several} steps" if several > 1 else ""
    rows: list[tuple[str, str | Text]] = [
        (
            "loss",
            Text.assemble(f"{first:.3f} -> ", (f"{last:.3f}", "bold green" if last < first else "bold red"), over),
        ),
        ("speed", f"{speed:,.0f} tokens/s after the first step; {len(session.losses)} steps, {seconds:.0f} s"),
    ]
    for tier in _TIERS:
        peak, capacity = int(stats[f"{tier}/peak_bytes"]), int(stats[f"{tier}/capacity_bytes"])
        if (tier == "device" and stats["memory/unified"]) or not peak:
            continue
        label = "peak" if not any(label == "peak" for label, _ in rows) else ""
        share = f"{format_bytes(peak)} of {format_bytes(capacity)} on {tier} ({peak / capacity:.1%})"
        rows.append((label, Text.assemble(share, ("  within capacity", "green"))))
    return rows


def _sample(session: Session, report: Report) -> str:
    options = session.options
    with report.working("writing a text"):
        made = generate(
            session.model,
            _PROMPT,
            options.sample_length,
            context=options.seq_len,
            seed=options.seed,
            device=session.device,
            limit_seconds=_SAMPLE_SECONDS,
        )
    report.heading("a sample of what it writes")
    text = made.decode("utf-8", errors="replace")
    for number, line in enumerate(_printable(text).splitlines() or [""]):
        report.line(Text.assemble((_PROMPT.decode(), "dim"), line) if number == 0 else line)
    return _PROMPT.decode() + text


def _printable(text: str) -> str:
    """What a half-trained model writes may hold anything; nothing of it shall steer the terminal."""
    return "".join(char if char.isprintable() or char == "\n" else "·" for char in text)


def _end_telemetry(session: Session, stats: Mapping[str, int | float]) -> Path | None:
    telemetry = boosted(session.model).telemetry
    folder = session.run_folder
    if telemetry is not None:
        telemetry.close("finished", stats)
    return folder


def _show_dashboard(run_folder: Path, options: Options) -> None:
    # Another process, as the user's own would be: it sees the files and nothing else.
    stream = sys.stderr if options.json else sys.stdout
    stream.flush()
    command = [sys.executable, "-m", "gemini.stat", str(run_folder)]
    subprocess.run(command, stdout=stream, stderr=sys.stderr, timeout=60, check=False)


def _as_json(
    session: Session,
    stats: Mapping[str, int | float],
    speed: float,
    sample: str | None,
    checkpoint: Path,
    run_folder: Path | None,
) -> dict[str, Any]:
    options, sources = session.options, session.budget_sources()
    return {
        "config": options.as_json(),
        "parameters": options.model.parameter_count(),
        "model_data_bytes": model_data_bytes(options),
        "tiers": {
            tier: {
                "capacity_bytes": int(stats[f"{tier}/capacity_bytes"]),
                "source": sources[tier],
                "peak_bytes": int(stats[f"{tier}/peak_bytes"]),
            }
            for tier in _TIERS
        },
        "device_and_host_are_one": bool(stats["memory/unified"]),
        "step": session.step,
        "losses": session.losses,
        "tokens_per_second": speed,
        "sample": sample,
        "checkpoint": str(checkpoint),
        "run": str(run_folder) if run_folder is not None else None,
    }
