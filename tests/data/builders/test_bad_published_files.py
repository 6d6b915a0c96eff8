"""What can be wrong with the files of each published data set is said before anything is written."""

from __future__ import annotations

import pickle
import re

import pytest
from published_layouts import (
    coco_captions,
    edit,
    flickr30k,
    gqa,
    nlvr,
    nlvr2,
    picture,
    refcoco,
    reference,
    vqav2,
    vsr,
    write,
)

from vla_jax.data.flattened import load_examples
from vla_jax.data.sources import load_source
from vla_jax.errors import UserError


def refused(tmp_path, name, message, config=None, split="train"):
    """Builds a data set from ``tmp_path``, which must fail with a message and leave nothing behind."""
    data = tmp_path / "prepared"
    with pytest.raises(UserError, match=message) as caught:
        load_source(name, split, data, config, manual_dir=tmp_path)
    assert not list(data.rglob("*.array_record*"))
    assert not list(data.rglob("dataset_info.json"))
    return str(caught.value)


MANUAL = ("vqav2", "gqa", "coco_captions", "flickr30k", "nlvr", "nlvr2", "vsr", "refcoco")
PROBES = ("winoground", "sugarcrepe", "aro", "valse")


@pytest.mark.parametrize("name", MANUAL + PROBES)
def test_an_empty_or_absent_folder_says_what_to_download(tmp_path, name):
    folder = tmp_path / "manual"
    with pytest.raises(UserError, match=r"folder that is not there; looked in .*manual \(manual_dir\)\.\n.*https://"):
        load_source(name, "train", tmp_path / "data", manual_dir=folder)
    folder.mkdir()
    with pytest.raises(UserError, match=r"(?s)looked in .*manual \(manual_dir\)\.\n.*https://"):
        load_source(name, "train", tmp_path / "data", manual_dir=folder)
    # Without a folder it is TFDS's usual one.
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "data" / "downloads" / "manual"))):
        load_source(name, "train", tmp_path / "data")


def test_vqav2_files_belong_together(tmp_path):
    vqav2(tmp_path)
    file = tmp_path / "v2_mscoco_train2014_annotations.json"
    content = file.read_text()
    file.unlink()
    refused(tmp_path, "vqav2", r"needs v2_mscoco_train2014_annotations\.json or Annotations/")
    write(file, content)
    edit(file, lambda found: found["annotations"][0].update(image_id=10))
    refused(tmp_path, "vqav2", r"row 1: the question 9000 is on picture 9, and its answers are on picture 10")
    write(file, content)
    edit(file, lambda found: found["annotations"].pop(0))
    refused(tmp_path, "vqav2", r"questions\.json, row 2: the question 9000 has no answers in the file")
    write(file, content)
    edit(file, lambda found: found["annotations"].append(found["annotations"][0] | {"question_id": 8}))
    refused(tmp_path, "vqav2", r"annotations\.json, row 4: answers to a question 8 that is not in")
    write(file, content)
    (tmp_path / "v2_OpenEnded_mscoco_train2014_questions.json").unlink()
    refused(tmp_path, "vqav2", r"needs v2_OpenEnded_mscoco_train2014_questions\.json")


def test_vqav2_rows(tmp_path):
    vqav2(tmp_path)
    questions = tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json"
    annotations = tmp_path / "v2_mscoco_val2014_annotations.json"
    kept = questions.read_text(), annotations.read_text()

    def broken(message, of_questions=None, of_annotations=None):
        for file, change in ((questions, of_questions), (annotations, of_annotations)):
            if change:
                edit(file, change)
        refused(tmp_path, "vqav2", message)
        write(questions, kept[0])
        write(annotations, kept[1])

    broken("row 1: the question 42000 has no answers", None, lambda a: a["annotations"][0].update(answers=[]))
    broken(
        r"row 1: 'answer' must be a text", None, lambda a: a["annotations"][0]["answers"][3].update(answer=["a", "b"])
    )
    broken("row 2: the question_id 42000 stands twice", lambda q: q["questions"].append(q["questions"][0]))
    broken("row 2: the question_id 42000 stands twice", None, lambda a: a["annotations"].append(a["annotations"][0]))
    broken("row 1: the field 'question' is missing", lambda q: q["questions"][0].pop("question"))
    broken("row 1: 'image_id' must be a whole number", lambda q: q["questions"][0].update(image_id="COCO_42"))
    broken(
        "the split 'validation' of the data set 'vqav2' is empty",
        lambda q: q["questions"].clear(),
        lambda a: a["annotations"].clear(),
    )
    write(questions, kept[0][:-5])
    refused(tmp_path, "vqav2", rf"{questions}: no valid JSON at line 1")


def test_pictures_that_are_missing(tmp_path):
    vqav2(tmp_path)
    (tmp_path / "test2015" / "COCO_test2015_000000000001.jpg").unlink()
    (tmp_path / "train2014" / "COCO_train2014_000000000009.jpg").unlink()
    message = refused(tmp_path, "vqav2", r"3 picture\(s\) that annotations of 'vqav2' speak of are missing")
    assert "COCO_train2014_000000000009.jpg" in message
    assert "v2_OpenEnded_mscoco_train2014_questions.json, row 2" in message


def test_a_split_without_files_is_left_out_and_missed_when_asked_for(tmp_path):
    vqav2(tmp_path / "manual")
    for file in (tmp_path / "manual").glob("*test*.json"):
        file.unlink()
    data = tmp_path / "data"
    assert len(load_examples("vqav2", "train", data, manual_dir=tmp_path / "manual")) == 3
    for load in (load_source, load_examples):
        with pytest.raises(
            UserError, match=r"'test' of the data set 'vqav2' was not built, for want of v2_OpenEnded_mscoco_test2015"
        ):
            load("vqav2", "test[:1]", data)
        with pytest.raises(UserError, match="did you mean 'validation'"):
            load("vqav2", "valid", data)


def test_gqa(tmp_path):
    gqa(tmp_path)
    file = tmp_path / "train_balanced_questions.json"
    content = file.read_text()
    edit(file, lambda found: found["07333408"].pop("answer"))
    refused(tmp_path, "gqa", r"train_balanced_questions\.json, row '07333408': the question has no answer")
    write(file, content.replace("07333408", "02930152"))
    refused(tmp_path, "gqa", "the id '02930152' stands twice")
    write(file, "[]")
    refused(tmp_path, "gqa", "expected an object with questions by id")
    write(file, content)
    (tmp_path / "images" / "2354786.jpg").unlink()
    refused(tmp_path, "gqa", r"2354786\.jpg \(.*train_balanced_questions\.json, row '02930152'\)")


def test_gqa_of_all_questions_in_ten_parts(tmp_path):
    gqa(tmp_path)
    examples = load_examples("gqa", "train", tmp_path / "data", "all", manual_dir=tmp_path)
    ids = [examples[place]["question_id"].decode() for place in range(len(examples))]
    assert ids == [f"{part}1" for part in range(10)] + [f"{part}2" for part in range(10)]
    assert len(load_source("gqa", "train", tmp_path / "data", "all")) == 2
    part = tmp_path / "train_all_questions" / "train_all_questions_3.json"
    content = part.read_text()
    write(part, content.replace('"32"', '"02"'))
    refused(tmp_path, "gqa", r"train_all_questions_3\.json, row '02': the question id '02' stands twice", "all")
    part.unlink()
    refused(tmp_path, "gqa", r"of the 10 parts in .*, train_all_questions_3\.json are missing", "all")


def test_captions(tmp_path):
    coco_captions(tmp_path)
    file = tmp_path / "dataset_coco.json"
    content = file.read_text()

    def broken(message, change):
        edit(file, change)
        refused(tmp_path, "coco_captions", message)
        write(file, content)

    broken("row 2: unknown split 'trian'; did you mean 'train'", lambda f: f["images"][1].update(split="trian"))
    broken("row 5: the picture '391895' stands twice", lambda f: f["images"].append(f["images"][0]))
    broken("row 1: the picture 391895 has no captions", lambda f: f["images"][0].update(sentences=[]))
    broken("row 3: the sentid 770337 stands twice", lambda f: f["images"][2]["sentences"][0].update(sentid=770337))
    broken("row 1: 'raw' must be a text", lambda f: f["images"][0]["sentences"][1].update(raw=None))
    broken("needs train2015 or images/train2015", lambda f: f["images"][1].update(filepath="train2015"))
    broken("the split 'test' of the data set 'coco_captions' is empty", lambda f: f["images"].pop(0))
    broken("expected an object with a list 'images'", lambda f: f.pop("images"))
    (tmp_path / "val2014" / "COCO_val2014_000000184613.jpg").unlink()
    refused(tmp_path, "coco_captions", r"1 picture\(s\).*COCO_val2014_000000184613\.jpg \(.*row 4\)")


def test_flickr30k(tmp_path):
    flickr30k(tmp_path)
    (tmp_path / "flickr30k-images").rename(tmp_path / "elsewhere")
    refused(tmp_path, "flickr30k", "needs flickr30k-images")


def test_flickr30k_entities(tmp_path):
    flickr30k(tmp_path)
    tokens, train = tmp_path / "results_20130124.token", tmp_path / "train.txt"
    content, names = tokens.read_text(), train.read_text()
    for changed, message in {
        content.replace("#3", "3", 1): r"token, row 4: a line is a picture's name, '#', a number, a tab and a caption",
        content.replace("\tTwo", "\t", 1): "row 2: a line is",
        content.replace("#1\t", "#0\t", 1): r"row 2: the caption '1000268201\.jpg#0' stands twice.*in row 1",
        content.replace("1000092795", "1000092796"): r"train\.txt, row 1: the picture '1000092795' has no caption in ",
    }.items():
        write(tokens, changed)
        refused(tmp_path, "flickr30k", message, config="entities")
    write(tokens, content)
    write(train, names + (tmp_path / "test.txt").read_text())
    refused(tmp_path, "flickr30k", r"test\.txt, row 1: the picture '10002456' stands twice", config="entities")
    train.unlink()
    tokens.unlink()
    refused(tmp_path, "flickr30k", r"needs results_20130124\.token", config="entities")


def test_nlvr(tmp_path):
    nlvr(tmp_path)
    file = tmp_path / "nlvr" / "train" / "train.json"
    content = file.read_text()
    write(file, content + content)
    refused(tmp_path, "nlvr", r"train\.json, row 2: the identifier '1572-0' stands twice; the first is in row 1")
    write(file, content.replace('"true"', '"maybe"', 1))
    refused(tmp_path, "nlvr", r"row 1: 'label' must be true or false \(or 1 or 0\); found 'maybe'")
    write(file, content + content[:40])
    refused(tmp_path, "nlvr", r"train\.json, row 2: no valid JSON")
    write(file, content)
    (tmp_path / "nlvr" / "train" / "images" / "17" / "train-1572-0-4.png").unlink()
    refused(tmp_path, "nlvr", r"1 picture\(s\).*train-1572-0-4\.png")


def test_nlvr2(tmp_path):
    nlvr2(tmp_path)
    file = tmp_path / "nlvr2" / "data" / "train.json"
    content = file.read_text()
    write(file, content + content.splitlines()[1])
    refused(tmp_path, "nlvr2", r"row 4: the identifier 'train-22-1-0' stands twice; the first is in row 2")
    write(file, content.replace("train-22-1-0", "train"))
    refused(tmp_path, "nlvr2", "row 2: the identifier 'train' does not read split-set-pair-sentence")
    write(file, "")
    refused(tmp_path, "nlvr2", "the split 'train' of the data set 'nlvr2' is empty")
    write(file, content)
    (tmp_path / "images" / "train" / "4" / "train-10108-0-img1.png").unlink()
    refused(tmp_path, "nlvr2", r"1 picture\(s\).*train-10108-0-img1\.png \(.*row 1\)")


def test_vsr(tmp_path):
    vsr(tmp_path)
    zeroshot = load_examples("vsr", "test", tmp_path / "data", "zeroshot", manual_dir=tmp_path)
    assert [zeroshot[0]["text"], zeroshot[0]["label"]] == [b"The cat is on the refrigerator.", 1]
    file = tmp_path / "splits" / "random" / "train.jsonl"
    content = file.read_text()
    write(file, content + content.splitlines()[2])
    refused(tmp_path, "vsr", r"row 4: the statement of a picture .* stands twice; the first is in row 3")
    write(file, content.replace('"label": 0', '"label": 2'))
    refused(tmp_path, "vsr", "row 1: 'label' must be true or false")
    write(file, content)
    (tmp_path / "images" / "000000155777.jpg").unlink()
    refused(tmp_path, "vsr", r"2 picture\(s\).*random/train\.jsonl, row 2.*random/dev\.jsonl, row 1")


def test_refcoco_boxes_and_pictures(tmp_path):
    refcoco(tmp_path)
    file = tmp_path / "refcoco" / "instances.json"
    content = file.read_text()

    def broken(message, change):
        edit(file, change)
        refused(tmp_path, "refcoco", message)
        write(file, content)

    def box(number, values):
        return lambda f: f["annotations"][number].update(bbox=values)

    broken(
        r"row 1: the box \[30, 2, 12, 20\].*1719310 lies outside its picture 581857, which is 40 x 30",
        box(0, [30, 2, 12, 20]),
    )
    broken("row 1: the box .* lies outside its picture", box(0, [-3, 2, 12, 20]))
    broken("row 1: the box .* has a negative or no size", box(0, [3, 2, -1, 20]))
    broken("row 1: the box .* has a negative or no size", box(0, [3, 2, float("nan"), 20]))
    broken("row 1: 'bbox' must be x, y, width, height", box(0, [3, 2, 20]))
    broken("row 1: the object 1719310 has a box without an area", box(0, [3, 2, 0, 20]))
    broken(r"row 2: no object 43992 of the picture 98304 is in", lambda f: f["annotations"].pop(2))
    broken("row 2: the id among 'images' 581857 stands twice", lambda f: f["images"][1].update(id=581857))
    broken("row 2: no category 62 is in", lambda f: f["categories"].pop())
    broken("in a picture 98304 that is not among the images", lambda f: f["images"].pop())
    folder = tmp_path / "train2014"
    write(folder / "COCO_train2014_000000581857.jpg", picture(1, size=(20, 15), file_format="JPEG"))
    refused(tmp_path, "refcoco", r"is 20 x 15 and its boxes are for 40 x 30; use the published pictures")
    write(folder / "COCO_train2014_000000581857.jpg", b"no picture")
    refused(tmp_path, "refcoco", r"COCO_train2014_000000581857\.jpg cannot be opened")
    (folder / "COCO_train2014_000000581857.jpg").unlink()
    refused(tmp_path, "refcoco", r"refs\(unc\)\.p, row 1")


def test_refcoco_references(tmp_path):
    refcoco(tmp_path)
    file = tmp_path / "refcoco" / "refs(unc).p"
    whole = reference(0, 1719310, 581857, 1, "train", {0: "a shirt"})
    for message, references in {
        "row 2: the ref_id 0 stands twice": [whole, whole],
        "row 2: the sent_id 0 stands twice": [whole, whole | {"ref_id": 1}],
        "row 1: the reference 0 has no phrases": [whole | {"sentences": []}],
        "row 1: unknown split 'testC'": [whole | {"split": "testC"}],
        "row 1: no object 1719310 of the picture 98304": [whole | {"image_id": 98304}],
        "row 1: expected an object with named fields": ["text"],
        "expected a list of references": {},
        "not the published pickle": {pickle.PickleBuffer: 1},
    }.items():
        write(file, pickle.dumps(references))
        refused(tmp_path, "refcoco", message)
    file.unlink()
    refused(tmp_path, "refcoco", r"needs refcoco/refs\(unc\)\.p")
    with pytest.raises(UserError, match="did you mean 'refcocog_umd' or 'refcoco_unc'"):
        load_source("refcoco", "train", tmp_path, "refcoco_umd", manual_dir=tmp_path)
