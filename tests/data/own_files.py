"""Small data files of one's own, with real pictures, as a user would have them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 24, 20


def pictures(folder: Path, count: int, suffix: str = "png") -> list[str]:
    """Writes pictures, each of another grey, and gives their names."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{number}.{suffix}" for number in range(count)]
    for number, name in enumerate(names):
        Image.fromarray(np.full((HEIGHT, WIDTH, 3), number, np.uint8)).save(folder / name)
    return names


def write(path: Path, rows: list[dict]) -> Path:
    """Writes rows as the kind of file that the path's ending says."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=7)
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            cells = lambda row: {k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()}  # noqa: E731
            writer.writerows(map(cells, rows))
    return path
