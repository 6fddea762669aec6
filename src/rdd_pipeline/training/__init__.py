"""The training loop and what surrounds it: jobs, checkpoints, schedule, progress.

Nothing here knows Kedro, MLflow or pandas.
"""
