"""A parameter that does not exist or does not fit ends the run before anything is read."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kedro.framework.project import pipelines as registered
from kedro.framework.project import settings
from kedro.io import DataCatalog, MemoryDataset
from kedro.pipeline import Node, Pipeline
from kedro.validation.type_extractor import TypeExtractor
from omegaconf import OmegaConf

from rdd_pipeline.config import (
    COUNT,
    FORMER_NAMES,
    LARGEST_SEED,
    MethodsParams,
    NetworkParams,
    Parameters,
    RddParams,
    RecipeParams,
    TrainerParams,
)
from rdd_pipeline.errors import UserError
from rdd_pipeline.hooks.configuration import check_machine
from rdd_pipeline.hooks.parameters import check_parameters, faults, fields_of, suggest
from rdd_pipeline.training.loop import step_seed
from tests.kedro_project import CONF, ENVIRONMENTS, bootstrap

KNOWN = list(dict(fields_of(Parameters)))


def context_of(conf: Path, params: dict[str, Any] | None = None, env: str = "test") -> Any:
    bootstrap()
    loader = settings.CONFIG_LOADER_CLASS(
        conf_source=str(conf), env=env, runtime_params=params, **settings.CONFIG_LOADER_ARGS
    )
    return SimpleNamespace(config_loader=loader, env=env, _runtime_params=params)


def test_the_list_of_parameters_is_what_the_pipelines_take():
    bootstrap()
    pipelines = {name: registered[name] for name in registered}
    taken = {
        name.removeprefix("params:")
        for pipeline in pipelines.values()
        for name in pipeline.inputs()
        if name.startswith("params:")
    }
    assert taken == set(Parameters.model_fields)
    for name, kind in TypeExtractor(pipelines).extract_types_from_pipelines().items():
        assert Parameters.model_fields[name].annotation is kind, name


@pytest.mark.parametrize("env", ENVIRONMENTS)
def test_every_environment_passes(env):
    check_parameters(context_of(CONF, env=env), Parameters)


def test_without_an_environment_the_line_says_what_only_one_can_say():
    with pytest.raises(UserError) as info:
        check_parameters(context_of(CONF, env="local"), Parameters)
    message = str(info.value)
    assert len(message.splitlines()) == 1
    for name in ("data.layout", "teacher.network", "student.name"):
        assert f"{name}: not set. An environment (--env) or --params says it." in message


def test_all_faults_come_in_one_line_that_says_what_was_meant():
    params = OmegaConf.to_container(
        OmegaConf.from_dotlist(
            [
                *("recipes.iterations=2", "on_problem=quarantine", "sead=3", "recipe.iteration=5"),
                *("data.workers=-1", "rdd.mode=nor", "seeds=abc", "zzz.q=1", "trainer.nodes=2"),
            ]
        )
    )
    with pytest.raises(UserError) as info:
        check_parameters(context_of(CONF, params), Parameters)
    message = str(info.value)
    assert len(message.splitlines()) == 1
    for part in (
        "--params sets recipes.iterations, which is no parameter (did you mean recipe.iterations?)",
        "sets on_problem, which is no parameter (did you mean data.on_problem?)",
        "sets sead, which is no parameter (did you mean seed?)",
        "sets recipe.iteration, which is no parameter (did you mean recipe.iterations?)",
        "sets zzz.q, which is no parameter.",
        "data.workers is -1: Input should be greater than 0; or: Input should be 'auto'.",
        "rdd.mode is 'nor': Input should be 'xor', 'or', 'and' or 'ohem'.",
        "seeds is 'abc': Input should be a valid integer",
        "trainer: nodes is 2, but rendezvous is not set. Give HOST:PORT",
    ):
        assert part in message


FORMER = {
    "rdd.warmup=0.1": "rdd: warmup is now called tfe_length.",
    "rdd.scope=global": "rdd: scope is now called min_kept_scope.",
    "rdd.min_kept_scope=rank": "rdd: min_kept_scope=rank is now called min_kept_scope=local.",
    "methods.relations=rank": "methods: relations is now called cross_image.",
    "methods.cross_image=gathered": "methods: cross_image=gathered is now called cross_image=g",
    "methods.preset=published": "methods: preset=published is now called preset=reference_code.",
    "recipe.accumulate=2": "recipe: accumulate is now called gradient_accumulation_steps.",
    "teacher_recipe.accumulate=2": "teacher_recipe: accumulate is now called gradient_acc",
    "trainer.patience=5": "trainer: patience is now called timeout.",
    "student.preprocessing=published": "student: preprocessing=published is now called prep",
    "teacher.network.preprocessing=published": "teacher.network: preprocessing=published is now",
    "teacher.format=published": "teacher: format=published is now called format=cirkd_names.",
}


def refused(given: str) -> str:
    """The one line with which a parameter is refused."""
    params = OmegaConf.to_container(OmegaConf.from_dotlist([given]))
    with pytest.raises(UserError) as info:
        check_parameters(context_of(CONF, params), Parameters)
    message = str(info.value)
    assert len(message.splitlines()) == 1
    return message


@pytest.mark.parametrize("given", FORMER)
def test_a_former_name_ends_in_one_line_that_says_the_new_one(given):
    message = refused(given)
    assert message.startswith(FORMER[given])
    assert message.endswith("Nothing was read or trained.")


def test_digests_are_made_of_the_former_names():
    """What was finished under a former name is found: only the name has changed."""
    pairs = (
        (
            RddParams(tfe_length=4, min_kept_scope="global"),
            {"warmup": 4, "scope": "global"},
        ),
        (RecipeParams(gradient_accumulation_steps=2), {"accumulate": 2}),
        (NetworkParams(name="a", preprocessing="caffe_bgr"), {"preprocessing": "published"}),
        (
            MethodsParams(preset="reference_code", cross_image="local"),
            {"preset": "published", "relations": "rank"},
        ),
    )
    for params, former in pairs:
        dumped = params.model_dump(mode="json", context=FORMER_NAMES)
        assert former.items() <= dumped.items()
        now = params.model_dump(mode="json")
        assert len(dumped) == len(now)
        assert type(params).model_validate(now) == params


def test_a_file_of_an_environment_is_named_as_the_place(tmp_path):
    for name, text in (("base", "seed: 0"), ("own", "sead: 1\n_mine: &a {x: 1}\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "parameters.yml").write_text(text)
    with pytest.raises(
        UserError, match=r"A parameters\*.yml of conf/ sets sead, which is no"
    ) as info:
        check_parameters(context_of(tmp_path, env="own"), Parameters)
    assert "_mine" not in str(info.value)


def test_parameters_that_other_files_take_are_allowed(tmp_path):
    """`run_name` names the MLflow run."""
    check_parameters(context_of(CONF, {"run_name": "mine"}), Parameters)
    (tmp_path / "base").mkdir()
    (tmp_path / "test").mkdir()
    (tmp_path / "base" / "parameters.yml").write_text("seed: 0")
    (tmp_path / "base" / "catalog.yml").write_text("a: {x: '${runtime_params: place.of, null}'}")
    check_parameters(context_of(tmp_path, {"place": {"of": "x"}}), Parameters)
    with pytest.raises(UserError, match="run_name"):
        check_parameters(context_of(tmp_path, {"run_name": "mine"}), Parameters)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("recpie.iterations", ["recipe.iterations"]),
        ("iterations", ["recipe.iterations", "teacher_recipe.iterations"]),
        ("device", ["trainer.device"]),
        ("crop", ["recipe.augment.crop", "teacher_recipe.augment.crop"]),
        ("traner", ["trainer"]),
        ("sedes", ["seeds"]),
        ("rdd.tfelength", ["rdd.tfe_length"]),
        (
            "batchsize",
            [
                "recipe.batch_size",
                "evaluation.batch_size",
                "teacher_recipe.batch_size",
                "predict.batch_size",
                "benchmark.batch_size",
            ],
        ),
        ("nonsense", []),
    ],
)
def test_the_likeliest_names_are_offered(name, meant):
    assert sorted(suggest(name, KNOWN)) == sorted(meant)


@pytest.mark.parametrize(
    "values",
    [
        {"seed": -1}, {"seed": True}, {"seed": 1.0}, {"seeds": 0}, {"seeds": [1, 2]},
        {"trainer": {"device": 3}}, {"recipe": 3}, {"teacher": {"network": {}}},
    ],
    ids=str,
)  # fmt: skip
def test_what_does_not_fit_is_found_whatever_pipeline_runs(values):
    (sentence,) = faults(values, Parameters, values)
    assert sentence.startswith(next(iter(values)))


ABSURD = [
    *("recipe.optimizer.lr=1e308", "recipe.optimizer.lr=.inf", "recipe.optimizer.betas=[5, 0.9]"),
    *("recipe.optimizer.betas=[0.9, 1.0]", "recipe.optimizer.weight_decay=.inf"),
    *("recipe.optimizer.power=.nan", "recipe.optimizer.warmup=1e30", "recipe.clip_norm=.inf"),
    *("recipe.iterations=1e30", "recipe.iterations=1000000000", "recipe.batch_size=1000000000"),
    *("recipe.gradient_accumulation_steps=1e12", "recipe.aux_weight=.inf"),
    *("recipe.validate_every=1e30", "recipe.augment.crop=[1000000000, 8]"),
    *("recipe.augment.crop=[32000, 32000]", "recipe.augment.scale_max=.inf"),
    *("recipe.augment.scale_max=1000000", "recipe.augment.scale_min=1e-9"),
    *("recipe.augment.scale_step=.nan", "recipe.augment.flip=.nan"),
    *("seed=9223372036854775808", "seed=10000000001", "seeds=1000000000"),
    *("evaluation.scales=[1000000.0]", "evaluation.scales=[.inf]", "evaluation.scales=[]"),
    *("evaluation.batch_size=1000000000", "evaluation.figure_images=1e9"),
    *("trainer.timeout=1e300", "trainer.timeout=.nan", "trainer.checkpoint_every=.inf"),
    *("trainer.devices=1000000", "trainer.nodes=1000000", "trainer.workers=1000000"),
    *("trainer.threads=1e9", "trainer.max_restarts=1e30", "data.workers=1000000"),
    *("data.image_size=[100000, 100000]", "data.val_fraction=.nan", "data.split_seed=1e30"),
    *("data.scenes.train=1e12", "data.scenes.height=1000000000", "data.scenes.seed=1e30"),
    *("rdd.tfe_length=.inf", "rdd.min_kept=1e30", "rdd.threshold=.nan", "rdd.class_floor=.inf"),
    *("methods.kd=.inf", "methods.kd=1e308", "methods.weights={cwd: {cwd_logits: .inf}}"),
    *("methods.options={cirkd: {cirkd_memory: {pixel_slots: 1000000000000}}}",),
    *("methods.options={cirkd: {cirkd_memory: {temperature: .nan}}}", "student.width=1000000000"),
    *("student.dropout=.nan", "student.dropout=1.0"),
]


@pytest.mark.parametrize("given", ABSURD)
def test_what_is_infinite_or_absurd_is_refused_in_one_line(given):
    message = refused(given)
    # The place in a list is left out.
    assert message.startswith(given.partition("=")[0])
    assert message.endswith("Nothing was read or trained.")


def test_seeds_may_not_lead_beyond_the_largest_one():
    with pytest.raises(UserError, match=r"seed \(10000000000\) and seeds \(2\) lead beyond"):
        check_parameters(context_of(CONF, {"seed": LARGEST_SEED, "seeds": 2}), Parameters)


def test_the_largest_seed_and_iteration_make_a_seed_that_torch_takes():
    torch.Generator().manual_seed(step_seed(LARGEST_SEED, COUNT))


def _take(trainer: TrainerParams) -> None: ...


@pytest.mark.parametrize("device", ["mps", "xpu", "meta", "cuda", "cuda:7", "gpu"])
def test_a_device_that_is_not_there_is_refused_before_any_node_runs(monkeypatch, device):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    catalog = DataCatalog({"params:trainer": MemoryDataset(TrainerParams(device=device))})
    pipeline = Pipeline([Node(_take, "params:trainer", None, name="train")])
    with pytest.raises(UserError, match=f"^trainer.device is {device!r}"):
        check_machine(pipeline, catalog)
    # What computes nothing needs no device.
    check_machine(Pipeline([]), catalog)
