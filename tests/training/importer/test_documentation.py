"""docs/importing.md has every option of the command and every input scale."""

import inspect
from pathlib import Path

import click

import training
from training.importer.command import import_command
from training.importer.scaling import COLORS, SCALES

PAGE = Path(__file__).parents[3] / "docs" / "importing.md"


def test_the_page_has_every_option_and_scale():
    text = PAGE.read_text()
    options = [option for option in import_command.params if isinstance(option, click.Option)]
    assert len(options) >= 9
    for option in options:
        assert f"| `{option.opts[0]}`" in text or f"`{option.opts[0]}` |" in text, option.opts[0]
    for scale in SCALES:
        assert f"| `{scale}` |" in text
    assert all(f"`{color}`" in text for color in COLORS)


def test_python_takes_the_options_of_the_command():
    options = {option.name for option in import_command.params if isinstance(option, click.Option)}
    assert options <= inspect.signature(training.export).parameters.keys()
