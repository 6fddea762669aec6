"""Two optimizer steps of a method on drawn images, in a process of its own (`test_additions`).

    python -m tests.two_steps METHOD STUDENT PIPELINE [RDD SETTINGS AS JSON]

Prints a JSON object: losses, iterations of the stages, methods, and what the pipeline's training
nodes take and give.
"""

from __future__ import annotations

import importlib
import json
import sys

import torch

from rdd_pipeline.config import RddParams
from rdd_pipeline.distillation.methods import METHODS, RDD_PLUS, STAGES, find_method
from rdd_pipeline.distillation.objective import Objective
from rdd_pipeline.distillation.stages import stage_span
from rdd_pipeline.losses.base import LossContext
from rdd_pipeline.networks import Preprocessing, build_network
from rdd_pipeline.networks.probe import output_shapes
from rdd_pipeline.reporting.report import pipeline_of
from rdd_pipeline.training.step import TrainingStep

CLASSES, SIZE, ITERATIONS = 3, (32, 32), 10


def main(method: str, student_name: str, pipeline: str, rdd: str = "{}") -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    definition = find_method(method)
    student = build_network(student_name, num_classes=CLASSES, width=8)
    teacher = build_network("fcn_test_resnet", num_classes=CLASSES, width=16)
    teacher.eval().requires_grad_(False)
    settings = definition.settings(RddParams(**{"min_kept": 0.3, **json.loads(rdd)}))
    objective = Objective(
        definition,
        rdd=settings,
        iterations=ITERATIONS,
        aux_weight=0.4,
        class_weights=None,
        ignore_index=255,
        context=LossContext(output_shapes(student, SIZE), output_shapes(teacher, SIZE)),
    )
    step = TrainingStep(
        student,
        objective,
        teacher=teacher,
        student_preprocessing=Preprocessing.imagenet(),
        teacher_preprocessing=Preprocessing.imagenet(),
        autocast=None,
    )
    optimizer = torch.optim.SGD(step.parameters(), lr=0.01)
    images = torch.randint(0, 256, (2, 3, *SIZE), dtype=torch.uint8)
    labels = torch.randint(0, CLASSES, (2, *SIZE), dtype=torch.uint8)
    before = [parameter.detach().clone() for parameter in student.parameters()]
    for iteration in (ITERATIONS - 1, ITERATIONS):
        output = step(images, labels, iteration)
        assert output.total.isfinite()
        optimizer.zero_grad()
        output.total.backward()
        optimizer.step()
    after = list(student.parameters())
    assert any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
    spans = {
        stage.name: stage_span(definition.stages, stage.name, settings, ITERATIONS)
        for stage in definition.stages
    }
    create_pipeline = importlib.import_module(f"rdd_pipeline.pipelines.{pipeline}").create_pipeline
    found = {
        "losses": sorted(output.parts),
        "statistics": sorted(output.statistics),
        "spans": spans,
        "methods": sorted(METHODS | RDD_PLUS),
        "on the way": list(STAGES),
        "pipelines": {name: pipeline_of(name) for name in ("tfe", method)},
        "nodes": {node.name: [node.inputs, node.outputs] for node in create_pipeline().nodes},
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
