"""YAML that a configuration must not be: each refused in one line that says where."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sanctl.config.document import parse_document, parse_value
from sanctl.errors import UserError


def refusal(text: str) -> str:
    with pytest.raises(UserError) as caught:
        parse_document(text, "x.yaml")
    return str(caught.value)


def test_values_and_lines() -> None:
    document = parse_document(
        "# head\nDATA:\n  classes: 3\n\nTRAIN: {epochs: 2,\n  amp: yes}\n", "x"
    )
    assert document.values == {"DATA": {"classes": 3}, "TRAIN": {"epochs": 2, "amp": True}}
    assert document.lines == {
        "DATA": 2,
        "DATA.classes": 3,
        "TRAIN": 5,
        "TRAIN.epochs": 5,
        "TRAIN.amp": 6,
    }


def test_merge_keys_are_followed() -> None:
    document = parse_document("DATA: &d\n  classes: 3\nTEST:\n  <<: *d\n  classes: 4\n", "x")
    assert document.values["TEST"] == {"classes": 4}
    assert document.lines["TEST.classes"] == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("DATA:\n\tclasses: 3\n", "x.yaml:2: a tab character; indent with spaces"),
        ("DATA:\n  classes: [3\nTRAIN:\n", "x.yaml:3: not valid YAML"),
        ("DATA:\n  a: 1\n b: 2\n", "x.yaml:3: not valid YAML"),
        ("", "x.yaml: empty; `sanctl config new`"),
        ("# nothing but a comment\n", "x.yaml: empty"),
        ("- DATA\n", "x.yaml:1: expected sections (DATA:, TRAIN:, ...), not a list"),
        ("\njust words\n", "x.yaml:2: expected sections (DATA:, TRAIN:, ...), not a single value"),
        ("a: 1\n---\nb: 2\n", "x.yaml:2: not valid YAML"),
        ("DATA:\n  day: 2020-99-99\n", "x.yaml: cannot be read as YAML (month"),
        ("[a, b]: 3\n", "x.yaml:1"),
        ("a: " + "[" * 900, "x.yaml: cannot be read as YAML"),
        ("a: \x00", "x.yaml: not a text file"),
        ("a: &a [*a]\n", "x.yaml:1: an alias that contains itself"),
    ],
)
def test_refused(text: str, message: str) -> None:
    assert message in refusal(text)
    assert "\n" not in refusal(text)


def test_duplicate_keys_are_all_named() -> None:
    text = "DATA:\n  classes: 3\n  classes: 4\nTRAIN:\n  amp: true\nDATA:\n  data_root: x\n"
    assert refusal(text).splitlines() == [
        "x.yaml:6: DATA: given twice, first on line 1",
        "x.yaml:3: DATA.classes: given twice, first on line 2",
    ]


def test_objects_are_refused_and_not_made(tmp_path: Path) -> None:
    made = tmp_path / "made"
    text = f"DATA:\n  data_root: !!python/object/apply:os.mkdir ['{made}']\n"
    assert refusal(text).startswith("x.yaml:2: could not determine a constructor for the tag")
    assert not made.exists()


def test_alias_bomb_is_refused() -> None:
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 30)]
    assert refusal("\n".join(lines)) == "x.yaml: more than 10000 values; not a configuration"


@pytest.mark.parametrize(
    ("text", "value"),
    [("3", 3), ("[3, 7]", [3, 7]), ("true", True), ("", None), ("a b", "a b"), ("1e-4", "1e-4")],
)
def test_values_of_overrides(text: str, value: object) -> None:
    assert parse_value(text, "override") == value


@pytest.mark.parametrize("text", ["[3", "a: b", "=", "!!python/name:os.system"])
def test_values_that_are_no_yaml(text: str) -> None:
    with pytest.raises(UserError, match="override"):
        parse_value(text, "override")


@given(st.text(alphabet="ab:-[]{}&*!<>#\t\n ,'\"|1.%@`?\x00\x85", max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        document = parse_document(text, "x.yaml")
    except UserError:
        return
    assert isinstance(document.values, dict)
