"""Size and shape of the code: ``python benchmarks/structure.py [--root ANOTHER_CHECKOUT]``.

Prints a table in Markdown and, below it, every function that is long or takes many parameters. The
source is only parsed, never imported, so any checkout can be measured, with Python alone.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

LONG = 60
"""Lines of a function above which it is listed."""
MANY = 8
"""Parameters of a function above which it is listed."""
HEART = ("losses/", "distillation/", "training/step.py", "training/loop.py", "training/schedule.py")
"""What a reader comes for: losses, methods and the loop that trains with them."""


@dataclass(frozen=True)
class Function:
    """One function or method, nested ones too."""

    file: str
    line: int
    name: str
    lines: int
    parameters: int

    @property
    def package(self) -> str:
        """First folder of the file, or the file itself."""
        return self.file.partition("/")[0]


@dataclass(frozen=True)
class Code:
    """All Python files of the package, by path below it."""

    lines: dict[str, int]
    functions: list[Function]
    classes: int
    fields: int

    def lines_of(self, *starts: str) -> int:
        """Lines of all files whose path begins with one of `starts`."""
        return sum(count for file, count in self.lines.items() if file.startswith(starts))


def measure(root: Path) -> Code:
    """Parse ``src/rdd_pipeline`` of a checkout.

    Raises:
        SystemExit: There is no such folder.
    """
    package = root / "src" / "rdd_pipeline"
    paths = sorted(package.rglob("*.py"))
    if not paths:
        raise SystemExit(f"There is no Python file below {package}. Give --root a checkout.")
    lines, functions, classes, fields = {}, [], 0, 0
    for path in paths:
        name, text = path.relative_to(package).as_posix(), path.read_text("utf-8")
        tree = ast.parse(text)
        lines[name] = len(text.splitlines())
        functions += list(_functions(name, tree))
        classes += sum(isinstance(n, ast.ClassDef) and n.name[0] != "_" for n in tree.body)
        if name == "config.py":
            models = [node for node in tree.body if isinstance(node, ast.ClassDef)]
            fields = sum(_is_parameter(node) for model in models for node in model.body)
    return Code(lines, functions, classes, fields)


def _functions(file: str, tree: ast.Module) -> Iterator[Function]:
    methods = {
        member
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for member in node.body
        if isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef)
        and not any(
            isinstance(d, ast.Name) and d.id == "staticmethod" for d in member.decorator_list
        )
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            given = node.args
            count = len(given.posonlyargs) + len(given.args) + len(given.kwonlyargs)
            count += bool(given.vararg) + bool(given.kwarg) - (node in methods)  # self or cls
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            yield Function(file, node.lineno, node.name, length, count)


def _is_parameter(node: ast.stmt) -> bool:
    """Whether a statement of a model is a field, and no section of other fields."""
    if not isinstance(node, ast.AnnAssign):
        return False
    kind = ast.unparse(node.annotation)
    return not (kind.startswith("ClassVar") or kind.endswith("Params"))


def table(code: Code) -> list[tuple[str, str]]:
    """What is measured and its value, in the order of the printed table."""
    long_file = max(code.lines, key=code.lines.__getitem__)
    long = max(code.functions, key=lambda f: f.lines)
    wide = max(code.functions, key=lambda f: f.parameters)
    heart, total = code.lines_of(*HEART), sum(code.lines.values())
    return [
        ("lines", f"{total:,} in {len(code.lines)} files"),
        ("of them the heart", f"{heart:,} ({heart / total:.0%})"),
        ("the rest", f"{total - heart:,}"),
        ("median file", f"{median(code.lines.values()):g} lines"),
        ("longest file", f"{code.lines[long_file]} lines ({long_file})"),
        ("functions", f"{len(code.functions):,}"),
        ("median function", f"{median(f.lines for f in code.functions):g} lines"),
        ("longest function", f"{long.lines} lines ({long.file}: {long.name})"),
        ("most parameters", f"{wide.parameters} ({wide.file}: {wide.name})"),
        (f"functions over {LONG} lines", str(sum(f.lines > LONG for f in code.functions))),
        (
            f"functions over {MANY} parameters",
            str(sum(f.parameters > MANY for f in code.functions)),
        ),
        ("public classes", str(code.classes)),
        ("parameters of config.py", str(code.fields)),
    ]


def report(code: Code) -> str:
    """The table, then by package the functions that are too long or take too much."""
    rows = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in table(code))]
    listed = [f for f in code.functions if f.lines > LONG or f.parameters > MANY]
    for package in sorted({f.package for f in listed}):
        own = [f for f in listed if f.package == package]
        many = sum(f.parameters > MANY for f in own)
        long = sum(f.lines > LONG for f in own)
        rows += ["", f"{package}: {long} over {LONG} lines, {many} over {MANY} parameters"]
        rows += [
            f"  {f.file}:{f.line} {f.name}: {f.lines} lines, {f.parameters} parameters"
            for f in sorted(own, key=lambda f: (f.file, f.line))
        ]
    return "\n".join(rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure a checkout and print what was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    own = Path(__file__).resolve().parents[1]
    parser.add_argument("--root", type=Path, default=own, help="a checkout (default: this one)")
    print(report(measure(parser.parse_args(argv).root)))


if __name__ == "__main__":
    main()
