"""The arrows between the packages point one way."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import torchrl_bcq

ROOT = Path(torchrl_bcq.__file__).parent
MAY_IMPORT = {
    "functional": set(),
    "protocols": set(),
    "memory": set(),
    "modules": {"functional", "protocols", "memory", "modules"},
    "objectives": {"functional", "protocols", "objectives"},
    "data": {"data"},
    "trainers": {"functional", "protocols", "memory", "modules", "objectives", "data", "trainers"},
    "conf": {"modules", "objectives", "data", "trainers", "conf"},
    "cli": {"modules", "objectives", "data", "trainers", "cli"},
}


def rooms_imported_by(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
    assert "torchrl_bcq" not in names, f"{file} imports the whole package"
    return {name.split(".")[1] for name in names if name.startswith("torchrl_bcq.")}


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_arrows_point_one_way(room):
    path = ROOT / room
    files = list(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
    assert files
    for file in files:
        assert rooms_imported_by(file) <= MAY_IMPORT[room], file


def test_every_room_is_listed():
    assert {p.stem for p in ROOT.iterdir() if not p.name.startswith(("_", "py."))} == set(MAY_IMPORT)


def test_functional_imports_torch_alone():
    tree = ast.parse((ROOT / "functional.py").read_text())
    names = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)} | {
        alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names
    }
    assert {name.split(".")[0] for name in names} == {"__future__", "collections", "torch"}


def test_optional_packages_are_imported_only_when_used():
    packages = ("minari", "h5py", "matplotlib", "hydra")
    code = f"from torchrl_bcq import *; import sys; print([m for m in {packages} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_names_are_loaded_when_they_are_used():
    stub = ast.parse((ROOT / "__init__.pyi").read_text())
    listed = next(ast.literal_eval(n.value) for n in stub.body if isinstance(n, ast.Assign))
    assert listed == sorted(listed) == sorted(torchrl_bcq.__all__)
    assert all(getattr(torchrl_bcq, name) is not None for name in listed)
    with pytest.raises(AttributeError, match="BCQLos"):
        torchrl_bcq.BCQLos  # noqa: B018
    code = "import torchrl, sys; before = {*sys.modules}; import torchrl_bcq; print(*sorted({*sys.modules} - before))"
    out = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    new = out.stdout.split()
    assert "torchrl_bcq" in new
    assert not [name for name in new if name.startswith(("torch.", "torchrl.", "torchrl_bcq.", "tensordict"))]


def test_the_package_imports_nothing_heavy_beside_torchrl():
    """Who has TorchRL's packages pays for filelock and our files: no readers, no command line, no compiler."""
    rooms = "checkpoint, torchrl.data, torchrl.envs, torchrl.modules, torchrl.objectives, torchrl.trainers"
    before = f"import sys, torchrl.{rooms}; before = {{*sys.modules}}"
    code = f"{before}; from torchrl_bcq import *; print(*before, '|', *sys.modules)"
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    before, after = (set(names.split()) for names in run.stdout.splitlines()[-1].split("|"))
    packages = {name.split(".")[0] for name in after} - {name.split(".")[0] for name in before}
    assert {"torchrl_bcq"} <= packages <= {"torchrl_bcq", "filelock", "lazy_loader"}
    assert not [name for name in after - before if name.startswith("torch.")]  # such as torch._inductor
