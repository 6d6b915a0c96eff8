"""What one process of ``train_step.py`` measures: the training step and the forward of one framework."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from benchmarks.measuring import PRODUCT_SIZE, best_product, in_turns, make_batch, peak_resident, timed

if TYPE_CHECKING:
    import jax
    import torch

    from vla_jax.names import Tree

Method = Literal["lora", "bottleneck", "full"]
Remat = Literal["none", "dots", "full"]
Framework = Literal["vla_jax", "pytorch"]

RANK = 16
REDUCTION = 16
LEARNING_RATE = 1e-4
WEIGHT_DECAY = 0.01
CLIP_NORM = 1.0


@dataclass(frozen=True)
class Case:
    """What one process measures: the options' part of it, where the weights lie, and the device."""

    framework: Framework
    model: str
    method: Method
    round: int
    steps: int
    pairs: int
    batch: int
    remat: Remat
    device: str
    folder: str

    @property
    def dtype(self) -> str:
        """The dtype of activations and products, and of frozen weights."""
        return "bfloat16" if self.device == "gpu" else "float32"


def measure_ours(case: Case) -> dict[str, Any]:
    """One training step and one forward of ours; see ``measure`` for what is returned."""
    import jax
    import jax.numpy as jnp

    from vla_jax.adapters import Bottleneck, LoRA, Placement, place
    from vla_jax.backbones.clip import CLIP
    from vla_jax.backbones.loading import load_backbone
    from vla_jax.backbones.transformer import Compute
    from vla_jax.tasks.contrastive import info_nce
    from vla_jax.training.optimizer import OptimizerConfig, make_optimizer
    from vla_jax.training.presets import preset
    from vla_jax.training.step import init_state, make_eval_step, make_train_step
    from vla_jax.training.table import ParameterTable

    after_import = peak_resident()
    # Trained weights are float32 masters, so that only frozen ones may be stored in the dtype computed in.
    backbone = load_backbone(case.folder, dtype="float32" if case.method == "full" else case.dtype)
    config = backbone.config
    model = CLIP(config, Compute(case.dtype, remat=case.remat))
    placements = {
        "lora": Placement(LoRA(rank=RANK, alpha=RANK), slots=("attn_q", "attn_v")),
        "bottleneck": Placement(Bottleneck(reduction=REDUCTION), slots=("mlp_out",)),
    }
    plan = None if case.method == "full" else place(placements[case.method], config.towers)
    params = {"backbone": backbone.params} | ({} if plan is None else {"adapters": plan.init(jax.random.key(0))})
    images, tokens = make_batch(case.batch, config.image_size, config.vocabulary_size)
    batch = {"image": jnp.asarray(images.transpose(0, 2, 3, 1)), "tokens": jnp.asarray(tokens)}

    def forward(params: Tree, batch: dict[str, jax.Array]) -> jax.Array:
        adapters = plan.bind(params["adapters"]) if "adapters" in params else None
        variables = {"params": params["backbone"]}
        return model.apply(variables, batch["image"], batch["tokens"], adapters=adapters).logits

    def loss_function(params: Tree, batch: dict[str, jax.Array], key: jax.Array) -> tuple[jax.Array, dict]:
        return info_nce(forward(params, batch)), {}

    table = ParameterTable(preset("full" if plan is None else "adapters")).resolve(params)
    trainable, frozen = table.split(params)
    settings = OptimizerConfig(LEARNING_RATE, "constant", weight_decay=WEIGHT_DECAY, clip_norm=CLIP_NORM)
    optimizer = make_optimizer(settings, table, trainable, case.steps + 1)
    state = init_state(trainable, optimizer)
    del backbone, params, trainable  # the state holds copies of what is trained
    train_step = make_train_step(loss_function, optimizer, seed=0)

    start = time.perf_counter()
    program = train_step.lower(state, frozen, batch).compile()
    compiled = time.perf_counter() - start
    losses = []

    def step() -> None:
        nonlocal state
        state, metrics = jax.block_until_ready(program(state, frozen, batch, *train_step.constants))
        losses.append(float(metrics["loss"]))

    first = timed(step)
    steps = [timed(step) for _ in range(case.steps)]
    device = jax.local_devices()[0]
    peak = device.memory_stats()["peak_bytes_in_use"] if case.device == "gpu" else peak_resident()

    evaluate = make_eval_step(lambda params, batch: {"logits": forward(params, batch)})
    # Without the adapters' parameters the forward is that of the plain backbone.
    trained = {False: state.trainable if plan is None else {}, True: state.trainable}
    bare, adapted = in_turns(
        lambda adapters: lambda: jax.block_until_ready(evaluate(trained[adapters], frozen, batch)), case.pairs
    )

    size = PRODUCT_SIZE[case.device]
    square = jnp.ones((size, size), case.dtype)
    product = jax.jit(jnp.matmul).lower(square, square).compile()
    return {
        "versions": {"jax": jax.__version__},
        "threads": os.cpu_count(),
        "trained": table.trained,
        "loss": losses[0],
        "compile_seconds": compiled,
        "first_step_seconds": compiled + first,
        "step_seconds": steps,
        "bare_seconds": bare,
        "adapted_seconds": adapted,
        "after_import_bytes": after_import,
        "peak_bytes": peak,
        "product_flops": best_product(lambda: product(square, square).block_until_ready(), size),
    }


def add_bottlenecks(model: torch.nn.Module) -> Callable[[bool], None]:
    """Freezes a CLIPModel and wraps every block's MLP in one with a bottleneck behind it; returns its switch."""
    import torch

    class WithBottleneck(torch.nn.Module):
        def __init__(self, mlp: torch.nn.Module, width: int):
            super().__init__()
            self.mlp, self.on = mlp, True
            self.down = torch.nn.Linear(width, width // REDUCTION)
            self.up = torch.nn.Linear(width // REDUCTION, width)
            torch.nn.init.zeros_(self.up.weight)
            torch.nn.init.zeros_(self.up.bias)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.mlp(x)
            return y + self.up(torch.relu(self.down(y))) if self.on else y

    model.requires_grad_(False)
    wrappers = []
    for tower in (model.vision_model, model.text_model):
        for layer in tower.encoder.layers:
            layer.mlp = WithBottleneck(layer.mlp, layer.layer_norm1.normalized_shape[0])
            wrappers.append(layer.mlp)

    def switch(on: bool) -> None:
        for wrapper in wrappers:
            wrapper.on = on

    return switch


def measure_peer(case: Case) -> dict[str, Any]:
    """The same of ``transformers.CLIPModel``, LoRA by peft; see ``measure`` for what is returned."""
    # peft asks transformers for what transformers renames; that is no news to whoever measures.
    warnings.simplefilter("ignore", FutureWarning)
    import peft
    import torch
    import transformers

    after_import = peak_resident()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    gpu = case.device == "gpu"
    device = torch.device("cuda" if gpu else "cpu")
    model = transformers.CLIPModel.from_pretrained(case.folder, dtype=torch.float32).to(device).train()
    config = model.config
    switch: Callable[[bool], None] = lambda on: None  # noqa: E731
    if case.method == "lora":
        lora = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["q_proj", "v_proj"])
        model = peft.get_peft_model(model, lora)
        layers = model.base_model
        switch = lambda on: layers.enable_adapter_layers() if on else layers.disable_adapter_layers()  # noqa: E731
    elif case.method == "bottleneck":
        switch = add_bottlenecks(model)
        model = model.to(device)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if gpu:
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)
    optimizer = torch.optim.AdamW(trainable, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    images, tokens = make_batch(case.batch, config.vision_config.image_size, config.text_config.vocab_size)
    batch = {
        "pixel_values": torch.from_numpy(images).to(device),
        "input_ids": torch.from_numpy(tokens).long().to(device),
    }
    context = (lambda: torch.autocast("cuda", torch.bfloat16)) if gpu else nullcontext
    wait = torch.cuda.synchronize if gpu else lambda: None
    losses = []

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with context():
            loss = model(**batch, return_loss=True).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, CLIP_NORM)
        optimizer.step()
        losses.append(loss.item())
        wait()

    first = timed(step)
    steps = [timed(step) for _ in range(case.steps)]
    peak = torch.cuda.max_memory_allocated() if gpu else peak_resident()
    optimizer.zero_grad(set_to_none=True)
    model.eval()

    def run() -> None:
        with torch.inference_mode(), context():
            model(**batch)
        wait()

    def forward(adapters: bool) -> Callable[[], None]:
        switch(adapters)
        return run

    bare, adapted = in_turns(forward, case.pairs)
    size = PRODUCT_SIZE[case.device]
    square = torch.ones((size, size), dtype=getattr(torch, case.dtype), device=device)

    def product() -> None:
        torch.matmul(square, square)
        wait()

    return {
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__},
        "threads": torch.get_num_threads(),
        "trained": sum(parameter.numel() for parameter in trainable),
        "loss": losses[0],
        "compile_seconds": 0.0,
        "first_step_seconds": first,
        "step_seconds": steps,
        "bare_seconds": bare,
        "adapted_seconds": adapted,
        "after_import_bytes": after_import,
        "peak_bytes": peak,
        "product_flops": best_product(product, size),
    }
