"""A trained network as an MLflow model."""
