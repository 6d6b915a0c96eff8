"""Checkpoints go to peft and come from it, and the features stay: ours against transformers' CLIPModel in peft."""

from __future__ import annotations

import json
from collections.abc import Iterable

import numpy as np
import pytest
from exchanged_clip import close, drawn, far, features, loaded, write_backbone
from hub_side import clip_model, hub_features, peft, torch, trained, with_adapter
from safetensors.numpy import load_file, save_file

from vla_jax.adapters import Affine, LoRA, Placement
from vla_jax.algebra.places import occupants
from vla_jax.exchange.adapter_file import SavedAdapter
from vla_jax.exchange.peft_export import export_peft
from vla_jax.exchange.peft_import import import_peft
from vla_jax.exchange.sites import adapter_of
from vla_jax.slots import LINEAR_SLOTS

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("quick_compilation")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_backbone(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def backbone(folder):
    return loaded(folder)


@pytest.fixture(scope="module")
def plain(backbone):
    return features(backbone)


LOW_RANK = {
    "lora": (Placement(LoRA(rank=2, alpha=5.0), slots=("attn_q", "attn_v")),),
    "everywhere": (Placement(LoRA(rank=3, dropout=0.2), slots=LINEAR_SLOTS),),
    "rank_stabilised": (Placement(LoRA(rank=4, rank_stabilised=True), slots=("mlp_fc1", "attn_out")),),
    "decomposed": (Placement(LoRA(rank=2, decomposed=True), slots=("attn_q", "mlp_fc2", "projection")),),
    "tables": (
        Placement(
            LoRA(rank=2, alpha=3.0),
            slots=("attn_q", "attn_k"),
            ranks=(("vision/attn_q/1", 4), ("text/attn_k/0", 1)),
            alphas=((r"text/attn_q/.", 7.5), ("vision/attn_q/1", 2.0)),
        ),
    ),
    "some_layers": (Placement(LoRA(rank=2), slots=("attn_v",), towers=("vision",), layers="0,2"),),
    "two_adapters": (
        Placement(LoRA(rank=2), "one", slots=("attn_q",), towers=("vision",)),
        Placement(LoRA(rank=2, alpha=1.0), "two", slots=("mlp_fc1", "projection"), layers="last 1"),
    ),
}
SCALES = {
    "published": (Placement(Affine(scale=True, shift=False), slots=("attn_k", "attn_v", "mlp_hidden")),),
    "elsewhere": (
        Placement(Affine(scale=True, shift=False), slots=("mlp_in", "attn_out", "mlp_fc2"), towers=("text",)),
    ),
    "one_layer": (Placement(Affine(scale=True, shift=False), slots=("mlp_hidden", "attn_q"), layers="last 1"),),
}
WHOLE = {
    "layer_norms": ((), "norm"),
    "some_layer_norms": ((), "vision/blocks/norm1"),
    "projections": ((), "projection"),
    "layer_norms_beside_lora": (LOW_RANK["lora"], "post_norm"),
    "projection_beside_scales": (SCALES["published"], "vision/projection"),
}
EXPORTED = {name: (placements, "") for name, placements in (LOW_RANK | SCALES).items()} | WHOLE


def adapter_of_case(backbone, name) -> SavedAdapter:
    placements, trained_leaves = EXPORTED[name]
    return drawn(backbone, placements, trained_leaves)


def some_slow(names: Iterable[str], quick: set[str]) -> list:
    """Every program of ours takes a second or two to compile, so that those which add little wait for the whole run."""
    assert quick <= set(names)
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize(
    "name", some_slow(EXPORTED, {"everywhere", "decomposed", "tables", "two_adapters", "published", "layer_norms"})
)
def test_trained_here_loads_there(name, folder, backbone, plain, tmp_path):
    adapter = adapter_of_case(backbone, name)
    ours = features(backbone, adapter)
    far(ours, plain)
    export_peft(tmp_path, adapter)
    close(hub_features(with_adapter(folder, tmp_path)), ours)


@pytest.mark.parametrize("decomposed", [pytest.param(False, marks=pytest.mark.slow), True])
def test_pissa_becomes_lora_of_twice_the_rank(folder, backbone, tmp_path, decomposed):
    method = LoRA(rank=2, alpha=3.0, init="pissa", decomposed=decomposed)
    adapter = drawn(backbone, (Placement(method, slots=("attn_q",), towers=("text",)),))
    export_peft(tmp_path, adapter, backbone=backbone.params)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 4
    close(hub_features(with_adapter(folder, tmp_path)), features(backbone, adapter))


@pytest.mark.parametrize("name", EXPORTED)
def test_there_and_back_is_the_same(name, backbone, tmp_path):
    adapter = adapter_of_case(backbone, name)
    again = import_peft(export_peft(tmp_path, adapter), backbone)
    # Names of adapters and how places are put together are lost; what sits at each place is not.
    ours, theirs = ({str(at): own for at, own in occupants(adapter_of(one)).items()} for one in (adapter, again))
    assert ours.keys() == theirs.keys()
    for at, occupant in ours.items():
        assert theirs[at].method == occupant.method
        assert theirs[at].leaves.keys() == occupant.leaves.keys()
        for leaf, value in occupant.leaves.items():
            np.testing.assert_array_equal(theirs[at].leaves[leaf], value, err_msg=f"{at} {leaf}")
    beside = lambda one: {leaf: v for leaf, v in one.leaves.items() if not leaf.startswith("adapters/")}  # noqa: E731
    assert beside(again).keys() == beside(adapter).keys()
    for leaf, value in beside(adapter).items():
        np.testing.assert_array_equal(again.leaves[leaf], value, err_msg=leaf)


LORA = {"r": 3, "lora_alpha": 5}
IMPORTED = {
    "list": lambda: peft.LoraConfig(**LORA, target_modules=["q_proj", "v_proj"], lora_dropout=0.1),
    "regular_expression": lambda: peft.LoraConfig(
        **LORA, target_modules=r"vision_model\.encoder\.layers\.\d\.(self_attn\.(q|k)_proj|mlp\.fc1)"
    ),
    "all_linear": lambda: peft.LoraConfig(**LORA, target_modules="all-linear"),
    "whole_names": lambda: peft.LoraConfig(
        **LORA, target_modules=["text_model.encoder.layers.1.mlp.fc2", "visual_projection"]
    ),
    "some_layers": lambda: peft.LoraConfig(**LORA, target_modules=["out_proj", "fc1"], layers_to_transform=[1, 2]),
    "one_layer": lambda: peft.LoraConfig(
        **LORA, target_modules=["k_proj"], layers_to_transform=1, layers_pattern="layers"
    ),
    "excluded": lambda: peft.LoraConfig(
        **LORA, target_modules=["q_proj", "fc2"], exclude_modules=r"text_model.*\.0\..*"
    ),
    "patterns": lambda: peft.LoraConfig(
        **LORA,
        target_modules=["q_proj", "v_proj"],
        rank_pattern={r"vision_model.*\.v_proj": 2, "layers.1.self_attn.q_proj": 6},
        alpha_pattern={"q_proj": 9, r"text_model\.encoder\.layers\.0\.self_attn\.v_proj": 1.5},
    ),
    "rank_stabilised": lambda: peft.LoraConfig(
        **LORA, target_modules=["q_proj", "fc1"], use_rslora=True, rank_pattern={"fc1": 7}
    ),
    "decomposed": lambda: peft.LoraConfig(
        **LORA, target_modules=["q_proj", "fc1", "text_projection"], use_dora=True, alpha_pattern={"fc1": 2}
    ),
    "saved_modules": lambda: peft.LoraConfig(
        **LORA, target_modules=["q_proj"], modules_to_save=["visual_projection", "layers.1.layer_norm2"]
    ),
    "gaussian_start": lambda: peft.LoraConfig(**LORA, target_modules=["q_proj"], init_lora_weights="gaussian"),
    "scales": lambda: peft.IA3Config(target_modules=["k_proj", "v_proj", "fc2"], feedforward_modules=["fc2"]),
    "scales_by_expression": lambda: peft.IA3Config(
        target_modules=r"text_model.*\.(q_proj|fc1|fc2)", feedforward_modules=r".*\.1\.mlp\.fc1"
    ),
    "scales_and_saved": lambda: peft.IA3Config(
        target_modules=["out_proj"], feedforward_modules=[], modules_to_save=["post_layernorm"]
    ),
    "layer_norms": lambda: peft.LNTuningConfig(target_modules=["layer_norm1", "layer_norm2", "pre_layrnorm"]),
    "layer_norms_of_one_block": lambda: peft.LNTuningConfig(target_modules=r"vision_model.*\.2\.layer_norm\d"),
}


@pytest.mark.parametrize(
    "name", some_slow(IMPORTED, {"list", "patterns", "decomposed", "saved_modules", "scales_by_expression"})
)
def test_trained_there_loads_here(name, folder, backbone, plain, tmp_path):
    model = trained(clip_model(folder), IMPORTED[name]())
    theirs = hub_features(model)
    far(theirs, plain)
    model.save_pretrained(tmp_path)
    close(features(backbone, import_peft(tmp_path, backbone)), theirs)


@pytest.mark.parametrize("name", IMPORTED)
def test_here_and_back_is_the_same(name, folder, backbone, tmp_path):
    model = trained(clip_model(folder), IMPORTED[name]())
    model.save_pretrained(tmp_path / "theirs")
    export_peft(tmp_path / "ours", import_peft(tmp_path / "theirs", backbone))
    close(hub_features(with_adapter(folder, tmp_path / "ours")), hub_features(model))


def test_half_precision_widens(folder, backbone, tmp_path):
    model = trained(clip_model(folder), IMPORTED["list"]())
    model.save_pretrained(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    save_file({name: tensor.astype(np.float16) for name, tensor in load_file(weights).items()}, weights)
    adapter = import_peft(tmp_path, backbone)
    assert {leaf.dtype for leaf in adapter.leaves.values()} == {np.dtype("float32")}
    close(features(backbone, adapter), hub_features(with_adapter(folder, tmp_path)), 1e-3)


class Judge(torch.nn.Module):
    """A CLIP with a head of ours beside it, under the name that the export gives it."""

    def __init__(self, clip):
        super().__init__()
        self.vision_model, self.visual_projection = clip.vision_model, clip.visual_projection
        self.text_model, self.text_projection = clip.text_model, clip.text_projection
        self.heads = torch.nn.ModuleDict({"matching": torch.nn.ModuleDict({"classifier": torch.nn.Linear(48, 1)})})


def test_heads_travel_along(folder, backbone, tmp_path):
    adapter = drawn(backbone, LOW_RANK["lora"])
    generator = np.random.default_rng(5)
    head = {"kernel": generator.standard_normal((48, 1)), "bias": generator.standard_normal(1)}
    heads = {f"heads/matching/classifier/{name}": value.astype(np.float32) for name, value in head.items()}
    adapter = SavedAdapter(**{**vars(adapter), "leaves": adapter.leaves | heads})
    export_peft(tmp_path, adapter)

    model = peft.PeftModel.from_pretrained(Judge(clip_model(folder)), tmp_path)
    features_of_pairs = generator.standard_normal((4, 48)).astype(np.float32)
    with torch.no_grad():
        scores = model.get_base_model().heads["matching"]["classifier"](torch.tensor(features_of_pairs)).numpy()
    np.testing.assert_allclose(scores, features_of_pairs @ head["kernel"] + head["bias"], rtol=1e-5, atol=1e-5)
    # A plain CLIPModel has no such module: it gets the adapter alone.
    close(hub_features(with_adapter(folder, tmp_path)), features(backbone, adapter))

    again = import_peft(tmp_path, backbone)
    for name, value in heads.items():
        np.testing.assert_array_equal(again.leaves[name], value)


def test_default_configurations_hold_nothing_unknown(folder, backbone, tmp_path):
    # Every field of the installed version is one that is read, known to be harmless, or off.
    for number, settings in enumerate(
        (
            peft.LoraConfig(target_modules=["q_proj"]),
            peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
            peft.LNTuningConfig(target_modules=["layer_norm1"]),
        )
    ):
        peft.get_peft_model(clip_model(folder), settings).save_pretrained(tmp_path / str(number))
        import_peft(tmp_path / str(number), backbone)


@pytest.mark.parametrize(
    "settings",
    [
        lambda: peft.PromptTuningConfig(num_virtual_tokens=2, task_type="FEATURE_EXTRACTION"),
        lambda: peft.PrefixTuningConfig(num_virtual_tokens=2, task_type="FEATURE_EXTRACTION"),
    ],
    ids=["prompt", "prefix"],
)
def test_peft_cannot_prompt_clip(folder, settings):
    """What the error for these methods says; when this fails, peft has learnt it."""
    images = torch.zeros(1, 3, 16, 16)
    tokens = torch.tensor([[1, 2, 39]])
    model = peft.get_peft_model(clip_model(folder), settings())
    with pytest.raises(TypeError, match=r"unexpected keyword argument|inputs_embeds|past_key_values"):
        model(input_ids=tokens, pixel_values=images, attention_mask=torch.ones_like(tokens))


def test_the_configuration_is_what_peft_writes(backbone, tmp_path):
    # Short target_modules where the last parts of the names choose the same modules.
    settings = json.loads(
        (export_peft(tmp_path, drawn(backbone, LOW_RANK["lora"])) / "adapter_config.json").read_text()
    )
    assert settings["target_modules"] == ["q_proj", "v_proj"]
    assert (settings["r"], settings["lora_alpha"], settings["rank_pattern"]) == (2, 5, {})
    assert settings["base_model_name_or_path"] == backbone.name
