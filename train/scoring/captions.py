"""Caption metrics by pycocoevalcap (extra `captions`): BLEU-4, ROUGE-L and CIDEr-D, with a tokenizer of our own.

Not the official figures: COCO's own use Stanford's tokenizer, which needs Java. Here words are runs of letters and digits in lower case,
and every Chinese character is a word. Compare runs with each other, not with papers.
"""

import re
from importlib.util import find_spec
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from boxcar.schemas.errors import ConfigError

_WORD = re.compile(r"[一-鿿]|[^\W_一-鿿]+")


def words(text: str) -> str:
    """Words with a blank between them, as the metrics split them."""
    return " ".join(_WORD.findall(text.casefold()))


def require_captions() -> None:
    """Raises ConfigError where the extra is missing: before anything is generated."""
    if find_spec("pycocoevalcap") is None:
        raise ConfigError(
            "evaluate.caption_metrics", found="no pycocoevalcap", expected="that package", fix="pip install '.[captions]' in a checkout."
        )


def caption_figures(table: pa.Table) -> dict[str, Any]:
    """bleu_4, rouge_l, cider and num of the caption turns of an answers table; every caption of an image is a reference for each of them.

    Raises ConfigError where the extra is missing or no turn is a caption.
    """
    require_captions()
    from pycocoevalcap.bleu.bleu import Bleu  # noqa: PLC0415  (an extra)
    from pycocoevalcap.cider.cider import Cider  # noqa: PLC0415
    from pycocoevalcap.rouge.rouge import Rouge  # noqa: PLC0415

    captions = table.filter(pc.equal(table["task"], "caption")).select(["sample_id", "turn", "image", "answer", "reply"]).to_pylist()
    if not captions:
        raise ConfigError("evaluate.caption_metrics", found="no caption turn", expected="`caption` among evaluate.tasks, and in the shards")
    of_image: dict[str, list[str]] = {}
    for row in captions:
        of_image.setdefault(row["image"], []).append(words(row["answer"]))
    names = [f"{row['sample_id']}#{row['turn']}" for row in captions]
    truth = {name: of_image[row["image"]] for name, row in zip(names, captions, strict=True)}
    said = {name: [words(row["reply"])] for name, row in zip(names, captions, strict=True)}
    bleu, _ = Bleu(4).compute_score(truth, said, verbose=0)
    rouge, _ = Rouge().compute_score(truth, said)
    cider, _ = Cider().compute_score(truth, said)
    return {"bleu_4": float(bleu[3]), "rouge_l": float(rouge), "cider": float(cider), "num": len(captions), "official": False}
