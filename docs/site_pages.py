"""Hooks of MkDocs (mkdocs.yml): pages for the files of the repository that the documentation links to.

The pages of docs/ are read in the repository too, where a link such as ``../configs/method/ssf.yaml`` leads to the file
itself. A site has no such file: each gets a page of its own with its text, and a folder one with the names in it. The
pages of methods are put into the navigation from their folder. The index of the search is also written as a script,
since a page that was opened from a folder may read no data there.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = "repository"
"""Folder of the site for these pages."""
_LINK = re.compile(r"(?<!!)(\]\()((?:\.\./)+[^)#\s]+)((?:#[^)\s]*)?\))")
_LANGUAGES = {".py": "python", ".yaml": "yaml", ".json": "json", ".toml": "toml", ".md": ""}
_LARGEST = 200_000
"""Bytes of a file above which its page says how large it is, and no more."""


def on_config(config: Any) -> Any:
    """Put every page of a method into the navigation."""
    names = sorted(path.name for path in (DOCS / "methods").glob("*.md") if path.name != "README.md")
    for section in config["nav"]:
        if "Methods" in section:
            section["Methods"][1:1] = [{"Every method": [f"methods/{name}" for name in names]}]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that links lead to."""
    for target in sorted({target for page in DOCS.rglob("*.md") for target in _outside(page)}):
        files.append(File.generated(config, f"{PAGES}/{_name(target)}", content=_text(target)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turn links to files of the repository into links to their pages."""
    here = page.file.src_uri

    def turned(found: re.Match[str]) -> str:
        target = _target(DOCS / here, found[2])
        if target is None:
            return found[0]
        place = posixpath.relpath(f"{PAGES}/{_name(target)}", posixpath.dirname(here) or ".")
        return f"{found[1]}{place})"

    return _LINK.sub(turned, markdown)


@event_priority(-100)  # behind the search, which writes the index
def on_post_build(config: Any) -> None:
    """Write the index of the search as a script, which Material loads where a page is opened from a folder.

    The search itself needs a worker, which a browser allows to pages of a server alone; elsewhere Material hides it.
    """
    index = Path(config["site_dir"]) / "search" / "search_index.json"
    index.with_suffix(".js").write_text(f"var __index = {index.read_text(encoding='utf-8')}", encoding="utf-8")


def _outside(page: Path) -> list[str]:
    found = (_target(page, link[2]) for link in _LINK.finditer(page.read_text(encoding="utf-8")))
    return [target for target in found if target is not None]


def _target(page: Path, link: str) -> str | None:
    """Return the path of a link's file in the repository; None if it is a page of the documentation."""
    path = Path(os.path.normpath(page.parent / link))
    if path.is_relative_to(DOCS) or not path.is_relative_to(ROOT) or not path.exists():
        return None
    return path.relative_to(ROOT).as_posix()


def _name(target: str) -> str:
    return f"{target}/index.md" if (ROOT / target).is_dir() else f"{target.removesuffix('.md')}.md"


def _text(target: str) -> str:
    path = ROOT / target
    if path.is_dir():
        names = sorted(
            f"{item.name}{'/' if item.is_dir() else ''}" for item in path.iterdir() if item.name[0] not in "._"
        )
        return f"# {target}\n\nA folder of the repository:\n\n" + "\n".join(f"* `{name}`" for name in names) + "\n"
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return _LINK.sub(lambda found: f"`{found[2]}`", re.sub(r"\[([^\]]*)\]\((?![a-z]+:)[^)]*\)", r"\1", text))
    if len(text) > _LARGEST:
        return f"# {target}\n\nA file of the repository, {len(text):,} characters.\n"
    fence = "`" * 4
    return f"# {target}\n\n{fence}{_LANGUAGES.get(path.suffix, 'text')}\n{text}\n{fence}\n"
