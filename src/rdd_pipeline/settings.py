"""Project settings, read by Kedro at start-up."""

import os

# Nothing in this project phones home. kedro-telemetry is also off by the file .telemetry.
os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ.setdefault("KEDRO_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

from rdd_pipeline.config import Parameters
from rdd_pipeline.hooks import ExperimentHook
from rdd_pipeline.hooks.environments import LayeredConfigLoader

HOOKS = (ExperimentHook(Parameters),)
# ExperimentHook extends kedro-mlflow's own hook; kedro-viz's run hook only warns on partial runs.
DISABLE_HOOKS_FOR_PLUGINS = ("kedro_mlflow", "kedro-viz", "kedro-telemetry")

CONFIG_LOADER_CLASS = LayeredConfigLoader
CONFIG_LOADER_ARGS = {
    "base_env": "base",
    "default_run_env": "scenes",  # the demonstration
    # "soft": an environment changes the keys it names and keeps the others.
    "merge_strategy": dict.fromkeys(("parameters", "globals", "mlflow", "catalog"), "soft"),
    # Not `**/parameters*`: a folder below an environment is a variant of it.
    "config_patterns": {
        name: [f"{name}*", f"{name}*/**"]
        for name in ("parameters", "catalog", "credentials", "mlflow")
    },
}
