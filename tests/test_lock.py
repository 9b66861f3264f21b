"""The locked development install is that of pyproject.toml."""

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
LINE = re.compile(r"([\w.-]+)==(\S+) --hash=sha256:[0-9a-f]{64}")


def locked() -> dict[str, str]:
    lines = (ROOT / "requirements-dev.lock").read_text().splitlines()
    found = [LINE.fullmatch(line) for line in lines if not line.startswith("#")]
    assert all(found), "a line is no package with a version and a hash"
    return {canonicalize_name(match[1]): match[2] for match in found if match}


def test_every_line_names_a_package_its_version_and_its_hash() -> None:
    assert len(locked()) > 50
    assert "://" not in (ROOT / "requirements-dev.lock").read_text()


def test_it_fulfils_what_the_project_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = project["project"]["dependencies"]
    wanted += project["project"]["optional-dependencies"]["dev"]
    wanted += project["build-system"]["requires"]
    versions = locked()
    for requirement in map(Requirement, wanted):
        version = versions[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"run .ci/lock again: {requirement}"
