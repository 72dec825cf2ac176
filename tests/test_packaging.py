"""`pip install -e .`: the distribution holds every package and every file that they read."""

import subprocess
import tomllib
from fnmatch import fnmatch

import pytest
from setuptools import find_namespace_packages

from tests.support.commands import ROOT

SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
PACKAGES = find_namespace_packages(str(ROOT), include=SETTINGS["packages"]["find"]["include"])
IMPORTABLE = ["kernels", "models", "data", "evaluation", "training"]


@pytest.mark.parametrize("folder", [*IMPORTABLE, "conf"])
def test_every_folder_is_a_package_and_every_file_of_it_is_packed(folder):
    patterns = ["*.py", *SETTINGS["package-data"]["*"]]
    tracked = subprocess.run(
        ["git", "ls-files", folder], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert tracked
    for path in (ROOT / name for name in tracked):
        package = ".".join(path.parent.relative_to(ROOT).parts)
        assert package in PACKAGES, path
        assert any(fnmatch(path.name, pattern) for pattern in patterns), path


def test_nothing_else_is_packed():
    assert {package.split(".")[0] for package in PACKAGES} == {*IMPORTABLE, "conf"}
