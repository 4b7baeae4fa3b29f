"""Imports point one way, objectives are named in one place, and files stay short."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import torchrl_bcq

ROOT = Path(torchrl_bcq.__file__).parent
LEAVES = {"errors", "files", "memory", "functional", "actions", "bounds", "version"}
SHARED = LEAVES | {"protocols"}
LEARNING = SHARED | {"modules", "objectives", "data"}
MAY_IMPORT = {
    **{name: set() for name in LEAVES},
    "protocols": LEAVES,
    "modules": SHARED | {"modules"},
    "objectives": SHARED | {"objectives"},
    "data": SHARED | {"data"},
    "trainers": LEARNING | {"trainers"},
    "evaluation": LEARNING | {"trainers", "evaluation"},
    "reports": LEARNING | {"trainers", "evaluation", "reports"},
    "export": SHARED | {"data", "modules", "export"},
    "runs": LEARNING | {"trainers", "evaluation", "reports", "runs"},
    "conf": LEARNING | {"trainers", "evaluation", "runs", "conf"},
    "cli": LEARNING | {"trainers", "evaluation", "reports", "export", "runs", "cli"},
}


def packages_imported_by(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            parts = [f"torchrl_bcq.{alias.name}" for alias in node.names]
            names.update(parts if node.module == "torchrl_bcq" else [node.module])
        elif isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
    assert "torchrl_bcq" not in names, f"{file} imports the whole package"
    return {name.split(".")[1] for name in names if name.startswith("torchrl_bcq.")}


@pytest.mark.parametrize("package", sorted(MAY_IMPORT))  # in one order for all workers
def test_imports_point_one_way(package):
    path = ROOT / package
    files = list(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
    assert files
    for file in files:
        assert packages_imported_by(file) <= MAY_IMPORT[package], file


def test_every_package_is_listed():
    assert {p.stem for p in ROOT.iterdir() if not p.name.startswith(("_", ".", "py."))} == set(MAY_IMPORT)


def test_packages_do_not_import_each_other():
    for package, imported in MAY_IMPORT.items():
        for other in imported - {package}:
            assert package not in MAY_IMPORT[other]


def test_trainers_metrics_and_reports_name_no_network():
    """A new objective needs no change in them."""
    named = re.compile(r"\b(vae|qvalue|actor)", re.IGNORECASE)
    files = [file for package in ("trainers", "evaluation", "reports") for file in (ROOT / package).rglob("*.py")]
    assert len(files) > 20
    assert [str(file.relative_to(ROOT)) for file in files if named.search(file.read_text())] == ["trainers/bcq.py"]


def test_no_file_is_longer_than_300_lines():
    lengths = {
        file: len(file.read_text().splitlines()) for file in ROOT.rglob("*.py*") if file.suffix in (".py", ".pyi")
    }
    assert len(lengths) > 60
    assert {str(file.relative_to(ROOT)): lines for file, lines in lengths.items() if lines > 300} == {}


def test_functional_imports_torch_and_the_standard_library_alone():
    tree = ast.parse((ROOT / "functional.py").read_text())
    names = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)} | {
        alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names
    }
    assert {name.split(".")[0] for name in names} == {"__future__", "collections", "math", "torch"}


def test_optional_packages_are_imported_only_when_used():
    packages = ("minari", "h5py", "matplotlib", "hydra", "omegaconf")
    code = f"from torchrl_bcq import *; import sys; print([m for m in {packages} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_names_are_loaded_when_they_are_used():
    stub = ast.parse((ROOT / "__init__.pyi").read_text())
    listed = [a.name for n in stub.body if isinstance(n, ast.ImportFrom) and n.module for a in n.names]
    assert sorted(listed) == sorted(torchrl_bcq.__all__)
    assert all(getattr(torchrl_bcq, name) is not None for name in listed)
    with pytest.raises(AttributeError, match="BCQLos"):
        torchrl_bcq.BCQLos  # noqa: B018
    code = "import torchrl, sys; before = {*sys.modules}; import torchrl_bcq; print(*sorted({*sys.modules} - before))"
    out = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    new = out.stdout.split()
    assert "torchrl_bcq" in new
    loaded = {name for name in new if name.startswith(("torch.", "torchrl.", "torchrl_bcq.", "tensordict"))}
    assert loaded == {"torchrl_bcq.version"}


def test_the_package_imports_nothing_heavy_beside_torchrl():
    """Beside TorchRL's packages it imports filelock and its own files: no readers, no command line, no compiler."""
    packages = "checkpoint, torchrl.data, torchrl.envs, torchrl.modules, torchrl.objectives, torchrl.trainers"
    before = f"import sys, torchrl.{packages}; before = {{*sys.modules}}"
    code = f"{before}; from torchrl_bcq import *; print(*before, '|', *sys.modules)"
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    before, after = (set(names.split()) for names in run.stdout.splitlines()[-1].split("|"))
    packages = {name.split(".")[0] for name in after} - {name.split(".")[0] for name in before}
    packages -= sys.stdlib_module_names
    assert {"torchrl_bcq"} <= packages <= {"torchrl_bcq", "filelock", "lazy_loader"}
    assert not [name for name in after - before if name.startswith("torch.")]  # such as torch._inductor
