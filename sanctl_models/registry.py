"""The named networks, each as the YAML keys that describe it."""

import copy
import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sanctl_models.san import DEFAULT_KERNELS, DEFAULT_WIDTHS


@dataclass(frozen=True)
class _Entry:
    name: str
    summary: str
    keys: dict[str, Any]


_SA_TYPES = {"pairwise": 0, "patchwise": 1}
_NO_NL = [0, 0, 0, 0]


def _sans() -> Iterator[_Entry]:
    """SAN10, SAN15 and SAN19 (Zhao, Jia and Koltun, CVPR 2020, table 1)."""
    depths = {"san10": [2, 1, 2, 4, 1], "san15": [3, 2, 3, 5, 2], "san19": [3, 3, 4, 6, 3]}
    for depth, layers in depths.items():
        for attention, sa_type in _SA_TYPES.items():
            keys = {
                "arch": "san",
                "sa_type": sa_type,
                "layers": layers,
                "widths": list(DEFAULT_WIDTHS),
                "kernels": list(DEFAULT_KERNELS),
            }
            yield _Entry(f"{depth}_{attention}", f"{depth.upper()}, {attention} attention", keys)


def _resnets() -> Iterator[_Entry]:
    """ResNet-26, -38 and -50 (He et al., CVPR 2016; the first two as in Zhao et al., 2020)."""
    for depth, layers in {26: [1, 2, 4, 1], 38: [2, 3, 5, 2], 50: [3, 4, 6, 3]}.items():
        yield _Entry(f"resnet{depth}", f"ResNet-{depth}", {"arch": "resnet", "layers": layers})


def _nonlocals() -> Iterator[_Entry]:
    """Non-local blocks alone (Wang et al., CVPR 2018)."""
    yield _Entry("nl", "non-local blocks alone", {"arch": "nl", "layers": [1, 2, 4, 1]})


def _hybrids() -> Iterator[_Entry]:
    """Residual stages followed by self-attention or non-local stages, and non-local additions."""
    for residual, last in ((2, 2), (3, 1)):
        for short, (attention, sa_type) in zip(("pair", "patch"), _SA_TYPES.items(), strict=True):
            name = f"hybrid_{short}_{residual}-{last}"
            summary = f"{residual} residual and {last} {attention} self-attention stages"
            types = ["res"] * residual + ["san"] * last
            yield _Entry(name, summary, _hybrid([1, 2, 4, 1], types, sa_type=sa_type))
            keys = _hybrid([1, 1, 2, 1], types, sa_type=sa_type, added_nl_blocks=[0, 1, 2, 0])
            yield _Entry(f"{name}_nl", f"{summary}, with 3 non-local blocks", keys)
        types = ["res"] * residual + ["nl"] * last
        summary = f"{residual} residual and {last} non-local stages"
        yield _Entry(f"hybrid_nl_{residual}-{last}", summary, _hybrid([1, 2, 4, 1], types))


def _with_nonlocal_blocks() -> Iterator[_Entry]:
    """ResNet-26 and SAN10 in which non-local blocks take the place of some main blocks."""
    keys = _hybrid([1, 1, 2, 1], ["res"] * 4, added_nl_blocks=[0, 1, 2, 0])
    yield _Entry("resnet26_nl", "ResNet-26 with 3 of its blocks non-local", keys)
    for attention, sa_type in _SA_TYPES.items():
        keys = _hybrid(
            [2, 1, 1, 2, 1],
            ["san"] * 5,
            sa_type=sa_type,
            widths=list(DEFAULT_WIDTHS),
            added_nl_blocks=[0, 0, 1, 2, 0],
        )
        summary = f"SAN10, {attention} attention, with 3 of its blocks non-local"
        yield _Entry(f"san10_{attention}_nl", summary, keys)


def _hybrid(layers: list[int], layer_types: list[str], **keys: Any) -> dict[str, Any]:
    defaults = {"widths": [256, 512, 1024, 2048], "added_nl_blocks": _NO_NL}
    return {"arch": "hybrid", "layers": layers, "layer_types": layer_types} | defaults | keys


_FAMILIES = (_sans, _resnets, _nonlocals, _hybrids, _with_nonlocal_blocks)
_ENTRIES = {entry.name: entry for family in _FAMILIES for entry in family()}


def list_models() -> list[str]:
    """Return the names of all networks, family by family."""
    return list(_ENTRIES)


def model_kwargs(name: str) -> dict[str, Any]:
    """Return a named network as YAML keys, fit for `build_model`; the caller may change them.

    Keys are arch, layers and, as the arch takes them, sa_type, widths, kernels, layer_types and
    added_nl_blocks.

    Raises:
        ValueError: there is no network of this name.
    """
    return copy.deepcopy(_entry(name).keys)


def model_summary(name: str) -> str:
    """Return what a named network is, in a few words.

    Raises:
        ValueError: there is no network of this name.
    """
    return _entry(name).summary


def _entry(name: str) -> _Entry:
    if name not in _ENTRIES:
        near = difflib.get_close_matches(str(name), _ENTRIES, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"use one of {', '.join(_ENTRIES)}"
        raise ValueError(f"model: {name!r} is unknown; {hint}")
    return _ENTRIES[name]
