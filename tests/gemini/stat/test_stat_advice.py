"""What gemini-stat advises, from made-up numbers."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from stat_runs import chunks, make_run

from gemini.stat.advice import Advice, advise
from gemini.stat.rates import rates
from gemini.telemetry.documents import read_chunks
from gemini.telemetry.layout import chunks_file
from gemini.telemetry.reader import read_run
from gemini.telemetry.run_folder import write_document


def waiting_advice(folder: Path, tier: str, document: dict[str, Any]) -> Advice:
    """Of a run that waits for a tier most of the time."""
    run = make_run(folder=folder)
    write_document(chunks_file(run, 0), document)
    view = read_run(run)
    found = replace(rates(view), stall_ratio=0.4, stall_seconds=0.08, stall_by_tier={tier: 0.08})
    (advice,) = (a for a in advise(view, found, read_chunks(run, 0), None) if "of a step is waiting" in a.text)
    return advice


def in_ram(**config: Any) -> dict[str, Any]:
    """All homes in RAM, where units run."""
    document = chunks()
    for chunk in document["chunks"]:
        chunk["homes"] = dict.fromkeys(chunk["homes"], "host")
    return {**document, "unified": True, "config": {**document["config"], "split_master": False, **config}}


def test_where_full_copies_are_filled_from_the_same_ram_masters_could_be_split(tmp_path: Path) -> None:
    advice = waiting_advice(tmp_path, "host", in_ram())
    assert advice.arguments == "split_master=True"
    assert "unless parameters are changed in place" in advice.text


def with_states(names: tuple[str, ...], nbytes: int) -> dict[str, Any]:
    document = in_ram()
    for chunk in document["chunks"]:
        chunk["homes"] = dict.fromkeys(("master", *names, "gradient"), "host")
        chunk["home_bytes"] = {"master": 1 << 26, **dict.fromkeys(names, nbytes), "gradient": 1 << 25}
    return document


@pytest.mark.parametrize(
    ("tier", "document"),
    [
        ("disk", in_ram()),
        ("host", {**in_ram(), "unified": False}),
        ("host", in_ram(precision="fp32")),
        ("host", in_ram(split_master=True)),
        ("host", with_states(("exp_avg", "exp_avg_sq"), 1 << 25)),
        ("host", with_states(("momentum_buffer",), 1 << 26)),
    ],
    ids=["waits for the disk", "another memory", "fp32", "split already", "states in bf16", "SGD"],
)
def test_where_that_is_no_remedy_it_is_not_advised(tier: str, document: dict[str, Any], tmp_path: Path) -> None:
    assert waiting_advice(tmp_path, tier, document).arguments != "split_master=True"
