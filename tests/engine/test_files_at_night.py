# SPDX-License-Identifier: Apache-2.0
"""Corrupt, truncated, swapped and stale files: each has its one clear error, before TensorRT sees anything."""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import safetensors
from safetensors import SafetensorError

from lynx_compile.engine import trt
from lynx_compile.engine.manifest import Manifest
from lynx_compile.engine.runtime import Engine
from lynx_compile.engine.weights import LARGEST_HEADER, open_weights, parse_header
from lynx_compile.errors import InputError, LynxError
from tests.engine.conftest import HOST_ELF, Stage
from tests.engine.fakes import FakeCuda

MakeStage = Callable[..., Stage]
T = TypeVar("T")


def refused(s: Stage, message: str) -> None:
    """Opening says ``message``; TensorRT has seen nothing, no library was loaded, nothing is left."""
    with pytest.raises(InputError, match=message):
        Engine.open(s.path)
    assert "deserialize" not in s.trt.log
    assert s.loaded == []
    assert s.cuda.leaks() == []


def rewrite(path: Path, change: Callable[[bytearray], Any]) -> None:
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)


# The engine.


def test_no_engine(stage: MakeStage) -> None:
    s = stage()
    s.path.unlink()
    refused(s, r"The engine .*small.engine does not exist. Check the path, or compile it")


@pytest.mark.parametrize("size", [0, 1, 100, -1])
def test_truncated_engine(stage: MakeStage, size: int) -> None:
    s = stage()
    rewrite(s.path, lambda data: data.__delitem__(slice(size, None)))
    refused(s, r"small.engine is cut off: it has \d+ of \d+ bytes. Copy the engine's files again")


def test_longer_engine(stage: MakeStage) -> None:
    s = stage()
    rewrite(s.path, lambda data: data.append(0))
    refused(s, "small.engine is too long")


@pytest.mark.parametrize("place", [0, 60, 700, -1])
def test_flipped_bit_in_the_engine(stage: MakeStage, place: int) -> None:
    s = stage()
    rewrite(s.path, lambda data: data.__setitem__(place, data[place] ^ 1))
    refused(s, r"small.engine is damaged, or of another manifest \(SHA-256\)")


# Host code: only the plugin library whose digest the manifest names.


def test_host_code_stays_forbidden(stage: MakeStage) -> None:
    """An embedded plugin library does not need the permission, which is for lean runtimes."""
    s = stage()
    Engine.open(s.path).close()
    assert not s.trt.host_code_allowed


@pytest.mark.parametrize("where", ["instead", "beside"])
def test_other_host_code_in_the_engine(stage: MakeStage, where: str) -> None:
    s = stage()
    plugin = s.plugin.read_bytes()
    other = HOST_ELF + b"something else's code" * 7

    def plant(data: bytearray) -> None:
        start = data.find(plugin)
        if where == "instead":
            data[start : start + len(plugin)] = other
        else:
            data += other

    rewrite(s.path, plant)
    s.change(engine={"bytes": s.path.stat().st_size, "sha256": trt.file_digest(s.path)})
    refused(s, r"carries host code that is not liblynx_plugin.so of SHA-256 [0-9a-f]{12}\. Do not load it")


def test_the_real_librarys_copy_is_found(stage: MakeStage) -> None:
    """With the real library, device code in it included; one byte of it changed is refused."""
    s = stage()
    real = trt.LIBRARIES / "liblynx_plugin.so"
    shutil.copy(real, s.plugin)
    s.path.write_bytes(b"vtrt" + bytes(132) + real.read_bytes() + bytes(1000))
    digest = trt.file_digest(s.plugin)
    s.change(
        engine={"bytes": s.path.stat().st_size, "sha256": trt.file_digest(s.path)}, plugin={"sha256": digest}
    )
    Engine.open(s.path).close()
    s.trt.log.clear(), s.loaded.clear()
    rewrite(s.path, lambda data: data.__setitem__(5000, data[5000] ^ 1))
    s.change(engine={"sha256": trt.file_digest(s.path)})
    refused(s, "carries host code that is not")


# The plugin library.


def test_damaged_library_beside_the_engine(stage: MakeStage) -> None:
    s = stage()
    rewrite(s.plugin, lambda data: data.append(1))
    refused(s, r"built with a liblynx_plugin.so of SHA-256 \w{12}, and .*tmp.* has \w{12} and .*lib")


def test_no_library(stage: MakeStage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    s = stage()
    s.plugin.unlink()
    refused(
        s,
        r"built with a liblynx_plugin.so of SHA-256 \w{12}, and /\S*liblynx_plugin.so has \w{12}\. Put",
    )
    monkeypatch.setattr(trt, "LIBRARIES", tmp_path / "nowhere")
    refused(s, "there is none in .* and .*nowhere")


def test_the_installed_library_will_do(stage: MakeStage) -> None:
    s = stage()
    installed = trt.LIBRARIES / "liblynx_plugin.so"
    s.path.write_bytes(b"vtrt" + installed.read_bytes())
    s.plugin.write_bytes(b"of another engine in the same folder")
    s.change(
        engine={"bytes": s.path.stat().st_size, "sha256": trt.file_digest(s.path)},
        plugin={"sha256": trt.file_digest(installed)},
    )
    Engine.open(s.path).close()
    assert s.loaded == [installed]


@pytest.mark.parametrize("change", [{"version": "2"}, {"names": ["Other"]}, {"namespace": "other"}])
def test_another_plugin(stage: MakeStage, change: dict[str, Any]) -> None:
    s = stage()
    s.change(plugin=change)
    refused(s, r"needs the plugin .*, and this lynx-compile knows LynxSparseLinear, .* version 1 of lynx")


# The machine.


def test_another_tensorrt(stage: MakeStage) -> None:
    s = stage()
    s.change(backend={"version": "1.6.0.9"})
    refused(
        s,
        r"built by tensorrt_rtx 1.6.0.9, and installed is tensorrt_rtx 1.7.1.116. "
        r"Run: pip install tensorrt-rtx-cu13==1.6.0.9, or compile",
    )


def test_another_gpu(stage: MakeStage) -> None:
    s = stage(cuda=FakeCuda(architecture=(9, 0)))
    refused(
        s,
        r"was built by tensorrt_rtx for sm80, sm89, and GPU 0 here is sm90, which cannot run that. "
        r"Compile it again for sm90",
    )


def test_a_later_gpu_compiles_what_it_needs(stage: MakeStage) -> None:
    Engine.open(stage(cuda=FakeCuda(architecture=(12, 1))).path).close()


# Files of two runs of one recipe: names, shapes and sizes agree, digests do not.


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("small.engine", r"small.engine is damaged, or of another manifest \(SHA-256\)"),
        ("small.json", r"small.engine is damaged, or of another manifest \(SHA-256\)"),
        ("model.safetensors", r"model.safetensors is damaged, or of another engine \(SHA-256\)"),
    ],
)
def test_files_of_two_runs(stage: MakeStage, tmp_path: Path, file: str, message: str) -> None:
    s = stage(external=True)
    other = shutil.copytree(tmp_path, tmp_path.parent / f"{tmp_path.name} other")
    for name in ("small.engine", "model.safetensors"):
        rewrite(other / name, lambda data: data.__setitem__(-1, data[-1] ^ 1))
    values = json.loads((other / "small.json").read_text())
    values["engine"]["sha256"] = trt.file_digest(other / "small.engine")
    values["weights"]["sha256"] = trt.file_digest(other / "model.safetensors")
    (other / "small.json").write_text(json.dumps(values))
    Engine.open(other / "small.engine").close()  # each by itself is whole
    shutil.copy(other / file, s.path.with_name(file))
    with pytest.raises(InputError, match=message):
        Engine.open(s.path)
    assert s.cuda.leaks() == []


# The manifest.


def test_no_manifest(stage: MakeStage) -> None:
    s = stage()
    s.manifest.unlink()
    refused(s, r"The manifest .*small.json does not exist. Keep it beside the engine")


def test_manifest_of_another_format(stage: MakeStage) -> None:
    s = stage()
    s.change(format_version=7)
    refused(s, r"no manifest of format version 2 \(but of 7\). Compile the engine again")


def test_stale_manifest(stage: MakeStage) -> None:
    """As written before it told the model's config."""
    s = stage()
    values = json.loads(s.manifest.read_text())
    del values["source"]["config"]
    s.manifest.write_text(json.dumps(values))
    refused(s, r"'source.config' is wrong \(Field required\). Compile the engine again")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "fp32"}, r"has no input 'x', fp32 \[1, 32, 64\]|has an input 'x', fp16 \[1, 32, 64\]"),
        (
            {"shape": [1, 32, 65]},
            r"has no input 'x', fp16 \[1, 32, 65\], unlike|has an input 'x', fp16 \[1, 32, 64\], unlike",
        ),
        ({"name": "z"}, "has an input 'x'"),
    ],
)
def test_manifest_that_tells_of_other_inputs(stage: MakeStage, change: dict[str, Any], message: str) -> None:
    """Only the engine itself can tell; it is freed again."""
    s = stage()
    values = json.loads(s.manifest.read_text())
    values["inputs"][0] |= change
    s.manifest.write_text(json.dumps(values))
    with pytest.raises(InputError, match=message):
        Engine.open(s.path)
    assert s.cuda.leaks() == []


def test_unknown_dtype(stage: MakeStage) -> None:
    s = stage()
    values = json.loads(s.manifest.read_text())
    values["inputs"][0]["dtype"] = "fp4"
    s.manifest.write_text(json.dumps(values))
    refused(s, "'x' has the dtype 'fp4', which this version does not know. Update lynx-compile")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"bytes":', '"bytes": 1, "bytes":', "a key is there twice"),
        ('"errors": [\n        0.0', '"errors": [NaN', "NaN is no number"),
        ('"errors": [\n        0.0', '"errors": [-Infinity', "-Infinity is no number"),
        ('"errors": [\n        0.0', '"errors": [1e999', "'sparse.0.errors.0' is wrong"),
        ('"plugin_layers": 2', f'"plugin_layers": {"9" * 5000}', "no JSON"),
        ('"plugin_layers": 2', f'"plugin_layers": {"[" * 90000}', "cut off or no JSON"),
        ('"name": "x"', f'"name": "{"blocks.1.proj.relu"}"', "'blocks.1.proj.relu' is there twice"),
        ('"shape": [', f'"shape": [{2**70}, ', "'inputs.0.shape.0' is wrong"),
        ('"mode": "embedded"', '"mode": "external"', "'weights' is wrong .external weights have a file"),
    ],
)
def test_hostile_manifests(stage: MakeStage, old: str, new: str, message: str) -> None:
    s = stage()
    text = s.manifest.read_text()
    assert old in text
    s.manifest.write_text(text.replace(old, new, 1))
    refused(s, message)


CALL: dict[str, Any] = {
    "class_name": "diffusers:Any",
    "parameters": [
        {"name": "x", "kind": "POSITIONAL_OR_KEYWORD", "default": None},
        {"name": "scale", "kind": "KEYWORD_ONLY", "default": {"constant": 1.0}},
    ],
    "tensors": {"x": "float16"},
    "constants": {"scale": 1.0},
    "padding": [],
    "fixed": [],
    "result": {"tuple": [{"tensor": "blocks.1.proj.relu"}, {"constant": None}]},
}
PARAMETER = {"name": "y", "kind": "POSITIONAL_OR_KEYWORD", "default": None}


def nodes(depth: int) -> dict[str, Any]:
    return {"list": [nodes(depth - 1)]} if depth else {"constant": None}


def test_a_call_in_the_manifest(stage: MakeStage) -> None:
    s = stage()
    s.change(call=CALL)
    with Engine.open(s.path) as engine:
        assert engine.manifest.call is not None
        assert engine.manifest.call.parameters[1].default == {"constant": 1.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tensors": {}}, "'x' is not both an input and a tensor of the call"),
        ({"tensors": {"x": 3}}, "'call.tensors.x' is wrong"),
        ({"constants": {"scale": [1]}}, "'call.constants.scale"),
        ({"padding": [{"tensor": "x", "axis": 3, "mask": "x"}]}, "'x' has no axis 3 to pad"),
        ({"padding": [{"tensor": "x", "axis": 1, "mask": "m"}]}, "'m' is not both an input and a tensor"),
        ({"padding": [{"tensor": "x", "axis": -1, "mask": "x"}]}, "'call.padding.0.axis' is wrong"),
        ({"fixed": [{"tensor": "y", "sha256": "a" * 64, "where": ""}]}, "'y' is fixed, and no tensor"),
        ({"fixed": [{"tensor": "x", "sha256": "abc", "where": ""}]}, "'call.fixed.0.sha256' is wrong"),
        ({"result": {"tensor": "z"}}, "the result 'z' is no output"),
        ({"result": {}}, "a structure has no kind"),
        ({"result": {"tensor": 3}}, "a structure has 'tensor'"),
        ({"result": {"tuple": [3]}}, "a structure is no mapping"),
        ({"result": {"dict": [[1]]}}, "a structure has no pairs"),
        ({"result": {"dict": [[None, {"constant": 1}]]}}, "a structure has no pairs"),
        ({"result": {"dataclass": 3, "fields": []}}, "a structure has 'dataclass', 'fields'"),
        ({"result": {"constant": [1]}}, "a structure has 'constant'"),
        ({"result": nodes(33)}, "a structure is no mapping, or too deep"),
        ({"parameters": [PARAMETER | {"kind": "NONE"}]}, "'NONE' is no kind of parameter"),
        ({"parameters": [PARAMETER | {"name": "a b"}]}, "is not a valid parameter name"),
        ({"parameters": [PARAMETER, PARAMETER]}, "duplicate parameter name"),
        ({"parameters": [PARAMETER | {"default": {"tensor": "x"}}]}, "the default of 'y' is a tensor"),
        ({"parameters": [PARAMETER | {"default": {"what": "x"}}]}, "a structure has 'what'"),
        ({"parameters": [{"name": "x"}]}, "'call.parameters.0.kind' is wrong"),
        ({"more": 1}, "'call.more' is wrong"),
    ],
)
def test_hostile_calls(stage: MakeStage, change: dict[str, Any], message: str) -> None:
    s = stage()
    s.change(call=CALL | change)
    refused(s, message)


def test_an_error_is_never_long(stage: MakeStage) -> None:
    s = stage()
    for values in ({"format_version": ["x" * 99] * 9999}, {"format_version": 2, "y" * 99999: 1}):
        s.manifest.write_text(json.dumps(values))
        with pytest.raises(InputError) as caught:
            Engine.open(s.path)
        assert len(str(caught.value)) < 1000


# The weights.


def test_weights_are_found_and_checked(stage: MakeStage) -> None:
    s = stage(external=True)
    manifest = Manifest.read(s.manifest)
    with open_weights(s.path.parent, manifest) as weights:
        assert weights is not None
        assert {r.tensor for r in weights.ranges} == set(manifest.weights.tensors)


def test_no_weights(stage: MakeStage) -> None:
    s = stage(external=True)
    s.lynx.weights_path.unlink()
    refused(s, r"The weights .*model.safetensors do not exist. Keep them beside the engine")


@pytest.mark.parametrize("size", [0, 7, 8, 100, -1])
def test_truncated_weights(stage: MakeStage, size: int) -> None:
    s = stage(external=True)
    rewrite(s.lynx.weights_path, lambda data: data.__delitem__(slice(size, None)))
    refused(s, r"model.safetensors is cut off or no safetensors file")


def test_swapped_weights(stage: MakeStage, tmp_path: Path) -> None:
    """Those of another engine, of other widths."""
    s = stage(external=True)
    other = stage(external=True, widths=(64, 256, 64))
    wide = other.lynx.weights_path.read_bytes()
    s = stage(external=True)
    s.lynx.weights_path.write_bytes(wide)
    refused(s, r"'blocks.0.proj.weight' is fp16 \[256, \d+\], and the engine takes fp16 \[128, \d+\]")


def test_weights_of_another_model(stage: MakeStage) -> None:
    s = stage(external=True)
    rewrite(
        s.lynx.weights_path,
        lambda data: data.__setitem__(slice(None), data.replace(b"blocks.0", b"blocks.7")),
    )
    refused(s, "holds no tensor 'blocks.0.proj")


def test_flipped_bit_in_the_weights(stage: MakeStage) -> None:
    """The header is right; the digest of what was copied is not. What was loaded is freed."""
    s = stage(external=True)
    rewrite(s.lynx.weights_path, lambda data: data.__setitem__(-1, data[-1] ^ 1))
    with pytest.raises(InputError, match=r"model.safetensors is damaged, or of another engine \(SHA-256\)"):
        Engine.open(s.path)
    assert s.cuda.leaks() == []
    assert s.trt.log[-1] == "destroy runtime"


def header(values: Any, size: int = 8) -> bytes:
    text = values if isinstance(values, bytes) else json.dumps(values).encode()
    return len(text).to_bytes(8, "little") + text + bytes(size)


def f16(start: int, end: int, *shape: int) -> dict[str, Any]:
    return {"dtype": "F16", "shape": list(shape), "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header({"a": f16(0, 4, 2), "b": f16(2, 8, 3)}), "overlaps another tensor or leaves a gap"),
        (header({"a": f16(0, 2, 1), "b": f16(4, 8, 2)}), "overlaps another tensor or leaves a gap"),
        (header({"a": f16(0, 80, 40)}), "its tensors take 80 bytes, and there are 8"),
        (header({"a": f16(8, 0, 4)}), "its entry 'a' is wrong"),
        (header({"a": f16(-8, 0, 4)}), "its entry 'a' is wrong"),
        (header({"a": f16(0, 8, 5)}), "its shape does not fit its bytes"),
        (header({"a": f16(0, 8, 2**30, 2**30)}), "its shape does not fit its bytes"),
        (header({"a": f16(0, 8, 2**62, 2**62)}), "its entry 'a' is wrong"),
        (header({"a": f16(0, 0, 0, 2**31), "b": f16(0, 8, 4)}), "its entry 'a' is wrong"),
        (header({"a": f16(0, 8, 2**64)}), "its entry 'a' is wrong"),
        (header({"a": f16(0, 8, *[1] * 9)}), "its entry 'a' is wrong"),
        (header({"a": f16(0, 8, True, 4)}), "its entry 'a' is wrong"),
        (header({"a": {**f16(0, 8, 4), "more": 1}}), "its entry 'a' is wrong"),
        (header({"a": [0, 8]}), "its entry 'a' is wrong"),
        (header({"__metadata__": {"a": 1}}, 0), "its metadata are no strings"),
        (header([]), "its header is no mapping"),
        (header(b'{"a": NaN}'), "NaN is no number"),
        (header(b'{"a": 1, "a": 2}'), "a key is there twice"),
        (header(b'{"a": ' + b"[" * 100_000), "its header is no JSON"),
        (header(b"\xff\xfe{}"), "its header is no JSON"),
        (header("{}".encode("utf-16")), "its header is no JSON"),
        ((2**64 - 1).to_bytes(8, "little") + b"{}", "it ends within its header"),
        ((LARGEST_HEADER + 1).to_bytes(8, "little") + bytes(LARGEST_HEADER + 9), "its header would take"),
        (b"\x80\x04K\x01.", "it ends within its header"),  # a pickle
    ],
    ids=range(24),
)
def test_hostile_safetensors(stage: MakeStage, content: bytes, message: str) -> None:
    s = stage(external=True)
    s.lynx.weights_path.write_bytes(content)
    refused(s, rf"model.safetensors is cut off or no safetensors file \(.*{message}")


# Fuzzing.


def mutated(data: bytes, rng: random.Random) -> bytes:
    """One to four changes: bytes, pieces, numbers, or structure."""
    for _ in range(rng.randint(1, 4)):
        kind, place = rng.randrange(7), rng.randrange(len(data) + 1)
        if kind == 0:
            data = data[:place] + bytes([rng.randrange(256)]) + data[place + 1 :]
        elif kind == 1:
            data = data[:place]
        elif kind == 2:
            end = min(len(data), place + rng.randrange(40))
            data = data[:place] + data[end:]
        elif kind == 3:
            end = min(len(data), place + rng.randrange(40))
            data = data[:end] + data[place:end] + data[end:]
        elif kind == 4:
            data = data[:place] + rng.choice(HOSTILE) + data[place:]
        else:
            data = _other_number(data, place, rng)
        data = data or b"{"
    return data


def outcome(read: Callable[[], T]) -> T | None:
    """What it reads, or None when it refuses; anything but a LynxError of a readable length is a failure."""
    try:
        return read()
    except LynxError as error:
        message = str(error)
    assert 20 < len(message.encode()) < 2000
    return None


HOSTILE = [
    b"NaN",
    b"-1",
    b"1e999",
    b"9" * 30,
    b"null",
    b"[]",
    b"{}",
    b'"',
    b"\\ud800",
    b"\0",
    b"[" * 3000,
    b"true",
]


def _other_number(data: bytes, place: int, rng: random.Random) -> bytes:
    """The next run of digits replaced: syntax stays whole, so that what lies behind it is reached."""
    start = next((i for i in range(place, len(data)) if data[i : i + 1].isdigit()), len(data))
    end = next((i for i in range(start, len(data)) if not data[i : i + 1].isdigit()), len(data))
    value = rng.choice([0, 1, 7, 255, 2**31, 2**32 + 1, 2**63, 2**64, 10**40, rng.randrange(5000)])
    return data[:start] + str(value).encode() + data[end:]


@pytest.mark.slow  # 4 to 15 s
@pytest.mark.nightly
def test_10000_mutated_manifests(stage: MakeStage, tmp_path: Path) -> None:
    """Each is read, or refused with a LynxError; one that is read is written and read again the same."""
    s = stage(external=True)
    data = json.dumps(json.loads(s.manifest.read_text())).encode()
    rng = random.Random(0)
    path = tmp_path / "mutated.json"
    read = 0
    for _ in range(10_000):
        path.write_bytes(mutated(data, rng))
        manifest = outcome(lambda: Manifest.read(path))
        if manifest is None:
            continue
        read += 1
        assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest
    assert 100 < read < 9000, "both outcomes are reached"


def test_10000_mutated_safetensors_headers(stage: MakeStage, tmp_path: Path) -> None:
    """Each is refused with a LynxError, or all of its tensors lie in the file, none in another, as the safetensors
    library says too.
    """
    s = stage(external=True)
    whole = s.lynx.weights_path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    size = len(whole) - 8 - length
    rng = random.Random(0)
    path = tmp_path / "mutated.safetensors"
    taken = 0
    for turn in range(10_000):
        text = mutated(whole[8 : 8 + length], rng)
        said = (
            len(text) if turn % 8 else rng.choice([len(text) - 1, len(text) + 1, 0, 2**63, 2**64 - 1, size])
        )
        content = said.to_bytes(8, "little") + text + bytes(size)
        file_size = len(content)
        if 8 + said > file_size:
            continue  # never parsed: test_truncated_weights
        ranges = outcome(lambda: parse_header(path, content[: 8 + said], len(content))) or ()  # noqa: B023
        end = 8 + said
        for range_ in ranges:
            assert 8 + said <= range_.start <= range_.end <= file_size
            assert range_.start >= end
            end = range_.end
        if ranges:
            taken += 1
            path.write_bytes(content)
            with safetensors.safe_open(path, "numpy") as library:
                theirs = {name: library.get_slice(name).get_shape() for name in library.keys()}  # noqa: SIM118
            for range_ in ranges:
                assert theirs[range_.tensor.name] == list(range_.tensor.shape)
    assert taken > 100, "whole ones are reached"


def test_what_the_library_refuses_is_refused(stage: MakeStage, tmp_path: Path) -> None:
    """The other direction on hostile headers that are valid JSON: never more lenient than the library."""
    rng = random.Random(1)
    path = tmp_path / "small.safetensors"
    base = {"a": f16(0, 4, 2), "b": f16(4, 8, 1, 2), "__metadata__": {"format": "pt"}}
    refusals = 0
    for _ in range(500):
        values = copy.deepcopy(base)
        entry = values[rng.choice("ab")]
        key = rng.choice(["shape", "data_offsets"])
        entry[key][rng.randrange(len(entry[key]))] = rng.choice([0, 1, 2, 4, 6, 8, 9, 2**63])
        path.write_bytes(content := header(values))
        try:
            with safetensors.safe_open(path, "numpy"):
                continue
        except (SafetensorError, OverflowError):
            refusals += 1
        with pytest.raises(InputError):
            parse_header(path, content[:-8], len(content))
    assert refusals > 100
