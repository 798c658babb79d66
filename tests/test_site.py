"""The site of docs/, and how to cite: links lead on, nothing is asked of another host, fields are whole."""

import importlib.util
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def settings() -> dict[str, Any]:
    class Loader(yaml.SafeLoader):
        """Of mkdocs.yml, whose one Python object is left aside."""

    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: None)
    return yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)


def pages_of(menu: Any) -> list[str]:
    if isinstance(menu, str):
        return [menu]
    return [page for entry in (menu.values() if isinstance(menu, dict) else menu) for page in pages_of(entry)]


def test_every_page_is_in_the_menu_once() -> None:
    guests = set(script("site_hooks").GUESTS)
    there = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    found = pages_of(settings()["nav"])
    assert len(found) == len(set(found))
    assert set(found) - guests == there - guests


def test_the_api_pages_name_what_there_is() -> None:
    pytest.importorskip("transformers")
    for page in (ROOT / "docs" / "api").glob("*.md"):
        for block in page.read_text(encoding="utf-8").split("\n::: ")[1:]:
            named = pkgutil.resolve_name(block.split()[0])
            for member in re.findall(r"\w+", "".join(re.findall(r"members: \[(.*)\]", block))):
                assert hasattr(named, member), f"{block.split()[0]}.{member}"


def test_links_out_of_the_docs_lead_into_the_repository_or_are_text() -> None:
    rewritten = script("site_hooks").rewritten
    line = (
        "see [the rule](../dsmr_kernels/visibility.py), [how](../CONTRIBUTING.md#habits) and [why](kernels.md#backends)"
    )
    assert rewritten(line, "demo.md") == "see the rule, [how](CONTRIBUTING.md#habits) and [why](kernels.md#backends)"
    there = rewritten(line, "demo.md", "https://host/dsmr/blob/main/")
    assert "[the rule](https://host/dsmr/blob/main/dsmr_kernels/visibility.py)" in there
    assert rewritten("[kernels](docs/kernels.md#backends)", "CONTRIBUTING.md") == "[kernels](kernels.md#backends)"
    assert rewritten("[web](https://arxiv.org)\n```\n[a](../no)\n```", "demo.md").count("](") == 2
    with pytest.raises(FileNotFoundError, match=r"demo\.md links to \.\./nowhere\.py"):
        rewritten("[gone](../nowhere.py)", "demo.md")


def test_every_page_can_be_rewritten() -> None:
    hooks = script("site_hooks")
    for path in (ROOT / "docs").rglob("*.md"):
        hooks.rewritten(path.read_text(encoding="utf-8"), path.relative_to(ROOT / "docs").as_posix())
    for name in hooks.TOP_PAGES:
        hooks.rewritten((ROOT / name).read_text(encoding="utf-8"), name)


def test_what_a_page_takes_from_another_host_is_found(tmp_path: Path) -> None:
    faults = script("check_site").faults
    (tmp_path / "a.css").write_text("body { color: red } /* url(https://x.org) */", encoding="utf-8")
    whole = (
        '<link rel="stylesheet" href="a.css"><a href="https://arxiv.org">read</a><img src="data:image/png;base64,xx">'
    )
    (tmp_path / "index.html").write_text(whole, encoding="utf-8")
    assert faults(tmp_path) == []
    for bad in (
        '<script src="https://cdn.org/x.js"></script>',
        '<link rel="preconnect" href="//fonts.org">',
        '<p style="background: url(http://x.org/a.png)">',
        '<pre class="mermaid">graph</pre>',
        '<img src="gone.png">',
    ):
        (tmp_path / "index.html").write_text(whole + bad, encoding="utf-8")
        assert len(faults(tmp_path)) == 1, bad
    (tmp_path / "index.html").unlink()
    (tmp_path / "a.css").write_text('@import "https://fonts.org/css";', encoding="utf-8")
    assert len(faults(tmp_path)) == 2


@pytest.mark.slow  # a process that imports PyTorch
def test_the_drawings_are_what_the_code_says() -> None:
    subprocess.run([sys.executable, "docs/draw_concepts.py", "--check"], cwd=ROOT, check=True)


def test_the_citation_is_whole_and_says_what_the_package_says() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    assert cited["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= set(cited)
    assert f'version="{cited["version"]}"' in setup
    assert f'license="{cited["license"]}"' in setup
    paper = cited["preferred-citation"]
    assert {"type", "title", "authors", "year", "url"} <= set(paper)
    readme = re.sub(r"\s+", " ", (ROOT / "README.md").read_text(encoding="utf-8")).replace("*", "")
    assert paper["title"] in readme
    assert paper["url"] in readme
    for author in cited["authors"] + paper["authors"]:
        assert set(author) in ({"name"}, {"family-names", "given-names"})
