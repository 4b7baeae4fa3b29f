"""Settings follow from signatures: names, defaults, and types that OmegaConf checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import pytest
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from torchrl_bcq.runs.signatures import fields_of, make_section, settings_of, taken_by

if TYPE_CHECKING:
    from torch import Tensor


class Part:
    def __init__(
        self,
        network: nn.Module,
        label: str,
        size: int = 3,
        *,
        rate: float,
        flag: bool = True,
        mode: Literal["min", "max"] = "max",
        limit: int | None = None,
        name: str | bool = "auto",
        sizes: Sequence[int] = (4, 5),
        pair: tuple[float, float] | None = None,
        names: Mapping[str, str] | None = None,
        kwargs: Mapping[str, Any] = {},
        module: nn.Module | None = None,
        compile: bool | Mapping[str, Any] = False,
        key: str | tuple[str, ...] = "action",
        weights: Tensor | None = None,
        threshold=0.5,
        **others: int,
    ) -> None:
        """Arguments of all kinds."""


PLAIN = {
    "size": 3, "rate": MISSING, "flag": True, "mode": "max", "limit": None, "name": "auto", "sizes": [4, 5],
    "pair": None, "names": None, "kwargs": {}, "threshold": 0.5,
}  # fmt: skip
NO_SETTINGS = {"network", "label", "module", "compile", "key", "weights"}


def test_settings_are_arguments_of_plain_types_with_their_defaults():
    node = OmegaConf.structured(make_section("Part", settings_of(Part)))
    assert OmegaConf.to_container(node) == PLAIN
    assert list(settings_of(Part, "flag", "size")) == ["flag", "size"]


def test_fields_are_all_arguments():
    fields = fields_of(Part)
    assert fields.keys() == PLAIN.keys() | NO_SETTINGS
    assert [fields[name] for name in ("network", "module", "label")] == [(Any, MISSING), (Any, None), (str, MISSING)]


def test_a_function_and_nested_sections():
    def make(loss, *, tau: float = 0.5):
        """A function."""

    section = make_section("Outer", {"inner": settings_of(make), "sizes": (list[int], [1])})
    one, other = OmegaConf.structured(section), OmegaConf.structured(section)
    one.inner.tau, one.sizes = 0.25, [2]
    assert OmegaConf.to_container(one) == {"inner": {"tau": 0.25}, "sizes": [2]}
    assert OmegaConf.to_container(other) == {"inner": {"tau": 0.5}, "sizes": [1]}
    assert taken_by(make, {"tau": 1.0, "gamma": 2.0, "loss": 3.0}) == {"tau": 1.0}


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("size", 4, 1.5),
        ("rate", 0.5, "fast"),
        ("flag", False, "maybe"),
        ("limit", 7, "many"),
        ("limit", None, [1]),
        ("name", False, 1.5),
        ("sizes", [1], ["a"]),
        ("pair", [0.5, 1.0], ["low"]),
        ("names", {"a": "b"}, 3),
        ("threshold", 0.25, "low"),
    ],
)
def test_types_are_checked_also_of_what_may_be_null(name, right, wrong):
    node = OmegaConf.structured(make_section("Part", settings_of(Part)))
    setattr(node, name, right)
    assert node[name] == right
    with pytest.raises(OmegaConfBaseException, match=r"Value|Invalid value|Cannot assign"):
        setattr(node, name, wrong)


def test_names_are_checked():
    node = OmegaConf.structured(make_section("Part", settings_of(Part)))
    with pytest.raises(OmegaConfBaseException, match="'sise' not in 'Part'"):
        node.sise = 3
