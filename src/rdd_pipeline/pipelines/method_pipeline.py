"""Wiring that every trained network shares, the teacher too.

One factory makes the pipeline of a method in its own namespace, so that each of them has the same
nodes, the same data set names (`student_{method}`, `metrics_{method}`, `history_{method}`) and the
same MLflow keys.
"""

from __future__ import annotations

from collections.abc import Sequence

from kedro.pipeline import Node, Pipeline

from rdd_pipeline.distillation.methods import find_method
from rdd_pipeline.pipelines.method_nodes import (
    draw_history,
    make_evaluate_node,
    make_plan_node,
    make_train_node,
)


def method_pipeline(method: str) -> Pipeline:
    """Plan, train and evaluate a network by one method, in a namespace of its own.

    A method that trains one stage goes on from ``state_{method}`` of the stage before, and leaves
    its own in the catalog if there is a further stage.

    Args:
        method: ``teacher`` or a key of `distillation.methods.METHODS`.
    """
    is_teacher, definition = method == "teacher", find_method(method)
    weights = "teacher_weights" if is_teacher else f"student_{method}"
    plan, training = f"plan_{method}", f"training_{method}"
    planned = {
        "images": "images",
        "network_plan": "network_plan",
        "recipe": "params:teacher_recipe" if is_teacher else "params:recipe",
        "rdd": "params:rdd",
        "methods": "params:methods",
        "evaluation": "params:evaluation",
        "seed": "params:seed",
    }
    run = {
        "images": "images",
        "plan": plan,
        "trainer": "params:trainer",
        "work_folder": "work_folder",
    }
    upstream = {}
    if is_teacher:
        upstream["given"] = "given_teacher"
    else:
        planned["seeds"] = "params:seeds"
    if definition.needs_teacher:
        upstream["teacher_weights"] = "teacher_weights"
    if definition.stage_before:
        upstream["initial_states"] = f"state_{definition.stage_before}"
    nodes = [
        Node(
            make_plan_node(method),
            name=f"plan_{method}_node",
            inputs=planned,
            outputs=plan,
            tags=["checks"],
        ),
        Node(
            make_train_node(method),
            name=f"train_{method}_node",
            inputs={**run, **upstream},
            outputs=[weights, f"history_{method}", training]
            + ([f"state_{method}"] if not definition.finishes else []),
            tags=["gpu", "training"],
        ),
        Node(
            make_evaluate_node(method),
            name=f"evaluate_{method}_node",
            inputs={
                **run,
                "weights": weights,
                "training": training,
                "evaluation": "params:evaluation",
            },
            outputs=[f"metrics_{method}", f"confusion_{method}"],
            tags=["gpu", "evaluation"],
        ),
        Node(
            draw_history,
            name=f"draw_{method}_history_node",
            inputs=f"history_{method}",
            outputs=f"curves_{method}",
            tags=["figures"],
        ),
    ]
    return Pipeline(
        nodes,
        namespace=method,
        prefix_datasets_with_namespace=False,
        tags=[f"method_{method}"],
    )


def methods_pipeline(methods: Sequence[str]) -> Pipeline:
    """Several methods side by side."""
    return sum((method_pipeline(name) for name in methods), start=Pipeline([]))
