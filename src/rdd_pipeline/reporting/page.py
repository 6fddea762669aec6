"""Templates of the HTML pages, which lie beside this file."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined, Template


def page_template(name: str) -> Template:
    """A template by its file's name; what it shows is escaped, what it lacks is an error."""
    return Environment(
        loader=PackageLoader("rdd_pipeline", "reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template(name)
