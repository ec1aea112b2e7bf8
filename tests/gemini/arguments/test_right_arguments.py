"""What makes sense is taken, in whatever type it comes."""

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gemini import Booster, Budget, GeminiPlugin, HybridAdam, LazyInitContext
from gemini.arguments.checked import NotAllowed
from gemini.arguments.places import Folder, Name
from gemini.sizes import parse_bytes


class Spelled(os.PathLike[str]):
    def __repr__(self) -> str:  # without the address: it is a part of a test's name
        return "Spelled()"

    def __fspath__(self) -> str:
        return "somewhere"


@pytest.mark.parametrize(
    ("keywords", "field", "meant"),
    [
        ({"host_memory": np.int64(1 << 30)}, "host_memory", 1 << 30),
        ({"host_memory": "1GiB"}, "host_memory", 1 << 30),
        ({"max_prefetch": np.int32(3)}, "max_prefetch", 3),
        ({"max_prefetch": np.uint8(3)}, "max_prefetch", 3),
        ({"max_norm": np.float32(0.5)}, "max_norm", 0.5),
        ({"max_norm": 1}, "max_norm", 1.0),
        ({"pin_memory": 0}, "pin_memory", False),
        ({"pin_memory": np.bool_(False)}, "pin_memory", False),
        ({"verbose": 1}, "verbose", True),
        ({"precision": np.str_("fp32")}, "precision", "fp32"),
        ({"offload_dir": Spelled()}, "offload_dir", Path("somewhere")),
        ({"offload_dir": "deep/er"}, "offload_dir", Path("deep/er")),
        ({"telemetry": "deep/er"}, "telemetry", Path("deep/er")),
        ({"telemetry": 0}, "telemetry", False),
        ({"chunk_config_dict": {1: {"chunk_size": np.int64(64), "keep_gathered": True}}}, "chunk_numel", 64),
        ({"snapshot_memory": 0}, "snapshot_memory", 0),
        ({"steady_cuda_cap_ratio": 1}, "steady_device_ratio", 1.0),
        ({"warmup_non_model_data_ratio": 0}, "warmup_non_model_ratio", 0.0),
        ({"min_chunk_size_m": 0.5, "search_range_m": 0, "hidden_dim": 1}, "search_range", (1 << 19, 1 << 19)),
    ],
    ids=str,
)
def test_a_plugin_takes_numbers_of_numpy_and_paths_of_any_kind(
    keywords: dict[str, Any], field: str, meant: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    got = getattr(GeminiPlugin(**keywords).config, field)
    assert got == meant and type(got) is type(meant)


def test_none_is_what_it_was() -> None:
    names = "chunk_config_dict hidden_dim min_chunk_size_m memstats device_memory host_memory disk_memory budget"
    names += " offload_dir snapshot_memory quantize activation_policy process_group hybrid_shard_size chunk_init_device"
    given = GeminiPlugin(**dict.fromkeys(names.split())).config  # type: ignore[arg-type]
    assert given == GeminiPlugin().config
    assert Booster(device=None, mixed_precision=None, plugin=None).plugin.config == given
    assert Budget(host_memory=None).said == {}
    assert LazyInitContext(None) and LazyInitContext("cpu") and LazyInitContext(torch.device("cpu"))


def test_an_optimizer_takes_tensors_numbers_of_numpy_and_flags_as_numbers() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    made = HybridAdam(
        [parameter], lr=torch.tensor(0.5), eps=np.float32(0.25), betas=[0.5, np.float64(0.25)], weight_decay=0,
        adamw_mode=1, bias_correction=True,
    )  # fmt: skip
    parameter.grad = torch.ones(2)
    made.step()
    assert made.param_groups[0]["lr"] is not None and not torch.equal(parameter, torch.ones(2))


def test_a_scale_out_of_its_own_bounds_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="initial_scale must be from min_scale to max_scale, got 4"):
        GeminiPlugin(initial_scale=4, min_scale=8)


def test_a_warning_names_the_line_of_the_user() -> None:
    for keywords in ({"placement_policy": "cpu"}, {"enable_jit_fused": True}):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            GeminiPlugin(**keywords)  # type: ignore[arg-type]
        assert [each.filename for each in seen] == [__file__]


def test_an_argument_that_does_not_exist_is_pythons_own_error() -> None:
    with pytest.raises(TypeError, match=r"GeminiPlugin\.__init__\(\) got an unexpected keyword argument 'host_memroy'"):
        GeminiPlugin(host_memroy=1)  # type: ignore[call-arg]


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    for place in (tmp_path, tmp_path / "new"):
        with pytest.raises(ValueError, match=r"offload_dir must be .*a folder .* this process may not write to"):
            GeminiPlugin(offload_dir=place)


def test_a_link_to_nothing_and_a_device_are_no_folders(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for place, says in ((tmp_path / "link", "link to nothing"), ("/dev/null", "a device or a pipe")):
        with pytest.raises(NotAllowed, match=says):
            Folder().meant(place)
    assert Name().meant(tmp_path / "link") == tmp_path / "link"


def test_a_size_is_bounded_and_its_text_too() -> None:
    assert parse_bytes(2**63 - 1) == 2**63 - 1 and parse_bytes(np.int64(7)) == 7
    for size in (2**63, "8388608TiB", "1" * 5000, 10**5000):
        with pytest.raises(ValueError, match="expected a number of bytes") as raised:
            parse_bytes(size)
        assert len(str(raised.value)) < 300
