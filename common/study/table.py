"""A table, written as CSV, LaTeX and HTML."""

import csv
import html
from dataclasses import dataclass

from common.study.results import Estimate


@dataclass(frozen=True)
class Table:
    """Cells are text, numbers, None or Estimate."""

    name: str  # of its files
    title: str
    caption: str
    header: tuple
    rows: list

    def text(self):
        """Rows of text: three decimals for a float."""
        return [[_text(cell) for cell in row] for row in self.rows]

    def write_csv(self, path):
        """Numbers in full; an Estimate becomes three columns: mean, low, high."""
        wide = {i for row in self.rows for i, c in enumerate(row) if isinstance(c, Estimate)}
        header = []
        for i, name in enumerate(self.header):
            header += [name, f"{name} low", f"{name} high"] if i in wide else [name]
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(header)
            for row in self.rows:
                cells = []
                for i, cell in enumerate(row):
                    if i in wide:
                        known = isinstance(cell, Estimate)
                        cells += [cell.mean, cell.low, cell.high] if known else [cell, None, None]
                    else:
                        cells.append(cell)
                writer.writerow(["" if c is None else c for c in cells])

    def write_latex(self, path):
        """A booktabs table."""
        body = [" & ".join(map(_latex, row)) + r" \\" for row in self.text()]
        lines = [
            r"\begin{table}",
            rf"\caption{{{_latex(self.caption)}}}",
            rf"\begin{{tabular}}{{{'l' * len(self.header)}}}",
            r"\toprule",
            " & ".join(map(_latex, self.header)) + r" \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def html(self, most=None):
        """A table that scrolls sideways in its own frame; most: rows, None for all."""
        head = "".join(f"<th>{html.escape(name)}</th>" for name in self.header)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
            for row in self.text()[:most]
        )
        return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _text(cell):
    if cell is None:
        return ""
    return f"{cell:.3f}" if isinstance(cell, float) else str(cell)


def _latex(text):
    special = {c: "\\" + c for c in "&%_#${}"}
    special |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(special.get(character, character) for character in text)
