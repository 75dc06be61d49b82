"""What is registered: the command ``quantize``."""

from __future__ import annotations

from kvpage import hookimpl
from kvpage.api.records import CliCommandRecord

KVPAGE_API_VERSION = "1.0"


@hookimpl
def kvpage_cli_commands() -> list[CliCommandRecord]:
    return [
        CliCommandRecord(
            name="quantize",
            factory="kvpage_quantize.command:run",
            help="write a quantized checkpoint: kvpage quantize MODEL --method int8 --out DIR",
        )
    ]
