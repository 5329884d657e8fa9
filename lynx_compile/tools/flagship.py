# SPDX-License-Identifier: Apache-2.0
"""``python -m lynx_compile.tools.flagship FOLDER``: compile a transformer of full size, and see what it takes.

Writes the model's public configuration with random weights, shard by shard, and a recording of random calls of it, so
that nothing has to be downloaded; runs ``lynx-compile`` on them as a process of its own; and prints, per stage of the
compilation, the minutes and the most anonymous memory (what no file backs: it cannot be dropped when memory runs
short), sampled from outside. The pictures would be noise: what is measured is the compiler.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache, partial, wraps
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import DiffusionPipeline

import lynx_compile
from lynx_compile.errors import InputError, LynxError
from lynx_compile.files.atomic import save_text
from lynx_compile.files.progress import no_progress
from lynx_compile.files.tensors import TensorSpec, write_tensors
from lynx_compile.models.capture import capture
from lynx_compile.models.checkpoint import open_checkpoint
from lynx_compile.models.recording import Recording
from lynx_compile.models.weightless import Weightless
from lynx_compile.recipe import load_recipe
from lynx_compile.tools.full_size import FullSize, find, step
from lynx_compile.tools.summary import add
from lynx_compile.tools.timing import file_name

SHARD_BYTES = 5 << 30
STEPS, WARM_UP = 10, 2  # that are timed, and before
POOL = 2**24 + 43
STAGES = "stages.json"  # of runs that were stopped, in the folder
EVERY_S = 0.1  # memory is looked at
BEFORE = "open"  # what the compiler does before its first stage: it digests the weights
EXPECTED = re.compile(
    r"expected: (?P<stage>\w+) +(?P<host>[\d.]+) GiB of memory(, +(?P<gpu>[\d.]+) GiB on the GPU)?"
)
STAGE = re.compile(r"INFO [\w.]+: (?P<stage>\w+): (?P<what>started|[\d.]+ s)$")


@dataclass
class Stage:
    """What a stage took: wall time, processors' time, and the most memory of the process and of the GPU meanwhile.

    ``expected`` and ``expected_gpu``: anonymous memory and the GPU's, as the compiler had said before; None of what it
    says nothing of.
    """

    name: str
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    anonymous: int = 0
    resident: int = 0
    gpu: int = 0
    expected: int | None = None
    expected_gpu: int | None = None


def write_model(model: FullSize, folder: Path) -> int:
    """A checkpoint as diffusers lays it out, of random bf16 weights, one shard after the other; returns its bytes."""
    skeleton = _skeleton(model)
    config = _config(model, skeleton)
    shards: list[list[tuple[str, torch.Size]]] = [[]]
    used = total = 0
    for name, tensor in skeleton.state_dict().items():
        size = 2 * tensor.numel()
        if shards[-1] and used + size > SHARD_BYTES:
            shards.append([])
            used = 0
        shards[-1].append((name, tensor.shape))
        used += size
        total += size
    folder.mkdir(parents=True, exist_ok=True)
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        path = folder / f"diffusion_pytorch_model-{number:05}-of-{len(shards):05}.safetensors"
        specs = [
            TensorSpec(name, torch.bfloat16, tuple(shape), partial(_random, name, shape))
            for name, shape in shard
        ]
        write_tensors(path, specs)
        index |= {name: path.name for name, _ in shard}
    save_text(
        folder / "diffusion_pytorch_model.safetensors.index.json",
        json.dumps({"metadata": {"total_size": total}, "weight_map": index}),
    )
    save_text(folder / "config.json", json.dumps(config))
    return total


def _config(model: FullSize, skeleton: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(dict(skeleton.config), default=str))
    return {"_class_name": model.class_name} | found


def _require_same(model: FullSize, folder: Path) -> None:
    """What an earlier run has written into ``folder`` is this model.

    Raises:
        InputError: it is another one.
    """
    there, wanted = (
        {key: value for key, value in config.items() if key == "_class_name" or not key.startswith("_")}
        for config in (json.loads((folder / "config.json").read_text()), _config(model, _skeleton(model)))
    )
    if there != wanted:
        raise InputError(
            f"{folder} holds the weights of another model, or of another --config.",
            "Give another folder, or delete that one.",
        )


def write_recording(model: FullSize, folder: Path, calls: int) -> Recording:
    """Random calls of a step's shapes, recorded from a module without weights."""

    class RandomCalls(DiffusionPipeline):
        transformer: Any

        def __init__(self, transformer: Any) -> None:
            super().__init__()
            self.register_modules(transformer=transformer)  # type: ignore[attr-defined]

        def __call__(self, seed: int) -> None:
            arguments = step(model, "cpu", seed)
            with Weightless(arguments):
                self.transformer(**arguments, return_dict=False)

    rows = [{"seed": number + 1} for number in range(calls)]
    skeleton = _skeleton(model)
    skeleton.forward = _once(skeleton.forward)
    return capture(RandomCalls(skeleton), rows, folder, components=("transformer",), progress=no_progress)


def _once(forward: Callable[..., Any]) -> Callable[..., Any]:
    """What the first call returned for every call: the shapes are the same, and a run without weights takes seconds."""
    found: list[Any] = []

    @wraps(forward)
    def first(*args: Any, **kwargs: Any) -> Any:
        if not found:
            found.append(forward(*args, **kwargs))
        return found[0]

    return first


def write_recipe(folder: Path, sections: Mapping[str, Any]) -> Path:
    """A recipe for ``folder``'s model and recording, with other sections, or ``budget: false``."""
    recipe: dict[str, Any] = {
        "model": {"source": "model", "dtype": "bf16"},
        "calibration": {"recording": "recording"},
    }
    for name, section in sections.items():
        recipe[name] = {**recipe.get(name, {}), **section} if isinstance(section, Mapping) else section
    path = folder / "recipe.yaml"
    save_text(path, yaml.safe_dump(recipe, sort_keys=False))
    return path


def run(
    recipe: Path, output: Path, limit_s: float | None, begun: Callable[[list[Stage]], None]
) -> tuple[int, list[Stage]]:
    """Compile in a process of its own and watch it; returns its exit status and its stages.

    Args:
        limit_s: it is killed then, as a machine may be; what it has done stays in the cache.
        begun: gets the stages that are done and the one that begins.
    """
    program = "from lynx_compile.cli import main; main()"
    command = [sys.executable, "-c", program, str(recipe), "-o", str(output)]
    output.with_suffix(".log").unlink(missing_ok=True)
    stages = [Stage(BEFORE)]
    taken = _gpu_used()  # by this process and others
    start, spent = time.monotonic(), 0.0
    with subprocess.Popen(command) as process:
        for found in _stages_of(output.with_suffix(".log")):
            if found is not None:
                stages.append(Stage(found))
                begun(stages)
            if process.poll() is not None:
                break
            if limit_s is not None and time.monotonic() - start > limit_s:
                process.kill()
            now = stages[-1]
            anonymous, resident = _memory(process.pid)
            now.anonymous, now.resident = max(now.anonymous, anonymous), max(now.resident, resident)
            now.gpu = max(now.gpu, _gpu_used() - taken)
            spent = max(_cpu_seconds(process.pid), spent)
            now.cpu_seconds = spent - sum(stage.cpu_seconds for stage in stages[:-1])
            time.sleep(EVERY_S)
            elapsed = time.monotonic() - start
            now.seconds += elapsed - sum(stage.seconds for stage in stages)
    log = output.with_suffix(".log")
    said = log.read_text(encoding="utf-8") if log.exists() else ""
    expected = {found["stage"]: found for found in EXPECTED.finditer(said)}
    for stage in stages:
        if said_of := expected.get(stage.name):
            stage.expected, stage.expected_gpu = (_bytes(said_of[where]) for where in ("host", "gpu"))
    return process.returncode, stages


def _bytes(gib: str | None) -> int | None:
    return None if gib is None else int(2**30 * float(gib))


def _stages_of(log: Path) -> Iterator[str | None]:
    """The stage that has begun since the last look, or None; for ever."""
    position = 0
    while True:
        begun = None
        if log.exists():
            with log.open(encoding="utf-8", errors="replace") as file:
                file.seek(position)
                for line in file:
                    if match := STAGE.search(line.rstrip()):
                        begun = match["stage"] if match["what"] == "started" else f"after {match['stage']}"
                position = file.tell()
        yield begun


def _memory(pid: int) -> tuple[int, int]:
    """Anonymous and resident bytes of a process; zero once it has gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0, 0
    sizes = {key: value for key, _, value in (line.partition(":") for line in lines)}
    return tuple(int(sizes.get(key, "0 kB").split()[0]) * 1024 for key in ("RssAnon", "VmRSS"))  # type: ignore[return-value]


def _cpu_seconds(pid: int) -> float:
    """That all threads of a process have run; zero once it has gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _gpu_used() -> int:
    if not torch.cuda.is_available():
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free


def _skeleton(model: FullSize) -> Any:
    import diffusers  # seconds, and only here

    try:
        with torch.device("meta"):
            return getattr(diffusers, model.class_name)(**model.config).bfloat16().eval()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{model.class_name} cannot be made with this configuration ({error}).", "Correct --config."
        ) from None


def _random(name: str, shape: torch.Size) -> torch.Tensor:
    """Weights that keep the size of what they multiply; norms are 1, and biases small."""
    if len(shape) == 1 and not name.endswith("bias"):
        return torch.ones(shape, dtype=torch.bfloat16)
    spread = math.prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.02
    start, count = zlib.crc32(name.encode()) % POOL, math.prod(shape)
    parts = [_pool()[start : start + count]] + [_pool()] * (count // POOL) + [_pool()[: count % POOL]]
    return torch.cat(parts)[:count].mul_(spread).view(shape)


@cache
def _pool() -> torch.Tensor:
    """Normal numbers, of which each tensor takes its own from another place on: drawing 12 billion takes long."""
    return torch.randn(POOL, generator=torch.Generator().manual_seed(0)).bfloat16()


def step_ms(model: FullSize, folder: Path, output: Path) -> tuple[float, float]:
    """Milliseconds of a step in eager mode, dense and with the compiled linears in it: medians, on the GPU if any."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    module = open_checkpoint(folder / "model", None).load(torch.bfloat16, device)
    arguments = step(model, device)
    dense = _median_ms(lambda: module(**arguments))
    lynx_compile.apply(module, output, restorable=False)
    return dense, _median_ms(lambda: module(**arguments))


def _median_ms(work: Callable[[], object]) -> float:
    found = []
    with torch.no_grad():
        for number in range(STEPS + WARM_UP):
            start = time.perf_counter()
            work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number >= WARM_UP:
                found.append(1000 * (time.perf_counter() - start))
    return statistics.median(found)


def _earlier(folder: Path) -> list[Stage]:
    """The stages of runs that did not come to their end, whatever stopped them."""
    path = folder / STAGES
    return [Stage(**values) for values in json.loads(path.read_text())] if path.exists() else []


def _keep(folder: Path, stages: list[Stage]) -> None:
    save_text(folder / STAGES, json.dumps([asdict(stage) for stage in stages]))


def table(stages: list[Stage]) -> str:
    """Minutes and memory by stage, as Markdown."""
    head = (
        "stage",
        "minutes",
        "CPU minutes",
        "anonymous, GiB",
        "expected",
        "resident, GiB",
        "GPU, GiB",
        "expected",
    )
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for stage in stages:
        times = [f"{seconds / 60:.2f}" for seconds in (stage.seconds, stage.cpu_seconds)]
        sizes = [
            "" if size is None else f"{size / 2**30:.2f}"
            for size in (stage.anonymous, stage.expected, stage.resident, stage.gpu, stage.expected_gpu)
        ]
        if stage.seconds >= 0.5:
            lines.append(f"| {' | '.join([stage.name, *times, *sizes])} |")
    return "\n".join(lines)


def main() -> None:
    """Prepare what is not there yet, compile, and print."""
    parser = argparse.ArgumentParser(prog="python -m lynx_compile.tools.flagship", description=__doc__)
    parser.add_argument("folder", type=Path, help="for weights, recording and outputs; kept for the next run")
    parser.add_argument("--model", default="flux1_dev")
    parser.add_argument("--config", type=_mapping, default={}, help="JSON over the model's configuration")
    parser.add_argument("--recipe", type=_mapping, default={}, help="JSON of the recipe's sections")
    parser.add_argument("--calls", type=int, default=1, help="in the recording")
    parser.add_argument(
        "--limit", type=float, help="seconds after which the compiler is killed, to be resumed"
    )
    parser.add_argument("--step", action="store_true", help="apply the result to the module, and time a step")
    parser.add_argument("--summary", type=Path, help="summary.json to write the result into")
    parser.add_argument("--fresh", action="store_true", help="forget what an earlier run has done")
    arguments = parser.parse_args()
    if arguments.calls < 1:
        parser.error(f"--calls is {arguments.calls}: give at least 1")
    folder: Path = arguments.folder.resolve()
    model = find(arguments.model)
    model = replace(model, config=model.config | arguments.config)
    recipe = write_recipe(folder, arguments.recipe)
    load_recipe(recipe)  # what is wrong with it is said before gigabytes are written
    if (folder / "model" / "config.json").exists():
        _require_same(model, folder / "model")
    else:
        start = time.monotonic()
        size = write_model(model, folder / "model")
        print(f"{size / 1e9:.1f} GB of weights written in {time.monotonic() - start:.0f} s")
    write_recording(model, folder / "recording", arguments.calls)
    if arguments.fresh:
        shutil.rmtree(folder / "out", ignore_errors=True)
        (folder / STAGES).unlink(missing_ok=True)
    earlier = _earlier(folder)
    output = folder / "out" / f"{model.name}.engine"
    status, stages = run(recipe, output, arguments.limit, lambda now: _keep(folder, earlier + now))
    stages = earlier + stages
    if status:
        _keep(folder, stages)
    else:
        (folder / STAGES).unlink(missing_ok=True)
    print(table(stages))
    minutes, peak = sum(s.seconds for s in stages) / 60, max(s.anonymous for s in stages) / 2**30
    gpu = max(s.gpu for s in stages) / 2**30
    cpu = sum(s.cpu_seconds for s in stages) / 60
    print(
        f"{model.name}: {minutes:.1f} minutes ({cpu:.1f} of processors), at most {peak:.2f} GiB anonymous "
        f"and {gpu:.1f} GiB on the GPU"
    )
    if status:
        raise SystemExit(f"the compiler ended with {status}; run this again to go on")
    if arguments.step:
        dense, ours = step_ms(model, folder, output)
        print(f"a step in eager mode: {dense:.1f} ms dense, {ours:.1f} ms compiled, {dense / ours:.2f}x")
    if arguments.summary is not None:
        key = f"compile.{model.name}.{_kind()}"
        found: dict[str, float | str] = {
            f"{key}.minutes": round(minutes, 1),
            f"{key}.cpu_minutes": round(cpu, 1),
            f"{key}.{'peak_host_gib' if gpu else 'peak_anon_gib'}": round(peak, 2),
        }
        if gpu:
            found |= {f"{key}.peak_gpu_gib": round(gpu, 1), f"{key}.device": torch.cuda.get_device_name()}
        add(found, arguments.summary)


def _kind() -> str:
    """Of the machine, in keys: Hopper's cards count as one, for they differ in memory alone."""
    if not torch.cuda.is_available():
        return "cpu"
    if torch.cuda.get_device_capability() == (9, 0):
        return "h100"
    return file_name(torch.cuda.get_device_name()).replace("-", "_")


def _mapping(text: str) -> dict[str, Any]:
    values = json.loads(text)
    if not isinstance(values, dict):
        raise argparse.ArgumentTypeError("it should be a JSON object, such as {}")
    return values


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        main()
    except LynxError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted: run this again to go on", file=sys.stderr)
        sys.exit(130)
