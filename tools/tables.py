"""Tables that fit the terminal: a table that is too wide for it is printed as blocks, a block for each row.

family       qwen2_5_vl                    family | models                | resize          ...
  models     Qwen2.5-VL (3B, 7B, ...)  <-  qwen2_5_vl | Qwen2.5-VL (3B, 7B, ... | smart_resize ...
  resize     smart_resize, factor 28
"""

import os

from rich import table as rich_table
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.padding import Padding
from rich.style import Style
from rich.text import Text

PIPE_WIDTH = 132
"""Columns of output that is no terminal's: a file, a pager, a log."""
LEAST_FOLDED_WIDTH = 32
"""Columns that a text which may be folded must have at least."""


def result_console(*, soft_wrap: bool = False) -> Console:
    """Standard output, as wide as the terminal or COLUMNS; PIPE_WIDTH where neither says how wide it is."""
    console = Console(soft_wrap=soft_wrap)
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(soft_wrap=soft_wrap, width=PIPE_WIDTH)


class Table(rich_table.Table):
    """A table of rich that is never squeezed: where its columns do not fit side by side, it is printed as blocks."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        # With soft wrap a console has no limit of its own; what counts is the width that is looked at.
        width = min(options.max_width, console.width)
        if self._needed_width(console) <= width:
            yield from super().__rich_console__(console, options.update(width=width) if self.expand else options)
        else:
            yield from self._blocks(console)

    def _needed_width(self, console: Console) -> int:
        """Columns that the table needs so that no cell is cut and no number is broken over lines."""
        needed = self._extra_width
        for column in self.columns:
            cells = [*column.cells, *([column.header] if self.show_header else [])]
            widest = max((cell_len(line) for cell in cells for line in _plain(console, cell).plain.split("\n")), default=0)
            folds = column.overflow == "fold" and not column.no_wrap
            needed += (min(widest, LEAST_FOLDED_WIDTH) if folds else widest) + self.padding[1] + self.padding[3]
        return needed

    def _blocks(self, console: Console) -> RenderResult:
        if self.title:
            yield _plain(console, self.title, "bold")
        names = [_plain(console, column.header) for column in self.columns] if self.show_header else [Text("")] * len(self.columns)
        widest = max((cell_len(name.plain) for name in names[1:]), default=0)
        first_block = True
        for row in zip(*(column.cells for column in self.columns), strict=True):
            cells = [_plain(console, cell) for cell in row]
            if not self.show_header:
                yield Text("  ").join(cell for cell in cells if cell.plain)
                continue
            if not first_block:
                yield Text("")
            first_block = False
            first = Text("  ").join(text for text in (names[0], cells[0]) if text.plain.strip())
            yield Text.assemble(first, style="bold")
            block = rich_table.Table.grid(padding=(0, 2, 0, 0))
            block.add_column(width=widest)
            block.add_column(overflow="fold")
            for name, cell in zip(names[1:], cells[1:], strict=True):
                if cell.plain.strip():
                    block.add_row(Text(name.plain, style="dim"), cell)
            yield Padding(block, (0, 0, 0, 2))
        if self.caption:
            yield _plain(console, self.caption, "dim italic")
        yield Text("")


def _plain(console: Console, cell: object, style: str | Style = "") -> Text:
    """A cell as text, its markup read as rich reads it."""
    if isinstance(cell, Text):
        return cell.copy()
    return console.render_str(str(cell), style=style)
