"""Pages of the documentation site that are made from the project itself, for mkdocs.

The first page is README, parameters come from `rdd_pipeline.config`, methods from the table of
methods, pipelines from the registry: nothing is written twice, and nothing goes stale.
"""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pydantic import BaseModel

from rdd_pipeline.config import Parameters
from rdd_pipeline.distillation.methods import METHODS

ROOT = Path(__file__).parents[1]
PUBLIC = {
    "A trained network": ["rdd_pipeline.inference.model", "rdd_pipeline.networks.checkpoint"],
    "Losses": [
        "rdd_pipeline.losses.rdd",
        "rdd_pipeline.losses.cross_entropy",
        "rdd_pipeline.losses.base",
        *sorted(
            f"rdd_pipeline.losses.{path.stem}"
            for path in (ROOT / "src/rdd_pipeline/losses").glob("*.py")
            if path.stem
            not in {"__init__", "rdd", "cross_entropy", "base", "fused", "fused_relations"}
        ),
    ],
    "Methods": ["rdd_pipeline.distillation.methods", "rdd_pipeline.distillation.objective"],
    "Networks": ["rdd_pipeline.networks.network", "rdd_pipeline.networks.preprocessing"],
    "Training": ["rdd_pipeline.training.job", "rdd_pipeline.training.training"],
    "Evaluation": ["rdd_pipeline.evaluation.scoring", "rdd_pipeline.evaluation.predict"],
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages."""
    for name, text in (
        ("index.md", _from_root("README.md")),
        ("contributing.md", _from_root("CONTRIBUTING.md")),
        ("changelog.md", _from_root("CHANGELOG.md")),
        ("reference/parameters.md", parameters()),
        ("reference/methods.md", methods()),
        ("reference/pipelines.md", pipelines()),
        ("reference/python.md", python()),
    ):
        files.append(File.generated(config, name, content=text))
    return files


def _from_root(name: str) -> str:
    """A file of the project's root, its links as they are from docs/; to the code: none."""
    text = (ROOT / name).read_text(encoding="utf-8")
    text = text.replace("](docs/", "](").replace("](CONTRIBUTING.md", "](contributing.md")
    return re.sub(r"\[([^\]]+)\]\((?!https?://|#|[\w./-]*\.md)[^)]*\)", r"\1", text)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links of docs/ to files of the root lead to their pages, those to other files nowhere."""
    for name in ("CONTRIBUTING", "CHANGELOG"):
        markdown = markdown.replace(f"](../{name}.md", f"]({name.lower()}.md")
    markdown = markdown.replace("](../README.md", "](index.md")
    return re.sub(r"\[([^\]]+)\]\((?:\.\./|cluster/)[^)]*\)", r"\1", markdown)


# Browsers start no worker from disk, and the theme would load a substitute from another host.
WORKER = """
if (location.protocol === "file:") window.Worker = class extends EventTarget {
  constructor(url) {
    super();
    const frame = document.createElement("iframe"), script = document.createElement("script");
    frame.hidden = true;
    document.body.append(frame);
    const inside = this.inside = frame.contentWindow;
    inside.postMessage = data => this.dispatchEvent(new MessageEvent("message", {data}));
    this.ready = new Promise(done => { script.onload = done; });
    script.src = url;
    inside.document.body.append(script);
  }
  postMessage(data) {
    const Event = this.inside.MessageEvent;
    this.ready.then(() => this.inside.dispatchEvent(new Event("message", {data})));
  }
};
"""


def on_post_page(output: str, **_: Any) -> str:
    """Search works from disk, too."""
    shim = re.compile(r'<script src="?https://unpkg.com/iframe-worker/shim"?></script>')
    return shim.sub(lambda _: f"<script>{WORKER}</script>", output)


def on_post_template(output_content: str, **_: Any) -> str:
    """The page for addresses that are not there is not made of Markdown."""
    return on_post_page(output_content)


def parameters() -> str:
    """Every parameter with type, default and meaning."""
    lines = [
        "# Parameters",
        "",
        "What `--params=NAME=VALUE` and the `parameters.yml` of an environment may say. Types and "
        "bounds are checked before anything is read; a wrong name is refused with the nearest "
        "right one. An environment's own values win over these defaults: "
        "`kedro run --env=NAME` takes `conf/NAME/parameters.yml`.",
        "",
    ]
    lines += _section(Parameters, "")
    return "\n".join(lines)


def _section(model: type[BaseModel], prefix: str) -> list[str]:
    rows, below = [], []
    for name, field in model.model_fields.items():
        inner = _model_of(field.annotation)
        if inner is not None:
            below.append((f"{prefix}{name}", inner, field))
        if inner is field.annotation:
            continue
        default = "required" if field.is_required() else f"`{_shown(field.get_default())}`"
        rows.append(
            f"| `{prefix}{name}` | {_cell(_type(field.annotation))} | {_cell(default)} | "
            f"{_cell(field.description or '')} |"
        )
    lines = []
    if rows:
        if prefix:
            lines += [f"## {prefix.rstrip('.')}", "", _first(model), ""]
        lines += ["| name | type | default | meaning |", "|---|---|---|---|", *rows, ""]
    for name, inner, field in below:
        if field.description and inner is field.annotation:  # else its row has it
            lines += [f"`{name}`: {field.description}", ""]
        lines += _section(inner, f"{name}.")
    return lines


def _model_of(annotation: Any) -> type[BaseModel] | None:
    """The model that an annotation names, `null` beside it or not."""
    names = typing.get_args(annotation) or (annotation,)
    models = [name for name in names if inspect.isclass(name) and issubclass(name, BaseModel)]
    return models[0] if models else None


def _type(annotation: Any) -> str:
    if annotation is type(None):
        return "null"
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type(arguments[0])
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(_type, arguments)))
    if origin in (tuple, list):
        inner = [_type(a) for a in arguments if a is not Ellipsis]
        if Ellipsis in arguments or origin is list:
            return f"list of {inner[0]}"
        return f"[{', '.join(inner)}]"
    if origin is not None:
        return "mapping"
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return "mapping"
    return getattr(annotation, "__name__", str(annotation)).lower()


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return str(list(value) if isinstance(value, tuple) else value)


def _first(model: type[BaseModel]) -> str:
    return inspect.cleandoc(model.__doc__ or "").split("\n\n")[0].replace("\n", " ")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def methods() -> str:
    """What each method adds to the task loss."""
    lines = [
        "# The method, and those beside it",
        "",
        *_rdd(),
        "## All methods",
        "",
        "`kedro run --pipeline=distill_baselines --namespaces=NAME` trains one. The weights are "
        "those of `methods.NAME`; with `preset=reference_code` settings follow the published code "
        "where it deviates from its paper.",
        "",
        "| method | what tables call it | stages of the task loss | losses and their weights |",
        "|---|---|---|---|",
    ]
    for name, method in METHODS.items():
        losses = ", ".join(
            f"`{loss}` {weight:g}"
            for spec in method.losses
            for loss, weight in spec.weights.items()
        )
        stages = " then ".join(stage.name for stage in method.stages)
        lines.append(f"| `{name}` | {_cell(method.title)} | {stages} | {losses or 'none'} |")
    return "\n".join(lines) + "\n"


def _rdd() -> Iterator[str]:
    """The part of README about RDD."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    part = text.partition("## What RDD does\n")[2].partition("\n## ")[0]
    yield from part.strip().splitlines()
    yield from (
        "",
        "With logits `s` of the student and `t` of the teacher, upsampled to the labels `y` with "
        "aligned corners:",
        "",
        "```text",
        "TFE   w       = up(exp(-KL(softmax(t_aux) || softmax(t))))",
        "      loss    = sum over valid pixels of w (CE(s, y) + 0.4 CE(s_aux, y)) / all pixels",
        "TSE   hard(z) = pixels with softmax(z)[y] <= max(0.7, the k-th smallest)",
        "      loss    = mean of CE(s, y) over hard(s) XOR hard(t), + 0.4 that of the aux heads",
        "```",
        "",
    )


def pipelines() -> str:
    """Nodes of every pipeline with what they read and write."""
    from kedro.framework.project import pipelines as registered
    from kedro.framework.startup import bootstrap_project

    bootstrap_project(ROOT)
    lines = [
        "# Pipelines and catalog",
        "",
        "`kedro run --pipeline=NAME`; `make viz` draws them, and `make docs-viz` puts the drawing "
        "into this site as `viz/index.html`: a namespace is a box until it is unfolded. Data sets "
        "whose names do not begin with `params:` are entries of the catalog in `conf/base/`.",
        "",
    ]
    for name in sorted(registered):
        pipeline = registered[name]
        if name == "__default__":
            continue
        lines += [f"## {name}", "", "| node | reads | writes |", "|---|---|---|"]
        lines += [
            f"| {node.name} | {_names(node.inputs)} | {_names(node.outputs)} |"
            for node in pipeline.nodes
        ]
        lines.append("")
    return "\n".join(lines)


def _names(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "nothing"


def python() -> str:
    """Stubs that mkdocstrings fills from the docstrings."""
    lines = ["# Python", "", "`import rdd_pipeline; model = rdd_pipeline.load(FILE)`", ""]
    for title, modules in PUBLIC.items():
        lines += [f"## {title}", ""]
        for module in modules:
            lines += [f"::: {module}", "    options:", "      heading_level: 3", ""]
    return "\n".join(lines)
