"""Project settings, read by Kedro at start-up."""

import os

# Nothing in this project phones home. kedro-telemetry is also off by the file .telemetry.
os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ.setdefault("KEDRO_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

from rdd_pipeline.config import Parameters
from rdd_pipeline.hooks import ExperimentHook

HOOKS = (ExperimentHook(Parameters),)
# ExperimentHook extends kedro-mlflow's own hook; kedro-viz's run hook only warns on partial runs.
DISABLE_HOOKS_FOR_PLUGINS = ("kedro_mlflow", "kedro-viz", "kedro-telemetry")

CONFIG_LOADER_ARGS = {
    "base_env": "base",
    "default_run_env": "local",
    # "soft": an environment changes the keys it names and keeps the others.
    "merge_strategy": {
        "parameters": "soft",
        "globals": "soft",
        "mlflow": "soft",
        "catalog": "soft",
    },
    "config_patterns": {"mlflow": ["mlflow*", "mlflow*/**", "**/mlflow*"]},
}
