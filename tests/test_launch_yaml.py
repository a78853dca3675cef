"""The YAML that launch writes reads back as what was meant, by a reader that is not ours."""

import pytest
import yaml as pyyaml
from hypothesis import given, settings
from hypothesis import strategies as st

from launch import yaml

# What YAML 1.1 and 1.2 read as something else where it stands plain, and what breaks a line or an indentation.
TRICKY = (
    "yes No ON off y null ~ NULL nan .inf 1 0x1f 0o7 1e3 -1 1_000 12:30 2001-01-01 4x4 = << * & ! | > % @ `".split()
)
TRICKY += [
    "",
    " ",
    "- a",
    "a: b",
    "a #b",
    "a:",
    "#a",
    "[a]",
    "{a}",
    "'",
    '"',
    "\\",
    "a\tb",
    "a\r\nb",
    "\n",
    "a\n",
    "a\n\n",
]
TRICKY += [
    "a\n  b\n",
    "  a\nb",
    "a\n ",
    "a\n\tb",
    "\ta\nb",
    "a\n\n b",
    "---",
    "...",
    "---\na\n",
    "a\x85b",
    "a\u2028b",
    "\ufeff",
    "é",
    "🙂",
]
TRICKY += [
    "$(A)",
    "ghcr.io/a/b:tag",
    "gs://bucket",
    "kueue.x-k8s.io/queue-name",
    "a\n--- b\n",
    "a\n... \nb",
    "\0",
    "\x7f\n",
]

TEXTS = st.sampled_from(TRICKY) | st.text(max_size=20) | st.text(alphabet="ab \n\t-#:|'\"", max_size=12)
SCALARS = st.none() | st.booleans() | st.integers() | TEXTS
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.lists(st.integers(), max_size=60) | st.dictionaries(TEXTS, inner, max_size=4)
    ),
    max_leaves=20,
)


@settings(deadline=None, max_examples=400)
@given(VALUES)
def test_what_is_written_reads_back_the_same(value):
    assert pyyaml.safe_load(yaml.dump(value)) == value


@pytest.mark.parametrize("text", TRICKY)
def test_a_tricky_string_stays_a_string_as_value_and_as_key(text):
    assert pyyaml.safe_load(yaml.dump({text: [text, {text: text}]})) == {text: [text, {text: text}]}


@given(st.lists(VALUES, min_size=1, max_size=4))
@settings(deadline=None, max_examples=50)
def test_several_documents_read_back_one_by_one(values):
    assert list(pyyaml.safe_load_all(yaml.documents(values))) == values


def test_the_layout_is_the_one_people_write():
    value = {
        "name": "a-1",
        "on": True,
        "empty": {},
        "args": ["x y", {"k": 1, "l": None}],
        "codes": [1, 2],
        "run": "a\n  b\n",
    }
    written = """\
name: a-1
"on": true
empty: {}
args:
  - "x y"
  - k: 1
    l: null
codes: [1, 2]
run: |
  a
    b
"""
    assert yaml.dump(value) == written


def test_a_long_list_of_numbers_is_wrapped():
    text = yaml.dump({"codes": list(range(300))})
    assert len(text.splitlines()) > 1 and max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("value", [1.5, {1: "a"}, {"a": {"b": (1,)}}, [b"a"]])
def test_what_it_cannot_write_is_refused(value):
    with pytest.raises(TypeError, match=r"YAML here is dict|keys here are strings"):
        yaml.dump(value)
