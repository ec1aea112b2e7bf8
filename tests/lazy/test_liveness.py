"""What a replay does not do: dead work is skipped, dead draws keep their effect on the generator only."""

from __future__ import annotations

import torch
from torch import nn

from gemini.lazy import LazyInitContext
from gemini.lazy.liveness import Role, plan_replay


def plan(parameter: nn.Parameter, advance: bool = False) -> dict[str, list[str]]:
    tape, value = parameter._lazy.tape, parameter._lazy.value
    roles = plan_replay(tape.records, [value], [torch.default_generator] if advance else ()).roles
    by_role: dict[str, list[str]] = {role.name: [] for role in Role}
    for index, role in roles.items():
        call = tape.records[index].call
        by_role[role.name].append(call._overloadpacket.__name__ if hasattr(call, "_overloadpacket") else "-")
    return by_role


def test_an_overwritten_draw_runs_on_scratch_and_overwritten_arithmetic_not_at_all():
    with LazyInitContext():
        w = nn.Parameter(torch.empty(3, 3))
        w.data.uniform_().erfinv_().mul_(2)
        w.data.normal_()
    assert plan(w) == {"RUN": ["normal_"], "SCRATCH": ["uniform_"], "SEED": ["-"]}


def test_draws_after_the_last_needed_one_only_move_the_generator():
    with LazyInitContext():
        w = nn.Parameter(torch.empty(3).normal_())
        torch.randn(5)
    assert plan(w)["RUN"] == ["normal_"]
    assert plan(w, advance=True)["RUN"] == ["normal_", "randn"]


def test_what_does_not_depend_on_random_numbers_draws_none():
    with LazyInitContext():
        torch.empty(100).normal_()
        w = nn.Parameter(torch.arange(3.0).mul_(2))
    assert plan(w) == {"RUN": ["arange", "mul_"], "SCRATCH": [], "SEED": []}


def test_a_partial_write_keeps_what_it_leaves():
    with LazyInitContext():
        w = nn.Parameter(torch.ones(3, 3))
        w.data[0].zero_()
    assert plan(w)["RUN"] == ["ones", "zero_"]


def test_a_seed_ends_the_need_for_earlier_draws():
    with LazyInitContext():
        torch.empty(100).normal_()
        torch.manual_seed(1)
        w = nn.Parameter(torch.empty(3).normal_())
    assert plan(w, advance=True) == {"RUN": ["normal_"], "SCRATCH": [], "SEED": ["-"]}


def test_a_read_of_drawn_values_is_not_paid_again_by_the_next_read():
    with LazyInitContext():
        first = torch.empty(100).normal_()
        assert first.sum().item() != 0
        second = nn.Parameter(torch.empty(100).normal_())
        assert plan(second) == {"RUN": ["normal_"], "SCRATCH": [], "SEED": ["-"]}
        # Its own draws, from the state the first read ended in.
        assert second.sum().item() != 0
