"""Every error a user can cause, as one small family.

    BoxcarError
    ├── ConfigError       workflows.yaml, an override or a command line says something impossible
    ├── AnnotationError   an annotation file as a whole cannot be read
    ├── ImageError        one image cannot be read or does not fit the family
    ├── BudgetError       a pixel or token budget that nothing can meet
    ├── TokenizerError    a tokenizer does not fit the family or cannot be composed exactly
    ├── ShardError        a shard or manifest is missing, damaged or of another version
    ├── ContractError     two frame contracts differ where they must agree
    ├── TrainingError     a run that cannot start, go on or be resumed
    └── StorageError      storage that does not answer, or says no: the same again may do

A message names where it happened, what was found, what was expected and the way out:
`AnnotationError: val.json, annotation 4131: found a bbox of 3 numbers, expected [x, y, width, height]. Fix the file ...`.

A *record* that cannot be used is not an error but a `schemas.record.Rejected`: counted, quarantined, never raised.
"""


class BoxcarError(Exception):
    """A mistake the user can mend. The command line prints it without a traceback and exits with 2."""

    def __init__(self, where: str, *, found: str, expected: str, fix: str = "") -> None:
        self.where = where
        self.found = found
        self.expected = expected
        self.fix = fix
        super().__init__(where, found, expected, fix)

    def __str__(self) -> str:
        message = f"{self.where}: found {self.found}, expected {self.expected}."
        return f"{message} {self.fix}" if self.fix else message

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword-only arguments do not survive the default pickling, and Ray carries errors between processes.
        return _rebuild, (type(self), self.where, self.found, self.expected, self.fix)


def _rebuild(kind: type[BoxcarError], where: str, found: str, expected: str, fix: str) -> BoxcarError:
    return kind(where, found=found, expected=expected, fix=fix)


class ConfigError(BoxcarError):
    """workflows.yaml, an override or a command line says something impossible."""


class AnnotationError(BoxcarError):
    """An annotation file as a whole cannot be read."""


class ImageError(BoxcarError):
    """One image cannot be read or does not fit the family."""

    def __init__(self, where: str, *, reason: str, found: str, expected: str, fix: str = "") -> None:
        super().__init__(where, found=found, expected=expected, fix=fix)
        self.reason = reason

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild_image_error, (self.where, self.reason, self.found, self.expected, self.fix)


def _rebuild_image_error(where: str, reason: str, found: str, expected: str, fix: str) -> ImageError:
    return ImageError(where, reason=reason, found=found, expected=expected, fix=fix)


class BudgetError(BoxcarError):
    """A pixel or token budget that nothing can meet."""


class TokenizerError(BoxcarError):
    """A tokenizer does not fit the family or cannot be composed exactly."""


class ShardError(BoxcarError):
    """A shard or manifest is missing, damaged or of another version."""


class ContractError(BoxcarError):
    """Two frame contracts differ where they must agree."""


class TrainingError(BoxcarError):
    """A run that cannot start, go on or be resumed."""


class StorageError(BoxcarError):
    """Storage that does not answer, or says no: a network, credentials, a bucket. Data and settings are right as far as one knows, so that
    starting again may help."""
