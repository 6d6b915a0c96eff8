"""How much memory and time does loading a checkpoint take, whole and cut over devices, beside transformers?

A CLIP of random weights is written once in the hub's format. Each contender loads it in a process of its own; the most
memory that process held above what it held after its imports is set against the bytes of the weights. Virtual devices
of a CPU keep their parts in the host's memory, so that the weights themselves count once in every row.

    pip install -r requirements-dev.txt
    python benchmarks/loading.py --write_readme
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import Progress
from rich.table import Table

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]  # run as a script, from a checkout

from benchmarks.measuring import alone, prepare, timed  # noqa: E402
from benchmarks.report import (  # noqa: E402
    Record,
    Spread,
    append_record,
    command_line,
    machine_line,
    markdown,
    started,
    terminal_table,
)
from vla_jax.errors import UserError  # noqa: E402

OUTPUT = Path(__file__).with_name("loading.jsonl")

DEVICES = 8

MEMORY_TARGET = 1.3  # of the weights' bytes

COLUMNS = (
    "loaded by",
    "weights, GiB",
    "peak above imports, GiB",
    "peak / weights",
    "of it private, / weights",
    "time [quartiles], s",
)


@dataclass(frozen=True)
class Options:
    """What is measured.

    Attributes:
        model: shape by preset name; its weights are written in float32.
        rounds: how often each contender loads it, in turns.
        output: file that the measurements are appended to, a JSON object a line.
        write_readme: whether to fill the results into README.md.
    """

    model: str = "openclip_h_14"
    rounds: int = 3
    output: Path = OUTPUT
    write_readme: bool = False

    def __post_init__(self):
        if self.rounds < 1:
            raise UserError("rounds must be 1 or more")


class Watch:
    """The most memory that this process holds while something runs, looked at every few milliseconds.

    ``ru_maxrss`` would do for the whole, but pages of a mapped file, which the system can take back at any time, count
    in it: they are told apart from what is private.
    """

    def __init__(self):
        self.resident = self.private = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    @staticmethod
    def now() -> tuple[int, int]:
        """Bytes that the process holds: all, and those that no file stands for."""
        fields = Path("/proc/self/statm").read_text(encoding="utf-8").split()
        resident, shared = int(fields[1]), int(fields[2])
        page = os.sysconf("SC_PAGE_SIZE")
        return resident * page, (resident - shared) * page

    def _look(self) -> None:
        while not self._done.wait(0.002):
            resident, private = self.now()
            self.resident, self.private = max(self.resident, resident), max(self.private, private)


def _measured(load: Callable[[], Any], versions: dict[str, str]) -> dict[str, Any]:
    before, private_before = Watch.now()
    with Watch() as watch:
        seconds = timed(load)
    return {
        "seconds": seconds,
        "peak_bytes": watch.resident - before,
        "private_bytes": watch.private - private_before,
        "versions": versions,
    }


def load_whole(folder: str) -> dict[str, Any]:
    """Ours, onto one device."""
    import jax

    from vla_jax.backbones.loading import load_backbone

    jax.block_until_ready(jax.numpy.zeros(1))
    return _measured(lambda: jax.block_until_ready(load_backbone(folder).params), {"jax": jax.__version__})


def load_cut(folder: str) -> dict[str, Any]:
    """Ours, every array cut over virtual devices as the table's rules for ``fsdp`` say."""
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={DEVICES}"
    import jax

    from vla_jax.backbones.convert import abstract_params
    from vla_jax.backbones.loading import load_backbone, load_config
    from vla_jax.names import flatten
    from vla_jax.training.presets import preset
    from vla_jax.training.sharding import MeshConfig, make_mesh
    from vla_jax.training.table import ParameterTable

    mesh = make_mesh(MeshConfig(data=1, fsdp=DEVICES))
    table = ParameterTable(preset("full")).resolve({"backbone": abstract_params(load_config(folder))})
    shardings = flatten(table.shardings(mesh))
    jax.block_until_ready(jax.numpy.zeros(1))
    return _measured(
        lambda: jax.block_until_ready(load_backbone(folder, shardings=shardings.__getitem__).params),
        {"jax": jax.__version__},
    )


def load_peer(folder: str) -> dict[str, Any]:
    """``transformers.CLIPModel``, in the dtype of the file."""
    import torch
    import transformers

    transformers.CLIPModel  # noqa: B018 - its import is lazy and would count as loading
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return _measured(lambda: _touched(transformers.CLIPModel.from_pretrained(folder)), versions)


def _touched(model: Any) -> float:
    """A sum over all weights, so that a mapped file is read, as it is by ours."""
    return sum(parameter.detach().sum().item() for parameter in model.parameters())


CONTENDERS: dict[str, Callable[[str], dict[str, Any]]] = {
    "vla_jax, one device": load_whole,
    f"vla_jax, cut over {DEVICES} devices": load_cut,
    "transformers": load_peer,
}


def measure(options: Options) -> list[Record]:
    """Runs every contender, appends its records to ``options.output`` and returns them."""
    run, records = started("loading") | {"model": options.model}, []
    with tempfile.TemporaryDirectory() as folder, Progress() as progress:
        task = progress.add_task("writing weights", total=options.rounds * len(CONTENDERS))
        prepared = alone(prepare, options.model, folder)
        weights = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        device = {"device": prepared["device"], "device_name": prepared["device_name"], "weights_bytes": weights}
        for round_ in range(options.rounds):
            for name, function in CONTENDERS.items():
                progress.update(task, description=name)
                records.append(run | device | {"contender": name, "round": round_} | alone(function, folder))
                append_record(options.output, records[-1])
                progress.advance(task)
    return records


def rows(records: Sequence[Record]) -> list[list[str]]:
    """One row a contender under :data:`COLUMNS`; the largest peak of its rounds."""
    found = []
    for name in dict.fromkeys(record["contender"] for record in records):
        own = [record for record in records if record["contender"] == name]
        weights = own[0]["weights_bytes"]
        peak, private = (max(record[field] for record in own) for field in ("peak_bytes", "private_bytes"))
        found.append(
            [
                name,
                f"{weights / 2**30:.2f}",
                f"{peak / 2**30:.2f}",
                f"{peak / weights:.2f}",
                f"{private / weights:.2f}",
                Spread.of(record["seconds"] for record in own).text(1),
            ]
        )
    return found


def section(records: Sequence[Record]) -> str:
    """The newest run as a section of the README: how it was made, the table and the target."""
    records = [record for record in records if record["run"] == records[-1]["run"]]
    first = records[0]
    versions = {name: value for record in records for name, value in record["versions"].items()}
    lines = [
        f"Run of {first['run']}, {first['model']}, float32:",
        "",
        f"    {first['command']}",
        "",
        machine_line(first),
        f"- Python {first['machine']['python']}, " + ", ".join(f"{n} {v}" for n, v in sorted(versions.items())),
        "",
        markdown(COLUMNS, rows(records), 1),
        "",
        f"Target, at most {MEMORY_TARGET:g} times the weights' bytes:",
        "",
    ]
    for name in (name for name in CONTENDERS if name.startswith("vla_jax")):
        own = [record for record in records if record["contender"] == name]
        ratio = max(record["peak_bytes"] for record in own) / first["weights_bytes"]
        lines.append(f"- {name}: {'met' if ratio <= MEMORY_TARGET else '**missed**'} ({ratio:.2f}).")
    return "\n".join(lines)


def show(records: Sequence[Record]) -> Table:
    """The table to print."""
    return terminal_table("Loading a checkpoint", COLUMNS, rows(records))


if __name__ == "__main__":
    command_line("loading", Options, __doc__, measure, show, section)
