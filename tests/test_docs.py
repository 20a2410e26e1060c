"""README and docs/: generated parts are current, links lead somewhere, code runs."""

import ast
import inspect
import re
from pathlib import Path

import pytest
import yaml

from tests import docs
from warpo.engine.config.algorithms import ALGORITHMS
from warpo.engine.config.control import ControlConfig
from warpo.engine.config.file import keys
from warpo.engine.config.offline import OfflineConfig
from warpo.engine.config.policy import Config, load_config
from warpo.kernels import ops

ROOT = docs.ROOT
PAGES = [*docs.PAGES, *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"))]
SETTINGS = {name for tree in (Config, OfflineConfig, ControlConfig) for name in keys(tree)}
SECTIONS = {name.partition(".")[0] for name in SETTINGS if "." in name}
# Shown and not run: they patch trainers that are not installed here.
NOT_RUN = 2


def blocks(language: str) -> list:
    """Fenced blocks of a language, as parameters of a test."""
    found = []
    for page in PAGES:
        pattern = rf"^( *)```{language}\n(.*?)^\1```$"
        for match in re.finditer(pattern, page.read_text(), re.DOTALL | re.MULTILINE):
            text = re.sub(rf"^{match[1]}", "", match[2], flags=re.MULTILINE)
            line = page.read_text()[: match.start()].count("\n") + 1
            found.append(pytest.param(text, id=f"{page.name}:{line}"))
    return found


@pytest.mark.parametrize("page", docs.PAGES, ids=lambda page: page.name)
def test_generated_parts_are_current(page):
    text = page.read_text()
    assert docs.filled(text) == text, "fill it by `python -m tests.docs`"


def test_every_generated_part_stands_somewhere():
    text = "".join(page.read_text() for page in docs.PAGES)
    assert set(re.findall(r"<!-- ([\w -]+) -->", text)) == set(docs.PARTS)


def test_the_front_page_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\((?!\w+:)([^)\s]+)\)", prose):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("name", [name for name in ops.__all__ if name[0].islower()])
def test_returns_are_read_as_one_value_or_as_named_ones(name):
    """The site makes an item of every line that is not indented further."""
    section = re.search(r"^Returns:\n((?:    .+\n?)+)", inspect.getdoc(getattr(ops, name)), re.M)
    items = re.findall(r"(?m)^    (\S.*)", section[1]) if section else []
    assert len(items) < 2 or all(re.match(r"[\w, ]+: ", item) for item in items)


def anchors(page: Path) -> set[str]:
    """Of headings, and of what mkdocstrings shows."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    slugs = {
        re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", title.lower()).strip()) for title in headings
    }
    return slugs | set(re.findall(r"^::: (\S+)$", text, re.MULTILINE))


@pytest.mark.parametrize("text", blocks("python"))
def test_python_runs(text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(text, "block", "exec"), {"__name__": "block"})


def test_python_that_does_not_run_is_python():
    shown = blocks("py")
    assert len(shown) <= NOT_RUN
    for block in shown:
        ast.parse(block.values[0])


@pytest.mark.parametrize("text", blocks("yaml"))
def test_settings_of_yaml_exist(text, tmp_path, monkeypatch):
    tree = yaml.safe_load(text)
    assert tree
    if "model" in tree:
        monkeypatch.chdir(tmp_path)
        Path(tree["model"]).mkdir(parents=True)
        Path("my.yaml").write_text(text)
        assert load_config(Path("my.yaml"), ["--sampler", "transformers"]).steps == tree["steps"]
    for name, value in tree.items():
        inner = value if isinstance(value, dict) else {}
        assert {f"{name}.{key}" for key in inner} <= SETTINGS and name in SETTINGS | SECTIONS


@pytest.mark.parametrize("text", blocks("bash"))
def test_commands_exist(text):
    usage = (ROOT / "engine/cli.py").read_text()
    makefile = (ROOT / "Makefile").read_text()
    for line in text.replace("\\\n", " ").splitlines():
        words = line.removeprefix(".venv/bin/").partition(" #")[0].split()
        if words[:1] == ["make"]:
            targets = [word for word in words[1:] if "=" not in word and not word.startswith("-")]
            assert all(re.search(rf"(?m)^{target}:", makefile) for target in targets), line
        elif words[:1] == ["warpo"]:
            assert f"warpo {words[1]}" in usage, line
        else:
            assert not words or words[:2] == ["pip", "install"] or words[0] == "#", line


def test_the_settings_that_other_trainers_are_translated_to_exist():
    rows = re.findall(r"(?m)^\| .* \| (.*) \|$", (ROOT / "docs/migrating.md").read_text())
    assert len(rows) > 60
    for name in re.findall(r"`([^`]+)`", " ".join(rows)):
        key = name.partition(":")[0]
        theirs = name.startswith("--") or name.startswith("function(")
        assert theirs or key in SETTINGS or name in ALGORITHMS, name
