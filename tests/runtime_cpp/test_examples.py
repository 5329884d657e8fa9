# SPDX-License-Identifier: Apache-2.0
"""The C++ examples: on stand-ins for CUDA and TensorRT their pictures are Python's, on a GPU they draw digits."""

from __future__ import annotations

import hashlib
import json
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from calib.digits_flux import sampler, seed
from lynx_compile.engine import trt
from tests.plugins.native import LIBRARY
from tests.runtime_cpp.conftest import ROOT, output, run

BATCH, STEPS = 10, 7
SHAPES = {
    "hidden_states": ("fp16", [BATCH, 64, 4]),
    "encoder_hidden_states": ("fp16", [BATCH, 8, 64]),
    "pooled_projections": ("fp16", [BATCH, 64]),
    "timestep": ("fp32", [BATCH]),
    "img_ids": ("fp32", [64, 3]),
    "txt_ids": ("fp32", [8, 3]),
}
NUMBERS = {"fp32": 0, "fp16": 1}  # nvinfer1::DataType


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    """What the stand-in for TensorRT takes for an engine of digits-flux, with its manifest and plugin library."""
    path = tmp_path / "digits.engine"
    lines = ["fake engine"]
    for name, (dtype, shape) in {**SHAPES, "velocity": SHAPES["hidden_states"]}.items():
        mode = "output" if name == "velocity" else "input"
        lines.append(" ".join(map(str, (mode, name, NUMBERS[dtype], *shape))))
    path.write_text("\n".join(lines) + "\n")
    (tmp_path / "liblynx_plugin.so").write_bytes(b"a library")
    write_manifest(path)
    return path


def write_manifest(path: Path, **backend: str) -> None:
    def tensor(name: str, key: str) -> dict[str, object]:
        return {"name": name, "dtype": SHAPES[key][0], "shape": SHAPES[key][1]}

    plan = path.read_bytes()
    manifest = {
        "format_version": 2,
        "engine": {"file": path.name, "bytes": len(plan), "sha256": hashlib.sha256(plan).hexdigest()},
        "backend": {"name": "tensorrt", "version": "10.14.1.48"} | backend,
        "gpus": ["sm80", "sm89"],
        "plugin": {
            "library": "liblynx_plugin.so",
            "sha256": hashlib.sha256((path.parent / "liblynx_plugin.so").read_bytes()).hexdigest(),
            "embedded": False,
        },
        "inputs": [tensor(name, name) for name in SHAPES],
        "outputs": [tensor("velocity", "hidden_states")],
        "weights": {"mode": "embedded", "file": None, "sha256": None, "tensors": []},
    }
    path.with_suffix(".json").write_text(json.dumps(manifest))


@pytest.fixture
def seed_file(tmp_path: Path) -> Path:
    path = tmp_path / "seed.safetensors"
    save_file(seed.seed_tensors(3, STEPS), path)
    return path


def velocity(**inputs: torch.Tensor) -> torch.Tensor:
    """What plugins/runtime/tests/fake_digits.cpp computes, in the same order, rounded at the same places."""
    half = {name: inputs[name].half().float() for name, (dtype, _) in SHAPES.items() if dtype == "fp16"}
    value = 0.75 * half["hidden_states"]
    value = value - inputs["timestep"][:, None, None]
    value = value + 0.1 * half["pooled_projections"][:, None, :1]
    value = value + 0.05 * half["encoder_hidden_states"][:, :1, :1]
    value = value + 0.01 * inputs["img_ids"][None, :, 2:]
    return (value + inputs["txt_ids"][0, 0]).half().float()


def test_picture_is_the_one_python_draws(
    programs: Path, tmp_path: Path, engine: Path, seed_file: Path
) -> None:
    picture = tmp_path / "cpp.png"
    assert output(programs / "digits_on_fakes", engine, seed_file, picture).strip() == str(picture)
    images = sampler.sample(velocity, torch.arange(10), seed=3, steps=STEPS)
    sampler.contact_sheet(images, 10, tmp_path / "python.png")
    found, due = (np.asarray(Image.open(tmp_path / name)) for name in ("cpp.png", "python.png"))
    assert found.shape == due.shape and due.std() > 10  # a picture of something
    assert np.array_equal(found, due)


def test_png_is_one_by_the_letter(programs: Path, tmp_path: Path, engine: Path, seed_file: Path) -> None:
    picture = tmp_path / "cpp.png"
    output(programs / "digits_on_fakes", engine, seed_file, picture)
    data = picture.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    at, chunks = 8, {}
    while at < len(data):
        length = int.from_bytes(data[at : at + 4])
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        assert int.from_bytes(data[at + 8 + length : at + 12 + length]) == zlib.crc32(kind + body)
        chunks[kind] = body
        at += 12 + length
    assert list(chunks) == [b"IHDR", b"IDAT", b"IEND"]
    rows = zlib.decompress(chunks[b"IDAT"])  # checks Adler-32; more than one stored block
    width, height = (int.from_bytes(chunks[b"IHDR"][i : i + 4]) for i in (0, 4))
    assert len(rows) == height * (width + 1) == 68 * 681
    image = Image.open(picture)
    assert image.mode == "L" and image.tobytes()[:width] == rows[1 : 1 + width]


def test_seed_is_the_samplers_and_the_same_each_time(tmp_path: Path) -> None:
    first = seed.seed_tensors(5, 20)
    assert torch.equal(first["latents"], sampler.noise(5, 10))
    assert first["sigmas"][0] == 1 and first["sigmas"][-1] == 0 and len(first["timesteps"]) == 20
    save_file(first, tmp_path / "a"), save_file(seed.seed_tensors(5, 20), tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert all(tensor.dtype == torch.float32 for tensor in first.values())


def test_wrong_arguments_are_told(programs: Path, tmp_path: Path, engine: Path, seed_file: Path) -> None:
    digits = programs / "digits_on_fakes"
    assert run(digits).returncode == 2
    nothing = run(digits, engine, tmp_path / "none.safetensors", tmp_path / "x.png")
    assert nothing.returncode == 3 and "does not exist" in nothing.stderr
    tensors = load_file(seed_file)
    for change, reason in (
        ({"latents": tensors["latents"][:3].contiguous()}, "numbers for 'hidden_states'"),
        ({"sigmas": tensors["sigmas"][1:].contiguous()}, "Write the seed file again"),
        ({"latents": tensors["latents"].half()}, "of the seed file is fp16"),
    ):
        save_file(tensors | change, seed_file)
        done = run(digits, engine, seed_file, tmp_path / "x.png")
        assert done.returncode == 3 and reason in done.stderr, done.stderr
    save_file({k: v for k, v in tensors.items() if k != "img_ids"}, seed_file)
    assert "has no tensor 'img_ids'" in run(digits, engine, seed_file, tmp_path / "x.png").stderr
    save_file(tensors, seed_file)
    unwritable = run(digits, engine, seed_file, tmp_path / "no folder" / "x.png")
    assert unwritable.returncode == 3 and "could not be written" in unwritable.stderr
    assert not list(tmp_path.rglob("*.png*"))


def test_plain_tensorrt_runs_an_engine(programs: Path, engine: Path) -> None:
    lines = output(
        programs / "plain_tensorrt_on_fakes", engine, engine.parent / "liblynx_plugin.so"
    ).splitlines()
    assert "input hidden_states 10 64 4" in lines and "output velocity 10 64 4" in lines
    assert lines[-1] == "ran"
    assert run(programs / "plain_tensorrt_on_fakes", engine.parent / "none", "x.so").returncode == 3


def test_a_real_engine_on_the_real_tensorrt_up_to_the_gpu(
    programs: Path, tmp_path: Path, engine: Path, seed_file: Path, tiny_engine: Path
) -> None:
    """Manifest, digests, host code and registry pass; then TensorRT for RTX misses its GPU and says so."""
    if trt.gpu():
        pytest.skip("there is a GPU")
    done = run(programs / "digits_on_fake_cuda", tiny_engine, seed_file, tmp_path / "x.png", LIBRARY)
    assert done.returncode == 3
    assert f"TensorRT cannot load {tiny_engine}. TensorRT says: " in done.stderr
    assert "cudaError 35" in done.stderr and done.stderr.count("\n") == 1
    other = tmp_path / "other.so"
    shutil.copy(LIBRARY, other)
    with other.open("ab") as file:
        file.write(b"x")
    done = run(programs / "digits_on_fake_cuda", tiny_engine, seed_file, tmp_path / "x.png", other)
    assert done.returncode == 3 and "was built with a liblynx_plugin.so of SHA-256" in done.stderr


def test_digits_on_a_gpu(programs: Path, tmp_path: Path) -> None:
    engine = ROOT / "engines" / "digits-flux.engine"
    if trt.gpu() is None:
        pytest.skip("no CUDA device was found: the engine was not run")
    if not engine.exists():
        pytest.skip("engines/digits-flux.engine is not there: compile engines/digits-flux.yaml")
    save_file(seed.seed_tensors(0, 20), tmp_path / "seed.safetensors")
    output(programs / "digits", engine, tmp_path / "seed.safetensors", tmp_path / "cpp.png", LIBRARY)
    images = sampler.sample(sampler.dense(sampler.load_model()), torch.arange(10), seed=0, steps=20)
    sampler.contact_sheet(images, 10, tmp_path / "python.png")
    found, due = (np.asarray(Image.open(tmp_path / name), np.float32) for name in ("cpp.png", "python.png"))
    assert np.corrcoef(found.ravel(), due.ravel())[0, 1] > 0.95  # the same digits, by a sparse model in fp16
