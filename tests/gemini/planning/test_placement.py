"""Where homes live: within the room, whole chunks on DEVICE, masters first on HOST."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemini.chunk import GRADIENT, MASTER, SHADOW, Tier
from gemini.chunk.disk import PAGE_BYTES
from gemini.planning.placement import (
    DISK_PAGE_BYTES as PAGE,
)
from gemini.planning.placement import (
    AutoPlacementPolicy,
    ChunkNeed,
    DoesNotFit,
    Placement,
    PlacementPolicy,
    Room,
    StaticPlacementPolicy,
    place,
)


def trainable(numel: int) -> ChunkNeed:
    buffers = {MASTER: 4 * numel, "exp_avg": 4 * numel, "exp_avg_sq": 4 * numel, GRADIENT: 2 * numel}
    return ChunkNeed(buffers=buffers, full_nbytes=2 * numel, shadow_nbytes=2 * numel)


def frozen(numel: int) -> ChunkNeed:
    return ChunkNeed(buffers={MASTER: 2 * numel}, full_nbytes=2 * numel)


def room_of(device: int, host: int, disk: int = 0, unified: bool = False, ring: int = 0, staging: int = 0) -> Room:
    capacities = {Tier.DEVICE: device, Tier.HOST: host, Tier.DISK: disk}
    return Room(capacities=capacities, unified=unified, ring_bytes=ring, staging_bytes=staging)


needs_of_models = st.lists(
    st.builds(trainable, st.integers(1, 50)) | st.builds(frozen, st.integers(1, 50)), max_size=12
)
rooms = st.builds(
    room_of,
    device=st.integers(0, 3000),
    host=st.integers(0, 5000),
    disk=st.just(0) | st.integers(0, 200_000),
    unified=st.booleans(),
    ring=st.integers(0, 400),
    staging=st.integers(0, 400),
)
policies = st.just(AutoPlacementPolicy()) | st.builds(StaticPlacementPolicy, offload_optim_frac=st.floats(0, 1))


def whole(need: ChunkNeed) -> int:
    return sum(need.buffers.values())


def try_place(needs: list[ChunkNeed], room: Room, policy: PlacementPolicy) -> Placement | DoesNotFit:
    try:
        return place(needs, room, policy)
    except DoesNotFit as error:
        return error


@settings(deadline=None, max_examples=600)
@given(needs=needs_of_models, room=rooms, policy=policies)
def test_every_role_has_one_home_and_no_tier_holds_more_than_its_room(
    needs: list[ChunkNeed], room: Room, policy: PlacementPolicy
) -> None:
    placement = try_place(needs, room, policy)
    if isinstance(placement, DoesNotFit):
        return
    assert [homes.keys() - {SHADOW} for homes in placement.homes] == [set(need.buffers) for need in needs]
    for tier in Tier:
        held = sum(
            need.nbytes(name, tier)
            for need, homes in zip(needs, placement.homes, strict=True)
            for name in homes
            if homes[name] is tier
        )
        assert placement.nbytes[tier] == held
    assert placement.uses_disk == (placement.nbytes[Tier.DISK] > 0)
    host = placement.nbytes[Tier.HOST] + (room.staging_bytes if placement.uses_disk else 0)
    device = placement.nbytes[Tier.DEVICE]
    if room.unified:
        assert device == 0 and host + room.ring_bytes <= room.capacities[Tier.HOST]
    else:
        assert host <= room.capacities[Tier.HOST] and device + room.ring_bytes <= room.capacities[Tier.DEVICE]
    assert placement.nbytes[Tier.DISK] <= room.capacities[Tier.DISK]


@settings(deadline=None, max_examples=600)
@given(needs=needs_of_models, room=rooms, policy=policies)
def test_the_device_takes_whole_chunks_in_order_and_leaves_out_what_does_not_fit(
    needs: list[ChunkNeed], room: Room, policy: PlacementPolicy
) -> None:
    placement = try_place(needs, room, policy)
    if isinstance(placement, DoesNotFit):
        return
    taken, share = 0, policy.device_share(sum(map(whole, needs)))
    for need, homes in zip(needs, placement.homes, strict=True):
        fits = taken + whole(need) <= min(room.capacities[Tier.DEVICE] - room.ring_bytes, share) and not room.unified
        assert (set(homes.values()) == {Tier.DEVICE}) == fits
        assert fits or Tier.DEVICE not in homes.values()
        taken += whole(need) if fits else 0


@settings(deadline=None, max_examples=600)
@given(needs=needs_of_models, room=rooms, policy=policies)
def test_shadows_take_what_the_host_has_left_and_nothing_that_a_home_could_use(
    needs: list[ChunkNeed], room: Room, policy: PlacementPolicy
) -> None:
    placement = try_place(needs, room, policy)
    if isinstance(placement, DoesNotFit):
        return
    without = place([replace(need, shadow_nbytes=0) for need in needs], room, policy)
    homes_only = [{role: tier for role, tier in h.items() if role is not SHADOW} for h in placement.homes]
    assert homes_only == list(without.homes)
    host = placement.nbytes[Tier.HOST] + (room.staging_bytes if placement.uses_disk else 0)
    for need, homes in zip(needs, placement.homes, strict=True):
        if SHADOW in homes:
            assert homes[SHADOW] is Tier.HOST and not room.unified and need.shadow_nbytes
            assert homes[MASTER] is Tier.HOST
        elif need.shadow_nbytes and not room.unified and homes[MASTER] is Tier.HOST:
            assert host + need.shadow_nbytes > room.capacities[Tier.HOST]


@settings(deadline=None, max_examples=600)
@given(needs=needs_of_models, room=rooms)
def test_what_goes_to_disk_has_no_place_on_host_and_buffers_go_in_order(needs: list[ChunkNeed], room: Room) -> None:
    placement = try_place(needs, room, AutoPlacementPolicy())
    if isinstance(placement, DoesNotFit) or not placement.uses_disk:
        return
    taken = room.staging_bytes + (room.ring_bytes if room.unified else 0)
    for name in (MASTER, GRADIENT, "exp_avg", "exp_avg_sq"):
        for need, homes in zip(needs, placement.homes, strict=True):
            if homes.get(name) is Tier.HOST:
                taken += need.nbytes(name, Tier.HOST)
            elif homes.get(name) is Tier.DISK:
                assert taken + need.buffers[name] > room.capacities[Tier.HOST]


@settings(deadline=None, max_examples=600)
@given(needs=needs_of_models, room=rooms, policy=policies)
def test_with_the_missing_bytes_added_it_fits(needs: list[ChunkNeed], room: Room, policy: PlacementPolicy) -> None:
    error = try_place(needs, room, policy)
    if isinstance(error, Placement):
        return
    assert error.homes_bytes >= 0 and all(nbytes > 0 for nbytes in error.working_bytes.values())
    assert error.missing_bytes == error.homes_bytes + sum(error.working_bytes.values()) > 0
    assert str(error.missing_bytes) in str(error)
    capacities = dict(room.capacities)
    for tier, nbytes in error.working_bytes.items():
        capacities[tier] += nbytes
    capacities[Tier.DISK if capacities[Tier.DISK] else Tier.HOST] += error.homes_bytes
    place(needs, replace(room, capacities=capacities), policy)


def test_masters_take_the_host_first_then_gradients_then_moments() -> None:
    needs = [trainable(10), trainable(10)]
    room = room_of(0, 80 + 20 + 20 + 30, 4 * PAGE, staging=30)
    first, second = place(needs, room, AutoPlacementPolicy()).homes
    assert first == {
        MASTER: Tier.HOST, GRADIENT: Tier.HOST, "exp_avg": Tier.DISK, "exp_avg_sq": Tier.DISK
    }  # fmt: skip
    assert second == first


def test_homes_on_disk_take_whole_pages() -> None:
    needs = [trainable(10), trainable(1025)]
    assert place(needs, room_of(0, 0, (4 + 3 * 2 + 1) * PAGE), AutoPlacementPolicy()).nbytes[Tier.DISK] == 11 * PAGE
    with pytest.raises(DoesNotFit) as raised:
        place(needs, room_of(0, 0, 11 * PAGE - 1), AutoPlacementPolicy())
    assert raised.value.homes_bytes == 2 * PAGE  # the home that has one page only


def test_staging_is_taken_only_where_something_is_on_disk() -> None:
    needs = [trainable(10)]
    assert not place(needs, room_of(0, 140, 4 * PAGE, staging=50), AutoPlacementPolicy()).uses_disk
    placement = place(needs, room_of(0, 139, 4 * PAGE, staging=50), AutoPlacementPolicy())
    assert placement.uses_disk and placement.nbytes[Tier.HOST] <= 139 - 50


def test_staging_that_the_host_cannot_hold_is_not_placed_beside_it() -> None:
    with pytest.raises(DoesNotFit) as raised:
        place([trainable(10)], room_of(0, 10, 4 * PAGE, staging=30), AutoPlacementPolicy())
    assert (raised.value.working_bytes, raised.value.homes_bytes) == ({Tier.HOST: 20}, 0)


def test_a_huge_chunk_does_not_keep_smaller_ones_off_the_device() -> None:
    placement = place([trainable(100), trainable(10)], room_of(200, 1 << 20), AutoPlacementPolicy())
    assert [Tier.DEVICE in homes.values() for homes in placement.homes] == [False, True]


def test_a_ring_that_the_device_cannot_hold_does_not_fit() -> None:
    with pytest.raises(DoesNotFit) as raised:
        place([trainable(10)], room_of(10, 1000, ring=20), AutoPlacementPolicy())
    assert (raised.value.working_bytes, raised.value.homes_bytes) == ({Tier.DEVICE: 10}, 0)


def test_placement_and_disk_agree_on_the_size_of_a_page() -> None:
    assert PAGE == PAGE_BYTES


def test_no_chunks_need_no_room() -> None:
    assert place([], room_of(0, 0), AutoPlacementPolicy()) == Placement((), dict.fromkeys(Tier, 0))


@settings(deadline=None, max_examples=500)
@given(needs=needs_of_models, fraction=st.floats(0, 1))
def test_a_static_fraction_is_kept_to_one_chunk(needs: list[ChunkNeed], fraction: float) -> None:
    total = sum(map(whole, needs))
    placement = place(needs, room_of(total, total), StaticPlacementPolicy(offload_optim_frac=fraction))
    on_device, wanted = placement.nbytes[Tier.DEVICE], round(total * (1 - fraction))
    assert on_device <= wanted
    left_out = [
        whole(need) for need, homes in zip(needs, placement.homes, strict=True) if Tier.DEVICE not in homes.values()
    ]
    assert all(on_device + nbytes > wanted for nbytes in left_out)


@pytest.mark.parametrize(("fraction", "count"), [(0.0, 4), (0.25, 3), (0.26, 2), (0.5, 2), (1.0, 0)])
def test_static_fractions_of_equal_chunks(fraction: float, count: int) -> None:
    placement = place([trainable(10)] * 4, room_of(1000, 1000), StaticPlacementPolicy(offload_optim_frac=fraction))
    assert placement.nbytes[Tier.DEVICE] == count * 140


@pytest.mark.parametrize("name", ["offload_optim_frac", "offload_param_frac"])
@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_a_fraction_outside_of_zero_to_one_is_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must be between 0 and 1"):
        StaticPlacementPolicy(**{name: value})
