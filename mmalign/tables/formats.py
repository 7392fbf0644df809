"""A table as text: terminal, Markdown, LaTeX (booktabs), CSV, HTML. One function each; best is bold, second underlined.

On a terminal best is `*`, second is `+`, and an interval stands on a line of its own below its row; `>` leads our own rows. LaTeX needs
booktabs, nothing else. CSV has every cell as printed, the ends of intervals as columns, and a column `origin`.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from html import escape

from mmalign.tables.layout import Cell, Header, Line, Table

ARROWS = {"higher": "↑", "lower": "↓"}
LEGEND = "* best, + second"
_LATEX = {"&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}"}
_LATEX |= {"^": r"\textasciicircum{}", "\\": r"\textbackslash{}", "<": r"$<$", ">": r"$>$", "†": r"$^{\dagger}$", "‡": r"$^{\ddagger}$"}
_SUPERSCRIPTS = dict(zip("abcdefghijklmnoprstuvwxyz", "ᵃᵇᶜᵈᵉᶠᵍʰⁱʲᵏˡᵐⁿᵒᵖʳˢᵗᵘᵛʷˣʸᶻ", strict=True))


def terminal(table: Table) -> str:
    """Aligned columns for a person."""
    from tabulate import tabulate

    rows: list[list[str]] = []
    for line in table.lines:
        cells = [{"best": "*", "second": "+"}.get(cell.mark, "") + cell.text + _superscript(cell) for cell in line.cells]
        cells[_name_column(table)] = ("> " if line.origin in ("ours", "deviating") else "") + cells[_name_column(table)]
        rows.append(cells)
        if any(cell.interval for cell in line.cells):
            rows.append([f"{cell.interval[0]}..{cell.interval[1]}" if cell.interval else "" for cell in line.cells])
    body = tabulate(rows, [_title(header) for header in table.headers], "simple", colalign=_alignment(table), disable_numparse=True)
    said = [f"{symbol}  {text}" for symbol, text in table.footnotes]
    if any(cell.mark for line in table.lines for cell in line.cells):
        said.insert(0, LEGEND + ("; below our rows their 95% intervals" if _has_intervals(table) else ""))
    parts = [f"{table.id}  {table.title}", body, "\n".join([*said, *(f"-  {note}" for note in table.notes)]), table.source]
    return "\n\n".join(part for part in parts if part)


def markdown(table: Table) -> str:
    """GitHub's tables; best in bold, second underlined, intervals in the cell."""
    from tabulate import tabulate

    def shown(cell: Cell) -> str:
        text = _marked(_escape_markdown(cell.text), cell.mark, ("**", "**"), ("<u>", "</u>"))
        text += f"<br>[{cell.interval[0]}, {cell.interval[1]}]" if cell.interval else ""
        return text + "".join(f"<sup>{note}</sup>" for note in cell.notes)

    rows = [[shown(cell) for cell in line.cells] for line in table.lines]
    for row, line in zip(rows, table.lines, strict=True):
        if line.origin in ("ours", "deviating"):
            row[_name_column(table)] = f"*{row[_name_column(table)]}*"
    headers = [_escape_markdown(_title(header)) for header in table.headers]
    body = tabulate(rows, headers, "pipe", colalign=_alignment(table), disable_numparse=True)
    said = [f"* <sup>{symbol}</sup> {_escape_markdown(text)}" for symbol, text in table.footnotes]
    said += [f"* {_escape_markdown(note)}" for note in table.notes]
    parts = [f"# {table.id}: {_escape_markdown(table.title)}", body, "\n".join(said), table.source]
    return "\n\n".join(part for part in parts if part) + "\n"


def latex(table: Table) -> str:
    """A `table` float with booktabs rules; groups are parted by a rule, and so are our rows from the paper's."""
    columns = "".join("r" if header.is_number else "l" for header in table.headers)
    lines = [r"\begin{table}", r"\centering", rf"\caption{{{_escape_latex(table.title)}}}", rf"\label{{tab:{table.id.replace('/', ':')}}}"]
    lines += [
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        " & ".join(_latex_header(header) for header in table.headers) + r" \\",
        r"\midrule",
    ]
    previous: Line | None = None
    for line in table.lines:
        if previous and (previous.group, _is_ours(previous)) != (line.group, _is_ours(line)):
            lines.append(r"\midrule")
        lines.append(" & ".join(_latex_cell(cell) for cell in line.cells) + r" \\")
        if any(cell.interval for cell in line.cells):
            spans = (rf"{{\scriptsize[{cell.interval[0]}, {cell.interval[1]}]}}" if cell.interval else "" for cell in line.cells)
            lines.append(" & ".join(spans) + r" \\")
        previous = line
    lines.append(r"\bottomrule")
    width = rf"\multicolumn{{{len(columns)}}}{{l}}"
    lines += [rf"{width}{{\footnotesize {_latex_symbol(symbol)} {_escape_latex(text)}}} \\" for symbol, text in table.footnotes]
    return "\n".join([*lines, r"\end{tabular}", r"\end{table}", ""])


def comma_separated(table: Table) -> str:
    """CSV: every cell as printed, then the ends of its interval where a row has one, the origin of the row, and its footnotes."""
    spans = [place for place in range(len(table.headers)) if any(line.cells[place].interval for line in table.lines)]
    names = [header.name for header in table.headers]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*names, *(f"{names[place]}_{end}" for place in spans for end in ("low", "high")), "origin", "footnotes"])
    texts = dict(table.footnotes)
    for line in table.lines:
        ends = [end for place in spans for end in (line.cells[place].interval or ("", ""))]
        said = " ".join(texts[note] for cell in line.cells for note in cell.notes)
        writer.writerow([*(cell.text for cell in line.cells), *ends, line.origin, said])
    return buffer.getvalue()


def html(table: Table) -> str:
    """A page of its own: sortable, no network, opens from disk."""
    from markupsafe import Markup

    from mmalign import pages

    return pages.render(
        "table.html.j2",
        script="leaderboard.js",
        title=f"{table.id}: {table.title}",
        table=table,
        body=Markup(html_table(table)),
        body_class="wide",
        is_partial=False,
    )


def html_table(table: Table) -> str:
    """The `<table>` element alone; every text is escaped."""
    heads = "".join(
        f'<th{_html_class(header)} scope="col"><button type="button">{escape(_title(header))}</button></th>' for header in table.headers
    )
    rows = []
    for line in table.lines:
        cells = "".join(
            f"<td{_html_class(header)}{_sort_value(cell)}>{_html_cell(cell)}</td>"
            for header, cell in zip(table.headers, line.cells, strict=True)
        )
        rows.append(f'<tr class="{line.origin}">{cells}</tr>')
    return f'<table class="compact sortable"><thead><tr>{heads}</tr></thead>\n<tbody>\n' + "\n".join(rows) + "\n</tbody></table>"


FORMATS: dict[str, Callable[[Table], str]] = {
    "terminal": terminal,
    "markdown": markdown,
    "latex": latex,
    "csv": comma_separated,
    "html": html,
}


def _title(header: Header) -> str:
    arrow = ARROWS.get(header.better, "")
    unit = f" ({header.unit})" if header.unit else ""
    return f"{header.name}{unit} {arrow}".rstrip()


def _alignment(table: Table) -> Sequence[str]:
    return ["right" if header.is_number else "left" for header in table.headers]


def _name_column(table: Table) -> int:
    names = [header.name for header in table.headers]
    return names.index("model") if "model" in names else 0


def _has_intervals(table: Table) -> bool:
    return any(cell.interval for line in table.lines for cell in line.cells)


def _is_ours(line: Line) -> bool:
    return line.origin in ("ours", "deviating")


def _superscript(cell: Cell) -> str:
    return "".join(_SUPERSCRIPTS.get(character, character) for note in cell.notes for character in note)


def _marked(text: str, mark: str, best: tuple[str, str], second: tuple[str, str]) -> str:
    opening, closing = {"best": best, "second": second}.get(mark, ("", ""))
    return f"{opening}{text}{closing}"


def _escape_markdown(text: str) -> str:
    for character in "\\`*_<|":
        text = text.replace(character, f"\\{character}")
    return text


def _escape_latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)


def _latex_header(header: Header) -> str:
    arrow = {"higher": r" $\uparrow$", "lower": r" $\downarrow$"}.get(header.better, "")
    return _escape_latex(_title(header).rstrip(" ↑↓")) + arrow


def _latex_symbol(symbol: str) -> str:
    return _LATEX.get(symbol, rf"$^{{\mathrm{{{symbol}}}}}$")


def _latex_cell(cell: Cell) -> str:
    text = _marked(_escape_latex(cell.text), cell.mark, (r"\textbf{", "}"), (r"\underline{", "}"))
    return text + "".join(_latex_symbol(note) for note in cell.notes)


def _html_class(header: Header) -> str:
    return ' class="number"' if header.is_number else ""


def _sort_value(cell: Cell) -> str:
    return "" if cell.value is None else f' data-value="{cell.value!r}"'


def _html_cell(cell: Cell) -> str:
    text = _marked(escape(cell.text), cell.mark, ("<b>", "</b>"), ("<u>", "</u>"))
    text += "".join(f"<sup>{escape(note)}</sup>" for note in cell.notes)
    return text + (f"<small>[{escape(cell.interval[0])}, {escape(cell.interval[1])}]</small>" if cell.interval else "")
