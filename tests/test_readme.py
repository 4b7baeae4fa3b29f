"""The README's snippet runs as printed."""

from __future__ import annotations

import re
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_usage_snippet(monkeypatch, tmp_path):
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    exec(compile(snippet, "README.md", "exec"), namespace)
    rollout = namespace["rollout"]
    assert rollout.batch_size == (200,)
    assert namespace["env"].action_spec.is_in(rollout["action"])
    assert namespace["trainer"].collected_frames == namespace["trainer"].total_frames
