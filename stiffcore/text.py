"""Names and messages that others made, as text that does nothing where it is shown."""

import unicodedata

# Format characters that reorder or hide what stands beside them; the others (joiners) make up letters and emoji.
_UNSEEN = {
    *map(chr, (*range(0x200E, 0x2010), *range(0x2028, 0x202F), *range(0x2060, 0x2070), 0xAD, 0x61C, 0x200B, 0xFEFF))
}
# Categories: control characters, halves of surrogate pairs (a file name that is no UTF-8), tag characters.
_UNSEEN_CATEGORIES = {"Cc", "Cs"}
# Of what a spreadsheet takes for a formula, the first characters, and their wide forms.
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "＝", "＋", "－", "＠")


def visible(text: str, *, lines: bool = True) -> str:
    r"""Text with every character that would act or hide written as an escape, as `\x1b`.

    These are control characters (a terminal obeys them), direction marks and other invisible ones, and halves of
    surrogate pairs, which cannot be written.

    Args:
        text: any.
        lines: whether line feeds and tabs stay.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(_seen(c) if c not in "\n\t" or not lines else c for c in text)


def _seen(character: str) -> str:
    code = ord(character)
    unseen = character in _UNSEEN or unicodedata.category(character) in _UNSEEN_CATEGORIES or 0xE0000 <= code < 0xE0080
    return character.encode("unicode_escape").decode() if unseen else character


def encodable(text: str) -> str:
    r"""Text that can be written: halves of surrogate pairs, as in names that are no UTF-8, are escapes, as `\udcff`."""
    return text.encode("utf-8", "backslashreplace").decode()


def spreadsheet_cell(text: str) -> str:
    """Text that no spreadsheet takes for a formula: one that could be begins with an apostrophe."""
    return visible(f"'{text}" if text.startswith(_FORMULA) else text)
