"""What ranks tell each other, where there are several."""

import torch
from torch import distributed


def is_distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """In place, on all ranks alike."""
    if is_distributed():
        distributed.all_reduce(values)
    return values


def largest_of_ranks(value: int, device: torch.device) -> int:
    """The same on all ranks, each of which must ask."""
    if not is_distributed():
        return value
    largest = torch.tensor(value, device=device)
    distributed.all_reduce(largest, op=distributed.ReduceOp.MAX)
    return int(largest)
