"""``python -m vla_jax.evaluation.probe``: what a saved model makes of a published probe, with controls beside it.

    python -m vla_jax.evaluation.probe winoground --data=FOLDER --adapters=runs/adapt-default/runs/lora/.../adapters
    python -m vla_jax.evaluation.probe sugarcrepe --data=sugar-crepe/data --images=val2017 --adapters=A --adapters=B
    python -m vla_jax.evaluation.probe valse --data=VALSE/data --images=FOLDER --backbone=openai/clip-vit-base-patch32

Adapters in any form (a run's folder, one file, a checkpoint of peft) are scored by the matching head that was trained
with them, else by the cosine of the features that they make. Beside them stand the backbone they were trained on,
without them; a constant scorer; and the first model once shown one and the same picture for all, and once one and the
same caption. The first is compared with each other model on the same examples. With ``--out`` the scores are kept, of
Winoground in its authors' format.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from vla_jax.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Scores a probe and prints what came out; returns 0, or 2 where something given cannot be used."""
    try:
        _run(_parser().parse_args(arguments))
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vla_jax.evaluation.probe",
        description="Scores a published probe with saved models, and controls beside them.",
        allow_abbrev=False,
    )
    parser.add_argument("probe", help="winoground, sugarcrepe, aro_relation, aro_attribution or valse")
    parser.add_argument("--data", required=True, metavar="FOLDER", help="the annotations as published")
    parser.add_argument("--images", metavar="FOLDER", help="pictures, where they lie elsewhere (sugarcrepe, valse)")
    parser.add_argument(
        "--adapters", action="append", default=[], metavar="PATH", help="a saved model; may be given several times"
    )
    parser.add_argument("--backbone", metavar="NAME", help="its name or folder; what the adapters keep if left out")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="pairs at a time (default: 64)")
    parser.add_argument(
        "--text-length", type=int, metavar="N", help="tokens a text; the backbone's context if left out"
    )
    parser.add_argument("--out", metavar="FOLDER", help="keeps scores, results.json and the tables there")
    parser.add_argument("--json", action="store_true", help="print everything as JSON, fractions at full precision")
    return parser


def _run(given: argparse.Namespace) -> None:
    from vla_jax.errors import unknown
    from vla_jax.evaluation.probe.judging import PROBES, judged

    if given.probe not in PROBES:
        raise unknown("probe", given.probe, PROBES)
    if not given.adapters and not given.backbone:
        raise UserError("nothing to score: give --adapters, or --backbone alone for the backbone as it is")
    if given.batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, got {given.batch_size}")
    if len(set(given.adapters)) < len(given.adapters):
        raise UserError("--adapters names one path twice; give each model once")
    probe = PROBES[given.probe]
    source = probe.read(Path(given.data), Path(given.images or given.data))

    from vla_jax.backbones.loading import load_backbone
    from vla_jax.data.image import Preprocess
    from vla_jax.data.text import Tokenize
    from vla_jax.evaluation.controls import CONSTANT, IMAGE_ONLY, MODEL, TEXT_ONLY, with_controls
    from vla_jax.evaluation.probe.models import backbone_scorer, saved_scorer
    from vla_jax.evaluation.scorers import Asking, Reading
    from vla_jax.exchange.checkpoints import load_backbone_of, read_adapter

    saved = {path: read_adapter(path, given.backbone) for path in given.adapters}
    backbone = load_backbone_of(saved[given.adapters[0]], given.backbone) if saved else load_backbone(given.backbone)
    for path, each in saved.items():
        if each.fingerprint and each.fingerprint != backbone.fingerprint:
            raise UserError(f"{path} was trained on another backbone than {given.adapters[0]}; score them apart")
    length = given.text_length or backbone.config.context_length
    backbone.config.check_text_length("--text-length", length)
    reading = Reading(Preprocess(backbone.image_processor), Tokenize(backbone.tokenizer, length))
    asking = Asking(reading, given.batch_size)
    bare = backbone_scorer(backbone, asking)
    scorers: dict[str, Any] = {}
    for path, each in saved.items():
        scorer, kind = saved_scorer(each, backbone, asking, path)
        scorers[f"{path} ({kind})"] = scorer
    scorers["backbone (cosine)"] = bare
    (name, first), *others = scorers.items()
    scores = with_controls(first, source, dict(others))
    controls = {each: scores.pop(each) for each in (CONSTANT, TEXT_ONLY, IMAGE_ONLY)}
    scores = {name: scores.pop(MODEL)} | scores
    if probe.right is None:
        controls.pop(CONSTANT)  # its report has one of its own
    content, tables = judged(probe, source, scores, controls)
    if given.out:
        _keep(Path(given.out), source, scores | controls, content, tables)
    if given.json:
        print(json.dumps(content, indent=1, ensure_ascii=False))
        return
    console = Console()
    if not console.is_terminal:
        console = Console(width=10_000)  # a pipe or a file has no width to keep to
    for table in tables:
        console.print(table.terminal())


def _keep(folder: Path, source: Any, scores: dict[str, np.ndarray], content: Any, tables: Sequence[Any]) -> None:
    from vla_jax.evaluation.winoground.score_files import write_scores
    from vla_jax.reporting.table import write_atomically

    folder.mkdir(parents=True, exist_ok=True)
    identifiers = [example.identifier for example in source.examples]
    names = {}
    for number, (name, values) in enumerate(scores.items()):
        names[f"scores_{number}.jsonl"] = name
        path = folder / f"scores_{number}.jsonl"
        if values.shape[1:] == (2, 2):
            write_scores(path, identifiers, values)
            continue
        lines = (
            json.dumps({"id": identifier, "scores": row[:, 0].tolist()})
            for identifier, row in zip(identifiers, values, strict=True)
        )
        write_atomically(path, "\n".join(lines) + "\n")
    write_atomically(folder / "results.json", json.dumps({"scores": names} | content, indent=1, ensure_ascii=False))
    for number, table in enumerate(tables):
        table.write(folder, f"table_{number}")


if __name__ == "__main__":
    sys.exit(main())
