"""Small segmentation networks by Relative Difficulty Distillation, as a Kedro project."""

__version__ = "0.1.0"
