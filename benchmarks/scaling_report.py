"""Tables, times by published bandwidths, and the picture of what training sends between devices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Table

from benchmarks.report import Record, machine_line, markdown, terminal_table
from vla_jax.reporting.drawing import COLORS, DASHES, DOTS_PER_INCH, MARKERS, SOFT

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "scaling.md"
FIGURE = DOCUMENT.with_name("scaling") / "efficiency.png"

REACHED = 0.4  # share of the peak that products reach in training, to turn FLOP into time
GOOD = 0.8  # share of the time spent on computing from which adding devices counts as worth it


@dataclass(frozen=True)
class Hardware:
    """Published figures of an accelerator.

    Attributes:
        name: of it.
        flops: products' peak, bfloat16, FLOP/s.
        memory: bytes of one device.
        near: bytes/s in one direction between ``neighbours`` devices that are joined directly.
        far: bytes/s a device beyond them.
        neighbours: how many are joined directly.
    """

    name: str
    flops: float
    memory: float
    near: float
    far: float
    neighbours: int

    def compute_seconds(self, record: Record) -> float:
        """A step's products on each device."""
        return record["flop"] / record["devices"] / (REACHED * self.flops)

    def traffic_seconds(self, record: Record) -> float:
        """A step's collectives as rings, one after the other, with nothing computed meanwhile."""
        devices = record["devices"]
        # A ring passes an array of V bytes on in (n - 1) / n V; an all-reduce is a reduce-scatter and an all-gather.
        passes = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1, "all-to-all": 1, "collective-permute": 1}
        sent = sum(passes[kind] * size for kind, size in record["collectives"].items()) * (devices - 1) / devices
        return sent / (self.near if devices <= self.neighbours else self.far)

    def efficiency(self, record: Record) -> float:
        """Share of a step in which devices compute."""
        compute = self.compute_seconds(record)
        return compute / (compute + self.traffic_seconds(record))


# TPU v5e: Google Cloud's documentation, and Austin et al. (2025), How to Scale Your Model, for the bandwidth of a ring
# along one axis of the torus. H100 SXM: NVIDIA's data sheet, NVLink within eight; 400 Gbit/s InfiniBand a GPU beyond.
HARDWARE = (
    Hardware("TPU v5e", 197e12, 16e9, 9e10, 9e10, 256),
    Hardware("H100", 989e12, 80e9, 450e9, 50e9, 8),
)

COLUMNS = (
    "model",
    "trained",
    "weights",
    "devices",
    "examples a device",
    "all-reduce, MB",
    "all-gather, MB",
    "reduce-scatter, MB",
    "held by a device, GiB",
    "by arithmetic, GiB",
    *(f"{hardware.name}, % computing" for hardware in HARDWARE),
)

WAYS = {"data": "on every device", "fsdp": "cut over all"}
METHODS = {"lora": "LoRA", "full": "everything"}


def newest(records: Sequence[Record]) -> list[Record]:
    """Of each model the records of its last run."""
    last = {record["model"]: record["run"] for record in records}
    return [record for record in records if record["run"] == last[record["model"]]]


def rows(records: Sequence[Record]) -> list[list[str]]:
    """One row a case under :data:`COLUMNS`."""
    found = []
    for record in records:
        sent = record["collectives"]
        megabytes = [f"{sent[kind] / 1e6:.1f}" for kind in ("all-reduce", "all-gather", "reduce-scatter")]
        held = [record["argument_bytes"] + record["temporary_bytes"], record.get("arithmetic_bytes")]
        gibibytes = [f"{count / 2**30:.2f}" if count else "" for count in held]
        shares = [f"{100 * hardware.efficiency(record):.0f}" for hardware in HARDWARE]
        names = [record["model"], METHODS[record["method"]], WAYS[record["way"]]]
        counts = [str(record["devices"]), str(record["batch"] // record["devices"])]
        found.append([*names, *counts, *megabytes, *gibibytes, *shares])
    return found


def limits(records: Sequence[Record]) -> list[str]:
    """A Markdown line for each case: from how many devices on they no longer compute most of the time."""
    lines = []
    for model, method, way in dict.fromkeys((r["model"], r["method"], r["way"]) for r in records):
        own = [r for r in records if (r["model"], r["method"], r["way"]) == (model, method, way)]
        told = []
        for hardware in HARDWARE:
            beyond = [r["devices"] for r in own if hardware.efficiency(r) < GOOD]
            told.append(
                f"{hardware.name} {f'from {min(beyond)} devices' if beyond else 'not up to ' + str(own[-1]['devices'])}"
            )
        lines.append(f"- {model}, {METHODS[method]} trained, weights {WAYS[way]}: {'; '.join(told)}.")
    return lines


def draw(records: Sequence[Record], path: Path) -> None:
    """Efficiency against devices, one panel an accelerator, one line a case, of the model with most cases."""
    models = [record["model"] for record in records]
    model = max(dict.fromkeys(models), key=models.count)
    records = [record for record in records if record["model"] == model]
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(HARDWARE), sharey=True)
    for axes, hardware in zip(panels, HARDWARE, strict=True):
        for number, (method, way) in enumerate(dict.fromkeys((r["method"], r["way"]) for r in records)):
            own = [r for r in records if (r["method"], r["way"]) == (method, way)]
            axes.plot(
                [r["devices"] for r in own],
                [100 * hardware.efficiency(r) for r in own],
                color=COLORS[number],
                marker=MARKERS[number],
                linestyle=DASHES[number] if way == "fsdp" else "solid",
                label=f"{METHODS[method]} trained, weights {WAYS[way]}",
            )
        axes.axhline(100 * GOOD, color=SOFT, linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_title(f"{hardware.name}: {model}, {records[0]['batch']:,} examples a step", loc="left", fontsize=11)
        axes.set_xlabel("devices")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("share of a step spent computing, %")
    panels[0].set_ylim(0, 102)
    panels[0].legend(frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DOTS_PER_INCH)


def section(records: Sequence[Record]) -> str:
    """The results section of the document, of each model's newest run; draws the picture beside it."""
    records = newest(records)
    draw(records, FIGURE)
    runs = {record["run"]: record for record in records}
    lines = []
    for run, first in runs.items():
        lines += [f"Run of {run}:", "", f"    {first['command']}", ""]
        lines += [machine_line(first | {"device": "cpu", "device_name": "virtual devices"})]
        lines += [f"- Python {first['machine']['python']}, jax {first['versions']['jax']}", ""]
    lines += [f"![share of a step spent computing]({FIGURE.relative_to(DOCUMENT.parent)})", ""]
    told = f"Of the numbers of devices below, the first where devices compute less than {100 * GOOD:.0f} % of a step:"
    lines += [told, "", *limits(records), ""]
    return "\n".join([*lines, markdown(COLUMNS, rows(records), 3)])


def show(records: Sequence[Record]) -> Table:
    """The table to print."""
    return terminal_table("What crosses between devices", COLUMNS, rows(records), words=3)
