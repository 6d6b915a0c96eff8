"""Rows, pictures, annotations and work directories as others write them."""

from __future__ import annotations

import abc
import io
import json
import pickle
from pathlib import Path
from random import Random
from typing import Any, ClassVar

import numpy as np
from hostile_kind import Files, Kind, list_of
from hostile_mutations import mutated_bytes, mutated_json, mutated_png, mutated_value
from PIL import Image

from vla_jax.data.builders._files import read_rows
from vla_jax.data.builders._plain_pickle import read_plain_pickle
from vla_jax.data.image import Preprocess, UnreadablePicture
from vla_jax.data.own import TASKS, OwnData, load_own
from vla_jax.evaluation.aro import Aro
from vla_jax.evaluation.sugarcrepe import SugarCrepe
from vla_jax.evaluation.valse import Valse
from vla_jax.evaluation.winoground import read_examples, read_relabelling, read_scores
from vla_jax.foreign import load_arrays
from vla_jax.reporting.page.render import _facts
from vla_jax.reporting.page.workdir import flattened, read_work_directory


def encoded_picture(form: str, mode: str = "RGB", size: tuple[int, int] = (13, 9), **settings: Any) -> bytes:
    """A file of a picture of noise."""
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, form, **settings)
    return file.getvalue()


class Rows(Kind):
    """A data file of one's own."""

    tasks: ClassVar[tuple[str, ...]] = ("matching", "classification", "retrieval")
    suffix: ClassVar[str]

    def rows(self) -> list[dict[str, Any]]:
        return [
            {"id": number, "image": f"{number % 6}.png", "text": f"a text {number}", "label": number % 2,
             "split": ("train", "val", "test")[number % 3]}
            for number in range(12)
        ]  # fmt: skip

    def seed(self) -> Files:
        self.pictures = {f"{number}.png": encoded_picture("PNG", size=(5, 4)) for number in range(6)}
        return {f"rows.{self.suffix}": self.encoded(self.rows())} | self.pictures

    @abc.abstractmethod
    def encoded(self, rows: list[dict[str, Any]]) -> bytes:
        """The file's content."""

    def read(self) -> Any:
        path = self.folder / f"rows.{self.suffix}"
        own = load_own(OwnData(str(path)), self.tasks[path.stat().st_size % len(self.tasks)])
        for source in own.splits.values():
            for index in range(len(source)):
                json.dumps(source.annotation(index) | {"box": 0}, ensure_ascii=False).encode()
        return own


class JsonRows(Rows):
    name, share, suffix, tasks = "rows (JSON lines)", 120, "jsonl", tuple(TASKS)

    def rows(self) -> list[dict[str, Any]]:
        more = {"phrase": "it", "box": [0, 0, 3, 2.5], "captions": ["one", "two"], "question": "q", "answers": ["a", 2]}
        return [row | more for row in super().rows()]

    def encoded(self, rows: list[dict[str, Any]]) -> bytes:
        return "".join(json.dumps(row) + "\n" for row in rows).encode()

    def mutated(self, random: Random) -> Files:
        lines = self.valid["rows.jsonl"].splitlines(keepends=True)
        for _ in range(1 + random.randrange(3)):
            which = random.randrange(len(lines))
            try:
                lines[which] = mutated_json(random, lines[which]) + b"\n"
            except (ValueError, RecursionError):
                lines[which] = mutated_bytes(random, lines[which])
        content = b"".join(lines)
        return self.valid | {"rows.jsonl": mutated_bytes(random, content) if random.random() < 0.2 else content}


class CsvRows(Rows):
    name, share, suffix = "rows (CSV)", 70, "csv"

    def encoded(self, rows: list[dict[str, Any]]) -> bytes:
        lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
        return ("\n".join(lines) + "\n").encode()

    def mutated(self, random: Random) -> Files:
        cells = [line.split(",") for line in self.valid["rows.csv"].decode().splitlines()]
        cells = mutated_value(random, cells)
        lines = [",".join(map(str, line)) if isinstance(line, list) else str(line) for line in list_of(cells)]
        content = "\n".join(lines).encode(errors="surrogatepass")
        return self.valid | {"rows.csv": mutated_bytes(random, content) if random.random() < 0.4 else content}


class ParquetRows(Rows):
    name, share, suffix = "rows (Parquet)", 40, "parquet"

    def encoded(self, rows: list[dict[str, Any]]) -> bytes:
        import pyarrow
        import pyarrow.parquet

        file = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=5)
        return file.getvalue()

    def mutated(self, random: Random) -> Files:
        if random.random() < 0.4:
            try:
                column = random.choice(("id", "image", "text", "label", "split"))
                rows = [row | {column: mutated_value(random, [row[column]])} for row in self.rows()]
                rows = [row | {column: (list_of(row[column]) or [None])[0]} for row in rows]
                return self.valid | {"rows.parquet": self.encoded(rows)}
            except Exception:  # Arrow does not write everything that is hostile
                pass
        return self._one(random, mutated_bytes, "rows.parquet")


class Pictures(Kind):
    """An encoded picture."""

    name, share, errors = "pictures", 150, (UnreadablePicture,)

    def seed(self) -> Files:
        forms = {
            "png": encoded_picture("PNG"),
            "palette": encoded_picture("PNG", "P"),
            "alpha": encoded_picture("PNG", "RGBA"),
            "jpeg": encoded_picture("JPEG"),
            "progressive": encoded_picture("JPEG", "L", progressive=True),
            "webp": encoded_picture("WEBP"),
            "lossless": encoded_picture("WEBP", "RGBA", lossless=True),
            "gif": encoded_picture("GIF", "P"),
            "bmp": encoded_picture("BMP"),
            "tiff": encoded_picture("TIFF", compression="tiff_lzw"),
            "ppm": encoded_picture("PPM"),
        }
        from transformers import CLIPImageProcessorPil

        edges = {"height": 8, "width": 8}
        self.preprocess = Preprocess(CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size=edges))
        return {"picture": forms["png"]} | {f"seeds/{name}": content for name, content in forms.items()}

    def mutated(self, random: Random) -> Files:
        others = [content for name, content in self.valid.items() if name.startswith("seeds/")]
        chosen = random.choice([*others, self.valid["seeds/png"], self.valid["seeds/jpeg"]])
        if chosen.startswith(b"\x89PNG") and random.random() < 0.6:
            content = mutated_png(random, chosen)
        else:
            content = mutated_bytes(random, chosen, others)
        return self.valid | {"picture": content}

    def read(self) -> Any:
        return self.preprocess((self.folder / "picture").read_bytes())


class ScoreFiles(Kind):
    """Winoground's files: examples, scores, and the relabelling."""

    name, share = "Winoground files", 30

    def seed(self) -> Files:
        examples = [
            {"id": number, "caption_0": "a b", "caption_1": "b a", "image_0": f"ex_{number}_img_0",
             "image_1": f"ex_{number}_img_1", "tag": "Noun", "secondary_tag": "x, y", "num_main_preds": 1,
             "collapsed_tag": "Object"}
            for number in range(3)
        ]  # fmt: skip
        scores = [{"label": f"{n}_c{c}_i{i}", "score": n + c - i / 2} for n in range(3) for c in (0, 1) for i in (0, 1)]
        tags = {"0": ["ambiguous"], "1": [], "2": ["a", "b"]}
        lines = {"examples.jsonl": examples, "scores.jsonl": scores}
        files = {name: "\n".join(map(json.dumps, rows)).encode() for name, rows in lines.items()}
        return files | {"tags.json": json.dumps(tags).encode()}

    def mutated(self, random: Random) -> Files:
        name = random.choice(list(self.valid))
        if name == "tags.json":
            return self._one(random, mutated_json, name)
        lines = self.valid[name].splitlines(keepends=True)
        which = random.randrange(len(lines))
        lines[which] = mutated_json(random, lines[which]) + b"\n"
        return self.valid | {name: b"".join(lines)}

    def read(self) -> Any:
        examples = read_examples(self.folder / "examples.jsonl")
        read_relabelling(self.folder / "tags.json", examples)
        return read_scores(self.folder / "scores.jsonl", [example.identifier for example in examples])


class Annotations(Kind):
    """Published annotations of other probes and of data sets that are built from a folder."""

    name, share = "annotations", 20

    def seed(self) -> Files:
        crepe = {"0": {"filename": "p.png", "caption": "a", "negative_caption": "b"}}
        valse = {"x": {"dataset": "SWiG", "image_file": "p.png", "caption": "a", "foil": "b", "mturk": {"caption": 3}}}
        box = {"bbox_x": 1, "bbox_y": 1, "bbox_w": 3, "bbox_h": 2}
        aro = [box | {"image_path": "p.png", "true_caption": "a", "false_caption": "b", "relation_name": "on"}]
        rows = {"images": [{"id": 3, "file_name": "p.png", "bbox": [1, 2, 3, 4], "answer": "a"}]}
        contents = {"swap_obj": crepe, "plurals": valse, "visual_genome_relation": aro, "rows": rows}
        files = {f"{name}.json": json.dumps(content).encode() for name, content in contents.items()}
        picture = encoded_picture("PNG")
        return files | {"p.png": picture, "SWiG/p.png": picture, "images/p.png": picture}

    def mutated(self, random: Random) -> Files:
        return self._one(random, mutated_json, random.choice([name for name in self.valid if name.endswith(".json")]))

    def read(self) -> Any:
        for row in read_rows(self.folder / "rows.json", "images"):
            row.integer("id"), row.text("file_name"), row.items("bbox"), row.text("answer")
        found = [
            SugarCrepe(self.folder, self.folder, ["swap_obj"]),
            Valse(self.folder, self.folder, instruments=["plurals"]),
            Aro(self.folder, "relation"),
        ]
        return [source[index] for source in found for index in range(len(source))]


class Pickles(Kind):
    """The one pickle in which a data set is published."""

    name, share = "pickles", 20

    def seed(self) -> Files:
        rows = [{"ref_id": 1, "sentences": [{"sent": "the man", "sent_id": 2}], "box": (1.5, None, True)}]
        self.dangerous = [pickle.dumps(value, protocol) for value in (print, Path("x"), rows) for protocol in (0, 2, 5)]
        return {"refs.p": pickle.dumps(rows, 2)}

    def mutated(self, random: Random) -> Files:
        content = random.choice([self.valid["refs.p"], *self.dangerous])
        return {"refs.p": mutated_bytes(random, content, self.dangerous)}

    def read(self) -> Any:
        return read_plain_pickle(self.folder / "refs.p")


class WorkDirectory(Kind):
    """A work directory of which a page is to be made, and the arrays in it."""

    name, share = "work directory", 20

    def seed(self) -> Files:
        arrays = io.BytesIO()
        np.savez_compressed(arrays, index=np.arange(3), correct=np.array([True, False, True]))
        config = {"backbone": "tiny", "tasks": ["a"], "budget": {"steps": 10, "batch_size": 2, "seeds": [0, 1]}}
        run = "runs/a/lora/learning_rate_0.001/seed_0"
        return {
            "config.json": json.dumps(config).encode(),
            "versions.json": json.dumps({"commit": "abc", "device": "cpu", "jax": "1"}).encode(),
            "results.jsonl": json.dumps({"name": "lora", "variant": "LoRA", "accuracy": 0.5}).encode(),
            "results.md": b"**Results**\n\n| variant | accuracy (%) |\n| --- | ---: |\n| LoRA | 50.0 [40, 60] |\n",
            "results.csv": b"variant,accuracy,accuracy_low,accuracy_high\nLoRA,0.5,0.4,0.6\n",
            f"{run}/metrics.jsonl": b'{"step": 1, "train/loss": 0.5}\n{"step": 2, "train/loss": null}\n',
            f"{run}/settings.json": json.dumps({"steps": 2, "model": {"modalities": ["image"]}}).encode(),
            f"{run}/test.npz": arrays.getvalue(),
        }

    def mutated(self, random: Random) -> Files:
        name = random.choice(list(self.valid))
        if name.endswith((".json", "results.jsonl")):
            return self._one(random, mutated_json, name)
        return self._one(random, mutated_bytes, name)

    def read(self) -> Any:
        work = read_work_directory(self.folder)
        found = [work.missing(), work.title, _facts(work), list(flattened(work.config)), work.groups]
        found += [(run.modalities, run.last_step, work.called(run.variant)) for run in work.runs]
        return found, load_arrays(self.folder / "runs/a/lora/learning_rate_0.001/seed_0/test.npz")
