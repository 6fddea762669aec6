"""Project settings, read by Kedro at start-up."""

from rdd_pipeline.config import Parameters
from rdd_pipeline.hooks import ExperimentHook
from rdd_pipeline.hooks.environments import LayeredConfigLoader
from rdd_pipeline.hooks.logs import log_whole_lines
from rdd_pipeline.hooks.messages import show_user_errors_as_one_line
from rdd_pipeline.hooks.plugins import (
    find_own_programs,
    keep_viz_offline,
    load_mlflow_commands_when_used,
    say_what_notebooks_need,
)
from rdd_pipeline.hooks.system import SystemMetricsHook
from rdd_pipeline.hooks.tensorboard import TensorBoardHook
from rdd_pipeline.hooks.viz import RunStatusHook, keep_plumbing_inside
from rdd_pipeline.interruptions import leaves_at_signals

find_own_programs()
keep_viz_offline()
keep_plumbing_inside()
load_mlflow_commands_when_used()
say_what_notebooks_need()
log_whole_lines()
if leaves_at_signals():
    show_user_errors_as_one_line()  # those of the command line, which is read next

HOOKS = (ExperimentHook(Parameters), TensorBoardHook(), SystemMetricsHook(), RunStatusHook())
# These stand in for those of kedro-mlflow and kedro-viz.
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
