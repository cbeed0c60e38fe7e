"""Tables of text, as Markdown and HTML."""

import html
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """Columns and rows of text."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """Return the table in Markdown."""
        rule = ["---"] * len(self.columns)
        lines = []
        for cells in (self.columns, rule, *self.rows):
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines)

    def html(self) -> str:
        """Return the table in HTML, with every cell escaped."""
        parts = [_html_row(self.columns, "th")]
        for row in self.rows:
            parts.append(_html_row(row, "td"))
        return f"<table>{''.join(parts)}</table>"


def _html_row(cells: Sequence[str], tag: str) -> str:
    """Return a row of a table in HTML, every cell in the tag."""
    parts = [f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells]
    return f"<tr>{''.join(parts)}</tr>"
