"""Disks that are full, folders that cannot be written, files that were altered, numbers that are not finite."""

from __future__ import annotations

import contextlib
import json
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from etils import epath
from processes import Run

from vla_jax.training import checksums
from vla_jax.training.checkpoint_folder import steps as saved_steps

pytestmark = pytest.mark.slow

STEPS = 100
LONG = (f"--config.steps={STEPS}", "--config.every=10", "--config.width=4000")
BEARS = "--config.tolerance.unsaved"


def saved(run: Run) -> list[int]:
    return saved_steps(epath.Path(run.workdir / "checkpoints"))


@contextlib.contextmanager
def full_disk(run: Run) -> Iterator[None]:
    """A file system without room: what is left of a small one is filled up."""
    ballast = run.workdir / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    yield
    ballast.unlink()


@contextlib.contextmanager
def no_large_files(run: Run) -> Iterator[None]:
    """No file of the process may grow beyond 64 KiB: what a quota says, and too little for a checkpoint's arrays."""
    _, hard = resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE, (2**16, hard))
    yield
    if run.process.is_alive():
        resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE, (hard, hard))


@contextlib.contextmanager
def unwritable(run: Run) -> Iterator[None]:
    folder = run.workdir / "checkpoints"
    folder.chmod(0o555)
    yield
    folder.chmod(0o755)


HINDRANCES = {
    "full disk": (full_disk, "No space left"),
    "quota": (no_large_files, "File too large"),
    "unwritable": (unwritable, "Permission denied"),
}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 24 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", folder], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("a file system may not be mounted here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture
def workdir(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    folder = request.getfixturevalue("small_disk") if request.param == "full disk" else tmp_path
    return folder / "run"


@pytest.mark.parametrize("bears", [False, True])
@pytest.mark.parametrize(("workdir", "kind"), [(kind, kind) for kind in HINDRANCES], indirect=["workdir"])
def test_what_cannot_be_saved_is_said_and_the_last_good_checkpoint_stays(workdir: Path, kind: str, bears: bool) -> None:
    hinder, reason = HINDRANCES[kind]
    # A run that does not bear it logs nothing on the way, so that it is the save that fails.
    own = [BEARS] if bears else ["--config.log_every=1000"]
    run = Run(workdir, *LONG, "--config.seconds=0.02", *own, unprivileged=True)
    run.until(lambda: len(saved(run)) >= 1)
    with hinder(run):
        if bears:
            run.until(lambda: "tries again when the next one is due" in run.said)
        else:
            assert run.end() == 2, run.said
        newest = saved(run)[-1]
        assert checksums.problem(epath.Path(workdir / "checkpoints" / str(newest))) is None
    said = [line for line in run.said.splitlines() if reason in line and "could not be saved" in line]
    assert said, run.said
    assert f"that of step {newest} is still good" in said[-1]
    if bears:  # there is room again
        run.until(lambda: saved(run)[-1] > newest)
        assert run.end() == 0, run.said
    else:
        assert said[-1].startswith("error: ")
        assert Run(workdir, *LONG).end() == 0
    assert saved(run)[-1] == STEPS


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_offered(tmp_path: Path) -> None:
    assert Run(tmp_path / "run").end() == 0
    checkpoints = tmp_path / "run" / "checkpoints"
    assert saved_steps(epath.Path(checkpoints)) == [8, 12]
    (victim,) = (checkpoints / "12" / "adapters" / "d").iterdir()
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    refused = Run(tmp_path / "run")
    assert refused.end() == 2
    assert f"adapters/d/{victim.name} has another content than when it was saved" in refused.said
    assert (
        f"The checkpoint of step 8 before it is whole: to go on from there, delete {checkpoints / '12'}" in refused.said
    )
    shutil.rmtree(checkpoints / "12")
    first = (tmp_path / "run" / "trained.npz").read_bytes()
    assert Run(tmp_path / "run").end() == 0
    assert (tmp_path / "run" / "trained.npz").read_bytes() == first


def test_steps_that_are_not_finite_are_named_and_end_the_run_when_they_are_too_many(tmp_path: Path) -> None:
    """Forty examples, eight a batch: three broken ones leave some batches of every pass whole."""
    some = Run(tmp_path / "some", "--config.broken=3", "--config.steps=20")
    assert some.end() == 0, some.said
    lines = [json.loads(line) for line in (tmp_path / "some" / "skipped.jsonl").read_text().splitlines()]
    assert len(lines) == 4  # in each of four passes one
    assert all(3 in line["examples"] and len(line["examples"]) == 8 for line in lines)
    all_of_them = f"--config.broken={','.join(map(str, range(0, 40, 2)))}"
    many = Run(tmp_path / "many", all_of_them, "--config.tolerance.skipped_steps=3")
    assert many.end() == 2
    assert "3 steps in a row, 1 to 3, were not applied" in many.said
    assert f"named in {tmp_path / 'many' / 'skipped.jsonl'}" in many.said
