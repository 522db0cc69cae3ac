"""Properties that every network of ours must have, and how its documents look. Used by the tests beside this file."""

import copy
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn
from torch.nn.functional import pad
from transformers import DynamicCache

from boxcar.pipelines.families.family import Network
from boxcar.schemas.training import NetworkPart
from boxcar.train.network.attention import SEGMENTS, Segments
from boxcar.train.network.native.native_model import NativeModel
from tests.golden.drawn import recorded

TOLERANCE = 5e-6
"""Of float32 numbers against those of the published code."""


@dataclass(frozen=True)
class Document:
    """A row of batch size 1."""

    input_ids: torch.Tensor
    """(1, T)."""
    image_mask: torch.Tensor
    """(1, T) bool."""
    pixel_values: torch.Tensor | None
    """(images, 3, side, side)."""

    def inputs(self) -> dict[str, Any]:
        return {"input_ids": self.input_ids, "image_mask": self.image_mask, "pixel_values": self.pixel_values}


def document(
    *parts: int | str,
    placeholders: int,
    side: int,
    seed: int,
    image_token: int = 3,
    opens: tuple[int, ...] = (),
    closes: tuple[int, ...] = (),
) -> Document:
    """Parts in order: a number of random text tokens, or "image". Ids of text are 10 to 59."""
    made = torch.Generator().manual_seed(seed)
    ids, mask, num_images = [], [], 0
    for part in parts:
        if part == "image":
            ids += [*opens, *[image_token] * placeholders, *closes]
            mask += [False] * len(opens) + [True] * placeholders + [False] * len(closes)
            num_images += 1
        else:
            assert isinstance(part, int)
            ids += torch.randint(10, 60, (part,), generator=made).tolist()
            mask += [False] * part
    pixels = torch.randn(num_images, 3, side, side, generator=made) if num_images else None
    return Document(torch.tensor([ids]), torch.tensor([mask]), pixels)


def largest_recorded_difference(found: torch.Tensor, golden: torch.Tensor) -> float:
    """The same, over the part of a tensor that a golden file holds."""
    return largest_difference(recorded(found), golden)


def largest_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return (found.double() - expected.double()).abs().max().item()


def positions_of(model: NativeModel, row: Document) -> torch.Tensor:
    return model.positions(torch.ones_like(row.input_ids), row.image_mask)


@contextmanager
def packed(model: NativeModel, rows: list[Document]) -> Iterator[dict[str, Any]]:
    """The pack of these documents, in the order given; the model is in packed mode meanwhile."""
    borders = [0]
    for row in rows:
        borders.append(borders[-1] + row.input_ids.shape[1])
    SEGMENTS.current = Segments(torch.tensor(borders, dtype=torch.int32), borders)
    model.packed = True
    images = [row.pixel_values for row in rows if row.pixel_values is not None]
    try:
        yield {
            "input_ids": torch.cat([row.input_ids for row in rows], dim=1),
            "position_ids": torch.cat([positions_of(model, row) for row in rows], dim=1),
            "image_mask": torch.cat([row.image_mask for row in rows], dim=1),
            "pixel_values": torch.cat(images) if images else None,
        }
    finally:
        model.packed = False
        SEGMENTS.current = None


def check_packed_equals_single(model: NativeModel, rows: list[Document]) -> None:
    model.eval()
    with torch.no_grad():
        alone = [model(**row.inputs()).logits for row in rows]
        with packed(model, rows) as inputs:
            together = model(**inputs).logits
        mixed = model(**inputs).logits
    assert largest_difference(together, torch.cat(alone, dim=1)) < 1e-5
    first = rows[0].input_ids.shape[1]
    assert largest_difference(mixed[:, first:], together[:, first:]) > 1e-3, "the documents are too alike for this test to mean anything"


def check_padding_changes_nothing(model: NativeModel, rows: list[Document], pad_token: int) -> None:
    """A batch of padded rows gives each row's own logits, padded on either side."""
    model.eval()
    longest = max(row.input_ids.shape[1] for row in rows)
    images = [row.pixel_values for row in rows if row.pixel_values is not None]
    for left in (False, True):
        ids = torch.full((len(rows), longest), pad_token)
        real, image_mask = torch.zeros(len(rows), longest, dtype=torch.long), torch.zeros(len(rows), longest, dtype=torch.bool)
        for number, row in enumerate(rows):
            length = row.input_ids.shape[1]
            place = slice(longest - length, None) if left else slice(length)
            ids[number, place], image_mask[number, place], real[number, place] = row.input_ids[0], row.image_mask[0], 1
        with torch.no_grad():
            together = model(input_ids=ids, image_mask=image_mask, attention_mask=real, pixel_values=torch.cat(images)).logits
            for number, row in enumerate(rows):
                assert largest_difference(together[number, real[number].bool()], model(**row.inputs()).logits[0]) < 1e-5


def check_cache_equals_whole_rows(model: NativeModel, row: Document, num_new: int = 5) -> None:
    """Step by step through the cache gives the logits of one pass, and `generate` the same tokens either way."""
    model.eval()
    num_tokens = row.input_ids.shape[1]
    options: dict[str, Any] = {"max_new_tokens": num_new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        cached = model.generate(**row.inputs(), **options, use_cache=True)
        assert torch.equal(cached, model.generate(**row.inputs(), **options, use_cache=False))
        assert cached.shape[1] == num_tokens + num_new
        image_mask = pad(row.image_mask, (0, num_new))
        whole = model(input_ids=cached, image_mask=image_mask, pixel_values=row.pixel_values).logits
        positions = model.positions(torch.ones_like(cached), image_mask)
        cache = DynamicCache(config=model.config)
        steps = [model(**row.inputs(), position_ids=positions[:, :num_tokens], past_key_values=cache).logits]
        for place in range(num_tokens, num_tokens + num_new):
            here = slice(place, place + 1)
            steps.append(model(cached[:, here], position_ids=positions[:, here], past_key_values=cache).logits)
    assert largest_difference(torch.cat(steps, dim=1), whole) < 1e-5


def check_rows_generate_together(model: NativeModel, rows: list[Document], pad_token: int, num_new: int = 4) -> None:
    """Rows of different length, padded on the left, generate what each generates alone."""
    model.eval()
    longest = max(row.input_ids.shape[1] for row in rows)
    options: dict[str, Any] = {"max_new_tokens": num_new, "do_sample": False, "eos_token_id": None, "pad_token_id": pad_token}
    missing = [longest - row.input_ids.shape[1] for row in rows]
    together = model.generate(
        torch.cat([pad(row.input_ids, (count, 0), value=pad_token) for row, count in zip(rows, missing, strict=True)]),
        image_mask=torch.cat([pad(row.image_mask, (count, 0)) for row, count in zip(rows, missing, strict=True)]),
        attention_mask=torch.cat([pad(torch.ones_like(row.input_ids), (count, 0)) for row, count in zip(rows, missing, strict=True)]),
        pixel_values=torch.cat([row.pixel_values for row in rows if row.pixel_values is not None]),
        **options,
    )
    for number, row in enumerate(rows):
        assert torch.equal(together[number, -num_new:], model.generate(**row.inputs(), **options)[0, -num_new:])


def check_round_trip(model: NativeModel, row: Document, folder: Path) -> None:
    """save_pretrained in several files, from_pretrained of safetensors and of torch's pickles."""
    model.eval()
    expected = model(**row.inputs()).logits
    model.save_pretrained(folder / "safetensors", max_shard_size="100KB")
    assert len(list((folder / "safetensors").glob("*.safetensors"))) > 1
    (folder / "bin").mkdir()
    model.config.save_pretrained(folder / "bin")
    torch.save(model.state_dict(), folder / "bin/pytorch_model.bin")
    for files in ("safetensors", "bin"):
        again, report = type(model).from_pretrained(folder / files, output_loading_info=True)
        assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert torch.equal(again.eval()(**row.inputs()).logits, expected)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert {name for name, parameter in again.named_parameters() if parameter.requires_grad} == trained


def check_checkpointing_keeps_gradients(model: NativeModel, rows: list[Document]) -> None:
    """In a pack: the documents must still be known when the layers run again, whatever SEGMENTS holds by then."""

    def gradients(network: NativeModel) -> dict[str, torch.Tensor]:
        network.train()
        with packed(network, rows) as inputs:
            loss = network(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        return {name: parameter.grad for name, parameter in network.named_parameters() if parameter.grad is not None}

    plain = gradients(copy.deepcopy(model))
    assert plain.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for reentrant in (False, True):
        network = copy.deepcopy(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # newer versions of transformers call it activation_checkpointing_enable
            network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        recomputed = gradients(network)
        # The pixels need no gradient, so torch's reentrant kind leaves the tower out, as it does in every network.
        names = plain.keys() & recomputed.keys()
        assert reentrant or names == plain.keys()
        for name in names:
            assert largest_difference(recomputed[name], plain[name]) < 1e-6, name


def check_no_image_still_gives_gradients(model: NativeModel, row: Document, side: int) -> None:
    """Pixels of no image: every parameter gets a gradient, which ranks of a distributed run wait for; the logits are those without."""
    assert row.pixel_values is None
    network = copy.deepcopy(model).train()
    output = network(row.input_ids, image_mask=row.image_mask, pixel_values=torch.zeros(0, 3, side, side), labels=row.input_ids)
    assert largest_difference(output.logits, network(row.input_ids).logits) < 1e-6
    output.loss.backward()
    assert [name for name, parameter in network.named_parameters() if parameter.grad is None] == []


def check_autocast(model: NativeModel, rows: list[Document]) -> None:
    """float32 weights under bfloat16 autocast, and bfloat16 weights: near the float32 logits."""
    model.eval()
    with packed(model, rows) as inputs, torch.no_grad():
        expected = model(**inputs).logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = model(**inputs).logits
    half = copy.deepcopy(model).to(torch.bfloat16)
    with packed(half, rows) as inputs, torch.no_grad():
        rounded = half(**inputs).logits
    assert rounded.dtype == torch.bfloat16
    for found in (mixed, rounded):
        assert (found.float() - expected).norm() < 0.1 * expected.norm()


def check_parts(model: nn.Module, network: Network) -> Counter[NetworkPart]:
    """Every parameter belongs to exactly one part. Returns how many each part has."""
    counts: Counter[NetworkPart] = Counter()
    for name, _ in model.named_parameters():
        parts: list[NetworkPart] = [part for part, pattern in network.part_names.items() if re.match(pattern, name)]
        assert len(parts) == 1, f"{name}: {parts}"
        counts[parts[0]] += 1
    return counts


def check_adapters(model: NativeModel, network: Network, row: Document, num_targets: dict[NetworkPart, int], folder: Path) -> None:
    """Each part's expression finds its linear layers and no others; adapters of all parts change the logits and come back from disk."""
    for part, pattern in network.lora_targets.items():
        found = [name for name, _ in model.named_modules() if re.fullmatch(pattern, name)]
        assert all(isinstance(model.get_submodule(name), nn.Linear) for name in found)
        assert all(re.match(network.part_names[part], name + ".weight") for name in found)
        assert len(found) == num_targets[part], found
    model.eval()
    plain = model(**row.inputs()).logits
    base = copy.deepcopy(model)
    targets = "|".join(f"({pattern})" for pattern in network.lora_targets.values())
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM")).eval()
    assert torch.equal(adapted(**row.inputs()).logits, plain), "fresh adapters change nothing"
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    expected = adapted(**row.inputs()).logits
    assert largest_difference(expected, plain) > 1e-2
    adapted.save_pretrained(folder)
    again = peft.PeftModel.from_pretrained(base, folder).eval()
    assert torch.equal(again(**row.inputs()).logits, expected)
    states = again.hidden_states(row.input_ids, positions_of(base, row), row.pixel_values, row.image_mask)
    assert torch.equal(again.lm_head(states), expected)
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert again.generate(**row.inputs(), **options).shape[1] == row.input_ids.shape[1] + 3
    merged = again.merge_and_unload()
    assert largest_difference(merged(**row.inputs()).logits, expected) < 1e-4


def published_shapes(table: dict[str, dict[str, Any]]) -> Counter[tuple[str, tuple[int, ...]]]:
    """Of `published_state_dict_shapes.json`: (name with N for numbers, shape) -> how many."""
    return Counter({(name, tuple(entry["shape"])): entry["count"] for name, entry in table.items()})


def shapes_of(model: nn.Module) -> Counter[tuple[str, tuple[int, ...]]]:
    """The same of a model."""
    return Counter((re.sub(r"\.\d+\.", ".N.", name), tuple(tensor.shape)) for name, tensor in model.state_dict().items())
