"""`pip install -e .`: the distribution holds every package and every file that they read."""

import subprocess
import tomllib
from fnmatch import fnmatch

import pytest

from tests.support.commands import ROOT

SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
PACKAGES = SETTINGS["packages"]["find"]["include"]  # globs of dotted names
FILES = ["*.py", *SETTINGS["package-data"]["*"]]
PACKED = {"kernels", "models", "data", "evaluation", "training", "conf"}


def tracked(folder: str = ".") -> list[str]:
    git = ["git", "ls-files", folder]
    return subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.parametrize("folder", sorted(PACKED))
def test_every_folder_is_a_package_and_every_file_of_it_is_packed(folder):
    assert tracked(folder)
    for path in tracked(folder):
        folders, _, name = path.rpartition("/")
        assert any(fnmatch(folders.replace("/", "."), glob) for glob in PACKAGES), path
        assert any(fnmatch(name, glob) for glob in FILES), path


def test_nothing_else_is_packed():
    tops = {path.split("/")[0] for path in tracked() if "/" in path}
    assert {top for top in tops if any(fnmatch(top, glob) for glob in PACKAGES)} == PACKED
