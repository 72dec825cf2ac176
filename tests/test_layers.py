"""The architecture: imports go one way, and Lightning stays where training is."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "kernels": set(),
    "models": {"kernels"},
    "evaluation": {"kernels", "models"},
    "training": {"kernels", "models", "evaluation", "data"},
    "data": set(),
}
LIBRARIES = {
    "kernels": {"torch", "triton"},
    "models": {"torch"},
    "data": {"torch", "numpy", "lightning", "datasets", "sentencepiece", "tqdm"},
}
OURS = {*MAY_IMPORT, "train", "eval", "bench", "tests"}
ALSO = {"training": {"data.batches.batch"}}  # single modules of other folders


def modules(path: Path) -> set[str]:
    """Dotted names of all that a file imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return names


def top_level(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def imports(path: Path) -> set[str]:
    return top_level(modules(path))


def files(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert found
    return found


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_package_imports_only_the_layers_below_it(package):
    for path in files(package):
        used = top_level(modules(path) - ALSO.get(package, set()))
        assert used & OURS <= MAY_IMPORT[package] | {package}, path


def test_training_knows_of_the_data_only_what_a_batch_is():
    for path in files("training"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "data":
                assert node.module in ("data.batches.batch", "data.batches.batching"), path
            if isinstance(node, ast.Import):
                assert not any(alias.name.split(".")[0] == "data" for alias in node.names), path


@pytest.mark.parametrize("package", LIBRARIES)
def test_the_lower_layers_need_few_libraries(package):
    for path in files(package):
        third_party = imports(path) - OURS - sys.stdlib_module_names
        assert third_party <= LIBRARIES[package], path


def test_lightning_is_imported_where_training_is():
    for package in MAY_IMPORT:
        for path in files(package):
            allowed = package == "training" or path == ROOT / "data" / "module.py"
            assert allowed or "lightning" not in imports(path), path


def test_loggers_that_need_an_account_or_a_package_are_imported_only_when_chosen():
    code = (
        "import train, eval, training.run.loggers, sys\n"
        "print({'wandb', 'tensorboard'} & {*sys.modules})"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert result.stdout == "set()\n"


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_no_module_is_named_after_a_library(package):
    taken = {"datasets", "triton", "torch", "lightning", "wandb", "hydra", "numpy", "types"}
    assert not {path.stem for path in files(package)} & taken
