"""TIES, DARE and trimmed sums against their definitions, entry by entry, and against peft on the same tensors."""

from __future__ import annotations

import math

import jax
import numpy as np
import pytest
from trained_clip import AFFINE, LORA, assert_same_changes, backbone, changes, trained

from vla_jax.algebra import Adapter, combine, scale
from vla_jax.algebra.sparsify import drop, elect, trim
from vla_jax.algebra.sums import SPARSE
from vla_jax.names import flatten

RANK = 100  # whole: what is sparse has no low rank


def of(adapter: Adapter) -> dict[str, np.ndarray]:
    return changes(adapter, backbone())


def tensors(count: int = 3) -> list[np.ndarray]:
    return list(np.random.default_rng(0).standard_normal((count, 7, 5)))


def trimmed_by_hand(update: np.ndarray, density: float) -> np.ndarray:
    kept = np.zeros_like(update)
    by_size = sorted(np.ndindex(update.shape), key=lambda at: -abs(update[at]))
    for at in by_size[: math.floor(density * update.size)]:
        kept[at] = update[at]
    return kept


def elected_by_hand(updates: list[np.ndarray]) -> np.ndarray:
    result = np.zeros_like(updates[0])
    for at in np.ndindex(result.shape):
        values = [update[at] for update in updates]
        positive = sum(value for value in values if value > 0)
        negative = -sum(value for value in values if value < 0)
        sign = 1 if positive >= negative else -1
        agreeing = [value for value in values if value * sign > 0]
        result[at] = sum(agreeing) / len(agreeing) if agreeing else 0.0
    return result


@pytest.mark.parametrize("density", [0.02, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("setting", ["lora", "biases", "ia3"])
def test_ties_and_pruning_equal_the_definition(setting, density):
    placement, weights = (LORA | AFFINE)[setting], [0.5, -1.5, 1.0]
    adapters = [trained(placement, seed=seed) for seed in range(3)]
    if setting == "lora":
        every = [of(adapter) for adapter in adapters]
        undo = lambda entries: entries  # noqa: E731
    else:  # vectors, of which scales count from one
        every = [{k: v - k.endswith("scale") for k, v in _vectors(adapter).items()} for adapter in adapters]
        undo = lambda entries: {k: v + k.endswith("scale") for k, v in entries.items()}  # noqa: E731
    for how in ("ties", "magnitude_prune"):
        expected = {}
        for label in every[0]:
            if setting == "lora" and label.split("/")[-2] == "bias":
                continue
            sparse = [trimmed_by_hand(w * one[label], density) for w, one in zip(weights, every, strict=True)]
            expected[label] = elected_by_hand(sparse) if how == "ties" else np.sum(sparse, 0)
        rank = {"rank": RANK} if setting == "lora" else {}
        result = combine(adapters, weights, how, density=density, **rank)
        ours = of(result) if setting == "lora" else _vectors(result)
        assert_same_changes(ours, undo(expected), 1e-5)


def _vectors(adapter: Adapter) -> dict[str, np.ndarray]:
    return {
        f"{k}:{path}": leaf
        for path, stack in flatten(adapter.params).items()
        for k, leaf in enumerate(np.asarray(stack, np.float64))
    }


def test_a_weight_is_a_scale():
    one, other = trained(LORA["rslora"]), trained(LORA["rslora"], seed=2)
    settings = {"density": 0.3, "rank": RANK}
    direct = combine([one, other], [3.0, -0.5], "ties", **settings)
    scaled = combine([scale(one, 3.0), scale(other, -0.5)], [1.0, 1.0], "ties", **settings)
    assert_same_changes(of(scaled), of(direct))


def test_dare_drops_the_share_it_names_and_keeps_the_mean():
    update, density = np.full((200, 300), 2.0), 0.3
    dropped = drop(update, density, jax.random.key(1))
    np.testing.assert_allclose(np.unique(dropped), [0.0, 2.0 / 0.3])
    deviation = math.sqrt(density * (1 - density) / update.size)
    assert abs(np.mean(dropped != 0) - density) < 5 * deviation
    assert abs(np.mean(dropped) - 2.0) < 5 * 2.0 / density * deviation


@pytest.mark.parametrize("how", ["dare_linear", "dare_ties"])
def test_dare_draws_for_every_adapter_kernel_and_key(how):
    one, other = trained(LORA["lora"]), trained(LORA["lora"], seed=2)
    settings = {"density": 0.4, "rank": RANK}
    first = combine([one, other], [1.0, -2.0], how, key=jax.random.key(0), **settings)
    again = combine([one, other], [1.0, -2.0], how, key=jax.random.key(0), **settings)
    different = combine([one, other], [1.0, -2.0], how, key=jax.random.key(1), **settings)
    assert_same_changes(of(again), of(first), 0.0)
    masks = {}
    for result in (first, different):
        for label, change in of(result).items():
            if "attn/q/kernel" in label or "attn/v/kernel" in label:
                masks[len(masks), label] = np.abs(change) > 1e-5
    shapes = {mask.shape for mask in masks.values()}
    for shape in shapes:
        own = [mask for mask in masks.values() if mask.shape == shape]
        assert all((a != b).any() for k, a in enumerate(own) for b in own[:k])
    if how == "dare_linear":
        # Each entry is a sum of what was dropped or rescaled: one of four values.
        for label, change in of(first).items():
            if label.split("/")[-2] == "kernel":
                a, b = of(one)[label] / 0.4, -2.0 * of(other)[label] / 0.4
                nearest = np.min([np.abs(change - value) for value in (0 * a, a, b, a + b)], axis=0)
                assert nearest.max() < 1e-4


def test_a_lower_rank_is_the_nearest_to_the_sparse_update():
    one, other = trained(LORA["lora"]), trained(LORA["lora"], seed=2)
    whole, low = (of(combine([one, other], [1.0, 1.0], "ties", density=0.3, rank=rank)) for rank in (RANK, 3))
    default = combine([one, other], [1.0, 1.0], "ties", density=0.3)
    assert {group.method.rank for group in default.plan.groups} == {2}
    for label, exact in whole.items():
        if label.split("/")[-2] == "kernel":
            tail = np.linalg.svd(exact, compute_uv=False)[3:]
            assert np.linalg.norm(low[label] - exact) == pytest.approx(np.sqrt(np.sum(tail**2)), rel=1e-4)


@pytest.mark.torch
@pytest.mark.parametrize("density", [0.1, 0.37, 0.8])
@pytest.mark.parametrize("how", SPARSE)
def test_equals_pefts_on_the_same_tensors(how, density, monkeypatch):
    torch = pytest.importorskip("torch")
    theirs = pytest.importorskip("peft.utils.merge_utils")
    updates = tensors()
    keys = jax.random.split(jax.random.key(5), len(updates))
    masks = iter([np.asarray(jax.random.bernoulli(key, density, (7, 5))) for key in keys])
    monkeypatch.setattr(torch, "bernoulli", lambda p: torch.tensor(next(masks), dtype=p.dtype))
    reference = getattr(theirs, how)([torch.tensor(u) for u in updates], torch.ones(3, dtype=torch.float64), density)
    if how.startswith("dare"):
        sparse = [drop(update, density, key) for update, key in zip(updates, keys, strict=True)]
    else:
        sparse = [trim(update, density) for update in updates]
    ours = elect(sparse) if how.endswith("ties") else sum(sparse)
    np.testing.assert_allclose(ours, reference.numpy(), rtol=1e-12, atol=1e-12)


@pytest.mark.torch
@pytest.mark.parametrize("how", ["linear", "cat", "svd", "ties_svd", "magnitude_prune_svd"])
def test_the_combined_adapter_is_pefts(how):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    adapters = [trained(LORA["lora"], seed=seed) for seed in range(2)]
    weights = [0.7, -0.4] if how in ("linear", "cat", "svd") else [1.0, 1.0]  # where weights mean the same
    settings = {"density": 0.3} if how.endswith("_svd") else {}
    ours = of(combine(adapters, weights, how.removesuffix("_svd"), **settings))["vision/blocks/attn/q/kernel/1"]

    module = torch.nn.ModuleDict({"linear": torch.nn.Linear(16, 16)})
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["linear"])
    model = peft.get_peft_model(module, config, adapter_name="first")
    model.add_adapter("second", config)
    layer = model.base_model.model["linear"]
    for label, adapter in zip(("first", "second"), adapters, strict=True):
        leaves = adapter.params["adapter"]["vision"]["attn_q"]
        with torch.no_grad():
            layer.lora_A[label].weight.copy_(torch.tensor(np.array(leaves["a"][1]).T))
            layer.lora_B[label].weight.copy_(torch.tensor(np.array(leaves["b"][1]).T))
    model.add_weighted_adapter(["first", "second"], weights, "result", how, **settings)
    reference = layer.get_delta_weight("result").detach().numpy().T
    assert np.linalg.norm(ours - reference) <= 1e-5 * np.linalg.norm(reference)
