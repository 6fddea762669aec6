"""Wiring that every trained network shares.

One factory makes the pipeline of a method in its own namespace, so that each of them has the same
nodes, the same data set names (`student_{method}`, `metrics_{method}`, `history_{method}`) and the
same MLflow keys.
"""

from __future__ import annotations

from collections.abc import Sequence

from kedro.pipeline import Node, Pipeline

from rdd_pipeline.distillation.methods import find_method
from rdd_pipeline.pipelines._training import (
    draw_history,
    make_check_node,
    make_evaluate_node,
    make_train_node,
)

SHARED_PARAMETERS = {
    "params:teacher",
    "params:student",
    "params:recipe",
    "params:rdd",
    "params:methods",
    "params:seed",
    "params:seeds",
    "params:trainer",
    "params:evaluation",
}


def method_pipeline(method: str) -> Pipeline:
    """Train and evaluate the student by one method, in a namespace of its own.

    A method that trains one stage goes on from ``state_{method}`` of the stage before, and leaves
    its own in the catalog if there is a further stage.

    Args:
        method: Key of `distillation.methods.METHODS`.
    """
    definition = find_method(method)
    start = definition.stage_before and f"state_{definition.stage_before}"
    keep_state = not definition.finishes
    inputs = {
        "images": "images",
        "work_folder": "work_folder",
    }
    training_inputs = {
        **inputs,
        "method_plan": "plan",
        "student": "params:student",
        "recipe": "params:recipe",
        "rdd": "params:rdd",
        "methods": "params:methods",
        "evaluation": "params:evaluation",
        "seed": "params:seed",
        "seeds": "params:seeds",
        "trainer": "params:trainer",
    }
    upstream = {"network_plan"}
    if definition.needs_teacher:
        training_inputs["teacher_weights"] = "teacher_weights"
        upstream.add("teacher_weights")
    if start is not None:
        training_inputs["initial_states"] = start
        upstream.add(start)
    nodes = Pipeline(
        [
            Node(
                make_check_node(method),
                name=f"check_{method}_node",
                inputs={
                    "images": "images",
                    "network_plan": "network_plan",
                    "teacher": "params:teacher",
                    "student": "params:student",
                    "recipe": "params:recipe",
                    "rdd": "params:rdd",
                    "methods": "params:methods",
                },
                outputs="plan",
                tags=["checks"],
            ),
            Node(
                make_train_node(method, definition.trains, keep_state=keep_state),
                name=f"train_{method}_node",
                inputs=training_inputs,
                outputs=["weights", "history", "training"] + (["state"] if keep_state else []),
                tags=["gpu", "training"],
            ),
            Node(
                make_evaluate_node(method),
                name=f"evaluate_{method}_node",
                inputs={
                    **inputs,
                    "weights": "weights",
                    "training": "training",
                    "student": "params:student",
                    "recipe": "params:recipe",
                    "rdd": "params:rdd",
                    "methods": "params:methods",
                    "evaluation": "params:evaluation",
                    "trainer": "params:trainer",
                },
                outputs=["metrics", "confusion"],
                tags=["gpu", "evaluation"],
            ),
            Node(
                draw_history,
                name=f"draw_{method}_history_node",
                inputs="history",
                outputs="curves",
                tags=["figures"],
            ),
        ]
    )
    outputs = {
        "weights": f"student_{method}",
        "history": f"history_{method}",
        "metrics": f"metrics_{method}",
        "confusion": f"confusion_{method}",
        "curves": f"curves_{method}",
    }
    if keep_state:
        outputs["state"] = f"state_{method}"
    return Pipeline(
        nodes,
        namespace=method,
        tags=[f"method_{method}"],
        inputs={*inputs, *upstream},
        outputs=outputs,
        parameters=SHARED_PARAMETERS,
    )


def methods_pipeline(methods: Sequence[str]) -> Pipeline:
    """Several methods side by side."""
    return sum((method_pipeline(name) for name in methods), start=Pipeline([]))
