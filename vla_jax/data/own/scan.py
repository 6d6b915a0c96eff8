"""One pass over files of rows: every problem with its line, and where the good rows of each split are."""

from __future__ import annotations

import array
import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vla_jax.data.own import together
from vla_jax.data.own.pictures import Looked, Pictures
from vla_jax.data.own.rows import Flaw, Kind, RowReader
from vla_jax.data.own.settings import SPLITS, OwnData, task_of
from vla_jax.data.own.tables import Parquet, Record, Table, open_table
from vla_jax.errors import UserError

_PICTURES = ("image_id", "image_id_1")
_CHUNK = 256  # rows whose pictures are looked at together
_MOST_CLASSES = 100_000

Progress = Callable[[int], None]
"""Is told how much of the files, in the units of their tables, has been read since it was told last."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """Something that has to be mended.

    Attributes:
        file: the file.
        line: the line, or the row of a Parquet file; None for what no single row is to blame for.
        kind: one of :data:`vla_jax.data.own.rows.Kind`.
        message: what is wrong, and what is allowed.
    """

    file: str
    line: int | None
    kind: Kind
    message: str

    def __str__(self) -> str:
        return f"{self.file}{'' if self.line is None else f':{self.line}'}: {self.kind}: {self.message}"


@dataclasses.dataclass(frozen=True)
class Summary:
    """What was found in all.

    Attributes:
        task: what the rows were read for.
        rows: how many there are, good and bad.
        bad: how many have a problem.
        problems: how many problems there are, by kind.
        splits: good rows by split.
        held_out: the splits that are shares of the training pictures.
        pictures: distinct pictures of good rows.
        shared: pictures that stand in more than one split, which files or a column may bring about.
        classes: class names in the order of their numbers; empty but for classification.
    """

    task: str
    rows: int
    bad: int
    problems: dict[str, int]
    splits: dict[str, int]
    held_out: tuple[str, ...]
    pictures: int
    shared: int
    classes: tuple[str, ...]


class Scan:
    """Reads files of rows once.

    Rows are read in chunks and forgotten; what is remembered of a row is a few numbers (46 bytes), so that memory does
    not grow with texts or pictures.

    Attributes:
        data: the settings.
        task: what rows are read for.
        tables: the files, by split.
        readers: what reads a row of each file.
    """

    def __init__(self, data: OwnData, task: str = "", *, decode: bool = True):
        """Opens the files and finds out the task; no rows are checked yet.

        Args:
            data: the settings.
            task: the task; from the columns if empty.
            decode: decodes every picture, as :func:`problems` says.

        Raises:
            UserError: if a file or folder is missing or of an unknown kind, or the columns say no task.
        """
        self.data = data
        self.tables: dict[str, Table] = {split: open_table(path) for split, path in data.files.items()}
        if not self.tables:
            raise UserError("no data file is given; data.path=FILE")
        if data.images and not Path(data.images).expanduser().is_dir():
            raise UserError(f"there is no folder of pictures {data.images}")
        first, *others = (set(data.columns.present(table.columns)) for table in self.tables.values())
        for (split, table), found in zip(list(self.tables.items())[1:], others, strict=True):
            if differ := sorted((first ^ found) - {"split", "id"}):
                raise UserError(f"{table.path} ({split}) and {data.path} differ in the columns {', '.join(differ)}")
        columns = data.columns.present(self.tables["train"].columns)
        self.task = task_of(columns, task)
        self.readers = {
            split: RowReader(self.task, data.columns.present(table.columns), data, self._folder_of(table))
            for split, table in self.tables.items()
        }
        # What tells a picture from those of the same name elsewhere; not its folder, where one folder has all.
        first = self.readers["train"].folder.resolve()
        folders = {split: reader.folder.resolve() for split, reader in self.readers.items()}
        self._prefixes = {
            split: f"{data.split_seed} " + ("" if folder == first else f"{folder}/")
            for split, folder in folders.items()
        }
        self.decode = decode
        self._start()

    @property
    def size(self) -> int:
        """What :data:`Progress` is told in all."""
        return sum(table.size for table in self.tables.values())

    def _folder_of(self, table: Table) -> Path:
        return Path(self.data.images).expanduser() if self.data.images else table.path.parent

    def _start(self) -> None:
        self._counts: Counter[str] = Counter()
        self._rows, self._bad = 0, 0
        self._labels: dict[str, int] = {}
        self._named: set[str] = set()
        codes = {"file": "B", "line": "I", "start": "Q", "length": "I", "split": "b", "label": "i", "id": "Q"}
        self._index = {name: array.array(code) for name, code in (codes | {"picture": "Q", "second": "Q"}).items()}

    def problems(self, progress: Progress | None = None) -> Iterator[Problem]:
        """Every problem, as it is found: those of single rows in their order, then what only all rows together show.

        Pictures have to be there, and to be decoded if the scan decodes; a box has to lie in its picture in any case.
        """
        self._start()
        for number, split in enumerate(self.tables):
            for problem in self._of_file(number, split, progress or (lambda _: None)):
                self._counts[problem.kind] += 1
                yield problem
        for problem in self._of_all():
            self._counts[problem.kind] += 1
            yield problem

    def summary(self) -> Summary:
        """What the pass found."""
        pictures, shared = together.shared_pictures(self._found)
        return Summary(
            task=self.task,
            rows=self._rows,
            bad=self._bad,
            problems=dict(self._counts),
            splits={name: int((self._found["split"] == code).sum()) for code, name in enumerate(SPLITS)},
            held_out=self._held_out(),
            pictures=pictures,
            shared=shared,
            classes=self.classes(),
        )

    def classes(self) -> tuple[str, ...]:
        """The class names in the order of their numbers: as given, or those of the training rows, sorted."""
        if self.task != "classification":
            return ()
        return self.data.classes or together.trained_classes(self._found, self._labels)

    def rows(self, split: str) -> dict[str, np.ndarray]:
        """``file``, ``line``, ``start``, ``length`` and ``picture`` of a split's good rows, ``[rows]`` each."""
        chosen = self._found["split"] == SPLITS.index(split)
        return {name: self._found[name][chosen] for name in ("file", "line", "start", "length", "picture")}

    def _of_file(self, number: int, split: str, progress: Progress) -> Iterator[Problem]:
        table, reader = self.tables[split], self.readers[split]
        if isinstance(table, Parquet):
            table.keep(list(reader.needed.values()))
        pictures = Pictures(reader.folder, decode=self.decode, sizes=self.task == "grounding")
        try:
            records = table.records()
            while chunk := list(itertools.islice(records, _CHUNK)):
                read = [({}, []) if record.values is None else reader.read(record.values) for record in chunk]
                looked = pictures.look(fields[name] for name in _PICTURES for fields, _ in read if name in fields)
                for record, (fields, flaws) in zip(chunk, read, strict=True):
                    flaws = [*flaws, *self._further(split, reader, record, fields, looked)]
                    self._rows += 1
                    self._bad += bool(flaws)
                    self._remember(number, split, record, fields, good=not flaws)
                    for flaw in flaws:
                        yield Problem(str(table.path), record.line, flaw.kind, flaw.message)
                progress(chunk[-1].start + chunk[-1].length - chunk[0].start)
        finally:
            pictures.close()

    def _further(
        self, split: str, reader: RowReader, record: Record, fields: dict[str, Any], looked: dict[str, Looked]
    ) -> Iterator[Flaw]:
        """What is wrong with a row beside what it says."""
        if record.values is None:
            yield Flaw("row", f"the {self.tables[split].unit} {record.problem}")
        for found in (looked[fields[name]] for name in _PICTURES if name in fields):
            if found.flaw is not None:
                yield found.flaw
            elif found.size and "box" in fields:
                yield from reader.check_box([fields["box"], *fields.get("boxes", ())], *found.size)
        said = fields.get("split", split)
        # Where a split has a file of its own, or the file is that of another: only the user knows which is right.
        if said != split and (split != "train" or said in self.tables):
            yield Flaw("split", f"the row is of split {said}, and the file is given for {split}")

    def _remember(self, number: int, split: str, record: Record, fields: dict[str, Any], good: bool) -> None:
        """Notes a row; of a bad one, that it is there and its id."""
        label = fields.get("class_name")
        if good and label is not None and label not in self._labels:
            if len(self._labels) == _MOST_CLASSES:
                raise UserError(
                    f"{self.data.path} has more than {_MOST_CLASSES:,} different labels; is its column "
                    f"{self.data.columns.label!r} that of the classes?"
                )
            self._labels[label] = len(self._labels)
        pictures = [
            together.name_hash(f"{self._prefixes[split]}{fields[name]}") for name in _PICTURES if name in fields
        ]
        noted = {
            "file": number,
            "line": record.line,
            "start": record.start,
            "length": record.length,
            "split": SPLITS.index(fields.get("split", split)) if good else -1,
            "label": self._labels[label] if good and label is not None else -1,
            "id": together.name_hash(fields["id"]) if "id" in fields else 0,
            "picture": pictures[0] if good else 0,
            "second": pictures[-1] if good else 0,
        }
        for name, value in noted.items():
            self._index[name].append(value)

    def _held_out(self) -> tuple[str, ...]:
        """The splits that neither a file nor a row of the column says anything of."""
        return tuple(split for split in SPLITS[1:] if split not in self.tables and split not in self._named)

    def _of_all(self) -> Iterator[Problem]:
        """Puts the rows into their splits, and gives what only all of them together show."""
        index = {name: np.array(np.frombuffer(kept, kept.typecode)) for name, kept in self._index.items()}
        self._found = index
        self._named = {SPLITS[code] for code in np.unique(index["split"]) if code >= 0}
        together.split_by_picture(index, self.data, self._held_out())
        found: dict[int, list[tuple[Kind, str]]] = {}
        if self.task == "classification":
            classes, codes = self.classes(), {code: name for name, code in self._labels.items()}
            known = [self._labels[name] for name in classes if name in self._labels]
            for row in np.flatnonzero((index["split"] >= 0) & ~np.isin(index["label"], known)).tolist():
                name = codes[int(index["label"][row])]
                message = f"the label {name!r} is none of the {len(classes)} classes of the training rows"
                found.setdefault(row, []).append(("label", message))
        for row, first in together.repeated(index["id"]):
            message = f"the id stands at {self._place(first)} already; if ids may repeat, set columns.id to nothing"
            found.setdefault(row, []).append(("duplicate id", message))
        for row, flaws in sorted(found.items()):
            self._bad += int(index["split"][row] >= 0)
            index["split"][row] = -1
            for kind, message in flaws:
                file = list(self.tables.values())[index["file"][row]].path
                yield Problem(str(file), int(index["line"][row]), kind, message)
        yield from self._lacking()

    def _lacking(self) -> Iterator[Problem]:
        """What there should be, and is not."""
        if self.task == "classification" and len(self.classes()) < 2:
            shown = ", ".join(map(repr, self.classes())) or "none"
            yield Problem(self.data.path, None, "label", f"classification needs at least 2 classes; found {shown}")
        for code, split in enumerate(SPLITS):
            if not (self._found["split"] == code).any():
                mend = f"raise {split}_share, or give more pictures" if split in self._held_out() else "give it rows"
                file = self.data.files.get(split, self.data.path)
                yield Problem(file, None, "empty split", f"the split {split} has no good row; {mend}")

    def _place(self, row: int) -> str:
        return f"{list(self.tables.values())[self._found['file'][row]].path}:{self._found['line'][row]}"
