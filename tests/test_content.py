"""A user's own project folder works like ours, from any working directory."""

import pytest

from tcjax import content


@pytest.fixture
def project(tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/sizes.py").write_text("WIDTH = 7\n")
    (tmp_path / "configs/mine.py").write_text(
        "from pathlib import Path\nimport sizes_of_mine\n\ndef run():\n    return 'the run'\n\n"
        "def wide():\n    return sizes_of_mine.WIDTH\n\ndef _private():\n    return 0\n"
    )
    (tmp_path / "sizes_of_mine.py").write_text("WIDTH = 7\n")
    return tmp_path


def test_a_function_is_called_by_file_and_name(project):
    assert content.call(f"{project}/configs/mine.py") == ("the run", project)
    assert content.call(f"{project}/configs/mine.py:wide") == (7, project)


def test_a_wrong_name_lists_the_right_ones(project):
    with pytest.raises(ValueError, match=r"has no function 'weid'; choose .*mine.py:NAME of \['run', 'wide'\]"):
        content.call(f"{project}/configs/mine.py:weid")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no such config file: .*nothing.py"):
        content.call(f"{tmp_path}/nothing.py")


def test_the_root_is_the_nearest_marked_folder(project):
    deep = project / "experiments/one"
    deep.mkdir(parents=True)
    assert content.project_root(deep) == project
    (deep / "pyproject.toml").write_text("")
    assert content.project_root(deep / "study.py") == deep
