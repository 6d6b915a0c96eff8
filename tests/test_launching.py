"""The command line: what it understands, and that everything it does not understand is said in one line."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import jax
import pytest

from vla_jax import launching, workplace
from vla_jax.adapters.layers import layers
from vla_jax.errors import UserError
from vla_jax.training.sharding import MeshConfig, check_batch, make_mesh

ROOT = Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Phase:
    name: str = "first"
    steps: int = 1


@dataclasses.dataclass(frozen=True)
class Inner:
    seeds: tuple[int, ...] = (0,)
    rates: tuple[float, ...] = (1e-3,)
    clip: float | None = 1.0
    schedule: Literal["cosine", "linear"] = "cosine"
    shuffle: bool = True
    phases: tuple[Phase, ...] = (Phase(), Phase("second", 2))
    least: int = 0
    most: int = 5

    def __post_init__(self):
        if self.least > self.most:
            raise UserError(f"least {self.least} is above most {self.most}")
        if min(self.seeds, default=0) < 0:
            raise UserError(f"seed {min(self.seeds)} is negative; allowed: 0 or more")


@dataclasses.dataclass(frozen=True)
class Config:
    preset: Literal["default", "small"] = "default"
    variants: tuple[str, ...] = ()
    quick: bool = False
    title: str = "as ever"
    batch_size: int = 8
    layers: str = "all"
    inner: Inner = dataclasses.field(default_factory=Inner)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)


def _check(config: Config) -> str:
    check_batch(config.batch_size, make_mesh(config.mesh))
    layers(config.layers, 12, "the tower")
    return f"would run {config.title}"


SMALL = Config(preset="small", title="small", inner=Inner(seeds=(7,)))


@pytest.fixture
def experiment(monkeypatch) -> SimpleNamespace:
    """An experiment that remembers what it was run with, found by the name ``toy``."""
    ran: list[tuple[Any, Path]] = []
    module = SimpleNamespace(
        PRESETS={"default": Config(), "small": SMALL},
        check=_check,
        run=lambda config, workdir: ran.append((config, workdir)),
        ran=ran,
    )
    load = launching.load_experiment
    monkeypatch.setattr(launching, "load_experiment", lambda name: module if name == "toy" else load(name))
    return module


@pytest.fixture
def parse(experiment):
    return lambda *arguments: launching.parse_config(experiment, arguments)


def _with(**changes) -> Config:
    return dataclasses.replace(Config(), **changes)


def _inner(**changes) -> Config:
    return _with(inner=dataclasses.replace(Inner(), **changes))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", Config()),
        ("--config.title=b", _with(title="b")),
        ("--config.title b", _with(title="b")),
        ("--config.title=a=b", _with(title="a=b")),
        ("--config.title=", _with(title="")),
        ("--config.inner.seeds=0 1 2", _inner(seeds=(0, 1, 2))),
        ("--config.inner.seeds 0 1 2", _inner(seeds=(0, 1, 2))),
        ("--config.inner.seeds=0,1,2", _inner(seeds=(0, 1, 2))),
        ("--config.inner.rates=1e-4,2", _inner(rates=(1e-4, 2.0))),
        ("--config.variants=linear,full --config.title=b", _with(variants=("linear", "full"), title="b")),
        ("--config.variants=", Config()),
        ("--config.quick", _with(quick=True)),
        ("--config.quick=true", _with(quick=True)),
        ("--config.inner.no_shuffle", _inner(shuffle=False)),
        ("--config.inner.shuffle=False", _inner(shuffle=False)),
        ("--config.inner.clip=none", _inner(clip=None)),
        ("--config.inner.clip=0.5", _inner(clip=0.5)),
        ("--config.mesh.data=-1 --config.mesh.fsdp 2", _with(mesh=MeshConfig(fsdp=2))),
        ("--config.inner.phases.1.steps=5", _inner(phases=(Phase(), Phase("second", 5)))),
        ("--config.seeds=0,1 --config.no_shuffle", _inner(seeds=(0, 1), shuffle=False)),
        ("--config.fsdp=2", _with(mesh=MeshConfig(fsdp=2))),
        ("--config.preset=small", SMALL),
        ("--config.title=b --config.preset small", dataclasses.replace(SMALL, title="b")),
        ("--config.title=b --config.title=c", _with(title="c")),
    ],
)
def test_values_become_the_configuration(parse, arguments, expected):
    assert parse(*arguments.split()) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--config.inner.seds=1", r"unknown argument --config\.inner\.seds; did you mean --config\.inner\.seeds"),
        ("--confg.title=b", r"unknown argument --confg\.title; did you mean --config\.title"),
        ("--workdr=b", r"unknown argument --workdr; did you mean --workdir"),
        ("--zzz", "unknown argument --zzz; --help lists every field"),
        ("--config.steps=5", r"did you mean --config\.inner\.phases\.0\.steps or --config\.inner\.phases\.1\.steps"),
        ("--config.phases.seeds=5", r"unknown argument --config\.phases\.seeds; did you mean --config\.inner\.seeds"),
        ("--config.inner=b", r"unknown argument --config\.inner; did you mean --config\.inner\.\w+"),
        ("--config.inner.phases.2.steps=5", r"did you mean --config\.inner\.phases\.1\.steps"),
        ("--config.preset=smal", "unknown preset 'smal'; did you mean 'small'"),
        ("--config.batch_size=1.5", r"--config\.batch_size cannot be '1\.5'; allowed: int$"),
        ("--config.batch_size", r"--config\.batch_size cannot be without a value; allowed: int$"),
        ("--config.title=a b", r"--config\.title cannot be 'a b'; allowed: str$"),
        ("--config.quick=perhaps", r"--config\.quick cannot be 'perhaps'; allowed: true, false$"),
        ("--config.inner.seeds=0,x", r"cannot be '0,x'; allowed: any number of int, separated by commas$"),
        ("--config.inner.clip=low", r"cannot be 'low'; allowed: float or none$"),
        ("--config.inner.schedule=lin", r"cannot be 'lin'; allowed: cosine, linear$"),
        ("--config.inner.seeds=1 --config.batch_size=x", r"^--config\.batch_size cannot be 'x'"),
        # Fitting its type, a value that misses another flag's is not to blame.
        ("--config.least=7 --config.most=9 --config.schedule=lin", r"^--config\.inner\.schedule cannot be 'lin'"),
        ("smoke", r"'smoke' belongs to no argument; write --config\.FIELD=smoke"),
        # What a configuration says against its values is handed on as it is.
        ("--config.inner.seeds=-1", "^seed -1 is negative; allowed: 0 or more$"),
        ("--config.least=7", "^least 7 is above most 5$"),
        ("--config.mesh.data=0", "^mesh axis 'data' is 0"),
    ],
)
def test_what_cannot_be_used_is_named_with_what_can(parse, capfd, arguments, message):
    with pytest.raises(UserError, match=message) as refused:
        parse(*arguments.split())
    assert "\n" not in str(refused.value)
    assert capfd.readouterr() == ("", "")


def test_an_experiment_is_checked_recorded_and_run(experiment, tmp_path):
    cache = jax.config.jax_compilation_cache_dir
    try:
        launching.main(["--experiment", "toy", f"--workdir={tmp_path / 'a' / 'b'}", "--config.inner.seeds=0", "1"])
    finally:
        jax.config.update("jax_compilation_cache_dir", cache)
    config = _inner(seeds=(0, 1))
    assert experiment.ran == [(config, tmp_path / "a" / "b")]
    recorded = json.loads((tmp_path / "a" / "b" / "config.json").read_text())
    assert recorded == json.loads(json.dumps(dataclasses.asdict(config)))


def test_the_folder_is_named_after_experiment_and_preset(experiment, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(workplace, "prepared", lambda *_: contextlib.nullcontext())
    launching.main(["--experiment=toy", "--config.preset=small"])
    assert experiment.ran == [(SMALL, Path("runs/toy-small"))]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.mesh.tensor=3", "does not fit 8 devices"),
        ("--config.batch_size=12", "batch size 12 cannot be cut into 8 equal parts.*: 8 and 16"),
        ("--config.layers=9,14", "14"),
    ],
)
def test_what_the_experiment_refuses_is_not_run_and_leaves_no_folder(experiment, tmp_path, argument, message):
    if jax.device_count() != 8:
        pytest.skip("needs 8 devices")
    with pytest.raises(UserError, match=message):
        launching.main(["--experiment=toy", f"--workdir={tmp_path / 'new'}", argument])
    assert not experiment.ran
    assert not (tmp_path / "new").exists()


def test_a_dry_run_prints_and_runs_nothing(experiment, tmp_path, capsys):
    launching.main(["--experiment=toy", f"--workdir={tmp_path / 'new'}", "--dry_run", "--config.title=b"])
    assert capsys.readouterr().out.strip() == "would run b"
    assert not experiment.ran
    assert not (tmp_path / "new").exists()


def test_help_lists_every_field_and_ends_well(experiment, capfd):
    with pytest.raises(SystemExit) as ended:
        launching.main(["--experiment=toy", "--config.preset=small", "--help"])
    assert ended.value.code == 0
    printed = re.sub(r"\x1b\[[\d;]*m", "", capfd.readouterr().out)
    for flag in ("--config.variants", "--config.inner.seeds", "--config.inner.phases.1.steps", "--config.mesh.fsdp"):
        assert flag in printed
    assert not experiment.ran
    launching.main(["--help"])
    assert "--experiment=NAME" in capfd.readouterr().out


def test_the_list_names_every_experiment_with_what_it_asks(capsys):
    launching.main(["--list"])
    printed = capsys.readouterr().out
    for module in (ROOT / "experiments").glob("[!_]*.py"):
        first = module.read_text(encoding="utf-8").split('"""')[1].splitlines()[0]
        assert module.stem in printed
        assert first.split()[0] in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no experiment given; --experiment=NAME with one of .*fusion_ablation"),
        (["--experiment=fusion_ablatoin"], "unknown experiment 'fusion_ablatoin'; did you mean 'fusion_ablation'"),
        (["--experiment=os.path"], "unknown experiment 'os.path'"),
        (["--experiment"], "--experiment: expected one argument; --help"),
    ],
)
def test_an_experiment_that_is_not_there_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        launching.main(arguments)


@pytest.mark.parametrize(("stop", "status"), [(KeyboardInterrupt(), 130), (SystemExit(143), 143)])
def test_a_stopped_run_says_how_to_go_on(experiment, tmp_path, monkeypatch, capsys, stop, status):
    def run(config, workdir):
        raise stop

    monkeypatch.setattr(workplace, "prepared", lambda *_: contextlib.nullcontext())
    experiment.run = run
    with pytest.raises(SystemExit) as ended:
        launching.main(["--experiment=toy", f"--workdir={tmp_path}"])
    assert ended.value.code == status
    assert capsys.readouterr().err == (f"stopped; the same command goes on with what is unfinished in {tmp_path}\n")


@pytest.fixture
def cache_as_before():
    before = jax.config.jax_compilation_cache_dir
    yield
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.usefixtures("cache_as_before")
def test_sigterm_where_nothing_is_trained_ends_with_0(experiment, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    experiment.run = lambda config, workdir: signal.raise_signal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        launching.main(["--experiment=toy", f"--workdir={tmp_path}"])
    assert ended.value.code == 0
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.usefixtures("cache_as_before")
def test_a_work_directory_in_use_is_refused_and_free_afterwards(experiment, tmp_path):
    command = ["--experiment=toy", f"--workdir={tmp_path}"]
    experiment.run = lambda config, workdir: launching.main([*command, "--config.title=b"])
    with pytest.raises(
        UserError, match=r"another run is using the work directory .*process \d+ on .*choose another --wo"
    ):
        launching.main(command)
    assert json.loads((tmp_path / "config.json").read_text())["title"] == "as ever"
    experiment.run = lambda config, workdir: None
    launching.main(command)
    assert not (tmp_path / "running.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--process_id=1"], "go with --distributed; add it, or leave them"),
        (["--distributed", "--process_id=1"], "--process_id given without --coordinator and --num_processes; give all"),
        (["--distributed", "--coordinator=a:1", "--num_processes=2", "--process_id=2"], "allowed: 0 to 1"),
        (["--distributed", "--coordinator=a", "--num_processes=2", "--process_id=1"], "an address with a port"),
        (["--distributed", "--num_processes=two"], "--num_processes: invalid int value: 'two'"),
    ],
)
def test_several_processes_need_all_that_tells_them_apart(experiment, arguments, message):
    with pytest.raises(UserError, match=message):
        launching.main(["--experiment=toy", *arguments])
    assert not experiment.ran


def test_a_folder_that_cannot_be_made_is_refused(experiment, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be made.*choose another with --workdir"):
        launching.main(["--experiment=toy", f"--workdir={tmp_path / 'file' / 'b'}"])


def test_launch_py_says_a_mistake_in_one_line_and_exits_with_two(tmp_path):
    # From another folder, as `python path/to/launch.py`.
    command = [sys.executable, str(ROOT / "launch.py"), "--experiment=fusion_ablatoin"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(r"error: unknown experiment 'fusion_ablatoin'; did you mean .*\n", done.stderr)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.ranks=3", r"unknown argument --config\.ranks; did you mean --config\.rank .*"),
        ("--config.rank=three", r".*--config\.rank.*three.*"),
        ("--config.mesh.tensor=3", r".*does not fit 8 devices.*"),
        ("--config.budget.batch_size=12", r"batch size 12 cannot be cut into 8 equal parts.*: 8 and 16.*"),
        ("--config.layers=4", r"layer 4 does not exist: .* has 3 layers, 0 to 2 .*"),
    ],
)
def test_no_mistake_in_an_experiments_settings_is_compiled(tmp_path, argument, message):
    command = [sys.executable, str(ROOT / "launch.py"), "--experiment=fusion_ablation", argument]
    cache = tmp_path / "compiled"
    settings = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_COMPILATION_CACHE_DIR": str(cache),  # where every program would leave a file, however small
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | settings, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(f"error: {message}\n", done.stderr.splitlines(keepends=True)[-1]), done.stderr
    # Shapes are learnt by drawing keys, which JAX compiles; of the model there is nothing.
    assert {file.name.split("-")[0] for file in cache.glob("*")} <= {"jit__threefry_seed", "jit_stage"}
    assert not (tmp_path / "runs").exists()


def test_tables_are_not_squeezed_into_a_log(tmp_path):
    command = [sys.executable, str(ROOT / "launch.py"), "--experiment=fusion_ablation", "--dry_run"]
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert "…" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) > 80
