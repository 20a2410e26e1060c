"""Hook of MkDocs: pages link to sources, examples and results where these lie in the repository.

What lies outside docs/ is copied into the site under source/, and the links follow. A link to a
file that does not exist fails the build.
"""

import re
from pathlib import Path, PurePosixPath

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
PAGES = ("CONTRIBUTING.md", "CHANGELOG.md", "LOG.md", "SECURITY.md")
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)\s#]+)")


def on_files(files, config):
    """The pages at the root, and every file outside docs/ that a page links to."""
    texts = {
        Path("docs", file.src_uri): file.content_string for file in files.documentation_pages()
    }
    texts |= {Path(name): (ROOT / name).read_text() for name in PAGES}
    linked = {target for page, text in texts.items() for target in _targets(page, text)}
    for target in sorted(linked):
        if not target.is_relative_to("docs") and str(target) not in PAGES:
            source = f"source/{target}"
            files.append(File.generated(config, source, abs_src_path=str(ROOT / target)))
    for name in PAGES:
        text = _in_the_site(Path(name), texts[Path(name)])
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown, page, config, files):
    if page.file.src_uri in PAGES:
        return markdown
    return _in_the_site(Path("docs", page.file.src_uri), markdown)


def _targets(page: Path, text: str) -> list[PurePosixPath]:
    """What the page links to, from the root."""
    return [_target(page, link) for link in LINK.findall(text)]


def _target(page: Path, link: str) -> PurePosixPath:
    path = (ROOT / page.parent / link).resolve()
    if not path.is_file():
        raise PluginError(f"{page} links to {link}, which is not a file")
    return PurePosixPath(path.relative_to(ROOT.resolve()))


def _in_the_site(page: Path, text: str) -> str:
    def place(match: re.Match) -> str:
        target = _target(page, match[1])
        if target.is_relative_to("docs"):
            return str(target.relative_to("docs"))
        return str(target) if str(target) in PAGES else f"source/{target}"

    return LINK.sub(place, text)
