"""What survives: kills at random moments, any number of workers, flipped bits."""

import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import xxhash

from boxcar.pipelines.verify import verify_folder
from boxcar.tools.bench.conversion import convert_command, prepare, remove, write_workflow


def _digest(folder: Path) -> dict[str, str]:
    """Hash of every file of an output folder but its state."""
    return {path.name: xxhash.xxh3_128_hexdigest(path.read_bytes()) for path in sorted(folder.iterdir()) if path.is_file()}


def kill(photographs: Path, tokenizer: Path, work: Path, kills: int, samples: int, executor: str) -> None:
    """Every round starts from nothing: kill at a random moment of an undisturbed run's time, run again to the end, compare."""
    annotations, images = prepare(photographs, work, samples, 8)
    whole, killed = work / "shards-whole", work / "shards-killed"
    settings = {"executor": executor, "records_per_shard": 1000}
    remove(whole)
    start = time.monotonic()
    _run(write_workflow(work, annotations, images, tokenizer, output=str(whole), **settings))
    duration = time.monotonic() - start
    expected = _digest(whole)
    random_moments = random.Random(0)
    workflows = write_workflow(work, annotations, images, tokenizer, output=str(killed), **settings)
    identical = resumed = 0
    for number in range(kills):
        remove(killed)
        moment = random_moments.uniform(0.1, 0.98) * duration
        process = subprocess.Popen(convert_command(workflows), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)
        process.wait()
        left = len(list((killed / ".boxcar" / "units").glob("*.json"))) if killed.exists() else 0
        resumed += left > 0
        _run(workflows)
        same = _digest(killed) == expected
        identical += same
        print(f"kill {number + 1} after {moment:.2f} of {duration:.2f} s: {left} units were complete, {_verdict(same)}")
    print(f"{identical} of {kills} byte-identical shards and manifest; {resumed} went on from complete units")


def workers(photographs: Path, tokenizer: Path, work: Path, samples: int) -> None:
    """One conversion with 1, 2 and 7 workers under Ray, and inline."""
    annotations, images = prepare(photographs, work, samples, 8)
    digests = {}
    for name, overrides in {
        "inline": ("executor=inline",),
        "1 worker": ("executor=ray", "num_workers=1"),
        "2 workers": ("executor=ray", "num_workers=2"),
        "7 workers": ("executor=ray", "num_workers=7"),
    }.items():
        output = work / "shards-workers"
        remove(output)
        workflows = write_workflow(work, annotations, images, tokenizer, output=str(output), records_per_shard=1000)
        _run(workflows, *overrides)
        digests[name] = _digest(output)
        print(f"{name}: {len(digests[name])} files, {'the first' if len(digests) == 1 else _verdict(digests[name] == digests['inline'])}")


def _verdict(same: bool) -> str:
    return "byte-identical" if same else "DIFFERENT"


def _run(workflows: Path, *overrides: str) -> None:
    subprocess.run(convert_command(workflows, *overrides), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)


def flip_bits(shards: Path, flips: int) -> None:
    """One bit at a time, in a copy: every file in proportion to its size, the manifest as often as all the others together."""
    copy = shards.with_name(f"{shards.name}-flipped")
    remove(copy)
    shutil.copytree(shards, copy)
    files = [path for path in sorted(copy.iterdir()) if path.is_file()]
    assert not verify_folder(copy).problems, "the conversion must be sound to begin with"
    draw = random.Random(0)
    weights = [path.stat().st_size for path in files]
    manifest = copy / "manifest.json"
    reported = 0
    for number in range(flips):
        path = manifest if number % 2 else draw.choices(files, weights)[0]
        data = bytearray(path.read_bytes())
        bit = draw.randrange(len(data) * 8)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        found = bool(verify_folder(copy).problems)
        reported += found
        if not found:
            print(f"MISSED: bit {bit} of {path.name}")
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
    remove(copy)
    print(f"{reported} of {flips} flipped bits reported, over {len(files)} files")
