"""Links of the site's pages to what lies outside docs/."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from mkdocs.structure.files import Files

ROOT = Path(__file__).parents[2]
PLOT = "fluxion_core/lab/results/decode-step-epyc/decode-step.png"


@pytest.fixture(scope="module")
def hook() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "repository_files", ROOT / "docs" / "repository_files.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def config(tmp_path: Path) -> SimpleNamespace:
    return SimpleNamespace(
        docs_dir=str(ROOT / "docs"),
        site_dir=str(tmp_path),
        use_directory_urls=False,
        extra={"repository_pages": {"guides/containers.md": "deploy/README.md"}},
        plugins=SimpleNamespace(_current_plugin="repository_files"),
    )


def led(hook: ModuleType, config: SimpleNamespace, markdown: str, *, of: str) -> tuple[str, Files]:
    """The page's text as the site has it, and what came to the site by it."""
    files = Files([])
    page = SimpleNamespace(file=SimpleNamespace(src_uri=of))
    return hook.on_page_markdown(markdown, page, config, files), files


def test_a_plot_beside_its_figures_is_copied_into_the_site(hook, config):
    text, files = led(hook, config, f"![plot](../../{PLOT})", of="guides/gpu.md")
    assert text == f"![plot](../repository/{PLOT})"
    assert [file.abs_src_path for file in files] == [str(ROOT / PLOT)]


def test_a_file_that_two_links_name_is_copied_once(hook, config):
    _, files = led(hook, config, f"[a](../{PLOT}) [b](../{PLOT})", of="index.md")
    assert len(files) == 1


def test_a_link_to_a_page_that_lies_elsewhere_leads_to_its_place(hook, config):
    markdown = "[up](../../deploy/README.md#kubernetes)\n\n[ref]: ../../deploy/README.md"
    text, files = led(hook, config, markdown, of="reference/settings.md")
    assert text == "[up](../guides/containers.md#kubernetes)\n\n[ref]: ../guides/containers.md"
    assert len(files) == 0


def test_a_page_that_lies_elsewhere_finds_the_pages_of_docs(hook, config):
    text, _ = led(hook, config, "[size](../docs/guides/size.md)", of="guides/containers.md")
    assert text == "[size](size.md)"


@pytest.mark.parametrize(
    "markdown",
    ["[x](https://example.org/a.md)", "[x](../no-such-file.md)", "[x](../../../etc/hostname)"],
)
def test_what_is_no_file_of_the_repository_stays_as_it_is(hook, config, markdown: str):
    text, files = led(hook, config, markdown, of="index.md")
    assert text == markdown
    assert len(files) == 0


def test_blocks_of_code_stay_as_they_are(hook, config):
    markdown = f"```text\n[plot](../{PLOT})\n```"
    assert led(hook, config, markdown, of="index.md")[0] == markdown


def test_every_folder_of_results_is_a_page(hook, config):
    pages = hook.pages_of_repository(ROOT, config)
    folders = {path.name for path in (ROOT / hook.RESULTS).iterdir() if path.is_dir()}
    assert {f"results/{name}.md" for name in folders} <= set(pages)
