"""``kvpage complete``: goes on with a text as it stands, on a model here or on a server."""

from __future__ import annotations

from collections.abc import Sequence

from kvpage.cli import remote_text
from kvpage.cli.generate import answer, make_parser

DESCRIPTION = """\
Go on with a text as it stands, without a chat template. Without a PROMPT, stdin is the text; with --url, each line."""


def run(arguments: Sequence[str]) -> int:
    """The command."""
    if remote_text.names_a_server(arguments):
        return remote_text.complete(arguments, DESCRIPTION)
    parser = make_parser("kvpage complete", DESCRIPTION, raw=True)
    parser.add_argument("--url", metavar="URL", help=remote_text.URL_HELP)
    parser.add_argument("--quick", metavar="TEXT", help="the same as PROMPT")
    namespace = parser.parse_arguments(arguments)
    if namespace.quick is not None:
        namespace.prompts.append(namespace.quick)
    return answer(namespace)
