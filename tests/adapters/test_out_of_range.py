"""Sizes and tasks outside their range are named before anything is computed."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from settings import BATCH, CONFIG, backbone, drawn, inputs, model

from vla_jax.adapters import PHM, Bottleneck, Fusion, Hyperformer, Ladder, LoRA, Placement, place
from vla_jax.errors import UserError
from vla_jax.many_tasks import Sent

NARROWEST = CONFIG.text.width


@pytest.mark.parametrize(
    "placement",
    [
        Placement(Bottleneck(rank=NARROWEST + 4), slots=("mlp_out",)),
        Placement(Bottleneck(rank=NARROWEST + 4, parallel=True), slots=("attn_sublayer",)),
        Placement(PHM(n=2, rank=NARROWEST + 4), slots=("mlp_out",)),
        Placement(Hyperformer(rank=NARROWEST + 4), slots=("mlp_out",)),
        Placement(Fusion(rank=NARROWEST + 4)),
        Placement(Ladder(rank=NARROWEST + 4, heads=1)),
        Placement(LoRA(rank=NARROWEST + 4), slots=("attn_q",)),
    ],
    ids=lambda placement: placement.method.kind,
)
def test_a_rank_above_the_width_is_refused(placement):
    with pytest.raises(UserError, match=rf"rank {NARROWEST + 4} .*{NARROWEST}"):
        place(placement, CONFIG.towers).parameter_count()


def routed():
    plan = place(Placement(LoRA(rank=2), slots=("attn_q",), tasks=("a", "b", "c")), CONFIG.towers)
    return plan, drawn(plan.shapes(), 1, 0.1)


@pytest.mark.parametrize("task", [-1, 3])
def test_a_task_that_there_is_not_is_neither_taken_nor_set(task):
    plan, adapters = routed()
    with pytest.raises(UserError, match=f"there is no task {task}; allowed: 0 to 2"):
        plan.select_task(adapters, task)
    with pytest.raises(UserError, match=f"there is no task {task}; allowed: 0 to 2"):
        plan.set_task(adapters, task, plan.select_task(adapters, 0))


@pytest.mark.parametrize("task", [-2, 3])
def test_a_route_to_a_task_that_there_is_not_is_refused_where_it_is_known(task):
    plan, adapters = routed()
    route = np.zeros(BATCH, np.int32)
    route[1] = task
    images, tokens, mask = map(jax.numpy.asarray, inputs(CONFIG))
    with pytest.raises(UserError, match=rf"the route names task {task}; allowed: -1 \(the bare backbone\) to 2"):
        model(CONFIG).apply(
            {"params": backbone(CONFIG)}, images, tokens, mask, adapters=plan.bind(adapters), route=route
        )


def test_examples_are_not_sent_below_the_bare_backbone():
    with pytest.raises(UserError, match="a task from 0 on, or -1 for the bare backbone; given -2"):
        Sent([{"a": 1}, {"a": 2}], np.array([0, -2]))
