"""What stands beside trained weights, as boxcar.json: the frame contract, the base they belong to, and what they were trained on.

Whoever loads an adapter reads this first. The contract says how images and questions become tokens and boxes become pixels; the base's
fingerprint says which weights the adapter changes.
"""

import msgspec
import xxhash

from boxcar.schemas.contract import FrameContract
from boxcar.schemas.errors import ContractError
from boxcar.schemas.task import TaskName

CARD = "boxcar.json"
FORMAT = "boxcar-adapter"
VERSION = 1


class BaseRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The base that an adapter belongs to."""

    name: str
    """Folder or Hugging Face id, as the run was told: for people, and to find it again."""
    config_xxh3_128: str
    """Hash of its config.json, without the keys that a copy changes."""
    random_seed: int | None = None
    """Seed of random weights (trials); None: pretrained."""


class AdapterCard(msgspec.Struct, frozen=True, kw_only=True):
    """boxcar.json."""

    contract: FrameContract
    base: BaseRecord
    method: str
    """lora, qlora, or full (then the folder holds a whole model)."""
    trained_turns: dict[TaskName, int]
    """Turns of each task in the run's plan."""
    train_shards: dict[str, str]
    """Folders of shards that it was trained on, with their manifests' hashes."""
    to_original_pixels: str
    """The rule from the numbers of a reply to pixels of the original image, for people and other programs."""
    card_xxh3_128: str = ""
    """Hash of all the rest, so that a changed number is noticed: with other pixel limits every box would lie elsewhere."""
    format: str = FORMAT
    version: int = VERSION

    def dumps(self) -> bytes:
        """Readable JSON, the same bytes for the same card."""
        sealed = msgspec.structs.replace(self, card_xxh3_128=self._hash())
        return msgspec.json.format(msgspec.json.encode(sealed, order="sorted"), indent=1) + b"\n"

    def require_unchanged(self, where: str) -> None:
        """Raises ContractError where the card is not as it was written."""
        if self.card_xxh3_128 != (found := self._hash()):
            raise ContractError(
                where,
                found=f"a card of hash {found}",
                expected=f"{self.card_xxh3_128 or 'a hash'}, as it was written: the file was changed",
                fix="Copy the adapter again; another frame needs another training.",
            )

    def _hash(self) -> str:
        plain = msgspec.structs.replace(self, card_xxh3_128="")
        return xxhash.xxh3_128_hexdigest(msgspec.json.encode(plain, order="sorted"))


def loads(data: bytes, where: str) -> AdapterCard:
    """Raises ContractError where this is no card of this version."""
    try:
        card = msgspec.json.decode(data, type=AdapterCard)
    except msgspec.DecodeError as error:
        raise ContractError(
            where, found=f"no card of an adapter ({error})", expected=f"{CARD} as `boxcar train` writes it", fix="Give the run's folder."
        ) from error
    if (card.format, card.version) != (FORMAT, VERSION):
        raise ContractError(where, found=f"{card.format} version {card.version}", expected=f"{FORMAT} version {VERSION}")
    card.require_unchanged(where)
    return card
