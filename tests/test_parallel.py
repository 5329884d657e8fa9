# SPDX-License-Identifier: Apache-2.0
"""Several processes that compile together: what they find is what one finds, and they end together."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lynx_compile import cli, parallel, pipeline
from lynx_compile.errors import InputError, LynxError, StageError
from lynx_compile.files.outputs import Outputs
from lynx_compile.passes import calibrate
from lynx_compile.passes.compensate import load_weights
from tests.processes import PROCESSES, ended, free_port, run_together, started


@pytest.fixture
def project(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "project"))


@pytest.mark.slow
def test_two_processes_record_measure_and_solve_what_one_does(project: Path, compiled_tiny: Path) -> None:
    """All that they share out; then the others leave, and the first one is stopped here."""

    def work(rank: int, output: str = "two/tiny.engine") -> None:
        _stop_before_export()
        _command("tiny.yaml", "-o", output)

    first, second = run_together(project, work)
    assert "Enough." in first.said and (first.code, second.said, second.code) == (3, "", 0)
    one, two = Outputs.find(compiled_tiny).cache, project / "two" / "tiny.cache"
    for sample in range(3):
        was, found = (
            json.loads((cache / "recording" / "samples" / f"{sample:05}.json").read_text())
            for cache in (one, two)
        )
        assert found["calls"] == was["calls"] and found["signatures"] == was["signatures"]
    files = sorted(path.name for path in (one / "statistics").iterdir())
    assert len(files) == 10 and files == sorted(path.name for path in (two / "statistics").iterdir())
    for name in files:
        was, found = (load_file(cache / "statistics" / name) for cache in (one, two))
        assert found["tokens"] == was["tokens"]
        for part in ("x_mean", "xx"):
            assert (found[part] - was[part]).norm() < 1e-6 * was[part].norm()
    log = (project / "two" / "tiny.log").read_text()
    assert log.count("calibrate: started") == log.count("compensate: started") == 1
    recipe = project / "tiny.yaml"  # and where moments are too large to keep, pass by pass
    recipe.write_text(recipe.read_text().replace("  batch: 2\n", "  batch: 2\n  memory_gib: 0.0003\n"))
    first, second = run_together(project, lambda rank: work(rank, "three/tiny.engine"))
    assert "Enough." in first.said and (first.code, second.said, second.code) == (3, "", 0)
    three, log = project / "three" / "tiny.cache", (project / "three" / "tiny.log").read_text()
    assert "calibrate: started" not in log and not (three / "statistics").exists()
    for path in (one / "weights").iterdir():
        for cache in (two, three):
            was, found = load_weights(path), load_weights(cache / "weights" / path.name)
            # a mask may fall otherwise where two are equal
            assert found.errors == pytest.approx(was.errors, rel=0.02)


def test_an_error_of_any_process_is_said_once_and_ends_all(project: Path) -> None:
    def work(rank: int) -> None:
        replay = calibrate.replay

        def failing(*arguments: object) -> object:
            if rank == 1:
                raise StageError("calibrate", "no.", "Try again.")
            return replay(*arguments)  # type: ignore[arg-type]

        calibrate.replay = failing  # type: ignore[assignment]
        _command("tiny.yaml", "-o", "out/tiny.engine")

    first, second = run_together(project, work)
    assert "error: Stage 'calibrate' failed: no. Try again." in first.said and first.code == 3
    assert (second.said, second.code) == ("", 0)
    log = (project / "out" / "tiny.log").read_text()
    assert "process 1 of 2 failed" in log and "in failing" in log  # with its traceback
    assert sorted(path.name for path in (project / "out").iterdir()) == ["tiny.cache", "tiny.log"]


def test_ctrl_c_ends_all_with_one_sentence(project: Path) -> None:
    """As torchrun passes it on: to every process."""

    def work(rank: int) -> None:
        calibrate.replay = lambda *_: time.sleep(60)
        _command("tiny.yaml", "-o", "out/tiny.engine")

    log = project / "out" / "tiny.log"
    with started(project, work) as processes:
        _wait(lambda: log.exists() and "calibrate: started" in log.read_text())
        for process in processes:
            assert process.pid is not None
            os.kill(process.pid, signal.SIGINT)
        first, second = ended(project, processes)
    assert "interrupted: no output was changed" in first.said and first.code == 130
    assert (second.said, second.code) == ("", -signal.SIGINT)


@pytest.mark.slow
def test_torchrun_starts_them(project: Path) -> None:
    """A recipe that is refused once the pipeline has run: in one sentence, whoever finds it first."""
    (project / "bad.yaml").write_text((project / "tiny.yaml").read_text() + "sparsity: {exclude: ['*']}\n")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(PROCESSES)]
    port = ["--master-port", str(free_port())]
    done = subprocess.run(
        [*torchrun, *port, "-m", "lynx_compile", "bad.yaml", "-o", "out/bad.engine"],
        cwd=project, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode != 0
    assert done.stderr.count("error: No linear would become sparse") == 1, done.stderr
    assert "exitcode  : 2" in done.stderr and "rank      : 0" in done.stderr
    samples = project / "out" / "bad.cache" / "recording" / "samples"
    assert len(list(samples.glob("*.json"))) == 4, "three samples to calibrate on, and one held out"


def test_one_process_is_the_first_and_has_all(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with parallel.joined():
        assert parallel.is_first() and parallel.share(range(5)) == range(5)
        parallel.meet()
        parallel.tell("topic", "nobody hears it")
        with parallel.adding_up() as all_reduce:
            all_reduce(tensor := torch.ones(2))
        assert tensor.tolist() == [1, 1]


def test_what_they_say_and_share(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        with parallel.joined():
            assert parallel.share("abcde") == ("ace" if rank == 0 else "bd")
            with parallel.first_process_first():
                assert (tmp_path / "made").exists() == (rank == 1)
                (tmp_path / "made").touch()
            if rank == 0:
                parallel.tell("x", "1")
                with parallel.alone():
                    assert parallel.share("abc") == "abc"
                    parallel.meet()  # nobody else is to come
                    parallel.tell("x", "not for the others")
                parallel.tell("x", "2")
            else:
                assert [parallel.hear("x"), parallel.hear("x")] == ["1", "2"]
            for _ in range(2):  # one group after the other
                with parallel.adding_up() as all_reduce:
                    all_reduce(tensor := torch.full((3,), 1.0 + rank))
                assert tensor.tolist() == [3, 3, 3]
            if rank == 1:
                raise InputError("Wrong.", "Correct it.")
            with pytest.raises(LynxError, match="Wrong. Correct it.") as caught:
                parallel.meet()
            assert caught.value.exit_code == 2
        assert parallel.is_first()

    first, second = run_together(tmp_path, work)
    assert (first.said, first.code) == ("", 0) and "Wrong." in second.said


def _command(*arguments: str) -> None:
    sys.argv = ["lynx-compile", *arguments]
    cli.main()


def _stop_before_export() -> None:
    def stop(*_: object) -> None:
        raise LynxError("Enough.", "")

    pipeline._dense = stop  # type: ignore[assignment]


def _wait(until: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not until():
        assert time.monotonic() < end
        time.sleep(0.02)
