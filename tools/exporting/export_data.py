"""`boxcar export-data`: shards for other programs, with boxes in the coordinates that each of them will really use.

| to            | boxes                                                                                | files                         |
|---------------|--------------------------------------------------------------------------------------|-------------------------------|
| coco          | xywh, pixels of the image file, upright                                              | instances.json, captions.json |
| llama-factory | in the text, exactly as the shards say it; LLaMA-Factory changes no numbers          | data.json, dataset_info.json  |
| ms-swift      | objects.bbox, xyxy, pixels of the image file; ms-swift turns them into model units   | data.jsonl                    |
| parquet       | in the text as the shards say it, and objects.bbox, xyxy, pixels of the image        | data/*.parquet                |

One file for each, `to_*.py`, and one line in EXPORTERS.
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from boxcar.pipelines import storage
from boxcar.pipelines.tokens.frame import frame_of
from boxcar.schemas.errors import ConfigError
from boxcar.tools.exporting.conversation import Job
from boxcar.tools.exporting.export_files import IMAGES, ImageFiles, require_empty
from boxcar.tools.exporting.to_coco import write_coco
from boxcar.tools.exporting.to_llama_factory import write_llama_factory
from boxcar.tools.exporting.to_ms_swift import write_ms_swift
from boxcar.tools.exporting.to_parquet import write_parquet
from boxcar.train.data.store import ShardStore

EXPORTERS: dict[str, Callable[[Job], str]] = {
    "coco": write_coco,
    "llama-factory": write_llama_factory,
    "ms-swift": write_ms_swift,
    "parquet": write_parquet,
}
"""Each writes its files and returns the text of README."""


def export_data(shards: str, to: str, out: Path, tokenizer: str = "", *, image_bytes: bool = True) -> tuple[Path, dict[str, int]]:
    """Write the turns of these shards for program `to`, with a README that says how to read them. Returns its path, and what was counted.

    tokenizer: where it is now, if it has moved. image_bytes: of parquet, whether it holds the images or their paths. Raises ConfigError (an
    unknown program, a family that it has not, a folder with files), ShardError, ContractError and ImageError.
    """
    if to not in EXPORTERS:
        raise ConfigError("--to", found=repr(to), expected=f"one of {', '.join(EXPORTERS)}")
    store = ShardStore([shards])
    frame = frame_of(store.contract, shards, tokenizer)
    require_empty(out)
    with storage.writing(out), TemporaryDirectory() as scratch:
        out.mkdir(parents=True, exist_ok=True)
        within = to == "parquet" and image_bytes  # images that must be written anew are then copied into the Parquet files
        job = Job(store, frame, ImageFiles(store, Path(scratch) if within else out / IMAGES), out, Counter(), image_bytes)
        text = EXPORTERS[to](job).strip()
        if job.files.num_written and not within:
            job.counts["images written"] = job.files.num_written
        counted = "".join(f"  {name}: {count}\n" for name, count in sorted(job.counts.items()))
        # Hugging Face takes README.md for the card of a data set.
        readme = out / ("README.md" if to == "parquet" else "README.txt")
        readme.write_text(f"{text}\n\nFrom {shards} ({frame.family.title}):\n{counted}", encoding="utf-8")
    return readme, dict(job.counts)
