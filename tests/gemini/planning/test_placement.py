"""Where homes live: within the room, whole chunks on DEVICE, on HOST what moves most and is waited for first."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemini.chunk import GRADIENT, MASTER, SHADOW, MemoryMap, Tier
from gemini.chunk.disk import PAGE_BYTES
from gemini.chunk.division import DIVISION_BYTES, Divided, HomeTier
from gemini.planning.placement import (
    DISK_PAGE_BYTES as PAGE,
)
from gemini.planning.placement import (
    STAYING_SHARE,
    AutoPlacementPolicy,
    Capacity,
    ChunkNeed,
    Placement,
    PlacementPolicy,
    StaticPlacementPolicy,
    Unplaced,
    place,
)


def trainable(numel: int) -> ChunkNeed:
    buffers = {MASTER: 4 * numel, "exp_avg": 4 * numel, "exp_avg_sq": 4 * numel, GRADIENT: 2 * numel}
    return ChunkNeed(buffers=buffers, full_nbytes=2 * numel, shadow_nbytes=2 * numel)


def frozen(numel: int) -> ChunkNeed:
    return ChunkNeed(buffers={MASTER: 2 * numel}, full_nbytes=2 * numel)


def room_of(
    device: int, host: int, disk: int = 0, memory: MemoryMap = MemoryMap.ACCELERATOR, ring: int = 0, staging: int = 0
) -> Capacity:
    nbytes = {Tier.DEVICE: device, Tier.HOST: host, Tier.DISK: disk}
    return Capacity(nbytes=nbytes, memory=memory, ring_bytes=ring, staging_bytes=staging)


needs_of_models = st.lists(
    st.builds(trainable, st.integers(1, 50)) | st.builds(frozen, st.integers(1, 50)), max_size=12
)
rooms = st.builds(
    room_of,
    device=st.integers(0, 3000),
    host=st.integers(0, 5000),
    disk=st.just(0) | st.integers(0, 200_000),
    memory=st.sampled_from(MemoryMap),
    ring=st.integers(0, 400),
    staging=st.integers(0, 400),
)
policies = st.just(AutoPlacementPolicy()) | st.builds(StaticPlacementPolicy, offload_optim_frac=st.floats(0, 1))


def whole(need: ChunkNeed) -> int:
    return sum(need.buffers.values())


def placed(needs: list[ChunkNeed], room: Capacity, policy: PlacementPolicy | None = None) -> Placement:
    found = place(needs, room, policy or AutoPlacementPolicy())
    assert isinstance(found, Placement)
    return found


def unplaced(needs: list[ChunkNeed], room: Capacity) -> Unplaced:
    found = place(needs, room, AutoPlacementPolicy())
    assert isinstance(found, Unplaced)
    return found


@settings(deadline=None, max_examples=200)
@given(needs=needs_of_models, room=rooms, policy=policies)
def test_every_role_has_one_home_and_no_tier_holds_more_than_its_room(
    needs: list[ChunkNeed], room: Capacity, policy: PlacementPolicy
) -> None:
    placement = place(needs, room, policy)
    if isinstance(placement, Unplaced):
        return
    assert [homes.keys() - {SHADOW} for homes in placement.homes] == [set(need.buffers) for need in needs]
    for tier in Tier:
        held = sum(
            nbytes
            for need, homes in zip(needs, placement.homes, strict=True)
            for name, where in homes.items()
            for at, nbytes in need.parts(name, where)
            if at is tier
        )
        assert placement.nbytes[tier] == held
    assert placement.uses_disk == (placement.nbytes[Tier.DISK] > 0)
    host = placement.nbytes[Tier.HOST] + (room.staging_bytes if placement.uses_disk else 0)
    device = placement.nbytes[Tier.DEVICE]
    if room.memory is MemoryMap.UNIFIED:
        assert device == 0 and host + room.ring_bytes <= room.nbytes[Tier.HOST]
    else:
        assert host <= room.nbytes[Tier.HOST] and device + room.ring_bytes <= room.nbytes[Tier.DEVICE]
    assert placement.nbytes[Tier.DISK] <= room.nbytes[Tier.DISK]


@settings(deadline=None, max_examples=200)
@given(needs=needs_of_models, room=rooms, policy=policies)
def test_the_device_takes_whole_chunks_in_order_and_leaves_out_what_does_not_fit(
    needs: list[ChunkNeed], room: Capacity, policy: PlacementPolicy
) -> None:
    placement = place(needs, room, policy)
    if isinstance(placement, Unplaced):
        return
    taken, share = 0, policy.device_share(sum(map(whole, needs)))
    for need, homes in zip(needs, placement.homes, strict=True):
        fits = (
            taken + whole(need) <= min(room.nbytes[Tier.DEVICE] - room.ring_bytes, share)
            and room.memory is not MemoryMap.UNIFIED
        )
        assert (set(homes.values()) == {Tier.DEVICE}) == fits
        assert fits or Tier.DEVICE not in homes.values()
        taken += whole(need) if fits else 0


@settings(deadline=None, max_examples=200)
@given(needs=needs_of_models, room=rooms, policy=policies)
def test_shadows_take_what_the_host_has_left_and_nothing_that_a_home_could_use(
    needs: list[ChunkNeed], room: Capacity, policy: PlacementPolicy
) -> None:
    placement = place(needs, room, policy)
    if isinstance(placement, Unplaced):
        return
    without = placed([replace(need, shadow_nbytes=0) for need in needs], room, policy)
    homes_only = [{name: tier for name, tier in h.items() if name != SHADOW} for h in placement.homes]
    assert homes_only == list(without.homes)
    host = placement.nbytes[Tier.HOST] + (room.staging_bytes if placement.uses_disk else 0)
    for need, homes in zip(needs, placement.homes, strict=True):
        if SHADOW in homes:
            assert homes[SHADOW] is Tier.HOST and room.memory is not MemoryMap.UNIFIED and need.shadow_nbytes
            assert homes[MASTER] is Tier.HOST
        elif need.shadow_nbytes and room.memory is not MemoryMap.UNIFIED and homes[MASTER] is Tier.HOST:
            assert host + need.shadow_nbytes > room.nbytes[Tier.HOST]


@settings(deadline=None, max_examples=200)
@given(needs=needs_of_models, room=rooms)
def test_what_goes_to_disk_has_no_place_on_host_and_buffers_go_in_order(needs: list[ChunkNeed], room: Capacity) -> None:
    placement = place(needs, room, AutoPlacementPolicy())
    if isinstance(placement, Unplaced) or not placement.uses_disk:
        return
    taken = room.staging_bytes + (room.ring_bytes if room.memory is MemoryMap.UNIFIED else 0)
    pairs = list(zip(needs, placement.homes, strict=True))
    below = [(need, homes) for need, homes in pairs if Tier.DEVICE not in homes.values()]
    copies = sum(need.full_nbytes for need, _ in below)
    stay = room.memory is not MemoryMap.ACCELERATOR and room.ring_bytes >= STAYING_SHARE * copies
    wholes = [(need, homes, name) for need, homes in below for name in (MASTER, "exp_avg", "exp_avg_sq", GRADIENT)]
    if not stay:  # masters are fetched twice a step beside their update: trained ones move most
        wholes.sort(key=lambda each: 0 if each[2] == MASTER and GRADIENT in each[0].buffers else 1)
    else:  # those of frozen chunks do not move at all
        wholes.sort(key=lambda each: GRADIENT not in each[0].buffers)
    for need, homes, name in wholes:
        if homes.get(name) is Tier.HOST:
            taken += need.buffers[name]
        elif homes.get(name) is Tier.DISK:
            assert taken + need.buffers[name] > room.nbytes[Tier.HOST]


@settings(deadline=None, max_examples=200)
@given(needs=needs_of_models, room=rooms, policy=policies)
def test_with_the_missing_bytes_added_it_fits(needs: list[ChunkNeed], room: Capacity, policy: PlacementPolicy) -> None:
    found = place(needs, room, policy)
    if isinstance(found, Placement):
        return
    assert found.homes_bytes >= 0 and all(nbytes > 0 for nbytes in found.working_bytes.values())
    assert found.missing_bytes == found.homes_bytes + sum(found.working_bytes.values()) > 0
    capacities = dict(room.nbytes)
    for tier, nbytes in found.working_bytes.items():
        capacities[tier] += nbytes
    capacities[Tier.DISK if capacities[Tier.DISK] else Tier.HOST] += found.homes_bytes
    placed(needs, replace(room, nbytes=capacities), policy)


def names_on(tier: Tier, homes: Mapping[str, HomeTier]) -> set[str]:
    return {name for name, where in homes.items() if where is tier}


def test_masters_that_are_fetched_twice_a_step_take_the_host_first_then_the_first_chunks_states() -> None:
    needs = [trainable(10), trainable(10)]
    first, second = placed(needs, room_of(0, 80 + 80 + 20 + 30, 4 * PAGE, staging=30)).homes
    assert names_on(Tier.HOST, first) == {MASTER, "exp_avg", "exp_avg_sq", GRADIENT}
    assert names_on(Tier.HOST, second) == {MASTER}


@pytest.mark.parametrize("memory", [MemoryMap.UNIFIED, MemoryMap.EMULATED])
def test_where_full_copies_stay_the_chunks_that_the_next_forward_waits_for_first_are_in_ram(memory: MemoryMap) -> None:
    needs, copies = [trainable(10)] * 3, 60
    host = 140 + 80 + (copies if memory is MemoryMap.UNIFIED else 0)
    first, second, third = placed(needs, room_of(copies, host, 9 * PAGE, memory, ring=copies)).homes
    assert names_on(Tier.HOST, first) == {MASTER, "exp_avg", "exp_avg_sq", GRADIENT}
    assert names_on(Tier.HOST, second) == {MASTER, "exp_avg"}
    assert names_on(Tier.HOST, third) == set()


def test_frozen_masters_whose_copies_stay_leave_the_host_to_what_moves() -> None:
    needs = [frozen(10), trainable(10)]
    room = room_of(40, 140, 4 * PAGE, MemoryMap.EMULATED, ring=40)
    assert [names_on(Tier.HOST, homes) for homes in placed(needs, room).homes] == [set(), set(needs[1].buffers)]
    fetched = replace(room, ring_bytes=29)
    assert names_on(Tier.HOST, placed(needs, fetched).homes[0]) == {MASTER}


def test_one_large_chunk_is_divided_where_the_host_is_full() -> None:
    numel = 10 * DIVISION_BYTES
    need, host = trainable(numel), 4 * numel + DIVISION_BYTES + 100
    homes = placed([need], room_of(0, host, 1 << 30)).homes[0]
    assert homes == {
        MASTER: Tier.HOST, "exp_avg": Divided(DIVISION_BYTES), "exp_avg_sq": Tier.DISK, GRADIENT: Tier.DISK
    }  # fmt: skip
    placement = placed([need], room_of(0, host, 1 << 30))
    assert placement.nbytes == {
        Tier.DEVICE: 0,
        Tier.HOST: 4 * numel + DIVISION_BYTES,
        Tier.DISK: 10 * numel - DIVISION_BYTES,
    }


def test_a_master_that_units_compute_with_is_on_one_tier() -> None:
    numel = 10 * DIVISION_BYTES
    need = replace(trainable(numel), full_can_be_home=True)
    room = room_of(0, 2 * numel, 1 << 30, MemoryMap.UNIFIED)
    assert placed([need], room).homes[0][MASTER] is Tier.DISK
    assert isinstance(placed([need], replace(room, memory=MemoryMap.ACCELERATOR)).homes[0][MASTER], Divided)


def test_homes_on_disk_take_whole_pages() -> None:
    needs = [trainable(10), trainable(1025)]
    assert placed(needs, room_of(0, 0, (4 + 3 * 2 + 1) * PAGE)).nbytes[Tier.DISK] == 11 * PAGE
    assert unplaced(needs, room_of(0, 0, 11 * PAGE - 1)).homes_bytes == PAGE  # the last gradient


def test_staging_is_taken_only_where_something_is_on_disk() -> None:
    needs = [trainable(10)]
    assert not placed(needs, room_of(0, 140, 4 * PAGE, staging=50)).uses_disk
    placement = placed(needs, room_of(0, 139, 4 * PAGE, staging=50))
    assert placement.uses_disk and placement.nbytes[Tier.HOST] <= 139 - 50


def test_staging_that_the_host_cannot_hold_is_not_placed_beside_it() -> None:
    assert unplaced([trainable(10)], room_of(0, 10, 4 * PAGE, staging=30)) == Unplaced({Tier.HOST: 20}, 0)


def test_a_huge_chunk_does_not_keep_smaller_ones_off_the_device() -> None:
    placement = placed([trainable(100), trainable(10)], room_of(200, 1 << 20))
    assert [Tier.DEVICE in homes.values() for homes in placement.homes] == [False, True]


def test_a_ring_that_the_device_cannot_hold_does_not_fit() -> None:
    assert unplaced([trainable(10)], room_of(10, 1000, ring=20)) == Unplaced({Tier.DEVICE: 10}, 0)


def test_placement_and_disk_agree_on_the_size_of_a_page() -> None:
    assert PAGE == PAGE_BYTES


def test_no_chunks_need_no_room() -> None:
    assert placed([], room_of(0, 0)) == Placement((), dict.fromkeys(Tier, 0))


@settings(deadline=None, max_examples=200)
@given(needs=needs_of_models, fraction=st.floats(0, 1))
def test_a_static_fraction_is_kept_to_one_chunk(needs: list[ChunkNeed], fraction: float) -> None:
    total = sum(map(whole, needs))
    placement = placed(needs, room_of(total, total), StaticPlacementPolicy(offload_optim_frac=fraction))
    on_device, wanted = placement.nbytes[Tier.DEVICE], round(total * (1 - fraction))
    assert on_device <= wanted
    left_out = [
        whole(need) for need, homes in zip(needs, placement.homes, strict=True) if Tier.DEVICE not in homes.values()
    ]
    assert all(on_device + nbytes > wanted for nbytes in left_out)


@pytest.mark.parametrize(("fraction", "count"), [(0.0, 4), (0.25, 3), (0.26, 2), (0.5, 2), (1.0, 0)])
def test_static_fractions_of_equal_chunks(fraction: float, count: int) -> None:
    placement = placed([trainable(10)] * 4, room_of(1000, 1000), StaticPlacementPolicy(offload_optim_frac=fraction))
    assert placement.nbytes[Tier.DEVICE] == count * 140


@pytest.mark.parametrize("name", ["offload_optim_frac", "offload_param_frac"])
@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_a_fraction_outside_of_zero_to_one_is_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must be between 0 and 1"):
        StaticPlacementPolicy(**{name: value})


@settings(deadline=None, max_examples=150)
@given(needs=needs_of_models, room=rooms)
def test_a_master_where_units_run_is_the_full_copy_if_they_can_compute_with_it(
    needs: list[ChunkNeed], room: Capacity
) -> None:
    needs = [replace(need, full_can_be_home=len(need.buffers) == 1) for need in needs]
    found = place(needs, room, AutoPlacementPolicy())
    if isinstance(found, Unplaced):
        return
    for need, homes, is_home in zip(needs, found.homes, found.full_is_home, strict=True):
        in_reach = (Tier.DEVICE, Tier.HOST) if room.memory is MemoryMap.UNIFIED else (Tier.DEVICE,)
        assert is_home == (len(need.buffers) == 1 and homes[MASTER] in in_reach)


@settings(deadline=None, max_examples=150)
@given(needs=needs_of_models, room=rooms, gradient=st.integers(1, 200))
def test_gradients_without_a_home_have_room_on_each_tier_with_masters_of_theirs(
    needs: list[ChunkNeed], room: Capacity, gradient: int
) -> None:
    needs = [
        replace(need, buffers={r: n for r, n in need.buffers.items() if r != GRADIENT}, borrows_gradient=True)
        if GRADIENT in need.buffers
        else need
        for need in needs
    ]
    found = place(needs, replace(room, gradient_bytes=gradient), AutoPlacementPolicy())
    if isinstance(found, Unplaced):
        return
    masters = {h[MASTER] for need, h in zip(needs, found.homes, strict=True) if need.borrows_gradient}
    assert found.gradient_room == {Tier.DEVICE if tier is Tier.DEVICE else Tier.HOST: gradient for tier in masters}
    ring = {room.memory.compute_tier: room.ring_bytes}
    for tier, nbytes in found.gradient_room.items():
        assert found.nbytes[tier] + nbytes + ring.get(tier, 0) <= room.nbytes[tier]
