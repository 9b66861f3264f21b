"""A wheel built from the tree, installed alone into an empty environment, runs the whole demo."""

import ast
import csv
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from email import message_from_string
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
OURS = {"sanctl", "sanctl_models", "sanctl_ops", "sanctl_templates"}
SOURCES = {
    "sanctl": "sanctl",
    "sanctl_models": "sanctl_models",
    "sanctl_ops": "ops/sanctl_ops",
    "sanctl_templates": "templates",
}
OTHER_PROVIDERS = {
    "cupy": ["cupy-cuda12x", "cupy-cuda13x"],  # need not be installed here
    "pydantic_core": ["pydantic"],  # which pins one version of it, as a part of its own
}


@dataclass(frozen=True)
class Installation:
    wheel: Path
    python: Path
    sanctl: Path
    site_packages: Path


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installation:
    folder = tmp_path_factory.mktemp("wheel")
    wheel = build_wheel(folder)
    environment = folder / "environment"
    venv.create(environment, symlinks=True)
    paths = sysconfig.get_paths(
        "venv", vars={"base": str(environment), "platbase": str(environment)}
    )
    python = Path(paths["scripts"]) / "python"
    run(
        *(sys.executable, "-m", "pip", "--python", python, "install", "--quiet"),
        *("--no-index", "--no-deps", wheel),
        cwd=folder,
    )
    site_packages = Path(paths["purelib"])
    # Only this line's folder becomes importable: the .pth files inside it, and with them the
    # editable install of the tree, are not followed.
    (site_packages / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return Installation(wheel, python, Path(paths["scripts"]) / "sanctl", site_packages)


def build_wheel(folder: Path) -> Path:
    """Builds from a copy, so that nothing left of earlier builds gets in and nothing is left."""
    tree = folder / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for source in SOURCES.values():
        shutil.copytree(
            ROOT / source, tree / source, ignore=shutil.ignore_patterns("__pycache__", "*.so")
        )
    run(sys.executable, "-m", "build", "--wheel", "--outdir", folder / "dist", tree, cwd=folder)
    (wheel,) = (folder / "dist").glob("*.whl")
    return wheel


def run(*command: str | Path, cwd: Path, timeout: float = 300) -> str:
    """Runs a command without this process's Python settings; fails with its output."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PYTEST"))}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=timeout,
    )
    assert done.returncode == 0, f"{command}: exit {done.returncode}\n{done.stdout[-4000:]}"
    return done.stdout


def test_every_file_of_the_packages_is_in_the_wheel(installed: Installation) -> None:
    with zipfile.ZipFile(installed.wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    wanted = {
        f"{package}/{path.relative_to(ROOT / source).as_posix()}"
        for package, source in SOURCES.items()
        for path in (ROOT / source).rglob("*")
        if path.suffix in {".py", ".yaml", ".cu", ".cuh", ".typed"}
    }
    assert wanted <= packed
    assert {Path(name).parts[0] for name in packed} == OURS
    for folder in ("datasets", "models"):
        assert any(name.startswith(f"sanctl_templates/{folder}/") for name in wanted)


def test_the_packages_come_from_the_wheel_alone(installed: Installation, tmp_path: Path) -> None:
    program = (
        "import json, sanctl, sanctl_models, sanctl_ops, sanctl_templates as t\n"
        "print(json.dumps([m.__file__ for m in (sanctl, sanctl_models, sanctl_ops, t)]))"
    )
    files = json.loads(run(installed.python, "-c", program, cwd=tmp_path))
    assert len(files) == 4
    for file in files:
        assert Path(file).is_relative_to(installed.site_packages), file


def requirements_of(wheel: Path) -> list[Requirement]:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = message_from_string(archive.read(name).decode())
    return [Requirement(text) for text in metadata.get_all("Requires-Dist", [])]


def test_the_wheels_requirements_are_met_here(installed: Installation) -> None:
    required = [r for r in requirements_of(installed.wheel) if not (r.marker and "extra" in str(r))]
    assert len(required) > 5
    unmet = [str(r) for r in required if not r.specifier.contains(version(r.name))]
    assert unmet == []


def third_party_imports() -> Iterator[str]:
    for source in SOURCES.values():
        for path in (ROOT / source).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    yield from (alias.name.partition(".")[0] for alias in node.names)
                elif isinstance(node, ast.ImportFrom) and not node.level:
                    yield (node.module or "").partition(".")[0]


def test_the_wheel_requires_whatever_the_packages_import(installed: Installation) -> None:
    required = {canonicalize_name(r.name) for r in requirements_of(installed.wheel)}
    imported = set(third_party_imports()) - OURS - sys.stdlib_module_names
    assert {"torch", "cv2", "yaml"} <= imported
    providers = {**packages_distributions(), **OTHER_PROVIDERS}
    unprovided = [
        name
        for name in sorted(imported)
        if not required & {canonicalize_name(each) for each in providers.get(name, [])}
    ]
    assert unprovided == []


def test_the_demo_runs_to_its_end_and_learns(installed: Installation, tmp_path: Path) -> None:
    text = run(installed.sanctl, "demo", "--out", "tried here", cwd=tmp_path, timeout=600)
    for command in (
        "dataset index",
        "dataset split",
        "dataset pack",
        "config new",
        "train",
        "test",
    ):
        assert f"$ sanctl {command} " in text or f"$ sanctl {command}\n" in text
    assert "\x1b" not in text
    (metrics,) = (tmp_path / "tried here").glob("exp/*/*/metrics.csv")
    with metrics.open(newline="") as file:
        top1 = [float(row["top1_val"]) for row in csv.DictReader(file)]
    assert max(top1) >= 90
    assert metrics.with_name("model").joinpath("model_best.pth").is_file()
    assert (metrics.parent / "test" / "predictions.csv").is_file()
