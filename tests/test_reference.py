"""The API reference that pdoc makes has all public names, and its links lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import torchrl_bcq

README = Path(__file__).parents[1] / "README.md"
_UNKNOWN_TO_PDOC = "Error parsing type annotation _AcceptedKeys"  # of TorchRL's LossModule


def test_names_and_links(tmp_path):
    words = re.search(r"&& python (-m pdoc .*)\n", README.read_text())[1].split()
    done = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    warnings = [line for line in done.stderr.splitlines() if _UNKNOWN_TO_PDOC not in line]
    assert (done.returncode, warnings) == (0, [])
    page = (tmp_path / "api" / "torchrl_bcq.html").read_text()
    anchors = set(re.findall(r'id="([^"]+)"', page))
    assert set(torchrl_bcq.__all__) <= anchors
    links = set(re.findall(r'href="([^"]+)"', page))
    inside = {link.removeprefix("#") for link in links if link.startswith("#")}
    assert len(inside) > 500
    assert inside - anchors == set()
    assert all(link.startswith(("#", "https://")) for link in links)
    assert "Initialize internal Module state" not in page
    assert (
        set(re.findall(r":(?:class|func|meth|mod|obj):|~torchrl_bcq", page)) == set()
    )  # marks that pdoc does not read
