"""An adapter for other programs: weights, tokenizer, processor and generation settings that say what training used.

    adapter folder ──> adapter copied, or base and adapter merged ──> safetensors, config.json
    frame contract ──> pixel limits      preprocessor_config.json
                   ──> chat template     chat_template.jinja, whose rendering is our prompt
                   ──> ends of a reply   generation_config.json
                   ──> boxcar.json       the contract itself; what is merged is a whole model

transformers (checked with 5.23) reads the limits of Qwen2-VL, Qwen2.5-VL and Qwen3-VL as `size` {shortest_edge, longest_edge}, in pixels of
area; `min_pixels` and `max_pixels` stand beside it for older versions and for vLLM.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.utils import cached_file

from boxcar.pipelines.families.family import ChatTemplate, Family
from boxcar.pipelines.tokens.frame import Frame, frame_of
from boxcar.schemas.adapter import CARD, AdapterCard, BaseRecord, loads
from boxcar.schemas.errors import ConfigError, ContractError
from boxcar.train.answering.adapter import WEIGHTS, config_hash, find_adapter, open_adapter
from boxcar.train.data import pixels

ADAPTER_CONFIG = "adapter_config.json"
_TEMPLATE, _OLD_TEMPLATE = "chat_template.jinja", "chat_template.json"
_TOKENIZER_CONFIG = "tokenizer_config.json"
_PREPROCESSOR = "preprocessor_config.json"
_COPIED_FROM_BASE = ("video_preprocessor_config.json",)
_SAMPLE_QUESTION = 'Where is the "red car" (2), 红色的车?'
_BICUBIC = 3


@dataclass(frozen=True)
class Exported:
    """What stands in the folder."""

    card: AdapterCard
    frame: Frame
    merged: bool
    """The folder holds a whole model."""
    processor: str | None
    """transformers' processor of the family; None: it has none, and only Boxcar can use the folder."""
    notes: list[str]


def processor_of(family: Family) -> str | None:
    """transformers' own processor class of a family; None where it has none."""
    name: str | None = PROCESSOR_MAPPING_NAMES.get(family.network.model_type)
    return name


def export_model(adapter: str, out: Path, *, merge: bool, base: str = "", tokenizer: str = "") -> Exported:
    """Fill the empty folder `out`. base, tokenizer: where they are now, if they have moved.

    Raises ConfigError where nothing another program could load would come of it, or something is missing; ContractError where base, adapter
    and tokenizer do not belong together, or the files written do not give training's prompts.
    """
    found = find_adapter(adapter)
    card = loads((found / CARD).read_bytes(), str(found / CARD))
    if not tokenizer and (found / "tokenizer.json").is_file():  # exported before
        tokenizer = str(found)
    frame = frame_of(card.contract, str(found / CARD), tokenizer)
    processor = processor_of(frame.family)
    whole = card.method == "full"
    _require_possible(found, card, frame.family, processor, merge=merge)
    notes: list[str] = []
    if whole:
        _copy(found, out, [path.name for path in found.iterdir() if path.suffix == ".safetensors" or path.name in _OF_MODELS])
    elif merge:
        card = _merge(found, out, card, base, tokenizer)
    else:
        _copy(found, out, [WEIGHTS, ADAPTER_CONFIG])
        if base:
            _point_to(out / ADAPTER_CONFIG, base)
    (out / CARD).write_bytes(card.dumps())
    source = str(found) if whole else base or card.base.name
    if processor is None:
        frame.tokenizer.backend.save(str(out / "tokenizer.json"))
        notes.append(
            f"transformers has no processor for {frame.family.title}: only `boxcar predict` and `boxcar evaluate` open this folder"
        )
        return Exported(card, frame, whole, None, notes)
    notes += _write_tokenizer(out, frame, _tokenizer_folder(frame.tokenizer_name), source)
    _write_processor(out, frame, processor, source)
    _write_generation(out, frame, source)
    return Exported(card, frame, merge or whole, processor, notes)


_OF_MODELS = ("config.json", "generation_config.json", "model.safetensors.index.json")


def _require_possible(found: Path, card: AdapterCard, family: Family, processor: str | None, *, merge: bool) -> None:
    if merge and processor is None:
        raise ConfigError(
            "--merge",
            found=f"{family.title}, for which transformers has no processor",
            expected="a family that transformers loads by itself",
            fix="Without --merge the adapter is exported with its contract, which `boxcar predict` opens.",
        )
    if not merge and card.method != "full" and card.base.random_seed is not None:
        raise ConfigError(
            str(found),
            found="an adapter of a base with random weights, which no other program has",
            expected="an adapter of a pretrained base",
            fix="--merge writes base and adapter as one model.",
        )


def _copy(source: Path, out: Path, names: Sequence[str]) -> None:
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
        elif name in (WEIGHTS, ADAPTER_CONFIG):
            raise ConfigError(str(source / name), found="no such file", expected="a whole adapter", fix="Train or copy it again.")


def _point_to(path: Path, base: str) -> None:
    settings = json.loads(path.read_bytes())
    path.write_text(json.dumps(settings | {"base_model_name_or_path": base}, indent=2), encoding="utf-8")


# ---- weights


def _merge(found: Path, out: Path, card: AdapterCard, base: str, tokenizer: str) -> AdapterCard:
    """Base and adapter as one model in the base's own precision. Returns the card of that model."""
    opened = open_adapter(str(found), torch.device("cpu"), _stored_dtype(base or card.base.name), base=base, tokenizer=tokenizer)
    try:
        model = opened.network.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise ConfigError(str(found / WEIGHTS), found=f"weights that do not merge ({error})", expected="finite weights") from error
    model.save_pretrained(out)
    for file in out.glob("*.safetensors"):  # written for the owner alone, whatever the umask: a server is often another user
        file.chmod((out / "config.json").stat().st_mode)
    record = BaseRecord(name=card.base.name, config_xxh3_128=config_hash(str(out)))
    return msgspec.structs.replace(card, method="full", base=record)


def _stored_dtype(base: str) -> torch.dtype:
    """The precision that a base says its weights are in; float32 where it says nothing."""
    try:
        found = AutoConfig.from_pretrained(base).dtype
    except (OSError, ValueError) as error:
        raise ConfigError(
            "base", found=f"{base!r}: {str(error).splitlines()[0][:200]}", expected="a folder or id with config.json"
        ) from error
    return found if isinstance(found, torch.dtype) else torch.float32


# ---- tokenizer and template


def _tokenizer_folder(name: str) -> str:
    return str(Path(name).parent) if Path(name).is_file() else name


def _optional(source: str, name: str) -> Path | None:
    """A file of a folder or a hub repository; None where it has none, or cannot be asked."""
    try:
        found = cached_file(source, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False)
    except (OSError, ValueError):  # no folder, and no name of a repository
        return None
    return None if found is None else Path(found)


def _read_json(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ConfigError(str(path), found=f"no JSON ({error})", expected="the file as it was published") from error
    return dict(content)


def _write_tokenizer(out: Path, frame: Frame, *sources: str) -> list[str]:
    """The tokenizer whose fingerprint the contract has, its settings, and a template that renders training's prompts. Returns remarks."""
    frame.tokenizer.backend.save(str(out / "tokenizer.json"))
    settings: dict[str, Any] = {}
    templates: list[str] = []
    for source in dict.fromkeys(sources):
        settings = settings or _read_json(_optional(source, _TOKENIZER_CONFIG))
        templates += _templates(source)
    settings.pop("chat_template", None)
    if not settings:
        settings = {"model_max_length": frame.family.max_sequence, "clean_up_tokenization_spaces": False}
    # tokenizer.json says all: the class that takes it as it is, whatever the published one would rebuild.
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    stop = _token(frame, frame.turn_close_ids[0])
    settings |= {"eos_token": settings.get("eos_token") or stop, "pad_token": settings.get("pad_token") or stop}
    (out / _TOKENIZER_CONFIG).write_text(json.dumps(settings, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(str(out))
    kept = next((text for text in templates if _renders_as_trained(tokenizer, text, frame)), None)
    template = kept or chat_template(frame.family.chat)
    (out / _TEMPLATE).write_text(template, encoding="utf-8")
    _require_same_prompts(out, frame, template)
    if kept is None and templates:
        return ["the published chat template does not render the prompts of training: chat_template.jinja is the contract's"]
    return [] if kept else ["chat_template.jinja is made from the contract"]


def _token(frame: Frame, number: int) -> str:
    found = frame.tokenizer.backend.id_to_token(number)
    assert found is not None, "the contract's ids are this tokenizer's"
    return found


def _templates(source: str) -> list[str]:
    plain = _optional(source, _TEMPLATE)
    texts: list[Any] = [] if plain is None else [plain.read_text(encoding="utf-8")]
    texts += [_read_json(_optional(source, name)).get("chat_template") for name in (_OLD_TEMPLATE, _TOKENIZER_CONFIG)]
    return [text for text in texts if isinstance(text, str)]


def chat_template(chat: ChatTemplate) -> str:
    """A family's template as transformers' chat templates are written (Jinja): system, user and assistant messages, text and images."""
    system_open, system_close = chat.header("\0", 0).split("\0")
    system_close = system_close.removesuffix(chat.turn_open)
    default = "" if chat.default_system is None else f"{system_open}{chat.default_system}{system_close}"
    quoted = {
        name: json.dumps(text, ensure_ascii=False)
        for name, text in {
            "DEFAULT": default,
            "SYSTEM_OPEN": system_open,
            "SYSTEM_CLOSE": system_close,
            "IMAGE": chat.image_in_question(1),
            "TURN_OPEN": chat.turn_open,
            "ANSWER_OPEN": chat.answer_open,
            "TURN_CLOSE": chat.turn_close,
        }.items()
    }
    text = _JINJA
    for name, value in quoted.items():
        text = text.replace(f"@{name}@", value)
    return text


_JINJA = """\
{%- macro said(content) -%}
  {%- if content is string -%}{{ content }}
  {%- else -%}
    {%- for part in content -%}
      {%- if part.type == 'image' or 'image' in part or 'image_url' in part -%}{{ @IMAGE@ }}
      {%- elif 'text' in part -%}{{ part.text }}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
  {%- if loop.first and message.role != 'system' -%}{{ @DEFAULT@ }}{%- endif -%}
  {%- if message.role == 'system' -%}{{ @SYSTEM_OPEN@ + said(message.content) + @SYSTEM_CLOSE@ }}
  {%- elif message.role == 'user' -%}{{ @TURN_OPEN@ + said(message.content) }}
    {%- if not loop.last or add_generation_prompt -%}{{ @ANSWER_OPEN@ }}{%- else -%}{{ @TURN_CLOSE@ }}{%- endif -%}
  {%- elif message.role == 'assistant' -%}{{ said(message.content) + @TURN_CLOSE@ }}
  {%- else -%}{{ raise_exception('roles are system, user and assistant') }}
  {%- endif -%}
{%- endfor -%}
"""


def _samples(chat: ChatTemplate) -> Iterator[tuple[list[dict[str, Any]], str]]:
    """Conversations, and the prompts that training makes of them."""
    asked: dict[str, Any] = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": _SAMPLE_QUESTION}]}
    prompt = f"{chat.header(chat.default_system, 1)}{_SAMPLE_QUESTION}{chat.answer_open}"
    yield [asked], prompt
    again: list[dict[str, Any]] = [asked, {"role": "assistant", "content": "Here."}, {"role": "user", "content": "And?"}]
    yield again, f"{prompt}Here.{chat.turn_close}{chat.turn_open}And?{chat.answer_open}"
    yield [{"role": "system", "content": "Be brief."}, asked], f"{chat.header('Be brief.', 1)}{_SAMPLE_QUESTION}{chat.answer_open}"


def _renders_as_trained(tokenizer: Any, template: str, frame: Frame) -> bool:
    for messages, expected in _samples(frame.family.chat):
        try:
            text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=True)
        except Exception:  # a template is a program of others; one that fails on these messages is not training's
            return False
        if text != expected:
            return False
    return True


def _require_same_prompts(out: Path, frame: Frame, template: str) -> None:
    """Raises ContractError where the folder's tokenizer and template give other ids than training saw."""
    tokenizer = AutoTokenizer.from_pretrained(str(out))
    assert tokenizer.chat_template == template, "read back as it was written"
    for messages, expected in _samples(frame.family.chat):
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        found = tokenizer(text, add_special_tokens=False)["input_ids"]
        ours = frame.tokenizer.backend.encode(expected, add_special_tokens=False).ids
        if text != expected or found != ours:
            raise ContractError(
                str(out),
                found=f"a template or tokenizer that gives {text!r} ({len(found)} tokens)",
                expected=f"{expected!r} ({len(ours)} tokens), as in training",
            )


# ---- processor and generation


def _write_processor(out: Path, frame: Frame, processor: str, source: str) -> None:
    """preprocessor_config.json: the published one, where the base has it, under the limits of training."""
    rule = pixels.patch_rule(frame.family)
    mean, std = pixels.MEAN_AND_STD[frame.family.image_normalisation]
    names = IMAGE_PROCESSOR_MAPPING_NAMES[frame.family.network.model_type]
    limits = frame.limits
    facts = {
        "processor_class": processor,
        "image_processor_type": names["torchvision"],
        "do_resize": True,
        "size": {"shortest_edge": limits.min_pixels, "longest_edge": limits.max_pixels},
        "min_pixels": limits.min_pixels,
        "max_pixels": limits.max_pixels,
        "resample": _BICUBIC,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
        "do_convert_rgb": True,
        "patch_size": rule.patch,
        "temporal_patch_size": pixels.TEMPORAL_PATCH,
        "merge_size": rule.merge,
    }
    settings = _read_json(_optional(source, _PREPROCESSOR)) | facts
    (out / _PREPROCESSOR).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    for name in _COPIED_FROM_BASE:
        if (found := _optional(source, name)) is not None:
            shutil.copyfile(found, out / name)


def _write_generation(out: Path, frame: Frame, source: str) -> None:
    """Greedy, as Boxcar predicts; a reply ends with what closes a turn, or with what the base ends with."""
    stop = frame.turn_close_ids[0]
    written = out / "generation_config.json"
    known = _read_json(written if written.is_file() else _optional(source, "generation_config.json"))
    own = known.get("eos_token_id")
    stops = sorted({stop, *(own if isinstance(own, list) else [] if own is None else [own])})
    GenerationConfig(do_sample=False, eos_token_id=stops, pad_token_id=stop).save_pretrained(out)
