"""Sentences as wide as the terminal."""

import pytest

from ensemble.bench.report.words import wrapped


def test_lines_are_broken_between_words_and_go_on_to_the_right() -> None:
    assert wrapped("one two three four", 9) == "one two\n  three\n  four"
    assert wrapped("short\n\n  two words", 9) == "short\n\n  two\n    words"
    assert wrapped("", 9) == ""


def test_a_path_is_not_broken() -> None:
    path = "/a-folder/with-hyphens/" + "x" * 200
    assert wrapped(f"at {path} it is", 20) == f"at\n  {path}\n  it is"


def test_the_width_is_the_terminals_or_a_hundred(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "word " * 100
    monkeypatch.setenv("COLUMNS", "60")
    assert max(map(len, wrapped(text).splitlines())) <= 60
    monkeypatch.setenv("COLUMNS", "3")
    assert 30 < max(map(len, wrapped(text).splitlines())) <= 40
    monkeypatch.delenv("COLUMNS")
    assert 90 < max(map(len, wrapped(text).splitlines())) <= 100
