"""What is printed: the one place through which text goes to a terminal."""

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from stiffcore.text import visible

# Where less room is told of, a table is lines: narrower columns would hold a letter each, or none.
NARROWEST = 60


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
        """Print a table; in a narrow terminal as one line a cell, each with the name of its column."""
        if not self.narrow:
            self.print(table)
            return
        names = [_plain(column.header) for column in table.columns]
        if table.title:
            self.print(_plain(table.title), soft_wrap=True)
        for row in zip(*(column.cells for column in table.columns), strict=True):
            for name, cell in zip(names, row, strict=True):
                self.print(f"{name} {_plain(cell)}".strip(), soft_wrap=True)
            self.print()
        if table.caption:
            self.print(_plain(table.caption), soft_wrap=True)

    def render_str(self, text: str, **options: Any) -> Text:
        """A string as it is shown; rich calls it for each that is printed."""
        return super().render_str(visible(text), **options)


def _plain(shown: Any) -> str:
    return " ".join(str(shown).split())
