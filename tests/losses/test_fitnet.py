"""FitNet's adapter; its loss is in `test_promises_features`."""

from rdd_pipeline.losses.layers import ChannelAdapter


def test_channel_adapter_is_a_projection_without_bias():
    adapter = ChannelAdapter(3, 5)
    assert [tuple(p.shape) for p in adapter.parameters()] == [(5, 3, 1, 1)]
