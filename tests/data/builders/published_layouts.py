"""Writes small data sets exactly as they are published: the same folders, names, fields and oddities."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image


def picture(seed: int, mode: str = "RGB", size: tuple[int, int] = (9, 7), file_format: str = "PNG") -> bytes:
    """The file of a picture of noise, ``size`` is width and height."""
    channels = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], *channels), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, file_format)
    return file.getvalue()


def write(path: Path, content: bytes | str | Any) -> Any:
    """Writes bytes, text, or anything else as JSON, with its folder; returns the content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else _text(content).encode())
    return content


def write_lines(path: Path, rows: list[Any]) -> None:
    """Writes one JSON object a line."""
    write(path, "".join(f"{json.dumps(row)}\n" for row in rows))


def edit(path: Path, change: Any) -> None:
    """Changes a JSON file in place, by a function of its content."""
    content = json.loads(path.read_text())
    change(content)
    write(path, content)


def _text(content: Any) -> str:
    return content if isinstance(content, str) else json.dumps(content)


def plain(value: Any) -> Any:
    """What a source gives, as plain values: text as str, pictures as bytes, arrays as lists."""
    if isinstance(value, dict):
        return {
            name: item if name.startswith("image") and name != "image_id" else plain(item)
            for name, item in value.items()
        }
    if isinstance(value, np.ndarray | list):
        return [plain(item) for item in value]
    if isinstance(value, bytes):
        return value.decode()
    return value.item() if isinstance(value, np.generic) else value


def vqav2(root: Path) -> dict[str, list[dict[str, Any]]]:
    """VQAv2: a grey and a colour picture in training, whose questions are not sorted by picture; returns records."""
    grey = write(root / "train2014" / "COCO_train2014_000000000009.jpg", picture(1, "L", file_format="JPEG"))
    color = write(root / "train2014" / "COCO_train2014_000000458752.jpg", picture(2, file_format="JPEG"))
    val = write(root / "val2014" / "COCO_val2014_000000000042.jpg", picture(3, file_format="JPEG"))
    test = write(root / "test2015" / "COCO_test2015_000000000001.jpg", picture(4, file_format="JPEG"))
    spoken = ["net"] * 7 + ["", "it's a net", "2"]
    counted = ["2"] * 10
    _vqav2_split(
        root,
        "train2014",
        [(458752, 458752000, "What is this?"), (9, 9000, "How many?"), (458752, 458752001, "Is it a net?")],
        {
            # Numbers as numbers, and the order of annotations is another than that of questions.
            9000: ("how many", "number", 2, [2] * 10),
            458752000: ("what is this", "other", "net", spoken),
            458752001: ("is it", "yes/no", "yes", ["yes"] * 10),
        },
    )
    _vqav2_split(root, "val2014", [(42, 42000, "Où?")], {42000: ("none of the above", "other", "ici", ["ici"] * 10)})
    _vqav2_split(root, "test2015", [(1, 1000, "Why?"), (1, 1001, "Who?")], None)
    _vqav2_split(root, "test-dev2015", [(1, 1001, "Who?")], None)

    def record(image: bytes, image_id: str, *questions: tuple[str, str, str, str, str, list[str]]) -> dict[str, Any]:
        names = ("question", "question_id", "question_kind", "answer_kind", "answer")
        fields = {name: [question[place] for question in questions] for place, name in enumerate(names)}
        return {
            "image": image,
            "image_id": image_id,
            "questions": fields | {"answers_count": [len(question[5]) for question in questions]},
            "answers": [answer for question in questions for answer in question[5]],
        }

    return {
        "train": [
            record(
                color,
                "458752",
                ("What is this?", "458752000", "what is this", "other", "net", spoken),
                ("Is it a net?", "458752001", "is it", "yes/no", "yes", ["yes"] * 10),
            ),
            record(grey, "9", ("How many?", "9000", "how many", "number", "2", counted)),
        ],
        "validation": [record(val, "42", ("Où?", "42000", "none of the above", "other", "ici", ["ici"] * 10))],
        "test": [record(test, "1", ("Why?", "1000", "", "", "", []), ("Who?", "1001", "", "", "", []))],
        "testdev": [record(test, "1", ("Who?", "1001", "", "", "", []))],
    }


def _vqav2_split(root: Path, name: str, questions: list, annotations: dict | None) -> None:
    head = {"info": {"version": "2.0"}, "license": {}, "data_type": "mscoco", "data_subtype": name}
    images = {question_id: image_id for image_id, question_id, _ in questions}
    rows = [{"image_id": i, "question": text, "question_id": q} for i, q, text in questions]
    file = root / f"v2_OpenEnded_mscoco_{name}_questions.json"
    write(file, head | {"task_type": "Open-Ended", "questions": rows})
    if annotations is None:
        return
    rows = [
        {
            "question_type": kind,
            "multiple_choice_answer": answer,
            "answers": [{"answer": a, "answer_confidence": "yes", "answer_id": n} for n, a in enumerate(answers, 1)],
            "image_id": images[question_id],
            "answer_type": answer_kind,
            "question_id": question_id,
        }
        for question_id, (kind, answer_kind, answer, answers) in annotations.items()
    ]
    write(root / f"v2_mscoco_{name}_annotations.json", head | {"annotations": rows})


def gqa(root: Path) -> dict[str, list[dict[str, Any]]]:
    """GQA's balanced questions, and all training questions in ten parts; returns the records of balanced."""
    sky = write(root / "images" / "2354786.jpg", picture(5, file_format="JPEG"))
    other = write(root / "images" / "n161313.jpg", picture(6, "L", file_format="JPEG"))
    dark = _gqa_question("2354786", "Is the sky dark?", "yes", "Yes, the sky is dark.", "verify", "global")
    what = _gqa_question("2354786", "What is white?", "wall", "The wall is white.", "query", "relS")
    left = _gqa_question("n161313", "Left or right?", "left", "It is on the left.", "choose", "rel")
    write(root / "train_balanced_questions.json", {"02930152": dark, "07333408": left, "07333405": what})
    write(root / "testdev_balanced_questions.json", {"201307251": left})
    hidden = {"question": "Who?", "isBalanced": True, "imageId": "n161313"}
    write(root / "test_balanced_questions.json", {"20400": hidden})
    for part in range(10):
        folder = root / "train_all_questions"
        write(folder / f"train_all_questions_{part}.json", {f"{part}1": dark, f"{part}2": left})
    names = ("question", "question_id", "question_kind", "semantic_kind", "answer_kind", "full_answer", "answers_count")

    def record(image: bytes, image_id: str, answers: list[str], *questions: tuple) -> dict[str, Any]:
        fields = {name: [question[place] for question in questions] for place, name in enumerate(names)}
        return {"image": image, "image_id": image_id, "questions": fields, "answers": answers}

    of_dark = ("Is the sky dark?", "02930152", "verify", "global", "binary", "Yes, the sky is dark.", 1)
    of_what = ("What is white?", "07333405", "query", "relS", "open", "The wall is white.", 1)
    of_left = ("Left or right?", "07333408", "choose", "rel", "binary", "It is on the left.", 1)
    return {
        "train": [
            record(sky, "2354786", ["yes", "wall"], of_dark, of_what),
            record(other, "n161313", ["left"], of_left),
        ],
        "testdev": [record(other, "n161313", ["left"], (of_left[0], "201307251", *of_left[2:]))],
        "test": [record(other, "n161313", [], ("Who?", "20400", "", "", "", "", 0))],
    }


def _gqa_question(image: str, question: str, answer: str, full: str, structural: str, semantic: str) -> dict[str, Any]:
    return {
        "semantic": [{"operation": "select", "dependencies": [], "argument": "sky (2486325)"}],
        "entailed": ["02930160"],
        "equivalent": ["02930152"],
        "question": question,
        "imageId": image,
        "isBalanced": True,
        "groups": {"global": None, "local": "06-sky_dark"},
        "answer": answer,
        "semanticStr": "select: sky (2486325)",
        "annotations": {"answer": {}, "question": {"2": "2486325"}, "fullAnswer": {"2": "2486325"}},
        "types": {"detailed": "verifyAttr", "semantic": semantic, "structural": structural},
        "fullAnswer": full,
    }


def karpathy(
    rows: list[tuple[str, str, list[str]]], name: str, filepaths: list[str] | None = None, first: int = 0
) -> dict[str, Any]:
    """A file of captions by picture: name of the file, split, texts."""
    images, sentid = [], first
    for imgid, (filename, split, texts) in enumerate(rows):
        sentences = [
            {"tokens": text.lower().split(), "raw": text, "imgid": imgid, "sentid": sentid + n}
            for n, text in enumerate(texts)
        ]
        sentids = [sentence["sentid"] for sentence in sentences]
        sentid += len(texts)
        image = {"sentids": sentids, "imgid": imgid, "sentences": sentences, "split": split, "filename": filename}
        if filepaths:
            image |= {"filepath": filepaths[imgid], "cocoid": int(filename[-16:-4])}
        images.append(image)
    return {"images": images, "dataset": name}


def coco_captions(root: Path) -> dict[str, list[dict[str, Any]]]:
    """COCO captions: pictures of both folders train; five captions, or more, or less."""
    rows = [
        ("COCO_val2014_000000391895.jpg", "test", ["A man.", "A person on a bike. ", "A man.", "Four", "Five"]),
        ("COCO_train2014_000000000009.jpg", "train", [f"caption {n}" for n in range(6)]),
        ("COCO_val2014_000000060623.jpg", "restval", ["A young girl.", "Cake"]),
        ("COCO_val2014_000000184613.jpg", "val", ["A child holding a flowered umbrella."]),
    ]
    folders = [name.split("_")[1] for name, _, _ in rows]
    write(root / "dataset_coco.json", karpathy(rows, "coco", folders, first=770337))
    records = {}
    for seed, (folder, (name, split, texts)) in enumerate(zip(folders, rows, strict=True)):
        image = write(root / folder / name, picture(10 + seed, "L" if seed == 1 else "RGB", file_format="JPEG"))
        records[split] = {"image": image, "image_id": str(int(name[-16:-4])), "captions": texts}
    return {
        "train": [records["train"], records["restval"]],
        "validation": [records["val"]],
        "test": [records["test"]],
    }


def flickr30k(root: Path) -> dict[str, list[dict[str, Any]]]:
    """Flickr30k: one picture a split."""
    rows = [
        ("1000092795.jpg", "train", ["Two young guys.", "Two friends.", "Three", "Four", "Five"]),
        ("10002456.jpg", "test", ["Several men .", "Men work .", "Three", "Four", "Five"]),
        ("1000268201.jpg", "val", ["A child in a pink dress .", "Two", "Three", "Four", "Five"]),
    ]
    write(root / "dataset_flickr30k.json", karpathy(rows, "flickr30k"))
    lines = [f"{name}#{turn}\t{text}\n" for name, _, texts in reversed(rows) for turn, text in enumerate(texts)]
    write(root / "results_20130124.token", "".join(lines))
    for name, split, _ in rows:
        write(root / f"{split}.txt", name.removesuffix(".jpg") + "\n")
    records = {}
    for seed, (name, split, texts) in enumerate(rows):
        image = write(root / "flickr30k-images" / name, picture(20 + seed, file_format="JPEG"))
        records[split] = [{"image": image, "image_id": name.removesuffix(".jpg"), "captions": texts}]
    return {"train": records["train"], "validation": records["val"], "test": records["test"]}


def nlvr(root: Path) -> dict[str, list[dict[str, Any]]]:
    """NLVR as its repository has it: pictures with transparency in numbered folders, which the hidden set names not."""
    box = {"y_loc": 80, "type": "triangle", "color": "#0099ff", "x_loc": 80, "size": 20}
    structure = [[box], [box, box | {"color": "Yellow"}], []]
    records = {}
    for split, name, label, directory in (("train", "train", "true", "17"), ("hidden", "hidden", "false", "")):
        row = {"sentence": f"One of {name}", "label": label, "identifier": "1572-0", "structured_rep": structure}
        if directory:
            row |= {"directory": directory, "evals": {"r1": "true"}}
        write_lines(root / "nlvr" / name / f"{name}.json", [row])
        records[split] = []
        for order in range(6):
            file = root / "nlvr" / name / "images" / (directory or "3") / f"{name}-1572-0-{order}.png"
            records[split].append(
                {
                    "image": write(file, picture(30 + order, "RGBA")),
                    "image_id": f"{name}-1572-0-{order}",
                    "text": f"One of {name}",
                    "label": int(label == "true"),
                    "statement_id": "1572-0",
                    "order": order,
                    "structure": json.dumps(structure),
                    "directory": directory,
                }
            )
    return records


def nlvr2(root: Path) -> dict[str, list[dict[str, Any]]]:
    """NLVR2 as its repository and its archives of pictures have it: labels are words, not every .png is a PNG."""

    def row(identifier: str, label: str, **more: Any) -> dict[str, Any]:
        links = {"left_url": "https://example.org/l.jpg", "right_url": "https://example.org/r.jpg"}
        named = {"sentence": f"Sentence of {identifier}.", "label": label, "identifier": identifier, "writer": "61"}
        return links | named | {"validation": {"61": label}, "synset": "beer bottle", "query": "bottles38"} | more

    data, images = root / "nlvr2" / "data", root / "images"
    write_lines(
        data / "train.json",
        [
            row("train-10108-0-0", "True", directory=4),
            row("train-22-1-0", "False", directory=71),
            row("train-10108-0-1", "False", directory=4),
        ],
    )
    write_lines(data / "dev.json", [row("dev-850-2-1", "True", extra_validations={"136": "True"})])
    files = {}
    for seed, (folder, pair) in enumerate(
        (("train/4", "train-10108-0"), ("train/71", "train-22-1"), ("dev", "dev-850-2"))
    ):
        for side in (0, 1):
            content = picture(40 + 2 * seed + side, "RGBA" if side else "L", file_format="PNG" if side else "JPEG")
            files[f"{pair}-{side}"] = write(images / folder / f"{pair}-img{side}.png", content)

    def record(pair: str, directory: str, labels: dict[str, int]) -> dict[str, Any]:
        identifiers = [f"{pair}-{number}" for number in labels]
        return {
            "image_0": files[f"{pair}-0"],
            "image_1": files[f"{pair}-1"],
            "image_id": pair,
            "directory": directory,
            "statements": {
                "text": [f"Sentence of {identifier}." for identifier in identifiers],
                "label": list(labels.values()),
                "statement_id": identifiers,
            },
        }

    return {
        "train": [record("train-10108-0", "4", {"0": 1, "1": 0}), record("train-22-1", "71", {"0": 0})],
        "validation": [record("dev-850-2", "", {"1": 1})],
    }


def vsr(root: Path) -> dict[str, list[dict[str, Any]]]:
    """VSR's random division, and zeroshot's test; returns the records of random."""
    first = write(root / "images" / "000000296471.jpg", picture(50, file_format="JPEG"))
    second = write(root / "images" / "000000155777.jpg", picture(51, "L", file_format="JPEG"))

    def row(image: str, caption: str, label: int, relation: str, **more: Any) -> dict[str, Any]:
        votes = {"annotator_id": 27, "vote_true_validator_id": "[]", "vote_false_validator_id": "[1, 2, 20]"}
        link = f"http://images.cocodataset.org/train2017/{image}"
        return (
            {"image": image, "image_link": link, "caption": caption, "label": label, "relation": relation}
            | votes
            | more
        )

    inside = row("000000296471.jpg", "The cat is inside the refrigerator.", 0, "inside", reference_frame=None)
    away = row("000000155777.jpg", "The bird is away from the motorcycle.", 1, "away from", reference_frame=0.0)
    on = row("000000296471.jpg", "The cat is on the refrigerator.", 1, "on", reference_frame=None)
    write_lines(root / "splits" / "random" / "train.jsonl", [inside, away, on])
    write_lines(root / "splits" / "random" / "dev.jsonl", [away])
    write_lines(root / "splits" / "zeroshot" / "test.jsonl", [on | {"subj": "cat", "obj": "refrigerator"}])

    def record(image: bytes, image_id: str, *rows: dict[str, Any]) -> dict[str, Any]:
        names = {"text": "caption", "label": "label", "statement_kind": "relation"}
        statements = {name: [row[key] for row in rows] for name, key in names.items()}
        return {"image": image, "image_id": image_id, "statements": statements}

    return {
        "train": [record(first, "000000296471", inside, on), record(second, "000000155777", away)],
        "validation": [record(second, "000000155777", away)],
    }


def refcoco(root: Path) -> dict[str, list[dict[str, Any]]]:
    """RefCOCO divided by UNC, pickled by Python 2's protocol; returns records."""
    first = write(
        root / "train2014" / "COCO_train2014_000000581857.jpg", picture(60, size=(40, 30), file_format="JPEG")
    )
    second = write(root / "train2014" / "COCO_train2014_000000098304.jpg", picture(61, "L", (20, 25), "JPEG"))
    images = [
        {"id": 581857, "width": 40, "height": 30, "file_name": "COCO_train2014_000000581857.jpg", "license": 1},
        {"id": 98304, "width": 20, "height": 25, "file_name": "COCO_train2014_000000098304.jpg", "license": 1},
    ]
    boxes = {
        1719310: (581857, 1, [1.5, 2.0, 10.25, 20.0]),
        1719311: (581857, 1, [0.0, 0.0, 40.01, 30.0]),  # stands out by what rounding makes of it
        43992: (98304, 62, [3.0, 4.0, 5.0, 6.0]),
        43993: (98304, 62, [3.0, 4.0, 0.0, 6.0]),  # without an area: no candidate
    }
    annotations = [
        {"id": number, "image_id": image, "category_id": category, "bbox": box, "iscrowd": 0, "area": 9.5}
        | {"segmentation": [[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]]}
        for number, (image, category, box) in boxes.items()
    ]
    categories = [
        {"supercategory": "person", "id": 1, "name": "person"},
        {"supercategory": "furniture", "id": 62, "name": "chair"},
    ]
    instances = {"info": {}, "licenses": [], "images": images, "annotations": annotations, "categories": categories}
    write(root / "refcoco" / "instances.json", instances)
    references = [
        reference(0, 1719310, 581857, 1, "train", {0: "navy blue shirt", 1: "woman back"}),
        reference(1, 43992, 98304, 62, "testB", {3: "chair"}),
        reference(2, 1719311, 581857, 1, "train", {2: "everything"}),
        reference(3, 1719310, 581857, 1, "val", {5: "her", 4: "left"}),
    ]
    write(root / "refcoco" / "refs(unc).p", python2_pickle(references))
    whole = [[1.5, 2.0, 11.75, 22.0], [0.0, 0.0, 40.0, 30.0]]

    def record(image: bytes, image_id: str, size: tuple[int, int], boxes: list, **phrases: list) -> dict[str, Any]:
        fields = {"image": image, "image_id": image_id, "width": size[0], "height": size[1]}
        return fields | {"boxes": boxes, "phrases": phrases}

    return {
        "train": [
            record(
                first,
                "581857",
                (40, 30),
                whole,
                phrase=["navy blue shirt", "woman back", "everything"],
                phrase_id=["0", "1", "2"],
                object_id=["1719310", "1719310", "1719311"],
                class_name=["person"] * 3,
                box=[whole[0], whole[0], whole[1]],
            )
        ],
        "validation": [
            record(
                first,
                "581857",
                (40, 30),
                whole,
                phrase=["her", "left"],
                phrase_id=["5", "4"],
                object_id=["1719310"] * 2,
                class_name=["person"] * 2,
                box=[whole[0]] * 2,
            )
        ],
        "testB": [
            record(
                second,
                "98304",
                (20, 25),
                [[3.0, 4.0, 8.0, 10.0]],
                phrase=["chair"],
                phrase_id=["3"],
                object_id=["43992"],
                class_name=["chair"],
                box=[[3.0, 4.0, 8.0, 10.0]],
            )
        ],
    }


class _Python2Pickler(pickle._Pickler):
    """Writes text as Python 2 wrote its ``str``: as bytes."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_str(self, text: str) -> None:
        self.write(b"S" + repr(text).encode("ascii") + b"\n")
        self.memoize(text)

    dispatch[str] = save_str


def python2_pickle(content: Any) -> bytes:
    """A pickle such as Python 2 wrote it."""
    file = io.BytesIO()
    _Python2Pickler(file, protocol=0).dump(content)
    return file.getvalue()


def reference(ref_id: int, ann_id: int, image_id: int, category_id: int, split: str, sents: dict[int, str]) -> dict:
    """An object with its phrases as the published pickles have it."""
    sentences = [
        {"tokens": sent.split(), "raw": sent.title(), "sent_id": number, "sent": sent} for number, sent in sents.items()
    ]
    return {
        "sent_ids": list(sents),
        "file_name": f"COCO_train2014_{image_id:012d}_{ref_id}.jpg",
        "ann_id": ann_id,
        "ref_id": ref_id,
        "image_id": image_id,
        "split": split,
        "sentences": sentences,
        "category_id": category_id,
    }


def winoground(root: Path) -> dict[str, list[dict[str, Any]]]:
    """Two of Winoground's examples, one without secondary tag, ids as numbers; returns records."""
    lines, records = [], []
    for number, secondary in ((0, "Pragmatics, Series"), (7, "")):
        names = [f"ex_{number}_img_{place}" for place in (0, 1)]
        pictures = [write(root / "images" / f"{name}.png", picture(60 + number + i)) for i, name in enumerate(names)]
        captions = {"caption_0": "a dog chases a cat", "caption_1": "a cat chases a dog"}
        tags = {"tag": "Noun", "secondary_tag": secondary, "num_main_preds": 1, "collapsed_tag": "Object"}
        lines.append({"id": number, "image_0": names[0], "image_1": names[1]} | captions | tags)
        records.append({"id": str(number), "image_0": pictures[0], "image_1": pictures[1]} | captions | tags)
    write_lines(root / "examples.jsonl", lines)
    return {"test": records}


def _pairs(*pairs: dict[str, Any]) -> dict[str, list[Any]]:
    return {name: [pair[name] for pair in pairs] for name in pairs[0]}


def sugarcrepe(root: Path) -> dict[str, list[dict[str, Any]]]:
    """All seven categories of SugarCrepe with one example each, on two pictures; returns records."""
    names = ("000000000139.jpg", "000000000285.jpg")
    files = [write(root / "val2017" / name, picture(70 + i, file_format="JPEG")) for i, name in enumerate(names)]
    found: list[list[dict[str, Any]]] = [[], []]
    categories = ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")
    for number, category in enumerate(categories):
        own = {"caption": f"caption {number}", "negative_caption": f"negative {number}"}
        write(root / "data" / f"{category}.json", {"0": {"filename": names[number % 2]} | own})
        found[number % 2].append({"id": f"{category}/0"} | own | {"kind": category})
    return {
        "test": [
            {"image": file, "image_id": name, "pairs": _pairs(*pairs)}
            for file, name, pairs in zip(files, names, found, strict=True)
        ]
    }


def aro(root: Path) -> dict[str, list[dict[str, Any]]]:
    """ARO's relations, two of them of one picture, a box reaching beyond it; returns records."""
    files = {
        name: write(root / "images" / name, picture(80 + i, size=(40, 30))) for i, name in enumerate(("1.jpg", "2.jpg"))
    }

    def row(name: str, relation: str, x: int, width: int) -> dict[str, Any]:
        texts = {
            "true_caption": f"the cup is {relation} the plate",
            "false_caption": f"the plate is {relation} the cup",
        }
        box = {"bbox_x": x, "bbox_y": 2, "bbox_w": width, "bbox_h": 20}
        return {"image_id": name[:-4], "image_path": name, "relation_name": relation} | texts | box

    rows = [row("1.jpg", "on", 3, 10), row("2.jpg", "left of", 0, 60), row("1.jpg", "under", 5, 30)]
    write(root / "visual_genome_relation.json", rows)

    def pair(number: int) -> dict[str, Any]:
        told = rows[number]
        x, width = told["bbox_x"], told["bbox_w"]
        captions = {"caption": told["true_caption"], "negative_caption": told["false_caption"]}
        return {"id": str(number)} | captions | {"kind": told["relation_name"], "box": [x, 2.0, x + width, 22.0]}

    return {
        "test": [
            {"image": files["1.jpg"], "image_id": "1.jpg", "pairs": _pairs(pair(0), pair(2))},
            {"image": files["2.jpg"], "image_id": "2.jpg", "pairs": _pairs(pair(1))},
        ]
    }


def valse(root: Path) -> dict[str, list[dict[str, Any]]]:
    """All of VALSE's instruments, each with an example that its annotators found valid and one not; returns records."""
    instruments = (
        "existence", "plurals", "counting-hard", "counting-small-quant", "counting-adversarial", "relations",
        "action-replacement", "actant-swap", "coreference-standard", "coreference-hard", "foil-it",
    )  # fmt: skip
    place = "FOIL dataset/COCO_val2014_000000000042.jpg"
    file = write(root / place, picture(90, file_format="JPEG"))
    pairs = []
    for instrument in instruments:
        texts = {"caption": f"{instrument} is here", "foil": f"no {instrument} is here"}
        about = {"dataset": "FOIL dataset", "image_file": Path(place).name} | texts
        votes = [{"foil": 0, "caption": count, "other": 3 - count} for count in (3, 1)]
        rows = {f"foil_{number}": about | {"mturk": vote} for number, vote in enumerate(votes)}
        write(root / "data" / f"{instrument}.json", rows)
        captions = {"caption": texts["caption"], "negative_caption": texts["foil"]}
        pairs.append({"id": f"{instrument}/foil_0"} | captions | {"kind": instrument})
    return {"test": [{"image": file, "image_id": place, "pairs": _pairs(*pairs)}]}
