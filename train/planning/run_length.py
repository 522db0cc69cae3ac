"""How long a run must be to train on a number of tokens. Pure: no torch.

Two schedules that are compared must see the same tokens, with rates, ramps and phases that end where the run ends. So a run is not broken
off after so many tokens: its `epochs` is chosen, in general with a part of an epoch at the end, and everything spans that.
"""

from boxcar.schemas.training import PlanConfig
from boxcar.train.planning.index import PlanIndex
from boxcar.train.planning.plan import EpochContent, content_of_epoch
from boxcar.train.planning.sampling import visits_of_epoch

MAX_ROUNDS = 16


def contents_of_run(index: PlanIndex, config: PlanConfig) -> list[EpochContent]:
    """What each epoch holds, counted without packs. Raises ConfigError where the settings leave no visit."""
    return [content_of_epoch(index, config, epoch) for epoch in range(config.num_epochs)]


def epochs_for_tokens(index: PlanIndex, config: PlanConfig, tokens: int) -> int | float:
    """The `epochs` with which the run has as nearly so many tokens as whole samples allow: some half a sample more or less, or 1/10,000 of
    them where that is more, but never more than a pack. tokens: above 0. The run of `config` must have some.

    What a schedule takes changes with the length of the run, but smoothly: tokens grow almost in proportion, and a few rounds of
    interpolation (regula falsi) are enough.
    """
    found: dict[int | float, int] = {}
    guess: int | float = config.epochs
    pack = config.cutoff_len or index.cutoff_len
    for _ in range(MAX_ROUNDS):
        guess = _whole_samples(index, config, guess)
        if guess in found:
            break
        contents = contents_of_run(index, config.model_copy(update={"epochs": guess}))
        found[guess] = sum(content.tokens for content in contents)
        sample = found[guess] / max(1, sum(content.documents for content in contents))
        if abs(found[guess] - tokens) <= max(sample / 2, min(pack, tokens / 10_000)):
            break
        guess = _interpolated(found, tokens)
    return min(found, key=lambda epochs: abs(found[epochs] - tokens))


def _interpolated(found: dict[int | float, int], tokens: int) -> float:
    """Where the tokens lie between the nearest lengths on both sides, or in proportion to the longest one."""
    below = max((epochs for epochs, count in found.items() if count <= tokens), default=0)
    above = min((epochs for epochs, count in found.items() if count > tokens), default=None)
    if above is None:
        return below * (tokens / found[below] if found[below] else 2.0)
    count_below = found.get(below, 0)
    return below + (above - below) * (tokens - count_below) / (found[above] - count_below)


def _whole_samples(index: PlanIndex, config: PlanConfig, epochs: float) -> int | float:
    """The nearest number of epochs that ends between two samples; at least one sample."""
    whole = int(epochs)
    num_visits = len(visits_of_epoch(index, config.mixture, config.seed, whole).rows)
    last = round((epochs - whole) * num_visits)
    if last == num_visits or not num_visits:
        return whole + 1
    if last == 0:
        return whole if whole else 1 / num_visits
    return whole + last / num_visits
