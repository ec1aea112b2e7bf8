"""gemini-stat verify: what it says of whole, damaged and unreadable files, and its exit codes."""

import json
import os
import pty
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from gemini.formats.json_file import CHECKSUM, checksum_of
from gemini.formats.manifest import MANIFEST_NAME, FileRecord, Manifest
from gemini.formats.safetensors_file import Unsealed
from gemini.stat.cli import main
from gemini.stat.commands.schema import output_schema

Capture = pytest.CaptureFixture[str]


def write_tensors(path: Path, *names: str, has_checksums: bool = True) -> None:
    """A safetensors file with four numbers of each name."""
    data = [bytes([index + 1] * 16) for index, _ in enumerate(names)]
    if has_checksums:
        header = Unsealed([(name, "F32", (4,)) for name in names], {"format": "pt"})
        path.write_bytes(header.sealed(map(zlib.crc32, data)) + b"".join(data))
        return
    of_name = {n: {"dtype": "F32", "shape": [4], "data_offsets": [16 * i, 16 * i + 16]} for i, n in enumerate(names)}
    text = json.dumps(of_name).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(data))


def write_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", b"\x80\x02}q\x00.")
        file.writestr("archive/data/0", b"\x01" * 64)


def write_index(path: Path, weight_map: dict[str, str], **others: Any) -> None:
    content = {**others, "weight_map": weight_map}
    path.write_text(json.dumps({**content, CHECKSUM: checksum_of(content)} if others else content))


def commit(folder: Path) -> None:
    """A manifest of what is in a folder."""
    files = {file.name: FileRecord.of(file) for file in sorted(folder.iterdir())}
    (folder / MANIFEST_NAME).write_text(Manifest(id="5f0c", world_size=1, parts={}, files=files).text())


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two checkpoints of a run, the folder of an optimizer, one of Hugging Face, and a half-written one."""
    for number in (1, 2):
        folder = tmp_path / f"checkpoint-00000{number}"
        folder.mkdir()
        write_tensors(folder / "model.safetensors", "a", "b")
        write_zip(folder / "lr_scheduler.pt")
        (folder / "config.json").write_text("{}")
        commit(folder)
    (tmp_path / "latest").symlink_to("checkpoint-000002")
    for name in ("hub", "optimizer", ".checkpoint.saving-1f2e"):
        (tmp_path / name).mkdir()
    write_tensors(tmp_path / "hub" / "model-1.safetensors", "a", has_checksums=False)
    write_index(tmp_path / "hub" / "model.safetensors.index.json", {"a": "model-1.safetensors"})
    write_tensors(tmp_path / "optimizer" / "optimizer.safetensors", "0.exp_avg")
    write_index(tmp_path / "optimizer" / "optimizer.json", {"0.exp_avg": "optimizer.safetensors"}, steps={"0": 3})
    (tmp_path / ".checkpoint.saving-1f2e" / "model.safetensors").write_bytes(b"half")
    return tmp_path


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def verified(path: Path, capsys: Capture, code: int) -> dict[str, Any]:
    """By the path of each checkpoint: its state, and the state of each file."""
    assert main(["verify", str(path), "--json"]) == code
    content = json.loads(capsys.readouterr().out)
    schema = output_schema()
    jsonschema.Draft202012Validator({"$ref": "#/$defs/verify", "$defs": schema["$defs"]}).validate(content)
    assert content["ok"] == (code == 0)
    return {
        Path(each["path"]).name: (each["state"], {file["name"]: file["state"] for file in each["files"]})
        for each in content["checkpoints"]
    }


def test_all_checkpoints_below_a_folder_are_verified(run: Path, capsys: Capture) -> None:
    found = verified(run, capsys, 0)
    assert {name: state for name, (state, _) in found.items()} == {
        "checkpoint-000001": "whole", "checkpoint-000002": "whole", "hub": "no_checksum", "optimizer": "whole",
    }  # fmt: skip
    assert set(found["checkpoint-000002"][1].values()) == {"whole"}
    assert main(["verify", str(run)]) == 0
    out = capsys.readouterr().out
    assert "1 tensor; no checksum, only its structure was looked at" in out
    assert out.splitlines()[-1].startswith("4 checkpoints, ")
    assert out.splitlines()[-1].endswith("3 whole, 1 without checksums")


@pytest.mark.parametrize("what", ["latest", "latest as text", "file"])
def test_latest_and_a_single_file_are_verified(what: str, run: Path, capsys: Capture) -> None:
    path = run / "latest"
    if what == "latest as text":
        path.unlink()
        path.write_text("checkpoint-000002\n")
    if what == "file":
        path = run / "optimizer" / "optimizer.safetensors"
    assert [state for state, _ in verified(path, capsys, 0).values()] == ["whole"]


@pytest.mark.parametrize(
    ("file", "at", "words"),
    [
        ("checkpoint-000001/model.safetensors", -1, "has other bytes than were saved in b"),
        ("checkpoint-000001/model.safetensors", 20, "has the checksum"),
        ("checkpoint-000001/lr_scheduler.pt", 70, "has the checksum"),
        ("checkpoint-000001/config.json", 0, "has the checksum"),
        ("checkpoint-000001/manifest.json", 40, "manifest.json"),
        ("optimizer/optimizer.json", -20, "optimizer.json"),
        ("optimizer/optimizer.safetensors", -3, "has other bytes than were saved in 0.exp_avg"),
    ],
)
def test_a_flipped_bit_anywhere_is_found(file: str, at: int, words: str, run: Path, capsys: Capture) -> None:
    flip(run / file, at)
    folder, name = file.split("/")
    state, files = verified(run, capsys, 3)[folder]
    assert (state, files[name]) == ("damaged", "damaged")
    assert main(["verify", str(run), "--quiet", "--ascii"]) == 3
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("  !!"))
    assert words in line


def test_a_flipped_bit_in_a_file_of_torch_is_found(tmp_path: Path, capsys: Capture) -> None:
    write_zip(tmp_path / "model.bin")
    assert main(["verify", str(tmp_path / "model.bin")]) == 0
    flip(tmp_path / "model.bin", 130)
    assert main(["verify", str(tmp_path)]) == 3
    assert "has other bytes than were saved in its record archive/data/0" in capsys.readouterr().out


@pytest.mark.parametrize("is_empty", [False, True])
@pytest.mark.parametrize("target", ["", "latest", "checkpoint-000002"])
def test_a_checkpoint_without_its_manifest_is_not_whole(
    target: str, is_empty: bool, run: Path, capsys: Capture
) -> None:
    for file in (run / "checkpoint-000002").iterdir():
        if is_empty or file.name == MANIFEST_NAME:
            file.unlink()
    assert main(["verify", str(run / target), "-q"]) == 3
    out = capsys.readouterr().out
    assert f"{MANIFEST_NAME}" in out and "is not a whole checkpoint" in out and "1 damaged" in out


def test_a_checkpoint_of_transformers_needs_no_manifest(run: Path) -> None:
    (run / "checkpoint-000002" / MANIFEST_NAME).unlink()
    (run / "checkpoint-000002" / "trainer_state.json").write_text("{}")
    assert main(["verify", str(run)]) == 0


def test_what_an_index_names_has_to_be_there(run: Path, capsys: Capture) -> None:
    index = run / "hub" / "model.safetensors.index.json"
    for weight_map, words in (
        ({"a": "model-1.safetensors", "b": "model-1.safetensors"}, "names tensors that are not in model-1.safetensors"),
        ({"a": "model-2.safetensors"}, "names model-2.safetensors, which is not there"),
        ({"a": "../x.safetensors"}, "names a file outside of its folder"),
        ([], "no weight_map"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        assert main(["verify", str(run / "hub")]) == 3
        assert words in capsys.readouterr().out
    (run / "checkpoint-000001" / "config.json").unlink()
    assert main(["verify", str(run / "checkpoint-000001")]) == 3
    assert "config.json: No such file or directory" in capsys.readouterr().out


def test_what_cannot_be_read_has_its_own_code(tmp_path: Path, capsys: Capture) -> None:
    assert main(["verify", str(tmp_path / "nowhere")]) == 6
    assert "there is no such file or folder" in capsys.readouterr().err
    assert main(["verify", str(tmp_path)]) == 6
    assert "holds no checkpoint" in capsys.readouterr().err
    assert main(["verify"]) == 2
    write_tensors(tmp_path / "model.safetensors", "a")
    (tmp_path / "other.safetensors").symlink_to("/proc/self/mem")
    assert main(["verify", str(tmp_path)]) == 3
    assert "it is 0 bytes long" in capsys.readouterr().out
    os.remove(tmp_path / "other.safetensors")
    os.mkfifo(tmp_path / "pipe.safetensors")
    assert main(["verify", str(tmp_path)]) == 3
    assert "is not a file" in capsys.readouterr().out


def test_names_from_files_cannot_steer_the_terminal(tmp_path: Path, capsys: Capture) -> None:
    write_tensors(tmp_path / "model.safetensors", "\x1b[2Jcleared")
    flip(tmp_path / "model.safetensors", -1)
    assert main(["verify", str(tmp_path)]) == 3
    assert "\x1b" not in capsys.readouterr().out


def test_it_starts_without_torch_and_draws_in_colour_on_a_terminal(run: Path) -> None:
    code = "import sys; from gemini.stat.cli import main; code = main(sys.argv[1:]); assert 'torch' not in sys.modules"
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100"}
    environment.pop("NO_COLOR", None)
    command = [sys.executable, "-c", code, "verify", str(run)]
    done = subprocess.run(command, stdout=slave, stderr=subprocess.PIPE, env=environment, timeout=60, check=False)
    os.close(slave)
    shown = os.read(master, 1 << 16).decode()
    os.close(master)
    assert done.returncode == 0, done.stderr
    assert "\x1b[32mok" in shown
