"""What the server registers; imported to find plugins, so it needs nothing but kvpage's contracts."""

from __future__ import annotations

from kvpage import hookimpl
from kvpage.api.records import CliCommandRecord, HookRecord

KVPAGE_API_VERSION = "1.0"
NEEDS = ("fastapi", "uvicorn", "pydantic", "prometheus_client", "yaml")
INSTALL = "pip install 'kvpage[server]'"


@hookimpl
def kvpage_addhooks() -> list[HookRecord]:
    return [
        HookRecord(
            name="kvpage_server_routes",
            factory="kvpage_server.records:ServerRoutesRecord",
            summary="routes that other plugins add to the server",
        )
    ]


@hookimpl
def kvpage_cli_commands() -> list[CliCommandRecord]:
    return [
        CliCommandRecord(
            name="serve",
            factory="kvpage_server.serve:run",
            help="a model behind OpenAI's API: kvpage serve MODEL",
            needs=NEEDS,
            install=INSTALL,
        ),
        CliCommandRecord(
            name="run-batch",
            factory="kvpage_server.run_batch:run",
            help="answer a file of requests: kvpage run-batch -i in.jsonl -o out.jsonl MODEL",
            needs=(*NEEDS, "httpx"),
            install=INSTALL,
        ),
    ]
