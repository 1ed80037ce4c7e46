"""The lines of the table: aligned, and safe for a terminal."""

from __future__ import annotations

import dataclasses

import click
import pytest

from client.predictions import Prediction
from client.table import Table, pad, percent, plain, truncate, width

CAT = Prediction("cat.png", "cat", 1, 0.9312, {"airplane": 0.0588, "cat": 0.9312, "dog": 0.01}, "pets", 3)
PLANE = Prediction("p.png", "airplane", 0, 1.0, {"airplane": 1.0, "cat": 0.0, "dog": 0.0}, "pets", 3)


def make_table(
    *, file_width: int = 12, top: int = 1, terminal_width: int | None = None, ascii_only: bool = False
) -> Table:
    return Table(file_width=file_width, top=top, terminal_width=terminal_width, ascii_only=ascii_only)


def test_row_has_file_label_confidence_and_bar() -> None:
    table = make_table()
    assert table.row("cat.png", CAT) == "cat.png       cat        93.1 %  █████████▎"
    assert table.row("p.png", PLANE) == "p.png         airplane  100.0 %  ██████████"


def test_next_labels_are_the_most_probable_first() -> None:
    assert make_table(top=2).row("cat.png", CAT).endswith("  █████████▎  airplane 5.9 %")
    assert make_table(top=9).row("cat.png", CAT).endswith("  airplane 5.9 %, dog 1.0 %")


@pytest.mark.parametrize(
    ("is_typical", "label_set", "expected"),
    [
        (True, ("cat",), ""),
        (False, ("cat",), "unlike the training images"),
        (True, ("cat", "dog"), "cat or dog"),
        (True, ("airplane", "cat", "dog"), "airplane, cat or dog"),
        (False, (), "unlike the training images"),
        (False, ("cat", "dog"), "unlike the training images; cat or dog"),
        (None, None, ""),
    ],
)
def test_limits_of_the_prediction_end_the_line(
    is_typical: bool | None, label_set: tuple[str, ...] | None, expected: str
) -> None:
    prediction = dataclasses.replace(CAT, is_typical=is_typical, label_set=label_set)
    assert (
        make_table().row("cat.png", prediction) == f"cat.png       cat        93.1 %  █████████▎  {expected}".rstrip()
    )


@pytest.mark.parametrize("share", [0.0, 0.004, 0.0063, 0.1, 0.5, 0.999, 1.0, 1.0000001, -0.0])
def test_bar_length_is_the_confidence(share: float) -> None:
    row = make_table(top=2, file_width=1).row("x", Prediction("x", "a", 0, share, {"a": share, "b": 0.0}, "m", 1))
    bar = row.partition("%  ")[2][:10]
    cells = bar.count("█") + sum((" ▏▎▍▌▋▊▉".index(char)) / 8 for char in bar if char != "█")
    assert cells == pytest.approx(share * 10, abs=1 / 16 + 1e-5)
    assert len(bar) == 10


def test_ascii_bar() -> None:
    assert make_table(ascii_only=True).row("cat.png", CAT) == "cat.png       cat        93.1 %  #########"


@pytest.mark.parametrize("file", ["猫の写真.png", "cafe\u0301.png", "🐈.png", "Καλημέρα.png", "ﾈｺ.png"])
def test_wide_and_combining_characters_are_aligned(file: str) -> None:
    row = make_table(file_width=20).row(file, CAT)
    before = row[: row.index("cat  ")]
    assert width(before) == 22


def test_long_names_are_not_truncated_without_a_terminal() -> None:
    name = "holidays/" + "very" * 30 + ".png"
    assert make_table(file_width=20).row(name, CAT).startswith(name + "  cat")


@pytest.mark.parametrize("columns", [60, 80, 200])
@pytest.mark.parametrize("name", ["holidays/2024/" + "long" * 50 + "/0001.png", "猫" * 120 + ".png"])
def test_rows_fit_the_terminal_and_keep_the_end_of_the_name(columns: int, name: str) -> None:
    row = click.unstyle(make_table(file_width=500, terminal_width=columns).row(name, CAT))
    assert width(row) <= columns
    assert row.startswith("…")
    assert ".png  cat" in row or ".png   cat" in row


def test_labels_are_aligned() -> None:
    table = make_table()
    short, long = table.row("cat.png", CAT), table.row("p.png", PLANE)
    assert short.index("%") == long.index("%")


def test_colour_only_on_terminals() -> None:
    assert "\033[" in make_table(terminal_width=80).row("cat.png", CAT)
    assert "\033[" not in make_table(terminal_width=None).row("cat.png", CAT)


def test_control_characters_are_replaced() -> None:
    assert plain("a\033[2Jb\nc\u202e.png") == "a\ufffd[2Jb\ufffdc\ufffd.png"
    assert plain("a b/ü猫.png") == "a b/ü猫.png"
    odd = Prediction(None, "c\nat", 0, 1.0, {"c\nat": 1.0, "d\033og": 0.0}, "m", 1)
    assert make_table(top=2).row("evil\r\n.png", odd).isprintable()


def test_width_pad_truncate_percent() -> None:
    assert [width(text) for text in ("abc", "猫", "e\u0301", "")] == [3, 2, 1, 0]
    assert pad("猫", 4) == "猫  "
    assert pad("abcde", 3) == "abcde"
    assert truncate("abcdef", 4) == "…def"
    assert truncate("abcdef", 6) == "abcdef"
    assert width(truncate("猫猫猫猫", 4)) <= 4
    assert [percent(share) for share in (0.0, 0.00049, 0.5, 1.0)] == ["0.0 %", "0.0 %", "50.0 %", "100.0 %"]
