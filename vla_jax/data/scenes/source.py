"""Examples of generated scenes by index: no files, no state, any number of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from random import Random
from typing import Any

from vla_jax.data.scenes import captions, complete, quadruples, statements
from vla_jax.data.scenes.render import annotations, object_arrays, object_box, patch_labels, render
from vla_jax.data.scenes.sampling import NoContent, Scene, SceneConfig, allowed_ids, check_split, draw_scene, seeded
from vla_jax.data.scenes.shifted import render_shifted
from vla_jax.data.scenes.vocabulary import ANSWERS, COLORS, SHAPES
from vla_jax.errors import UserError, unknown

Example = dict[str, Any]
_ATTEMPTS = 50
_TAGS = ("tag", "secondary_tag", "num_main_preds", "collapsed_tag")


class SceneSource:
    """Random access to examples of one kind: ``source[i]`` is a pure function of (seed, split, kind, i).

    Every example is a dict with ``image``, uint8 [size, size, 3], and ``scene``, the annotations that JSON can hold
    (``quadruples``: ``image_0``, ``image_1``, ``scene_0``, ``scene_1``). Besides these:

    - ``captions``: ``caption``, ``caption_kind``
    - ``twins``: ``caption``, ``twin_image``, ``twin_caption``, ``twin_scene``, ``swapped``
    - ``statements``: ``text``, ``label`` (1 true, 0 false), ``statement_kind``
    - ``questions``: ``question``, ``answer``, ``answer_id`` (index in ``vocabulary.ANSWERS``), ``question_kind``
    - ``phrases``: ``phrase``, ``box`` (pixels, x0 y0 x1 y1)
    - ``classes``: ``label`` (shape id), ``class_name``, ``color_label``, ``color_name``; one object
    - ``complete``: all of this of one scene of three objects and more. ``captions``; ``questions``, ``answers``,
      ``answer_ids``, ``question_kinds``, one of each kind; ``statements``, ``statement_labels``, ``statement_kinds``, a
      true and a false one of each kind; ``phrases``, ``boxes`` (as ``box``), one of each object; the largest
      object's ``label``, ``class_name``, ``color_label``, ``color_name``; a second picture ``image_1``, ``scene_1``,
      and ``caption_0``, ``caption_1``, ``tag``, ``secondary_tag``, ``num_main_preds``, ``collapsed_tag``
    - ``quadruples``: ``id``, ``caption_0``, ``caption_1``, ``tag``, ``secondary_tag``, ``num_main_preds``,
      ``collapsed_tag``

    With ``config.patch_grid`` captions and twins also carry ``patch_labels``, int32 [grid, grid, 4], and ``objects``
    (see :func:`render.object_arrays`); twins also ``twin_patch_labels`` and ``twin_objects``.

    Args:
        split: ``train``, ``validation`` or ``test``; their scenes share no content.
        kind: one of :data:`KINDS`.
        config: what scenes look like and what is said; the defaults if not given.
        length: number of examples; the configuration's if not given.

    Raises:
        UserError: unknown split or kind, or a length below one; reading an example, that the configuration leaves
            nothing to draw it from.
    """

    def __init__(self, split: str, kind: str, config: SceneConfig | None = None, length: int | None = None):
        if kind not in _MAKERS:
            raise unknown("kind of example", kind, KINDS)
        self.split = check_split(split)
        self.kind = kind
        self.config = SceneConfig() if config is None else config
        self.length = self.config.length if length is None else length
        if self.length < 1:
            raise UserError(f"length {self.length} must be at least 1")

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Example:
        index = int(index)
        if not -self.length <= index < self.length:
            raise IndexError(f"example {index} of {self.length}")
        index %= self.length
        rng = seeded(self.config.seed, self.split, self.kind, index)
        for _ in range(_ATTEMPTS - 1):
            # Small splits of narrow configurations lack some contents: then something else is asked for.
            with contextlib.suppress(NoContent):
                return _MAKERS[self.kind](rng, self.config, self.split, index)
        return _MAKERS[self.kind](rng, self.config, self.split, index)

    def __repr__(self) -> str:
        return f"SceneSource({self.split!r}, {self.kind!r}, {self.config!r}, length={self.length})"


def _seen(scene: Scene, config: SceneConfig) -> Example:
    size = config.image_size
    image = render(scene, size) if config.shift is None else render_shifted(scene, config.shift, size)
    return {"image": image, "scene": annotations(scene, size)}


def _supervision(scene: Scene, config: SceneConfig, prefix: str = "") -> Example:
    if not config.patch_grid:
        return {}
    return {
        f"{prefix}patch_labels": patch_labels(scene, config.patch_grid, config.image_size),
        f"{prefix}objects": object_arrays(scene, config.image_size),
    }


def _captions(rng: Random, config: SceneConfig, split: str, index: int) -> Example:
    scene, kind = captions.draw_captioned_scene(rng, config, split)
    text = captions.caption(scene, rng, kind)
    return _seen(scene, config) | {"caption": text, "caption_kind": kind} | _supervision(scene, config)


def _twins(rng: Random, config: SceneConfig, split: str, index: int) -> Example:
    scene, twin, caption, twin_caption, swapped = quadruples.draw_twins(rng, config, split)
    example = _seen(scene, config) | {"caption": caption, "twin_caption": twin_caption, "swapped": swapped}
    example |= {f"twin_{key}": value for key, value in _seen(twin, config).items()}
    return example | _supervision(scene, config) | _supervision(twin, config, "twin_")


def _statements(rng: Random, config: SceneConfig, split: str, index: int) -> Example:
    scene, text, label, kind = statements.draw_statement(rng, config, split)
    return _seen(scene, config) | {"text": text, "label": label, "statement_kind": kind}


def _questions(rng: Random, config: SceneConfig, split: str, index: int) -> Example:
    scene, question, answer, kind = statements.draw_question(rng, config, split)
    words = {"question": question, "answer": answer, "answer_id": ANSWERS.index(answer), "question_kind": kind}
    return _seen(scene, config) | words


def _phrases(rng: Random, config: SceneConfig, split: str, index: int) -> Example:
    scene, phrase, chosen = statements.draw_phrase(rng, config, split)
    box = list(object_box(scene.objects[chosen], config.image_size))
    return _seen(scene, config) | {"phrase": phrase, "box": box}


def _classes(rng: Random, config: SceneConfig, split: str, index: int) -> Example:
    pinned = {name: rng.choice(allowed_ids(config, name)) for name in ("shape", "color")}
    scene = draw_scene(rng, config, split, count=1, pinned=[pinned])
    names = {"class_name": SHAPES[pinned["shape"]], "color_name": COLORS[pinned["color"]]}
    return _seen(scene, config) | {"label": pinned["shape"], "color_label": pinned["color"]} | names


def _quadruples(rng: Random, config: SceneConfig, split: str, index: int) -> Example:
    drawn = quadruples.draw_quadruple(rng, config, split)
    example: Example = {"id": index}
    for number, (scene, text) in enumerate(zip(drawn.scenes, drawn.captions, strict=True)):
        example |= {f"{key}_{number}": value for key, value in _seen(scene, config).items()}
        example[f"caption_{number}"] = text
    return example | {name: getattr(drawn, name) for name in _TAGS}


def _complete(rng: Random, config: SceneConfig, split: str, index: int) -> Example:
    drawn = complete.draw_complete(rng, config, split)
    questions = complete.questions_of(drawn, rng, config)
    told = complete.statements_of(drawn, rng, config)
    quadruple = complete.quadruple_of(drawn, rng)
    answers = [answer for _, answer, _ in questions]
    return (
        _seen(drawn.scene, config)
        | {"captions": complete.captions_of(drawn, rng, config)}
        | {"questions": [question for question, _, _ in questions], "answers": answers}
        | {"answer_ids": [ANSWERS.index(answer) for answer in answers]}
        | {"question_kinds": [kind for _, _, kind in questions]}
        | dict(
            zip(("statements", "statement_labels", "statement_kinds"), map(list, zip(*told, strict=True)), strict=True)
        )
        | {"phrases": complete.phrases_of(drawn, rng)}
        | {"boxes": [list(object_box(thing, config.image_size)) for thing in drawn.scene.objects]}
        | complete.class_of(drawn)
        | {f"{key}_1": value for key, value in _seen(quadruple.scenes[1], config).items()}
        | {f"caption_{number}": text for number, text in enumerate(quadruple.captions)}
        | {name: getattr(quadruple, name) for name in _TAGS}
    )


_MAKERS: dict[str, Callable[[Random, SceneConfig, str, int], Example]] = {
    "captions": _captions,
    "twins": _twins,
    "statements": _statements,
    "questions": _questions,
    "phrases": _phrases,
    "classes": _classes,
    "complete": _complete,
    "quadruples": _quadruples,
}

KINDS = tuple(_MAKERS)
