"""`boxcar export-data`: shards for other programs, with boxes in the coordinates that each of them will really use.

| to            | boxes                                                                                | files                         |
|---------------|--------------------------------------------------------------------------------------|-------------------------------|
| coco          | xywh, pixels of the image file, upright                                              | instances.json, captions.json |
| llama-factory | in the text, exactly as the shards say it; LLaMA-Factory changes no numbers          | data.json, dataset_info.json  |
| ms-swift      | objects.bbox, xyxy, pixels of the image file; ms-swift turns them into model units   | data.jsonl                    |

One file for each, `to_*.py`, and one line in EXPORTERS.
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

from boxcar.pipelines import storage
from boxcar.pipelines.tokens.frame import frame_of
from boxcar.schemas.errors import ConfigError
from boxcar.tools.exporting.conversation import Job
from boxcar.tools.exporting.export_files import IMAGES, ImageFiles, require_empty
from boxcar.tools.exporting.to_coco import write_coco
from boxcar.tools.exporting.to_llama_factory import write_llama_factory
from boxcar.tools.exporting.to_ms_swift import write_ms_swift
from boxcar.train.data.store import ShardStore

EXPORTERS: dict[str, Callable[[Job], str]] = {"coco": write_coco, "llama-factory": write_llama_factory, "ms-swift": write_ms_swift}
"""Each writes its files and returns the text of README.txt."""


def export_data(shards: str, to: str, out: Path, tokenizer: str = "") -> dict[str, int]:
    """Write the turns of these shards for program `to`, with a README.txt that says how to read them. Returns what was counted.

    tokenizer: where it is now, if it has moved. Raises ConfigError (an unknown program, a family that it has not, a folder with files),
    ShardError, ContractError and ImageError.
    """
    if to not in EXPORTERS:
        raise ConfigError("--to", found=repr(to), expected=f"one of {', '.join(EXPORTERS)}")
    store = ShardStore([shards])
    frame = frame_of(store.contract, shards, tokenizer)
    require_empty(out)
    with storage.writing(out):
        out.mkdir(parents=True, exist_ok=True)
        job = Job(store, frame, ImageFiles(store, out / IMAGES), out, Counter())
        readme = EXPORTERS[to](job)
        if job.files.num_written:
            job.counts["images written"] = job.files.num_written
        counted = "".join(f"  {name}: {count}\n" for name, count in sorted(job.counts.items()))
        (out / "README.txt").write_text(f"{readme.strip()}\n\nFrom {shards} ({frame.family.title}):\n{counted}", encoding="utf-8")
    return dict(job.counts)
