"""`get_accelerator` and `get_current_device`, on the CPU and with torch pretending that there are two devices."""

import pytest
import torch

import gemini
from gemini.accelerator import Accelerator, get_accelerator
from gemini.utils import get_current_device


@pytest.fixture
def two_devices(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Devices 0 and 1 of a kind that CPU builds of torch can name. Returns the list of devices set so far."""
    current = [0]
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: current[-1])
    monkeypatch.setattr(torch.accelerator, "set_device_index", current.append)
    monkeypatch.setattr(torch.accelerator, "max_memory_allocated", lambda device: 100 + current[-1])
    return current


needs_no_accelerator = pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has an accelerator")


@needs_no_accelerator
def test_without_an_accelerator_it_is_the_cpu() -> None:
    accelerator = get_accelerator()
    assert accelerator.get_current_device() == get_current_device() == torch.device("cpu")
    assert (accelerator.name, accelerator.communication_backend) == ("cpu", "gloo")
    assert (accelerator.is_available(), accelerator.device_count(), accelerator.current_device()) == (False, 0, 0)
    assert repr(accelerator) == "Accelerator(cpu, gloo)"


@needs_no_accelerator
def test_on_the_cpu_there_is_nothing_to_wait_for_or_to_set_and_no_memory_of_a_device() -> None:
    accelerator = get_accelerator()
    accelerator.synchronize()
    accelerator.set_device(1)
    accelerator.empty_cache()
    accelerator.reset_peak_memory_stats()
    amounts = [accelerator.memory_allocated(), accelerator.max_memory_allocated()]
    assert [*amounts, accelerator.memory_reserved(), accelerator.max_memory_reserved()] == [0, 0, 0, 0]
    assert accelerator.get_current_device() == torch.device("cpu")


def test_what_torch_says_of_the_accelerator_is_passed_on(two_devices: list[int]) -> None:
    accelerator = get_accelerator()
    assert (accelerator.name, accelerator.communication_backend) == ("cuda", "nccl")
    assert (accelerator.is_available(), accelerator.support_set_device, accelerator.device_count()) == (True, True, 2)
    accelerator.set_device(1)
    assert accelerator.get_current_device() == get_current_device() == torch.device("cuda", 1)
    assert (accelerator.current_device(), accelerator.max_memory_allocated()) == (1, 101)


def test_a_process_takes_the_device_of_its_local_rank(two_devices: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    get_accelerator().set_device()
    assert two_devices == [0, 1]


def test_seeding_repeats_random_numbers() -> None:
    state = torch.get_rng_state()
    try:
        drawn = []
        for seed in (get_accelerator().manual_seed, get_accelerator().manual_seed_all):
            seed(5)
            drawn.append(torch.rand(3))
        assert torch.equal(*drawn)
    finally:
        torch.set_rng_state(state)


def test_modules_move_to_the_current_device_alone_or_in_a_list() -> None:
    first, second = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    accelerator = get_accelerator()
    assert accelerator.set_to_device(first) is first
    assert accelerator.set_to_device([first]) is first
    assert accelerator.set_to_device([first, second]) == [first, second]


@needs_no_accelerator
def test_autocast_is_torchs_on_this_device() -> None:
    layer = torch.nn.Linear(2, 2)
    with get_accelerator().autocast(dtype=torch.bfloat16):
        assert layer(torch.ones(1, 2)).dtype is torch.bfloat16
    with get_accelerator().autocast(enabled=False):
        assert layer(torch.ones(1, 2)).dtype is torch.float32


@needs_no_accelerator
def test_the_rest_is_that_of_torchs_module_of_the_device() -> None:
    assert get_accelerator().Stream is torch.cpu.Stream
    with pytest.raises(AttributeError, match=r"no 'get_device_properties', and torch\.cpu neither"):
        get_accelerator().get_device_properties()


def test_all_callers_get_the_same_one_also_as_an_attribute_of_the_package() -> None:
    assert get_accelerator() is get_accelerator()
    assert isinstance(gemini.accelerator.get_accelerator(), Accelerator)
