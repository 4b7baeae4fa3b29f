"""Each change in tests/mutations.py still applies to the code; testing them all takes ten minutes."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("mutations", ROOT / "tests" / "mutations.py")
mutations = importlib.util.module_from_spec(spec)
spec.loader.exec_module(mutations)


@pytest.mark.parametrize("name", mutations.BREAKS)
def test_break_changes_one_place_and_compiles(name, tmp_path):
    file, line, broken = mutations.BREAKS[name]
    mutations.broken_copy(tmp_path, file, line, broken)
    source, copied = ((root / "torchrl_bcq" / file).read_text() for root in (ROOT, tmp_path))
    assert (source == copied) == (name == mutations.CONTROL)
    compile(copied, file, "exec")
