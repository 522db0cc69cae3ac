"""Pages of the documentation that are generated from the code: every configuration key, and the model families.

`mkdocs.yml` names docs/hooks.py, which puts these pages in the site.
"""

import inspect
from collections.abc import Container, Iterator
from html import escape
from types import NoneType
from typing import Any, get_args

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from boxcar.pipelines.families.catalog import FAMILIES
from boxcar.schemas.workflow import Workflow

_SECTIONS = {
    "scenes": "Drawn scenes, for the quick start.",
    "convert": "`boxcar convert` and `boxcar audit`.",
    "train": "`boxcar plan`, `boxcar train` and `boxcar ablate`.",
    "evaluate": "`boxcar evaluate`.",
}


def configuration_page() -> str:
    """Markdown: a table for each section of a workflow, with each key, its type, its default and its description."""
    lines = [
        "# Configuration keys",
        "",
        "Every key of a workflow in `workflows.yaml`. This page is generated from the schema; `boxcar schema` prints it as JSON Schema for",
        "editors. Any key can be given on the command line: `boxcar convert NAME cutoff_len=2048 tasks.caption.share=0`. `boxcar run`",
        "needs the section's name before the key: `boxcar run NAME train.epochs=2`.",
        "",
        "## The workflow",
        "",
        *_table(Workflow, skip=_SECTIONS),
    ]
    for name, about in _SECTIONS.items():
        lines += ["", f"## {name}", "", about, "", *_section(name, _model_of(Workflow.model_fields[name]))]
    return "\n".join(lines) + "\n"


def _section(path: str, model: type[BaseModel] | None) -> Iterator[str]:
    if model is None:
        raise TypeError(f"{path} is not a section")
    parts = {name: part for name, field in model.model_fields.items() if (part := _model_of(field))}
    yield from _table(model)
    seen: dict[type[BaseModel], str] = {}
    for name, part in parts.items():
        inner = f"{path}.{name}"
        if part in seen:  # each task has the same keys
            continue
        seen[part] = inner
        others = [f"`{path}.{other}`" for other, model_of_it in parts.items() if model_of_it is part and other != name]
        yield from ("", f"### {inner}", "")
        if others:
            yield from (f"The same keys: {', '.join(others)}.", "")
        yield from _section(inner, part)


def _table(model: type[BaseModel], skip: Container[str] = ()) -> Iterator[str]:
    yield "| key | type | default | meaning |"
    yield "|---|---|---|---|"
    for name, field in model.model_fields.items():
        if name not in skip:
            yield f"| `{name}` | {_type(field)} | {_default(field)} | {_cell(_meaning(field))} |"


def _meaning(field: FieldInfo) -> str:
    part = _model_of(field)
    described = field.description or (" ".join((part.__doc__ or "").split()) if part else "")
    limits = [str(limit) for limit in field.metadata if type(limit).__name__ in ("Gt", "Ge", "Lt", "Le")]
    words = {"Gt(gt=": "above ", "Ge(ge=": "at least ", "Lt(lt=": "below ", "Le(le=": "at most "}
    for mark, word in words.items():
        limits = [limit.replace(mark, word).rstrip(")") for limit in limits]
    return f"{described} ({', '.join(limits)})" if limits else described


def _type(field: FieldInfo) -> str:
    if _model_of(field):
        return "section"
    return f"`{_cell(_name(field.annotation))}`"


def _name(annotation: Any) -> str:
    arguments = get_args(annotation)
    if not arguments:
        return "null" if annotation is NoneType else getattr(annotation, "__name__", str(annotation))
    if "Literal" in str(annotation).split("[", 1)[0]:
        return " or ".join(str(value) for value in arguments)
    origin = getattr(annotation, "__origin__", None)
    if origin is tuple:
        return f"list of {_name(arguments[0])}"
    if origin is dict:
        return f"map of {_name(arguments[0])} to {_name(arguments[1])}"
    if hasattr(annotation, "__metadata__"):
        return _name(arguments[0])
    return " or ".join(_name(argument) for argument in arguments if argument is not NoneType)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    if _model_of(field):
        values = field.default.model_dump(exclude_unset=True) if isinstance(field.default, BaseModel) else {}
        shown = ", ".join(f"`{name}={value}`" for name, value in values.items())
        return shown or ("its own" if isinstance(field.default, BaseModel) else "none")
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "none"
    shown = yaml.safe_dump(value, default_flow_style=True, width=200).removesuffix("...\n").strip()
    return f"`{_cell(shown)}`"


def _model_of(field: FieldInfo) -> type[BaseModel] | None:
    """The section that a key holds, if it holds one."""
    for candidate in (field.annotation, *get_args(field.annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def families_table() -> str:
    """Markdown: a row for each model family."""
    lines = ["| `family` | models | resize | boxes in the text | published tokenizer | checked against |", "|---|---|---|---|---|---|"]
    for name, family in FAMILIES.items():
        cells = family.title, family.resize.description, family.grid.description, f"`{family.checkpoint}`", family.upstream
        lines.append(f"| `{name}` | {' | '.join(_cell(cell) for cell in cells)} |")
    return "\n".join(lines)


def python_reference() -> str:
    """Markdown: signature and docstring of each public function of `import boxcar`."""
    import boxcar  # noqa: PLC0415  (the package imports its functions when they are asked for)

    lines: list[str] = []
    for name in boxcar.__all__:
        value = getattr(boxcar, name)
        signature = "" if inspect.isclass(value) else str(inspect.signature(value)).replace("'", "")
        lines += [f"## boxcar.{name}", "", "```python", f"boxcar.{name}{signature}", "```", ""]
        lines += [f'<pre class="docstring">{escape(inspect.getdoc(value) or "")}</pre>', ""]
    return "\n".join(lines)
