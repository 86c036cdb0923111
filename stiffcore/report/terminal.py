"""What is printed: the one place through which text goes to a terminal."""

from typing import Any

from rich.console import Console
from rich.text import Text

from stiffcore.text import visible


class Terminal(Console):
    """A console that prints text as it is: no markup, no emoji codes, no control characters.

    Every string passes through here, the cells and titles of tables and the columns of progress bars too. What is to
    be styled is a `rich.text.Text` of text that is ours.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """A string as it is shown; rich calls it for each that is printed."""
        return super().render_str(visible(text), **options)
