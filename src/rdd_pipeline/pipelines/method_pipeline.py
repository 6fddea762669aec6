"""Wiring that every trained network shares, the teacher too.

One factory makes the pipeline of a method in its own namespace, so that each of them has the same
nodes, the same data set names (`student_{method}`, `metrics_{method}`, `history_{method}`) and the
same MLflow keys.
"""

from __future__ import annotations

from collections.abc import Sequence

from kedro.pipeline import Pipeline

from rdd_pipeline.distillation.methods import find_method
from rdd_pipeline.lazy import Lazy
from rdd_pipeline.pipelines.node import Node

_nodes = Lazy("rdd_pipeline.pipelines.method_nodes")


def method_pipeline(method: str) -> Pipeline:
    """Plan, train and evaluate a network by one method, in a namespace of its own.

    A method that trains one stage goes on from ``state_{method}`` of the stage before, and leaves
    its own in the catalog if there is a further stage.

    Args:
        method: ``teacher`` or a key of `distillation.methods.METHODS`.
    """
    weights = "teacher_weights" if method == "teacher" else f"student_{method}"
    training = f"training_{method}"
    evaluated = {"weights": weights, "training": training, "evaluation": "params:evaluation"}
    outputs = [weights, f"history_{method}", training]
    if not find_method(method).finishes:
        outputs.append(f"state_{method}")
    drawn = [f"curves_{method}", f"progress_{method}"]
    if find_method(method).uses_rdd:
        drawn.append(f"difficulty_{method}")
    nodes = [
        Node(
            _nodes.make_plan_node.made_with(method, name=f"plan_{method}"),
            name=f"plan_{method}",
            inputs=planned_from(method),
            outputs=f"plan_{method}",
            tags=["checks"],
        ),
        Node(
            _nodes.make_train_node.made_with(method, name=f"train_{method}"),
            name=f"train_{method}",
            inputs=_run_with(method) | _trained_from(method),
            outputs=outputs,
            tags=["gpu", "training"],
        ),
        Node(
            _nodes.make_evaluate_node.made_with(method, name=f"evaluate_{method}"),
            name=f"evaluate_{method}",
            inputs=_run_with(method) | evaluated,
            outputs=[f"metrics_{method}", f"confusion_{method}"],
            tags=["gpu", "evaluation"],
        ),
        Node(
            _nodes.make_draw_node.made_with(method, name=f"draw_{method}_history"),
            name=f"draw_{method}_history",
            inputs=[f"history_{method}", f"plan_{method}", "images", training],
            outputs=drawn,
            tags=["figures"],
        ),
    ]
    return Pipeline(
        nodes,
        namespace=method,
        prefix_datasets_with_namespace=False,
        tags=[f"method_{method}"],
    )


def planned_from(method: str) -> dict[str, str]:
    """Inputs of the node that plans a method."""
    inputs = {"images": "images", "network_plan": "network_plan"}
    keys = {name: name for name in ("recipe", "rdd", "methods", "evaluation", "seed", "seeds")}
    if method == "teacher":  # one of them, by a recipe of its own
        keys["recipe"] = "teacher_recipe"
        del keys["seeds"]
    return inputs | {name: f"params:{key}" for name, key in keys.items()}


def _run_with(method: str) -> dict[str, str]:
    """Inputs of what runs on a device."""
    return {
        "images": "images",
        "plan": f"plan_{method}",
        "trainer": "params:trainer",
        "work_folder": "work_folder",
    }


def _trained_from(method: str) -> dict[str, str]:
    """What a training takes over from other trainings, or from a user."""
    if method == "teacher":
        return {"given": "given_teacher"}
    definition = find_method(method)
    upstream = {}
    if definition.needs_teacher:
        upstream["teacher_weights"] = "teacher_weights"
    if definition.needs_teacher and not definition.stage_before:
        upstream["run_methods"] = "run_methods"
    if definition.stage_before:
        upstream["initial_states"] = f"state_{definition.stage_before}"
    return upstream


def methods_pipeline(methods: Sequence[str]) -> Pipeline:
    """Several methods side by side."""
    return sum((method_pipeline(name) for name in methods), start=Pipeline([]))
