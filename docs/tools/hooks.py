"""MkDocs hooks: adds one generated page per mechanism, and figures and tables from the README."""

from __future__ import annotations

from typing import Any

from mkdocs.structure.files import File, Files

import attnjax as aj
from docs.tools import pages, pictures, tables


def on_config(config: Any) -> Any:
    """Puts the pages of the mechanisms into the navigation, grouped by folder."""
    groups: dict[str, list[Any]] = {}
    for spec in aj.mechanisms().values():
        groups.setdefault(pages.folder(spec), []).append({spec.id: f"mechanisms/{spec.id}.md"})
    listed = [{name: groups[name]} for name in sorted(groups)]
    config["nav"].append({"Mechanisms": ["mechanisms/index.md", *listed]})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Generates the pages and pictures of all mechanisms; nothing is written into docs/."""
    for spec in aj.mechanisms().values():
        png = pictures.mechanism(spec)
        address = f"assets/mechanisms/{spec.id}.png" if png else None
        if png and address:
            files.append(File.generated(config, address, content=png))
        text = pages.page(spec, f"../{address}" if address else None)
        files.append(File.generated(config, f"mechanisms/{spec.id}.md", content=text))
    index = "---\nhide: [toc]\n---\n\n# Mechanisms\n\n" + tables.mechanism_table(link="{id}.md")
    files.append(File.generated(config, "mechanisms/index.md", content=index))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Replaces `<!-- readme: name -->` by the part of the README with that name."""
    readme = tables.README.read_text()
    for name in ("figures",):
        markdown = markdown.replace(f"<!-- readme: {name} -->", tables.between(readme, name))
    return markdown
