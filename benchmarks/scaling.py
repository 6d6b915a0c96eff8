"""What does training send between devices, and hold on each, from 1 to 256 of them?

Every training step is compiled ahead of time for virtual devices of a CPU, with shapes alone: nothing is allocated and
nothing runs. What crosses between devices is counted in the compiled program, memory is the compiler's account. The
global batch stays what it is while devices are added, which is where data parallelism ends: with fewer examples on each
device the work shrinks and the traffic does not.

    python benchmarks/scaling.py --write_readme
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.progress import Progress

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]  # run as a script, from a checkout

from benchmarks.measuring import alone  # noqa: E402
from benchmarks.report import Record, append_record, command_line, started  # noqa: E402
from benchmarks.scaling_report import DOCUMENT, section, show  # noqa: E402
from vla_jax.errors import UserError  # noqa: E402

OUTPUT = Path(__file__).with_name("scaling.jsonl")

Method = Literal["lora", "full"]
Remat = Literal["none", "dots", "full"]
Way = Literal["data", "fsdp"]


@dataclass(frozen=True)
class Options:
    """What is compiled.

    Attributes:
        model: shape by preset name, or ``decoder_7b`` (``scaling_steps.py``), whose examples are texts of 512 tokens.
        methods: LoRA of rank 16 on queries and values of both towers, or full fine-tuning.
        ways: weights on every device (``data``), or cut over all of them (``fsdp``).
        devices: numbers of devices.
        batch: examples of a step on all devices together.
        remat: what the backward pass recomputes.
        output: file that the measurements are appended to, a JSON object a line.
        write_readme: whether to fill the results into the document.
    """

    model: str = "vit_b_32"
    methods: tuple[Method, ...] = ("lora", "full")
    ways: tuple[Way, ...] = ("data", "fsdp")
    devices: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    batch: int = 4096
    remat: Remat = "dots"
    output: Path = OUTPUT
    write_readme: bool = False

    def __post_init__(self):
        for count in self.devices:
            if count < 1 or self.batch % count:
                raise UserError(f"a batch of {self.batch} cannot be cut over {count} devices; choose a divisor of it")


def measure_case(options: Options, method: Method, way: Way, devices: int) -> dict[str, Any]:
    """What one step sends and holds.

    ``collectives``, bytes by kind; ``argument_bytes`` and ``temporary_bytes`` by the compiler's account, and with
    ``remat=full`` ``arithmetic_bytes`` by the document's terms.
    """
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    import jax.numpy as jnp

    from benchmarks.scaling_steps import work
    from vla_jax.training.hlo import collective_bytes
    from vla_jax.training.optimizer import OptimizerConfig, make_optimizer
    from vla_jax.training.presets import preset
    from vla_jax.training.sharding import MeshConfig, make_mesh
    from vla_jax.training.step import TrainState, make_train_step, step_shardings
    from vla_jax.training.table import ParameterTable

    given = work(options.model, method, options.batch, options.remat)
    mesh = make_mesh(MeshConfig() if way == "data" else MeshConfig(data=1, fsdp=devices))
    table = ParameterTable(preset("adapters" if method == "lora" else "full")).resolve(given.shapes)
    trainable, frozen = table.split(given.shapes)
    optimizer = make_optimizer(OptimizerConfig(1e-4, "constant"), table, trainable, 100)
    shardings = step_shardings(table, trainable, optimizer, mesh)
    step = make_train_step(given.loss, optimizer, seed=0, shardings=shardings)

    def placed(shapes: Any, places: Any) -> Any:
        return jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), shapes, places)

    state = TrainState(jax.ShapeDtypeStruct((), jnp.int32), trainable, jax.eval_shape(optimizer.init, trainable))
    lowered = step.lower(
        placed(state, shardings.state),
        placed(frozen, shardings.frozen),
        placed(given.batch, dict.fromkeys(given.batch, shardings.batch)),
    )
    # What is sent does not depend on how good the machine code is, and making good code takes most of the time.
    program = lowered.compile({"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True})
    memory = program.memory_analysis()
    parts = devices if way == "fsdp" else 1
    # float32, with gradient and two moments where it is trained; adapters stay whole
    weights = 4 * (table.total - table.trained) / parts + 16 * table.trained / (parts if method == "full" else 1)
    return {
        "collectives": collective_bytes(program),
        "argument_bytes": int(memory.argument_size_in_bytes),
        "temporary_bytes": int(memory.temp_size_in_bytes),
        "arithmetic_bytes": int(weights + given.kept * options.batch / devices) if options.remat == "full" else None,
        "trained": table.trained,
        "parameters": table.total,
        "flop": given.flop,
        "versions": {"jax": jax.__version__},
    }


def measure(options: Options) -> list[Record]:
    """Compiles every case, appends its record to ``options.output`` and returns them."""
    run, records = started("scaling") | {"model": options.model, "batch": options.batch, "remat": options.remat}, []
    cases = [(method, way, n) for method in options.methods for way in options.ways for n in options.devices]
    with Progress() as progress:
        task = progress.add_task("", total=len(cases))
        for method, way, devices in cases:
            progress.update(task, description=f"{method}, {way}, {devices} devices")
            case = {"method": method, "way": way, "devices": devices}
            records.append(run | case | alone(measure_case, options, method, way, devices))
            append_record(options.output, records[-1])
            progress.advance(task)
    return records


if __name__ == "__main__":
    command_line("scaling", Options, __doc__, measure, show, section, DOCUMENT)
