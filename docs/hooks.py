"""Hooks of MkDocs: pages and tables that are generated from the code when the site is built."""

from typing import Any

from mkdocs.structure.files import File, Files

from boxcar.tools.reference import configuration_page, families_table, python_reference


def on_files(files: Files, config: Any) -> Files:
    """Add the page of configuration keys."""
    files.append(File.generated(config, "configuration.md", content=configuration_page()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put generated parts where a page asks for them."""
    parts = {"<!-- families -->": families_table, "<!-- python -->": python_reference}
    for mark, make in parts.items():
        if mark in markdown:
            markdown = markdown.replace(mark, make())
    return markdown
