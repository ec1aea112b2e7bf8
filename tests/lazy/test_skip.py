"""Getting past random numbers without making them leaves the generator where drawing them leaves it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gemini.lazy import LazyInitContext, materialize, replay, skip


@pytest.fixture
def always(monkeypatch):
    """Skip short draws too, and count the skips."""
    skip.is_reliable()  # asked once in a process: its own skips do not count
    counts = []
    original = skip.skip
    monkeypatch.setattr(skip, "skip", lambda generator, count: (counts.append(count), original(generator, count)))
    monkeypatch.setattr(replay, "_SKIP_FROM_NUMEL", 0)
    monkeypatch.setattr(replay, "_COMPILE_FROM_NUMEL", 0)
    return counts


def test_this_torch_draws_as_we_think():
    assert skip.is_reliable()


@pytest.mark.parametrize("before", [0, 1, 623, 624, 1000])
def test_every_count_from_every_position(before):
    drawn, skipped = torch.Generator().manual_seed(before), torch.Generator().manual_seed(before)
    torch.empty(before).uniform_(generator=drawn)
    skip.skip(skipped, before)
    for count in (0, 1, 2, 622, 623, 624, 625, 1247, 1248, 1249, 5000):
        torch.empty(count).uniform_(generator=drawn)
        skip.skip(skipped, count)
        assert torch.equal(drawn.get_state(), skipped.get_state()), count
    assert torch.equal(torch.randn(50, generator=drawn), torch.randn(50, generator=skipped))


def redrawn(shape, dtype=torch.float32, transposed=False):
    def build():
        net = nn.Module()
        for name in ("a", "b"):
            weight = torch.empty(shape, dtype=dtype)
            parameter = nn.Parameter(weight.t() if transposed else weight)
            setattr(net, name, parameter)
            with torch.no_grad():
                parameter.normal_()
                parameter.uniform_()
                parameter.exponential_()
                parameter.normal_()
        return net

    return build


@pytest.mark.parametrize("shape", [(3, 5), (4, 4), (17, 5), (64, 33), (1, 700), (0, 3)])
@pytest.mark.parametrize(
    ("dtype", "transposed", "skips"),
    [(torch.float32, False, True), (torch.float32, True, True), (torch.float64, False, False),
     (torch.bfloat16, False, False)],
)  # fmt: skip
def test_dead_draws_of_every_kind(shape, dtype, transposed, skips, always, check_lazy_equals_eager):
    check_lazy_equals_eager(redrawn(shape, dtype, transposed))
    assert bool(always) == skips


def test_a_whole_model(always, check_lazy_equals_eager):
    def build():
        net = nn.Transformer(32, 2, 1, 1, 64, batch_first=True)
        for parameter in net.parameters():
            nn.init.normal_(parameter)
        return net

    check_lazy_equals_eager(build)
    assert len(always) > 10


def test_if_torch_drew_otherwise_nothing_would_be_skipped(always, monkeypatch, check_lazy_equals_eager):
    original = skip.words
    monkeypatch.setattr(skip, "words", lambda record: (original(record) or 0) + 1)
    skip.is_reliable.cache_clear()
    try:
        assert not skip.is_reliable()
        always.clear()
        check_lazy_equals_eager(redrawn((8, 8)))
        assert not always
    finally:
        monkeypatch.undo()
        skip.is_reliable.cache_clear()


def test_small_models_do_not_load_the_compiler(monkeypatch):
    monkeypatch.setattr(skip, "is_reliable", lambda: pytest.fail("asked for"))
    with LazyInitContext():
        model = redrawn((8, 8))()
    materialize(model)
