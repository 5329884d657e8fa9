# SPDX-License-Identifier: Apache-2.0
"""Hub ids: a small hub on this machine's loopback, its cache, downloads that show a bar, and being offline."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest
from safetensors.torch import load_file

from lynx_compile.errors import InputError
from lynx_compile.models.checkpoint import open_checkpoint
from lynx_compile.models.source import fetch

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
VARIANT = "transformer/diffusion_pytorch_model.fp16.safetensors"


@pytest.fixture
def repository(tiny: Path, tmp_path: Path) -> dict[str, bytes]:
    """A pipeline's repository as it is often found: two variants, pickles, and all of it in one file as well."""
    model = tiny / "model"
    files = {p.relative_to(model).as_posix(): p.read_bytes() for p in model.rglob("*") if p.is_file()}
    index = {
        "_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"], "image_encoder": [None, None],
    }  # fmt: skip
    weights = files[WEIGHTS]
    return files | {
        "model_index.json": json.dumps(index).encode(),
        VARIANT: weights,
        "transformer/diffusion_pytorch_model.bin": b"pickle",
        "transformer/modeling.py": b"code",
        "flux1-dev.safetensors": weights,
        "README.md": b"text",
    }


@pytest.fixture
def hub(repository: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Serves ``repository`` as nobody/tiny, with an empty cache; the names of the files that were sent."""
    sent: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def _answer(self) -> None:
            path = self.path.split("?")[0]
            if not path.startswith(("/api/models/nobody/tiny", "/nobody/tiny/")):
                self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
            elif path.startswith("/api/"):
                names = [{"rfilename": name} for name in repository]
                tree = [
                    {"type": "file", "path": name, "size": len(data), "oid": sha256(data).hexdigest()}
                    for name, data in repository.items()
                ]
                model = {"id": "nobody/tiny", "sha": COMMIT, "siblings": names}
                self._send(200, json.dumps(tree if "/tree/" in path else model).encode(), {})
            else:
                name = path.split("/", 5)[5]
                if self.command == "GET":  # noted first: the client may be done before this thread goes on
                    sent.append(name)
                self._send(200, repository[name], {"ETag": f'"{sha256(repository[name]).hexdigest()}"'})

        def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in (headers | {"X-Repo-Commit": COMMIT, "Content-Length": str(len(data))}).items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        def log_message(self, *of: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    yield sent
    server.shutdown()
    server.server_close()


def test_a_download_shows_a_bar_and_brings_what_is_needed(
    hub: list[str], repository: dict[str, bytes]
) -> None:
    shown: list[tuple[str, int, int]] = []
    folder = fetch("nobody/tiny", progress=lambda *of: shown.append(of))
    wanted = {"model_index.json", WEIGHTS, "transformer/config.json", "scheduler/scheduler_config.json"}
    assert set(hub) == wanted
    assert {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} == wanted
    assert open_checkpoint(folder, "transformer").tensors.keys() == load_file(folder / WEIGHTS).keys()
    assert {what for what, *_ in shown} == {"MB downloaded"}
    size = sum(len(repository[name]) for name in wanted - {"model_index.json"})  # which says what is needed
    assert 0 <= shown[-1][2] - size // 10**6 <= 1 and shown[-1][1] == shown[-1][2] > 0
    hub.clear()
    assert fetch("nobody/tiny") == folder and hub == []


def test_the_asked_variant_and_components_are_fetched(hub: list[str]) -> None:
    fetch("nobody/tiny", variant="fp16", components=["transformer"])
    assert set(hub) == {"model_index.json", VARIANT, "transformer/config.json"}


def test_the_only_variant_is_fetched(hub: list[str], repository: dict[str, bytes]) -> None:
    del repository[WEIGHTS]
    folder = fetch("nobody/tiny")
    assert open_checkpoint(folder, "transformer").files == (folder / VARIANT,)


def test_the_cache_serves_when_the_hub_does_not(hub: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fetch("nobody/tiny")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert fetch("nobody/tiny") == folder
    (folder / WEIGHTS).resolve().rename(
        folder / "lost"
    )  # as when a download is stopped, or the cache cleaned
    with pytest.raises(InputError, match="is a link to .*which is not there.* Fetch the checkpoint again"):
        open_checkpoint(fetch("nobody/tiny"), "transformer")
    shutil.rmtree(folder)
    with pytest.raises(
        InputError, match="'nobody/tiny' could not be fetched from the hub .HF_HUB_OFFLINE is set"
    ):
        fetch("nobody/tiny")


def test_an_unknown_id(hub: list[str]) -> None:
    with pytest.raises(InputError, match="'nobody/else' could not be fetched from the hub .*Check the id"):
        fetch("nobody/else")
