"""The loss over a large vocabulary: the logits of all tokens, of the labelled ones, and of a chunk of these at a time.

Each way runs in a process of its own (`python -m tools.bench.head WAY ...`), so that its peak memory is its own; the weight of the head,
which every way needs, is taken off. What a way computes is written to a file and compared here.
"""

import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from boxcar.train.network.loss import weighted_cross_entropy

WAYS = ("all", "labelled", "chunked")
_TITLES = {"all": "logits of all tokens", "labelled": "logits of the labelled tokens", "chunked": "labelled, in chunks (ours)"}


@dataclass(frozen=True)
class Case:
    """Sizes of the head and of a pack."""

    hidden: int
    vocabulary: int
    tokens: int
    labelled_share: float
    chunk_tokens: int
    threads: int


def compare(case: Case, passes: int) -> None:
    """Every way `passes` times, in turn; medians, ratios to the first, and the largest differences of loss and gradient."""
    taken: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as scratch:
        for _ in range(passes):
            for way in WAYS:
                output = Path(scratch) / f"{way}.npz"
                sizes = [case.hidden, case.vocabulary, case.tokens, case.labelled_share, case.chunk_tokens, case.threads]
                subprocess.run([sys.executable, "-m", "boxcar.tools.bench.head", way, str(output), *map(str, sizes)], check=True)
                with np.load(output) as found:
                    taken[way].append((float(found["cpu_seconds"]), float(found["peak_mb"])))
        results = {}
        for way in WAYS:
            with np.load(Path(scratch) / f"{way}.npz") as found:
                results[way] = found["loss"], found["gradient"]
    reference, gradient = results["all"]
    seconds, peaks = ({way: float(np.median([value[place] for value in taken[way]])) for way in WAYS} for place in (0, 1))
    print(
        f"hidden {case.hidden}, vocabulary {case.vocabulary:,}, {case.tokens} tokens, {case.labelled_share:.0%} labelled, float32, "
        f"chunks of {case.chunk_tokens}, torch threads: {case.threads}; forward and backward, {passes} processes each"
    )
    for way in WAYS:
        loss_apart = abs(float(results[way][0]) - float(reference)) / abs(float(reference))
        gradient_apart = np.abs(results[way][1] - gradient).max() / np.abs(gradient).max()
        print(
            f"  {_TITLES[way]:<30} {seconds[way]:6.2f} CPU-s (x{seconds[way] / seconds['all']:.2f})  +{peaks[way]:6,.0f} MB "
            f"(x{peaks[way] / peaks['all']:.2f})  relative difference: loss {loss_apart:.1e}, gradient {gradient_apart:.1e}"
        )


@dataclass(frozen=True)
class _Outcome:
    cpu_seconds: float
    peak_mb: float
    """Of resident memory, over what it was when all inputs were there."""
    loss: float
    gradient: npt.NDArray[np.float32]
    """(tokens, hidden): of the hidden states."""


def _run(way: str, case: Case) -> _Outcome:
    """One way, in this process."""
    torch.set_num_threads(case.threads)
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(case.hidden, case.vocabulary, bias=False).requires_grad_(False)
    head.weight.normal_(std=0.02, generator=generator)
    hidden = torch.randn(case.tokens, case.hidden, generator=generator).requires_grad_()
    targets = torch.randint(case.vocabulary, (case.tokens,), generator=generator)
    keep = torch.rand(case.tokens, generator=generator) < case.labelled_share
    weights = torch.where(keep, torch.rand(case.tokens, generator=generator) + 0.5, 0.0)
    _forget_peak()
    before, start = _peak_mb(), time.process_time()
    if way == "all":
        total = (cross_entropy(head(hidden), targets, reduction="none") * weights).sum()
    elif way == "labelled":
        total = (cross_entropy(head(hidden[keep]), targets[keep], reduction="none") * weights[keep]).sum()
    else:
        total, _ = weighted_cross_entropy(hidden[keep], head, targets[keep], weights[keep], chunk_tokens=case.chunk_tokens)
    total.backward()
    seconds, peak = time.process_time() - start, _peak_mb() - before
    assert hidden.grad is not None, "the hidden states want one"
    return _Outcome(seconds, peak, total.item(), hidden.grad.numpy())


def _forget_peak() -> None:
    """From here on VmHWM is the peak since now (Linux, `man proc`, clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")


def _peak_mb() -> float:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024 / 1e6


if __name__ == "__main__":
    chosen, output, *numbers = sys.argv[1:]
    hidden, vocabulary, tokens, labelled_share, chunk_tokens, threads = map(float, numbers)
    made = _run(chosen, Case(int(hidden), int(vocabulary), int(tokens), labelled_share, int(chunk_tokens), int(threads)))
    np.savez(output, cpu_seconds=made.cpu_seconds, peak_mb=made.peak_mb, loss=made.loss, gradient=made.gradient)
