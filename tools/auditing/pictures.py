"""Pictures that come more than once: by content, by looks, across splits, in other sets."""

from collections.abc import Callable, Mapping, Sequence

from boxcar.pipelines.images.same_images import difference_hash, look_alikes, same_content, shared_images
from boxcar.tools.auditing.result import Duplicates

NUM_EXAMPLES = 10


def duplicates_of(paths: Sequence[str], splits: Mapping[str, set[str]]) -> Duplicates:
    """Groups of files with the same content. splits: of each path. Raises ImageError."""
    return _counted(same_content(paths), splits)


def look_alikes_of(paths: Sequence[str], splits: Mapping[str, set[str]], on_image: Callable[[int], None]) -> Duplicates:
    """Groups of pictures that look alike; decodes every one. Raises ImageError."""
    hashes = []
    for number, path in enumerate(paths):
        hashes.append(difference_hash(path))
        on_image(number + 1)
    return _counted(look_alikes(paths, hashes), splits)


def leakage_of(paths: Sequence[str], others: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of files with the same content in both lists."""
    return shared_images(paths, others)


def _counted(groups: Sequence[Sequence[str]], splits: Mapping[str, set[str]]) -> Duplicates:
    across = [group for group in groups if len(set().union(*(splits[path] for path in group))) > 1]
    # One file may itself stand in two splits.
    several = [[path] for path, names in splits.items() if len(names) > 1]
    return Duplicates(
        groups=len(groups),
        images=sum(len(group) for group in groups),
        examples=[list(group) for group in groups[:NUM_EXAMPLES]],
        across_splits=len(across) + len(several),
        split_examples=[list(group) for group in [*across, *several][:NUM_EXAMPLES]],
    )
