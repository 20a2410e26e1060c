"""The files that a newcomer opens first agree with the package."""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import metadata
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FORMS = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))


def test_the_version_is_the_same_everywhere():
    number = PROJECT["version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == number
    assert re.search(rf"(?m)^## {re.escape(number)}\b", (ROOT / "CHANGELOG.md").read_text())
    command = [sys.executable, "-m", "warpo.engine.cli", "--version"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed == f"warpo {number}\n"


def test_the_licence_is_the_one_that_the_package_names():
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    assert metadata("warpo")["License-Expression"] == PROJECT["license"] == "Apache-2.0"
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["license"] == "Apache-2.0"


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_an_issue_form_has_the_fields_that_its_schema_asks_for(path):
    form = yaml.safe_load(path.read_text())
    assert form["name"] and form["description"]
    for field in form["body"]:
        assert field["type"] == "textarea" and field["id"] and field["attributes"]["label"]


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"])
def test_the_links_of_a_page_lead_somewhere(name):
    for link in re.findall(r"\]\(([^)#:]+)\)", (ROOT / name).read_text()):
        assert (ROOT / link).exists(), link
