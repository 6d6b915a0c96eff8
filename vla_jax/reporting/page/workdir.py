"""What a work directory holds: configuration, versions, result tables, figures, and the runs with what they logged."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vla_jax.catalogue import entry
from vla_jax.errors import UserError
from vla_jax.foreign import MOST_JSON_BYTES, parse_json, read_bytes
from vla_jax.model import MODALITIES
from vla_jax.reporting.page.tables import PageTable, read_tables, results_first
from vla_jax.reporting.table import read_rows
from vla_jax.training.metrics import read_records

MOST_LOG_BYTES = 1 << 30
"""Of what a run logged; a step takes some hundred bytes."""

_RUN = re.compile(r"runs/(?:(?P<group>.+)/)?(?P<variant>[^/]+)/learning_rate_(?P<rate>[^/]+)/seed_(?P<seed>\d+)")


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        folder: where it lies.
        group: what it was trained for, the folders between ``runs`` and the variant's, such as ``statements``; may be
            empty.
        variant: the variant's name.
        rate: its learning rate, as its folder says it; empty for runs that are no part of a comparison.
        seed: its seed; 0 where the folder does not say.
        records: what it logged, one mapping a logged step.
        tested: whether it was chosen on validation data and tested.
        settings: what it was run with; empty where that is not written down.
        begun: the folder of the run that trained what this one began with and did not train again; None if there is
            none.
    """

    folder: Path
    group: str
    variant: str
    rate: str
    seed: int
    records: tuple[Mapping[str, Any], ...]
    tested: bool
    settings: Mapping[str, Any]
    begun: Path | None = None

    @property
    def modalities(self) -> tuple[str, ...]:
        """What its model was shown."""
        return tuple(_list(_mapping(self.settings.get("model")).get("modalities")) or MODALITIES)

    @property
    def last_step(self) -> int:
        """The last logged step."""
        return int(self.records[-1]["step"]) if self.records else 0


@dataclass(frozen=True)
class WorkDirectory:
    """What an experiment wrote; pieces that are not there are empty.

    Attributes:
        folder: the work directory.
        config: the resolved configuration.
        versions: what it ran on.
        data: what its data were, where they are a user's own.
        tables: result tables as people read them, ``results`` first.
        titles: by variant's name, what it is called.
        figures: PNG files, ``results`` first.
        runs: every run that logged something, in the order of the result rows.
    """

    folder: Path
    config: Mapping[str, Any]
    versions: Mapping[str, Any]
    data: Mapping[str, Any]
    tables: tuple[PageTable, ...]
    titles: Mapping[str, str]
    figures: tuple[Path, ...]
    runs: tuple[Run, ...]

    @property
    def title(self) -> str:
        """That of the result table, or the folder's name."""
        titles = [table.title for table in self.tables if table.title]
        return titles[0] if titles else self.folder.resolve().name

    @property
    def groups(self) -> tuple[str, ...]:
        """What runs were trained for, in the order of the configuration's tasks, else of the folders."""
        tasks = [str(task) for task in _list(self.config.get("tasks"))]
        found = dict.fromkeys(run.group for run in self.runs)
        return tuple(sorted(found, key=lambda group: tasks.index(group) if group in tasks else len(tasks)))

    def called(self, variant: str) -> str:
        """A variant's title, by the rows or the catalogue; else its name."""
        if variant in self.titles:
            return self.titles[variant]
        try:
            return entry(variant).title
        except UserError:  # an experiment's own
            return variant.replace("_", " ")

    def of_group(self, group: str) -> dict[str, list[Run]]:
        """The runs of a group by variant."""
        found: dict[str, list[Run]] = {}
        for run in self.runs:
            if run.group == group:
                found.setdefault(run.variant, []).append(run)
        return found

    def missing(self) -> list[str]:
        """What a finished experiment would have and this one has not, as sentences."""
        found = []
        for name, there in (("config.json", self.config), ("versions.json", self.versions)):
            if not there:
                found.append(f"{name} is missing.")
        if not self.tables:
            found.append("There is no result table yet.")
        return found + list(self._unfinished())

    def _unfinished(self) -> Iterator[str]:
        seeds = _list(_mapping(self.config.get("budget")).get("seeds")) or [0]
        for group in self.groups:
            for variant, runs in self.of_group(group).items():
                if not any(run.rate for run in runs):
                    continue  # no part of a comparison: nothing says what is still to come
                tested = sum(run.tested for run in runs)
                name = f"{self.called(variant)} ({group})" if group else self.called(variant)
                if not tested:
                    last = max(runs, key=lambda run: run.last_step)
                    of = f" of {last.settings['steps']}" if "steps" in last.settings else ""
                    yield f"{name} has not been tested; it was last seen at step {last.last_step}{of}."
                elif tested < len(seeds):
                    yield f"{name} has been tested with {tested} of {len(seeds)} seeds."


def read_work_directory(folder: str | Path) -> WorkDirectory:
    """Reads a work directory, whole or unfinished.

    Raises:
        UserError: if there is no such folder, it is none that an experiment wrote, or a file in it is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; give the --workdir of an experiment")
    parts = ("config.json", "results.jsonl", "runs")
    if not any((folder / part).exists() for part in parts):
        raise UserError(
            f"{folder} is no work directory: it has none of {', '.join(parts)}; give the --workdir of an experiment"
        )
    titles = {}
    check_size(folder / "results.jsonl")
    for row in read_rows(folder / "results.jsonl"):
        if isinstance(row.get("name"), str):
            titles[row["name"]] = str(row.get("variant", row["name"]))
    order = {name: place for place, name in enumerate(titles)}
    runs = sorted(
        (_run(folder, path) for path in folder.rglob("metrics.jsonl")),
        key=lambda run: (run.group, order.get(run.variant, len(order)), run.variant, _number(run.rate), run.seed),
    )
    return WorkDirectory(
        folder=folder,
        config=_json(folder / "config.json"),
        versions=_json(folder / "versions.json"),
        data=_json(folder / "data.json"),
        tables=tuple(read_tables(folder)),
        titles=titles,
        figures=tuple(sorted(folder.glob("*.png"), key=results_first)),
        runs=tuple(runs),
    )


def flattened(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every setting by its path, such as ``budget.steps``, with its value as text."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from flattened(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            yield f"{prefix}{name}", ", ".join(map(str, value)) or "none"
        else:
            yield f"{prefix}{name}", str(value)


def _run(folder: Path, path: Path) -> Run:
    place = path.parent
    settings = _json(place / "settings.json")
    try:
        check_size(path)
        records = tuple(record for record in read_records(path) if _is_record(record))
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is damaged: {error}; mend or delete it") from error
    relative = place.relative_to(folder).as_posix()
    found = _RUN.fullmatch(relative)
    if found is None:
        group, _, variant = relative.rpartition("/")
        return Run(place, group, variant if variant != "." else "run", "", 0, records, False, settings)
    tested = (place / "test.npz").is_file()
    return Run(
        place, found["group"] or "", found["variant"], found["rate"], int(found["seed"]), records, tested, settings
    )


def _json(path: Path) -> dict[str, Any]:
    """A JSON object; empty if there is no file."""
    if not path.is_file():
        return {}
    try:
        return _mapping(parse_json(read_bytes(path, MOST_JSON_BYTES)))
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}; mend or delete it") from error


def check_size(path: Path) -> None:
    """Refuses a file of lines that is too large to be read as a whole."""
    if path.is_file() and path.stat().st_size > MOST_LOG_BYTES:
        raise UserError(f"{path} has over {MOST_LOG_BYTES:,} bytes; is it what an experiment wrote?")


def _is_record(record: Any) -> bool:
    step = record.get("step") if isinstance(record, Mapping) else None
    return isinstance(step, int | float) and abs(step) < 1 << 53


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else []


def _mapping(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0
