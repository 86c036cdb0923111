"""What is printed: the one place through which text goes to a terminal."""

from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from stiffcore.text import visible

# Where less room is told of, a table is lines: narrower columns would hold a letter each, or none.
NARROWEST = 60
# What a column of names that may be folded, as long module paths are, has at least.
FOLDED = 12


class Terminal(Console):
    """A console that prints text as it is: no markup, no emoji codes, no control characters.

    Every string passes through here, the cells and titles of tables and the columns of progress bars too. What is to
    be styled is a `rich.text.Text` of text that is ours.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)
        self.narrow = self.width < NARROWEST
        if self.narrow:  # what is no table is broken by the terminal itself
            self.width = NARROWEST

    def print_table(self, table: Table) -> None:
        """Print a table; where its numbers do not fit, as one line a cell, each with the name of its column."""
        if not self.narrow and self._has_room(table):
            self.print(table)
            return
        names = [_plain(column.header) for column in table.columns]
        if table.title:
            self.print(_plain(table.title), soft_wrap=True)
        for row in zip(*(column.cells for column in table.columns), strict=True):
            for name, cell in zip(names, row, strict=True):
                self.print(f"{name} {_plain(cell)}".strip(), soft_wrap=True)
            self.print()
        for line in str(table.caption or "").split("\n"):
            self.print(line, soft_wrap=True)

    def _has_room(self, table: Table) -> bool:
        """Whether no number of a table is cropped, and no name is broken into less than its words."""
        between = 2 if table.collapse_padding else 3

        def least(column: Column) -> int:
            lines = [line for cell in column.cells for line in str(cell).split("\n")]
            words = [_plain(column.header), *lines]
            if column.justify != "right" and not column.no_wrap:
                words = [word for line in words for word in line.split()]
            longest = max(map(len, words), default=0)
            return min(longest, FOLDED) if column.overflow == "fold" else longest

        return sum(least(column) + between for column in table.columns) <= self.width

    def render_str(self, text: str, **options: Any) -> Text:
        """A string as it is shown; rich calls it for each that is printed."""
        return super().render_str(visible(text), **options)


def _plain(shown: Any) -> str:
    return " ".join(str(shown).split())
