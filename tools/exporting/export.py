"""`boxcar export`: what `train.answering.export` writes, with a README whose snippets run as they stand, for transformers and for vLLM."""

import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import transformers
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich.console import Console
from rich.text import Text

from boxcar.pipelines import storage
from boxcar.pipelines.families.family import Family
from boxcar.tools.exporting.export_files import require_empty
from boxcar.tools.plain import visible
from boxcar.train.answering.export import ADAPTER_CONFIG, Exported, export_model

SNIPPETS = Path(__file__).with_name("snippets")
README = "README.md"
_NUM_SHOWN_QUESTIONS = 2
_ENVIRONMENT = Environment(
    loader=FileSystemLoader(SNIPPETS),
    autoescape=False,  # Python and Markdown; what is not ours stands in them as literals
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def export(adapter: str, out: Path, *, merge: bool, base: str = "", tokenizer: str = "") -> Exported:
    """Write the folder, whole or not at all. Raises ConfigError and ContractError, as `train.answering.export.export_model` does."""
    require_empty(out)
    with storage.writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
        try:
            exported = export_model(adapter, beside, merge=merge, base=base, tokenizer=tokenizer)
            (beside / README).write_text(readme(exported, beside, out, base), encoding="utf-8")
            beside.chmod(0o755)
            if out.exists():
                out.rmdir()
            beside.rename(out)
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            raise
    return exported


def export_and_tell(adapter: str, out: Path, *, merge: bool, base: str, tokenizer: str) -> None:
    """Export, and say what is in the folder."""
    exported = export(adapter, out, merge=merge, base=base, tokenizer=tokenizer)
    console = Console(soft_wrap=True)
    what = "one model, base and adapter merged" if exported.merged else f"the adapter of {exported.card.base.name}"
    console.print(Text(visible(f"{out}: {what}")))
    for path in sorted(out.iterdir()):
        console.print(Text(visible(f"  {path.name:<32} {path.stat().st_size / 1e6:>10.2f} MB")))
    for note in exported.notes:
        console.print(Text(visible(f"- {note}")))
    console.print(Text(visible(f"How to load it: {out / README}")))


# ---- the README


def readme(exported: Exported, folder: Path, out: Path, base: str) -> str:
    """folder: where the files are now; out: where they will be; base: where it is now, if it has moved."""
    card, frame = exported.card, exported.frame
    contract, chat = card.contract, frame.family.chat
    question = _question(exported)
    trained = {str(task) for task, turns in card.trained_turns.items() if turns}
    facts: dict[str, Any] = {
        "title": out.name,
        "folder": repr(str(out.absolute())),
        "base": repr(base or card.base.name),
        "merged": exported.merged,
        "limits": frame.limits,
        "question": _literal(question),
        "image_token": _literal(chat.image_token),
        "family": frame.family,
        "card": card,
        "contract": contract,
        "processor": exported.processor,
        "notes": exported.notes,
        "absolute": frame.family.grid.needs_resized_size,
        "version": transformers.__version__,
        "prompts": [
            (task, [text.replace("|", "\\|") for texts in by_language.values() for text in texts[:_NUM_SHOWN_QUESTIONS]])
            for task, by_language in contract.prompts.items()
            if task in trained
        ],
        "snippet": "",
        "vllm": "",
    }
    if exported.processor:
        stops = json.loads((folder / "generation_config.json").read_bytes())["eos_token_id"]
        facts["prompt"] = _literal(f"{chat.header(chat.default_system, 1)}{question}{chat.answer_open}")
        facts["stops"] = json.dumps(stops if isinstance(stops, list) else [stops])
        facts["rank"] = 0 if exported.merged else json.loads((folder / ADAPTER_CONFIG).read_bytes())["r"]
        facts["reading"] = _reading(frame.family)
        facts["snippet"] = _ENVIRONMENT.get_template("transformers.py.j2").render(facts)
        facts["vllm"] = _ENVIRONMENT.get_template("vllm.py.j2").render(facts)
    text = _ENVIRONMENT.get_template("export.md.j2").render(facts | {"folder": str(out)})
    return re.sub(r"\n{4,}", "\n\n\n", text).strip() + "\n"


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _question(exported: Exported) -> str:
    """One that training asked: about a phrase, or about a label, or whatever there is."""
    prompts = exported.card.contract.prompts
    trained = {str(task) for task, turns in exported.card.trained_turns.items() if turns}
    for task in (name for name in ("refer", "detect", *prompts) if name in trained):
        texts = [text for by_language in prompts.get(task, {}).values() for text in by_language]
        if texts:
            return texts[0].replace("{label}", "the red car")
    return "Describe the image."


def _reading(family: Family) -> str:
    """Code that takes a reply's boxes to pixels of the original, by the family's grid and form of text."""
    across, down = family.grid.px_expressions
    form = family.box_text
    order = ", ".join(("x0", "y0", "x1", "y1")[place] for place in form.order)
    facts = {"rule": family.grid.inverse_description, "across": across, "down": down, "key": re.escape(form.key), "order": order}
    if form.tags:
        facts |= zip(("ref_open", "ref_close", "box_open", "box_close"), map(re.escape, form.tags), strict=True)
    return _ENVIRONMENT.get_template(f"boxes_{form.form}.py.j2").render(facts)
