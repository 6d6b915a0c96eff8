import jax.numpy as jnp
import numpy as np
import pytest
from pairs import BATCH, WIDTH, assert_sharded_equals_one_device, expected_logits, head, output
from sklearn.metrics import top_k_accuracy_score

from vla_jax.data.text import Tokenize, train_word_tokenizer
from vla_jax.errors import UserError
from vla_jax.tasks.classification import (
    Classification,
    PrototypeClassification,
    ZeroShotClassification,
    class_texts,
    within,
)

CLASSES = 5
TASK = Classification("answers", CLASSES)
LABELS = np.random.default_rng(5).integers(0, CLASSES, BATCH).astype(np.int32)
VALID = np.arange(BATCH) % 5 != 3


def _expected(rows):
    """The mean cross-entropy and accuracy over some rows, one at a time."""
    losses, right = [], []
    for i in rows:
        logits = expected_logits(head(4 * WIDTH, CLASSES), output())[i]
        losses.append(-np.log(np.exp(logits[LABELS[i]]) / sum(np.exp(logits))))
        right.append(max(range(CLASSES), key=lambda k, logits=logits: logits[k]) == LABELS[i])
    return np.mean(losses), np.mean(right)


def test_loss_and_accuracy_are_those_of_a_loop():
    loss, metrics = TASK.loss(head(4 * WIDTH, CLASSES), output(), {"label": jnp.asarray(LABELS)})
    expected, accuracy = _expected(range(BATCH))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], accuracy, rtol=1e-6)


def test_padding_rows_do_not_count():
    batch = {"label": jnp.asarray(np.where(VALID, LABELS, 0)), "valid": jnp.asarray(VALID)}
    loss, metrics = TASK.loss(head(4 * WIDTH, CLASSES), output(), batch)
    expected, accuracy = _expected(np.flatnonzero(VALID))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], accuracy, rtol=1e-6)


def test_predictions_are_the_largest_logits():
    found = TASK.predict(head(4 * WIDTH, CLASSES), output(), {"label": jnp.asarray(LABELS)})
    largest = expected_logits(head(4 * WIDTH, CLASSES), output()).argmax(-1)
    np.testing.assert_array_equal(found["prediction"], largest)
    np.testing.assert_array_equal(found["correct"], largest == LABELS)
    assert found["prediction"].dtype == jnp.int32


def test_a_new_head_finds_every_class_equally_likely():
    loss, _ = TASK.loss(TASK.init(4 * WIDTH), output(), {"label": jnp.asarray(LABELS)})
    np.testing.assert_allclose(loss, np.log(CLASSES), rtol=1e-6)


def test_the_loss_is_a_mean_over_all_devices():
    batch = {"label": jnp.asarray(LABELS), "valid": jnp.asarray(VALID)}
    assert_sharded_equals_one_device(TASK, head(4 * WIDTH, CLASSES), batch)


def test_one_class_is_refused():
    with pytest.raises(UserError, match="at least 2 classes, got 1"):
        Classification("answers", 1)


def test_confidence_and_the_five_likeliest():
    task = Classification("answers", 8)
    logits = expected_logits(head(4 * WIDTH, 8), output())
    labels = np.random.default_rng(1).integers(0, 8, BATCH).astype(np.int32)
    found = task.predict(head(4 * WIDTH, 8), output(), {"label": jnp.asarray(labels)})
    powers = np.exp(logits - logits.max(1, keepdims=True))
    np.testing.assert_allclose(found["confidence"], (powers / powers.sum(1, keepdims=True)).max(1), rtol=1e-4)
    share = top_k_accuracy_score(labels, logits, k=5, labels=np.arange(8))
    np.testing.assert_allclose(np.mean(found["top_5"]), share)
    assert 0 < share < 1


def test_equal_logits_count_against_the_model():
    logits = jnp.array([[1.0, 1, 0], [2, 1, 0], [jnp.nan, 1, 0]])
    np.testing.assert_array_equal(within(logits, jnp.array([0, 0, 1]), 1), [False, True, False])
    np.testing.assert_array_equal(within(logits, jnp.array([0, 0, 1]), 2), [True, True, True])


def _cosines(first, second):
    unit = lambda a: a / np.linalg.norm(a, axis=-1, keepdims=True)  # noqa: E731
    return unit(np.asarray(first, np.float64)) @ unit(np.asarray(second, np.float64)).T


def test_prototypes_are_compared_by_scaled_cosines():
    task, given = PrototypeClassification("classes", CLASSES), output().replace(scale=jnp.float32(3))
    drawn = np.random.default_rng(2).normal(0, 4, (CLASSES, WIDTH)).astype(np.float32)
    params = {"prototypes": jnp.asarray(drawn), "log_scale": jnp.log(jnp.float32(2))}
    np.testing.assert_allclose(
        task.logits(params, given), 6 * _cosines(given.image_features, drawn), rtol=1e-4, atol=1e-5
    )
    new = task.init(WIDTH)
    assert new["prototypes"].shape == (CLASSES, WIDTH)
    assert np.linalg.matrix_rank(new["prototypes"]) == CLASSES


def test_prototypes_of_examples_classify_them():
    generator = np.random.default_rng(3)
    labels = np.repeat(np.arange(CLASSES), 4)
    features = (np.eye(CLASSES, WIDTH)[labels] + 0.05 * generator.normal(size=(20, WIDTH))).astype(np.float32)
    task = PrototypeClassification("classes", CLASSES)
    params = task.from_examples(features, labels)
    given = output(batch=20).replace(image_features=jnp.asarray(features))
    np.testing.assert_array_equal(jnp.argmax(task.logits(params, given), -1), labels)


NAMES, TEMPLATES = ("red circle", "blue square", "circle"), ("a photo of a {}", "the {}")


@pytest.fixture(scope="module")
def tokenize(tmp_path_factory):
    words = ["a", "photo", "of", "the", "red", "blue", "circle", "square"]
    return Tokenize(train_word_tokenizer(words, tmp_path_factory.mktemp("tokenizer"), context_length=16), 10)


def test_names_in_templates_are_a_tasks_own_texts(tokenize):
    task = ZeroShotClassification.of_names("classes", NAMES, TEMPLATES, tokenize)
    assert class_texts(NAMES, TEMPLATES)[:3] == [
        "a photo of a red circle",
        "the red circle",
        "a photo of a blue square",
    ]
    tokens, mask = task.texts
    expected_tokens, expected_mask = tokenize.batch(class_texts(NAMES, TEMPLATES))
    np.testing.assert_array_equal(tokens, expected_tokens)
    np.testing.assert_array_equal(mask, expected_mask)
    assert hash(task) == hash(ZeroShotClassification.of_names("classes", NAMES, TEMPLATES, tokenize))


def test_zero_shot_logits_are_cosines_with_ensembles(tokenize):
    task = ZeroShotClassification.of_names("classes", NAMES, TEMPLATES, tokenize)
    given = output().replace(scale=jnp.float32(5))
    texts = np.random.default_rng(4).normal(0, 2, (6, WIDTH)).astype(np.float32)
    unit = texts / np.linalg.norm(texts, axis=1, keepdims=True)
    means = unit.reshape(3, 2, WIDTH).mean(1)
    expected = 5 * _cosines(given.image_features, means)
    labels = {"label": jnp.zeros(BATCH, jnp.int32)}
    shared = task.logits(task.init(1), given.replace(text_features=jnp.asarray(texts)), labels)
    np.testing.assert_allclose(shared, expected, rtol=1e-4, atol=1e-5)
    # One row a pair, as adapters between the towers need it.
    pairs = given.replace(
        image_features=jnp.repeat(given.image_features, 6, axis=0), text_features=jnp.tile(texts, (BATCH, 1))
    )
    np.testing.assert_allclose(task.logits(task.init(1), pairs, labels), expected, rtol=1e-4, atol=1e-5)


def test_zero_shot_mistakes_are_named(tokenize):
    with pytest.raises(UserError, match="given twice: 'circle'"):
        ZeroShotClassification.of_names("classes", ("circle", "circle"), TEMPLATES, tokenize)
    with pytest.raises(UserError, match="as many texts as the others"):
        ZeroShotClassification("classes", ((1, 2), (1, 2), (1, 2)), (2, 2, 2), 2)
    task = ZeroShotClassification.of_names("classes", NAMES, TEMPLATES, tokenize)
    with pytest.raises(UserError, match="both modalities"):
        task.logits(task.init(1), output(text=False), {"label": jnp.zeros(BATCH, jnp.int32)})
