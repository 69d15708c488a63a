"""Hook of the site: files of the repository that pages link to, and that lie outside docs/.

A page shows a plot where it lies, beside its figures: `![](../../fluxion_core/lab/results/X.png)`.
So it is seen in the repository's own pages too, and no file lies there twice. The site has it
under `repository/`. A link to anything that is not there is a warning, and the build is strict.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

_LINK = re.compile(r"(!?\[[^\]]*\]\(|^\[[^\]]+\]:\s+)((?:\.\./)+[^)\s#]+)", re.MULTILINE)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links that leave docs/ to a copy of their file within the site."""
    root = Path(config.docs_dir).parent
    folder = posixpath.dirname(page.file.src_uri)

    def within_site(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join("docs", folder, match[2]))
        if path.startswith(("docs/", "../")) or not (root / path).is_file():
            return match[0]
        uri = f"repository/{path}"
        if files.get_file_from_path(uri) is None:
            files.append(File.generated(config, uri, abs_src_path=str(root / path)))
        return match[1] + posixpath.relpath(uri, folder or ".")

    return _LINK.sub(within_site, markdown)
