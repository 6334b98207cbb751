"""Text wrapped to the width of the terminal."""

import pytest

from ensemble.bench.report.labels import wrapped


def test_lines_are_wrapped_between_words_and_continuations_indented() -> None:
    assert wrapped("one two three four", 9) == "one two\n  three\n  four"
    assert wrapped("short\n\n  two words", 9) == "short\n\n  two\n    words"
    assert wrapped("", 9) == ""


def test_a_path_is_not_broken() -> None:
    path = "/a-folder/with-hyphens/" + "x" * 200
    assert wrapped(f"at {path} it is", 20) == f"at\n  {path}\n  it is"


def test_the_width_is_that_of_the_terminal_or_100(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "word " * 100
    monkeypatch.setenv("COLUMNS", "60")
    assert max(map(len, wrapped(text).splitlines())) <= 60
    monkeypatch.setenv("COLUMNS", "3")
    assert 30 < max(map(len, wrapped(text).splitlines())) <= 40
    monkeypatch.delenv("COLUMNS")
    assert 90 < max(map(len, wrapped(text).splitlines())) <= 100
