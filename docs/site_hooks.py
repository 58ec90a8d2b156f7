"""What MkDocs calls while it builds the site: formulas as MathML, and links out of `docs/`.

Formulas are `$...$` and `$$...$$`, which GitHub renders too; here they become MathML, which
browsers render without a script. A link to a file of the repository outside of `docs/`, such as
`../configs/mnist.py`, is right where the repository is browsed; in the site it leads to a page that
shows the file. Links to what does not exist stay as they are, and the strict build refuses them.
"""

from __future__ import annotations

import html
import os
import pathlib
import re

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
# What pymdownx.arithmatex writes with `generic: true`.
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
_LINK_OUT = re.compile(r'\]\(((?:\.\./)+[^)#\s]+)\)')
_PAGES = 'files'


def on_page_content(content: str, **_: object) -> str:
    """Replaces formulas by MathML."""

    def formula(match: re.Match[str]) -> str:
        tag, kind, source = match.groups()
        display = 'block' if kind == '[' else 'inline'
        mathml = convert(html.unescape(source).strip(), display=display)
        return f'<{tag} class="formula">{mathml}</{tag}>'

    return _FORMULA.sub(formula, content)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds a page for each file outside of `docs/` that a page links to."""
    for page in files.documentation_pages():
        for link in _LINK_OUT.findall(page.content_string):
            path = _outside(page, link)
            if path is not None and files.get_file_from_path(_page_of(path)) is None:
                files.append(File.generated(config, _page_of(path), content=_shown(path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Leads links out of `docs/` to those pages."""

    def link(match: re.Match[str]) -> str:
        path = _outside(page.file, match.group(1))
        if path is None:
            return match.group()
        here = pathlib.PurePosixPath(page.file.src_uri).parent
        return f']({os.path.relpath(_page_of(path), here)})'

    return _LINK_OUT.sub(link, markdown)


def _outside(page: File, link: str) -> pathlib.Path | None:
    """The file that a link of a page names, relative to the repository, if it is not in `docs/`."""
    target = (REPOSITORY / 'docs' / page.src_uri).parent.joinpath(link).resolve()
    inside = target.is_relative_to(REPOSITORY) and not target.is_relative_to(REPOSITORY / 'docs')
    return target.relative_to(REPOSITORY) if inside and target.is_file() else None


def _page_of(path: pathlib.Path) -> str:
    return f'{_PAGES}/{path.as_posix()}.md'


def _shown(path: pathlib.Path) -> str:
    language = {'.py': 'python', '.md': 'markdown'}.get(path.suffix, 'text')
    text = (REPOSITORY / path).read_text(encoding='utf-8')
    return f'# {path.name}\n\n`{path.as_posix()}`\n\n````{language}\n{text.rstrip()}\n````\n'
