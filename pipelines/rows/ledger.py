"""The bookkeeping of a unit: every record that is read ends as written or rejected, with a reason.

Ledger   what the reader, the image rules and the last attempt rejected
Attempt  what one round of encoding rejects; thrown away where images shrink and the round is repeated
"""

from collections.abc import Iterable, Sequence

import msgspec

from boxcar.pipelines.turns.tasks import RejectedTurn
from boxcar.schemas.manifest import Rejections
from boxcar.schemas.record import Record, Rejected

DUPLICATE_ID = "duplicate_id"
NO_TURNS = "no_turns"


class Attempt:
    """Rejections of one round of encoding."""

    def __init__(self) -> None:
        self.rejected: dict[int, Rejected] = {}
        """By row of the record."""
        self.turns: dict[int, list[tuple[RejectedTurn, int]]] = {}
        """By row of the record: turns that cannot be made, and how many of each."""

    def turn(self, row: int, turn: RejectedTurn, count: int = 1) -> None:
        self.turns.setdefault(row, []).append((turn, count))

    def nothing_left(self, row: int, record: Record) -> None:
        """No turn of a record can be written: reject it for the reason of its first turn."""
        if row in self.turns:
            turn = self.turns[row][0][0]
            reason, detail = turn.reason, turn.detail
        else:
            reason = NO_TURNS
            detail = (
                f"found {len(record.regions)} regions and {len(record.captions)} captions that gave no turn, expected one at least; "
                "see `tasks` in the workflow"
            )
        self.rejected[row] = Rejected(reason, record.position, detail, record.record_id)


class Ledger:
    """Everything that a unit rejects."""

    def __init__(self) -> None:
        self.num_read = 0
        self.by_reader: list[Rejected] = []
        self.rejected: dict[int, Rejected] = {}
        """By row of the record."""
        self.turns_rejected: dict[str, Rejections] = {}

    def usable(self, items: Iterable[Record | Rejected]) -> list[Record]:
        """The records of a unit, each id once."""
        records: list[Record] = []
        seen: set[str] = set()
        for item in items:
            self.num_read += 1
            if isinstance(item, Rejected):
                self.by_reader.append(item)
            elif item.record_id in seen:
                self.by_reader.append(Rejected(DUPLICATE_ID, item.position, f"found the id {item.record_id!r} again", item.record_id))
            else:
                seen.add(item.record_id)
                records.append(item)
        return records

    def take(self, attempt: Attempt, records: Sequence[Record]) -> None:
        """The attempt is final. Turns are counted where their record is written all the same."""
        self.rejected.update(attempt.rejected)
        for row, turns in sorted(attempt.turns.items()):
            if row not in self.rejected:
                for turn, count in turns:
                    example = f"{records[row].position}: {turn.detail}"
                    self.turns_rejected.setdefault(turn.reason, Rejections()).add(Rejections(count, [example]))

    def by_reason(self) -> dict[str, Rejections]:
        reasons: dict[str, Rejections] = {}
        for rejected in self.by_reader + [self.rejected[row] for row in sorted(self.rejected)]:
            reasons.setdefault(rejected.reason, Rejections()).add(Rejections(1, [f"{rejected.position}: {rejected.detail}"]))
        return reasons

    def quarantine(self, records: Sequence[Record]) -> list[Rejected]:
        """Every rejected record, with its content where the reader had it no more."""
        entries = list(self.by_reader)
        for row in sorted(self.rejected):
            entries.append(msgspec.structs.replace(self.rejected[row], source_text=_source_text(records[row])))
        return entries


def _source_text(record: Record) -> str:
    try:
        return msgspec.json.encode(record)[:2000].decode(errors="replace")
    except UnicodeEncodeError:  # a lone surrogate: JSON cannot say it, and it may be the very reason why the record is here
        return ascii(record)[:2000]
