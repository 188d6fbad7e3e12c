"""Writes the generated parts of README.md: `python -m docs.tools.readme`."""

from __future__ import annotations

from docs.tools import pictures, tables


def main() -> None:
    """Puts the table of mechanisms between its markers and draws the picture of the masks."""
    text = tables.README.read_text()
    head, tail = tables.around(text, "mechanisms")
    tables.README.write_text(head + tables.mechanism_table() + tail)
    pictures.save_catalogue(tables.ROOT / "docs/assets/masks.png")


if __name__ == "__main__":
    main()
