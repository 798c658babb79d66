"""What the site generator does to our pages, which are written to be read in the repository as well.

A link out of docs/, such as one to a source file, leads to that file where `repo_url` says where the repository is, and
is its text alone where nobody has said it; the pages at the top of the repository come along as pages of the site. A
path that does not exist ends the build, as every other link that leads nowhere does.
"""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TOP_PAGES = ("CONTRIBUTING.md", "CHANGELOG.md")
GUESTS = {"into-my-model.md": "Into my model"}  # in the menu where they exist
LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?![a-z]+:)([^)\s#]+)(#[^)\s]*)?\)")


def rewritten(markdown: str, page: str, repo_url: str = "") -> str:
    """A page's text with its links out of docs/ as the site has them.

    Args:
        page: the page's path below docs/, or the name of one of `TOP_PAGES`.
        repo_url: where the files of the repository are shown, such as https://host/owner/dsmr/blob/main; "" = nowhere.

    Raises:
        FileNotFoundError: if a link leads to no file of the repository.
    """
    here = ROOT if page in TOP_PAGES else (ROOT / "docs" / page).parent

    def target(match: re.Match[str]) -> str:
        text, path, anchor = match.group(1), match.group(2), match.group(3) or ""
        found = (here / path).resolve()
        if not found.exists():
            raise FileNotFoundError(f"{page} links to {path}, which does not exist")
        inside = found.relative_to(ROOT).as_posix()
        if inside in TOP_PAGES:
            return f"[{text}]({'../' * page.count('/')}{inside}{anchor})"
        if inside == "docs":
            return f"[{text}]({'../' * page.count('/')}README.md)"
        if inside.startswith("docs/") and not inside.endswith(".py"):
            return f"[{text}]({inside.removeprefix('docs/')}{anchor})" if page in TOP_PAGES else match.group(0)
        return f"[{text}]({repo_url.rstrip('/')}/{inside}{anchor})" if repo_url else text

    fences = re.split(r"(^```.*?^```$)", markdown, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if index % 2 else LINK.sub(target, part) for index, part in enumerate(fences))


# --- what MkDocs calls ------------------------------------------------------------------------------------------------


def on_config(config: Any) -> Any:
    """The pages of other authors, where there are any, in the menu."""
    for section in config.nav:
        if "How to" in section:
            pages = section["How to"]
            found = {name: title for name, title in GUESTS.items() if (ROOT / "docs" / name).exists()}
            pages[3:3] = [{title: name} for name, title in found.items() if {title: name} not in pages]
        if "Working on it" in section:
            section["Working on it"] += [{name.removesuffix(".md").capitalize(): name} for name in TOP_PAGES]
    return config


def on_files(files: Any, config: Any) -> Any:
    """The pages at the top of the repository among those of docs/."""
    from mkdocs.structure.files import File

    for name in TOP_PAGES:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """See `rewritten`."""
    return rewritten(markdown, page.file.src_uri, config.repo_url or "")
