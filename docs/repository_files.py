"""Hook of the site: files of the repository that lie outside docs/ and are part of the site.

Pages: a README that stands beside what it describes is a page as it is, so that it exists once.
`extra.repository_pages` of mkdocs.yml says where in the site each goes; of every folder of
lab/results the README becomes `results/FOLDER.md`.

Files: a page shows a plot where it lies, beside its figures, by a relative link that leaves docs/.
The site has a copy under `repository/`. Links between pages are led to where the pages are.
A link to anything that is not there is a warning, and the build is strict.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

RESULTS = "fluxion_core/lab/results"
_LINK = re.compile(
    r"(\]\(|^\[[^\]]+\]:\s+)([^)\s#:]+)(?=[)#\s]|\Z)|(```.*?^```$)", re.MULTILINE | re.DOTALL
)


def pages_of_repository(root: Path, config: MkDocsConfig) -> dict[str, str]:
    """Path in the repository of every page that lies outside docs/, by its place in the site."""
    pages: dict[str, str] = dict(config.extra["repository_pages"])
    for readme in sorted(root.glob(f"{RESULTS}/*/README.md")):
        pages[f"results/{readme.parent.name}.md"] = str(readme.relative_to(root))
    return pages


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages."""
    root = Path(config.docs_dir).parent
    for uri, path in pages_of_repository(root, config).items():
        files.append(File.generated(config, uri, abs_src_path=str(root / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links out of a page's folder to where the site has the page or file."""
    root = Path(config.docs_dir).parent
    pages = pages_of_repository(root, config)
    places = {path: uri for uri, path in pages.items()}
    source = pages.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def within_site(match: re.Match[str]) -> str:
        if match[3]:  # a block of code
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[2]))
        uri = places.get(path) or (path[len("docs/") :] if path.startswith("docs/") else None)
        if uri is None and not path.startswith("../") and (root / path).is_file():
            uri = f"repository/{path}"
            if files.get_file_from_path(uri) is None:
                files.append(File.generated(config, uri, abs_src_path=str(root / path)))
        if uri is None:
            return match[0]
        return match[1] + posixpath.relpath(uri, posixpath.dirname(page.file.src_uri) or ".")

    return _LINK.sub(within_site, markdown)
