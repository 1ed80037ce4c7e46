"""The command that makes a token: `python -m serving.access NAME --scope predict >> tokens`."""

from __future__ import annotations

import hashlib
import secrets

import click

from serving.access.tokens import SCOPES, parse_tokens
from serving.errors import StartupError

TOKEN_BYTES = 32


@click.command()
@click.argument("name")
@click.option("--scope", "scopes", type=click.Choice(SCOPES), multiple=True, required=True, help="May be repeated.")
def main(name: str, scopes: tuple[str, ...]) -> None:
    """Make a random token: its line for --auth-token-file goes to standard output, its text to standard error.

    The text cannot be found out from the line, so keep it where the client reads it.
    """
    token = secrets.token_urlsafe(TOKEN_BYTES)
    line = f"{name} {','.join(dict.fromkeys(scopes))} sha256:{hashlib.sha256(token.encode()).hexdigest()}"
    try:
        parse_tokens(line.encode(), name="")
    except StartupError:
        raise click.BadParameter(
            "expected up to 64 letters, digits and . _ -, the first a letter or a digit", param_hint="NAME"
        ) from None
    click.echo(line)
    click.echo(token, err=True)


if __name__ == "__main__":
    main(prog_name="python -m serving.access")
