"""Means between two points of the curves."""

from rdd_pipeline.training.curves import RunningMeans


def test_a_value_of_some_steps_is_the_mean_of_those():
    window = RunningMeans()
    window.add({"loss": 1.0, "teacher_confidence": 0.9}, 4)
    window.add({"loss": 3.0, "chosen": 0.2}, 4)
    window.add({"loss": 5.0, "chosen": 0.4}, 4)
    means, images, seconds, waited = window.close()
    assert waited == 0
    assert means == {"loss": 3.0, "teacher_confidence": 0.9, "chosen": 0.30000000000000004}
    assert images == 12
    assert seconds >= 0
    assert window.close()[:2] == ({}, 0)
