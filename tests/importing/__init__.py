"""Tests of what labeling tools write."""
