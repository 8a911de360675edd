"""A text file of class names."""

import pytest

from softlabel.errors import RecipeError
from softlabel.workflows.vocabulary import read_vocabulary


def written(tmp_path, text):
    path = tmp_path / "words.txt"
    path.write_text(text)
    return path


def test_names_alone_and_with_phrasings(tmp_path):
    found = read_vocabulary(
        written(tmp_path, "# transport\nplane\n\nship: a boat, a ship  # afloat\n  storage tank \n")
    )
    assert found == {"plane": ("plane",), "ship": ("a boat", "a ship"), "storage tank": ("storage tank",)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# nothing\n\n", "names no class: write one a line"),
        ("plane\nship\nplane\n", "line 3: plane is named twice: remove or rename it"),
        ("plane:\n", "line 1: write a name, or `name: phrasing, phrasing`"),
        (": a plane\n", "line 1: write a name, or `name: phrasing, phrasing`"),
        ("all\n", "line 1: all is what results call all classes together"),
    ],
)
def test_a_slip_is_named_with_its_line(tmp_path, text, message):
    with pytest.raises(RecipeError, match=message):
        read_vocabulary(written(tmp_path, text))


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(RecipeError, match=r"no vocabulary at .*: give a text file with a class name per line"):
        read_vocabulary(tmp_path / "none.txt")
