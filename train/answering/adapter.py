"""A trained adapter and its base, opened together; nothing is loaded that does not fit.

run folder or adapter folder ──> boxcar.json ──> base (by id and config hash) ──> adapter (every key, both ways) ──> network, frame
"""

import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from transformers.utils import cached_file

from boxcar.pipelines import storage
from boxcar.pipelines.tokens.frame import Frame, frame_of
from boxcar.schemas.adapter import CARD, AdapterCard, loads
from boxcar.schemas.errors import ConfigError, ContractError
from boxcar.train.network.model import Base, open_base, without_future_warnings
from boxcar.train.running.run_folder import ADAPTER, RunFolder

WEIGHTS = "adapter_model.safetensors"
_CHANGED_BY_COPIES = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")


@dataclass(frozen=True)
class Opened:
    """A network in evaluation mode, and how to speak with it."""

    base: Base
    network: Any
    """The peft model around base.model, or base.model itself."""
    frame: Frame
    card: AdapterCard | None
    """None: a bare base under a contract of some shards."""
    where: str

    def bare(self) -> AbstractContextManager[Any]:
        """For the time of the block, the base without its adapter. Raises ConfigError where all weights were tuned."""
        if self.card is None:
            return nullcontext()
        if self.card.method == "full":
            raise ConfigError(self.where, found="a model whose own weights were tuned", expected="an adapter that can be taken off")
        found: AbstractContextManager[Any] = self.network.disable_adapter()
        return found


def config_hash(base: str) -> str:
    """xxh3-128 in hex over a base's config.json, as canonical JSON without what saving it again changes. Raises ConfigError."""
    try:
        path = cached_file(base, "config.json")
        config = json.loads(Path(str(path)).read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(
            "base", found=f"{base!r}: {str(error).splitlines()[0][:200]}", expected="a folder or id with config.json"
        ) from error
    kept = {key: value for key, value in config.items() if key not in _CHANGED_BY_COPIES}
    return xxhash.xxh3_128_hexdigest(json.dumps(kept, sort_keys=True).encode())


def find_adapter(where: str) -> Path:
    """The folder with boxcar.json: that folder itself, a run's `adapter/`, or a run's newest checkpoint. Raises ConfigError."""
    if storage.local_path(where) is None:
        raise ConfigError(
            "adapter",
            found=f"the URI {where}",
            expected="a local or shared folder",
            fix="Copy the run's adapter/ (for S3: `aws s3 cp --recursive`) and give the copy: nothing in it depends on its place.",
        )
    path = Path(where)
    checkpoints = [path / f"step-{step:08d}" for step in RunFolder(where).checkpoints()] if path.is_dir() else []
    for folder in (path, path / ADAPTER, *checkpoints):
        if (folder / CARD).is_file():
            return folder
    raise ConfigError(
        "adapter",
        found=f"{where}: {'no ' + CARD + ' in it' if path.is_dir() else 'no such folder'}",
        expected="a run's folder, or its adapter/",
        fix="`boxcar train` writes it; an adapter of other programs has no frame contract, and its boxes cannot be trusted.",
    )


def open_adapter(where: str, device: torch.device, dtype: torch.dtype, *, base: str = "", tokenizer: str = "") -> Opened:
    """Load an adapter with its base. base, tokenizer: where they are now, if they have moved.

    Raises ConfigError where something is missing or is of another model, ContractError where the frame here is another.
    """
    folder = find_adapter(where)
    card = loads((folder / CARD).read_bytes(), str(folder / CARD))
    if not tokenizer and (folder / "tokenizer.json").is_file():  # an exported folder brings its own
        tokenizer = str(folder)
    frame = frame_of(card.contract, str(folder / CARD), tokenizer)
    whole = card.method == "full"
    name = str(folder) if whole else base or card.base.name
    if not whole:
        _require_base(card, name, folder)
    random = card.base.random_seed is not None and not whole
    opened = open_base(
        name,
        frame.family,
        frame.image_token_id,
        random_weights=random,
        dtype=dtype,
        packed=False,
        seed=card.base.random_seed or 0,
    )
    network = opened.model if whole else _attach(opened, folder)
    network.to(device).eval()
    return Opened(opened, network, frame, card, str(folder))


def _require_base(card: AdapterCard, name: str, folder: Path) -> None:
    if (found := config_hash(name)) != card.base.config_xxh3_128:
        raise ContractError(
            str(folder),
            found=f"base {name!r} with a config.json of hash {found}",
            expected=f"{card.base.config_xxh3_128}, the base that it was trained on ({card.base.name!r})",
            fix="Name that base (--base, if it has moved).",
        )


def _attach(base: Base, folder: Path) -> Any:
    import peft  # noqa: PLC0415  (a whole model needs none)

    try:
        settings = peft.PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            str(folder / "adapter_config.json"),
            found=str(error).splitlines()[0],
            expected="peft's settings of the adapter",
            fix="Train or copy it again.",
        ) from error
    settings.inference_mode = True
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            written = set(file.keys())
            with without_future_warnings():
                model = peft.get_peft_model(base.model, settings)
            wanted = set(peft.get_peft_model_state_dict(model, save_embedding_layers=False))
            if missing := sorted(wanted ^ written):
                raise ContractError(
                    str(folder / WEIGHTS),
                    found=f"{len(written - wanted)} weights that the base has no place for, {len(wanted - written)} places without weight "
                    f"({', '.join(missing[:3])})",
                    expected="a weight for each adapted layer",
                    fix="Adapter and base are not of one model, or the file is damaged.",
                )
            peft.set_peft_model_state_dict(model, {key: file.get_tensor(key) for key in written})
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            str(folder / WEIGHTS), found=f"{error}", expected="an adapter's weights", fix="Train or copy it again."
        ) from error
    return model
