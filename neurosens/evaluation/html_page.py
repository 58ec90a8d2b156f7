"""Pages of HTML that need no other file and no script: text, tables, pictures and checks.

Every text is escaped; pictures are inside the page. A page is a pure function of its sections:

    page('Title', ['A sentence.'], [Section('Results', [Table('All', ['x', 'y'], [['a', '2']])])])
"""

from __future__ import annotations

import base64
import html
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, TypeAlias


class Status(NamedTuple):
    """A word that a colour and a sign stress.

    Attributes:
      kind: 'pass', 'warn' or 'fail'; others are shown without stress.
      text: the word; by default the kind.
    """

    kind: str
    text: str = ''


Cell: TypeAlias = 'str | Status'


class Table(NamedTuple):
    """A table whose first column names its rows; columns of numbers stand to the right.

    Attributes:
      caption: what it shows.
      header: names of the columns.
      rows: as many cells in each row.
    """

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]


class Figure(NamedTuple):
    """A picture; neighbours stand side by side where there is room.

    Attributes:
      picture: the bytes of a PNG file.
      caption: text below it.
      alternative: what it shows, for those who cannot see it.
    """

    picture: bytes
    caption: str
    alternative: str


class Values(NamedTuple):
    """The few numbers that matter most, large.

    Attributes:
      items: label, value and a remark for each.
    """

    items: Sequence[tuple[str, str, str]]


class Code(NamedTuple):
    """Text whose spaces and lines are kept."""

    text: str


class Notes(NamedTuple):
    """Sentences that a reader must not miss.

    Attributes:
      title: what they are about.
      sentences: one for each line of the list.
    """

    title: str
    sentences: Sequence[str]


class Folded(NamedTuple):
    """What is shown on demand, and in print.

    Attributes:
      title: what can be unfolded.
      blocks: what is in it.
    """

    title: str
    blocks: Sequence[Block]


class Section(NamedTuple):
    """A part of a page with a heading, which the table of contents lists.

    Attributes:
      title: the heading.
      blocks: what is below it; sections among them are of the next level.
      lead: what of it stands at the top of the page too; no sections.
    """

    title: str
    blocks: Sequence[Block]
    lead: Sequence[Block] = ()


# A string is a paragraph.
Block: TypeAlias = 'str | Table | Figure | Values | Code | Notes | Folded | Section'


def check_table(caption: str, checks: Iterable[tuple[str, str, str, str]]) -> Table:
    """The findings of a diagnosis as a table.

    Args:
      caption: what was checked.
      checks: of each check its name; 'pass', 'warn', 'fail' or another word, such as 'n/a'; what
        was measured; and what that means, or what to do.

    Returns:
      A block for a section.
    """
    rows: list[list[Cell]] = [
        [name, Status(verdict), figures, advice] for name, verdict, figures, advice in checks
    ]
    return Table(caption, ['check', 'result', 'figures', 'advice'], rows)


def page(title: str, lead: Sequence[Block], sections: Sequence[Section]) -> str:
    """A whole page.

    Args:
      title: its title and first heading.
      lead: what comes before the table of contents; no sections.
      sections: the page's parts.

    Returns:
      An HTML document with no reference to any other file, and no script.
    """
    identifiers = list(_identifiers(_titles(sections)))
    # Headings take theirs in the order in which the titles were listed.
    rest = iter(identifiers)
    body = _blocks(sections, 2, rest)
    return '\n'.join(
        [
            '<!doctype html>',
            '<html lang="en">',
            '<head>',
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            f'<title>{_text(title)}</title>',
            f'<style>{_STYLE}</style>',
            '</head>',
            '<body>',
            '<header>',
            f'<h1>{_text(title)}</h1>',
            _blocks(
                [*lead, *(block for section in sections for block in section.lead)], 2, iter(())
            ),
            '</header>',
            _contents(sections, iter(identifiers)),
            '<main>',
            body,
            '</main>',
            '</body>',
            '</html>',
            '',
        ]
    )


# Whatever a name of a class or a directory may hold, the page loads and runs nothing.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
# Characters that HTML must not hold, among them halves of characters from undecodable file names.
_FORBIDDEN = re.compile('[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]')


def _text(text: str) -> str:
    """Text as HTML, inside elements and attributes."""
    return html.escape(_FORBIDDEN.sub('\N{REPLACEMENT CHARACTER}', text))


# ---------------------------------------------------------------------------------- headings


def _titles(blocks: Iterable[Block]) -> Iterator[str]:
    """The titles of all sections, in the order of the page."""
    for block in blocks:
        if isinstance(block, Section):
            yield block.title
        if isinstance(block, (Section, Folded)):
            yield from _titles(block.blocks)


def _identifiers(titles: Iterable[str]) -> Iterator[str]:
    """For each title a name of its own that a link can bear."""
    taken: set[str] = set()
    for title in titles:
        base = re.sub('[^a-z0-9]+', '-', title.lower()).strip('-') or 'section'
        numbered = (f'{base}-{number}' for number in itertools.count(2))
        name = next(name for name in itertools.chain([base], numbered) if name not in taken)
        taken.add(name)
        yield name


def _contents(sections: Sequence[Section], identifiers: Iterator[str]) -> str:
    """The table of contents."""

    def entries(blocks: Iterable[Block]) -> list[str]:
        lines = []
        for block in blocks:
            if isinstance(block, Section):
                link = f'<a href="#{next(identifiers)}">{_text(block.title)}</a>'
                below = entries(block.blocks)
                inner = f'\n<ol>\n{_lines(below)}\n</ol>\n' if below else ''
                lines.append(f'<li>{link}{inner}</li>')
            elif isinstance(block, Folded):
                lines += entries(block.blocks)
        return lines

    return f'<nav aria-label="Contents">\n<ol>\n{_lines(entries(sections))}\n</ol>\n</nav>'


# ------------------------------------------------------------------------------------ blocks


def _blocks(blocks: Iterable[Block], level: int, identifiers: Iterator[str]) -> str:
    lines = []
    for kind, group in itertools.groupby(blocks, type):
        members = [_block(block, level, identifiers) for block in group]
        if kind is Figure:
            members = [f'<div class="figures">\n{_lines(members)}\n</div>']
        lines += members
    return _lines(lines)


def _block(block: Block, level: int, identifiers: Iterator[str]) -> str:
    match block:
        case str():
            return f'<p>{_text(block)}</p>'
        case Table():
            return _table(block)
        case Figure():
            return _figure(block)
        case Values():
            items = [
                f'<div><dt>{_text(label)}</dt><dd><strong>{_text(value)}</strong> '
                f'<span>{_text(remark)}</span></dd></div>'
                for label, value, remark in block.items
            ]
            return f'<dl class="values">\n{_lines(items)}\n</dl>'
        case Code():
            return f'<pre><code>{_text(block.text)}</code></pre>'
        case Notes():
            items = [f'<li>{_text(sentence)}</li>' for sentence in block.sentences]
            return (
                f'<div class="notes" role="note">\n<p><strong>{_text(block.title)}</strong></p>\n'
                f'<ul>\n{_lines(items)}\n</ul>\n</div>'
            )
        case Folded():
            inner = _blocks(block.blocks, level, identifiers)
            return f'<details>\n<summary>{_text(block.title)}</summary>\n{inner}\n</details>'
        case Section():
            name, heading = next(identifiers), f'h{min(level, 6)}'
            inner = _blocks(block.blocks, level + 1, identifiers)
            return (
                f'<section aria-labelledby="{name}">\n'
                f'<{heading} id="{name}">{_text(block.title)}</{heading}>\n{inner}\n</section>'
            )
    raise TypeError(f'{block!r} is no block of a page.')


def _table(table: Table) -> str:
    columns = range(len(table.header))
    kinds = ['']
    kinds += [' class="number"' if _numeric(table.rows, column) else '' for column in columns[1:]]
    head = [f'<th scope="col"{kind}>{_text(name)}</th>' for name, kind in zip(table.header, kinds)]
    body = []
    for first, *others in table.rows:
        cells = [f'<th scope="row">{_cell(first)}</th>']
        cells += [f'<td{kind}>{_cell(cell)}</td>' for cell, kind in zip(others, kinds[1:])]
        body.append(f'<tr>{"".join(cells)}</tr>')
    caption = _text(table.caption)
    # Those who have no mouse can scroll only what they can reach.
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{caption}">\n<table>\n'
        f'<caption><span>{caption}</span></caption>\n<thead>\n<tr>{"".join(head)}</tr>\n</thead>\n'
        f'<tbody>\n{_lines(body)}\n</tbody>\n</table>\n</div>'
    )


def _cell(cell: Cell) -> str:
    if isinstance(cell, Status):
        known = cell.kind if cell.kind in _SIGNS else 'other'
        sign = f'<span aria-hidden="true">{_SIGNS.get(cell.kind, "")}</span> '
        return f'<span class="status {known}">{sign}{_text(cell.text or cell.kind)}</span>'
    return _text(cell)


_SIGNS = {'pass': '✓', 'warn': '!', 'fail': '✗'}


def _numeric(rows: Sequence[Sequence[Cell]], column: int) -> bool:
    """Whether a column holds nothing but numbers, with signs, per cents and intervals."""
    pattern = re.compile(r'[+−-]?(inf|nan|∞|[\d.][\d.,e%()+−– -]*)|[–-]?')
    return all(
        isinstance(row[column], str) and pattern.fullmatch(str(row[column])) is not None
        for row in rows
    )


def _figure(figure: Figure) -> str:
    width, height = _size(figure.picture)
    # Of a PNG's pixels there are more than a page has, so that it is sharp on good screens.
    width, height = round(width / _DENSITY), round(height / _DENSITY)
    data = base64.b64encode(figure.picture).decode('ascii')
    label = _text(figure.alternative)
    return (
        f'<figure>\n<div class="scroll">'
        f'<img src="data:image/png;base64,{data}" alt="{label}" width="{width}" height="{height}" '
        f'style="min-width:{round(_SHRUNK * width)}px"></div>\n'
        f'<figcaption>{_text(figure.caption)}</figcaption>\n</figure>'
    )


_DENSITY = 1.6
# Pictures become no smaller than this share of their width, but scroll; their text has to be read.
_SHRUNK = 0.55


def _size(picture: bytes) -> tuple[int, int]:
    """Width and height of a PNG in pixels."""
    if not picture.startswith(b'\x89PNG\r\n\x1a\n') or len(picture) < 24:
        raise ValueError(f'A picture begins with {picture[:8]!r}; it must be a PNG file.')
    return int.from_bytes(picture[16:20], 'big'), int.from_bytes(picture[20:24], 'big')


def _lines(lines: Iterable[str]) -> str:
    return '\n'.join(lines)


_STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fff; --ink: #1c2126; --faint: #59626c; --line: #d3d9df; --soft: #f4f6f8;
  --link: #0b5394; --pass: #146c3a; --warn: #8a4b00; --warned: #fff5e0; --fail: #a8201a;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #15181c; --ink: #e3e7eb; --faint: #a2acb6; --line: #3a424b; --soft: #1e2328;
    --link: #86bcff; --pass: #7bd69b; --warn: #f4bd6a; --warned: #33280f; --fail: #ff9a92;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 76rem;
  background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
h1, h2, h3, h4, p, li, summary, figcaption, dt, dd { overflow-wrap: anywhere; }
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0 0 .75rem; }
h2 {
  font-size: 1.4rem; line-height: 1.25; margin: 3rem 0 .75rem; padding-top: .75rem;
  border-top: 1px solid var(--line);
}
h3 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
h4 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
p, .notes ul { max-width: 48rem; margin: .5rem 0; }
a { color: var(--link); }
nav { margin: 1.5rem 0 0; padding: .75rem 1rem; background: var(--soft); border-radius: .5rem; }
nav ol { list-style: none; margin: 0; padding: 0; }
nav > ol { columns: 16rem; column-gap: 2rem; }
nav > ol > li { break-inside: avoid; }
nav ol ol { padding-left: 1rem; font-size: .9rem; }
.values { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1.25rem 0; }
.values > div {
  flex: 1 1 11rem; max-width: 22rem; padding: .6rem .9rem;
  border: 1px solid var(--line); border-radius: .5rem; background: var(--soft);
}
.values dt { font-size: .85rem; color: var(--faint); }
.values dd { margin: 0; }
.values strong { display: block; font-size: 1.6rem; line-height: 1.3; }
.values span { font-size: .85rem; color: var(--faint); }
.scroll { overflow-x: auto; max-width: 100%; }
.scroll:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
table {
  border-collapse: collapse; margin: .75rem 0 1.25rem; font-size: .9rem;
  font-variant-numeric: tabular-nums;
}
caption {
  caption-side: top; text-align: left; padding: 0 0 .4rem; color: var(--faint);
  font-size: .9rem;
}
/* Seen whole where the table is wider than the screen. */
caption span { display: block; position: sticky; left: 0; max-width: calc(100vw - 2rem); }
th, td {
  padding: .3rem .75rem; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line);
}
thead th { border-bottom: 2px solid var(--line); background: var(--soft); vertical-align: bottom; }
tbody th { font-weight: 500; }
tbody tr:hover > * { background: var(--soft); }
tbody th, td:not(.number) {
  min-width: 7.5rem; max-width: min(30rem, 55vw); overflow-wrap: break-word;
}
.number { text-align: right; white-space: nowrap; }
.figures { display: flex; flex-wrap: wrap; gap: 1rem 2rem; align-items: flex-start; }
figure { margin: .75rem 0; max-width: 100%; min-width: 0; }
figure .scroll { border: 1px solid var(--line); border-radius: .5rem; background: #fff; }
figure img { display: block; max-width: 100%; height: auto; }
figcaption {
  /* A caption is no wider than its picture. */
  contain: inline-size;
  margin-top: .4rem; color: var(--faint); font-size: .9rem;
}
pre {
  margin: .75rem 0; padding: .75rem 1rem; background: var(--soft); border-radius: .5rem;
  white-space: pre-wrap; overflow-wrap: anywhere; font-size: .875rem;
}
code { font-family: ui-monospace, "SFMono-Regular", Menlo, Consolas, monospace; }
.notes {
  margin: 1.25rem 0; padding: .6rem 1rem; border-left: .3rem solid var(--warn);
  background: var(--warned); border-radius: .25rem;
}
.notes ul { padding-left: 1.25rem; }
.status { font-weight: 600; white-space: nowrap; }
.pass { color: var(--pass); }
.warn { color: var(--warn); }
.fail { color: var(--fail); }
details { margin: .75rem 0; }
summary { cursor: pointer; font-weight: 500; color: var(--link); }
@media print {
  :root {
    --paper: #fff; --ink: #000; --faint: #444; --line: #bbb; --soft: #fff; --link: #000;
    --pass: #000; --warn: #000; --warned: #fff; --fail: #000;
  }
  body { max-width: none; padding: 0; font-size: 10pt; }
  h2, h3, h4, caption { break-after: avoid; }
  figure, tr, .notes, .values > div { break-inside: avoid; }
  .figures { display: block; }
  .scroll { overflow: visible; }
  caption span { max-width: none; }
  figure .scroll { border: 0; }
  figure img { min-width: 0 !important; }
  tbody th, td { white-space: normal !important; }
  details::details-content { content-visibility: visible; display: block; height: auto; }
}
"""
