"""Does the work of `ow blocks`, and prints it as JSON; `python -m` runs it.

A process of its own, because Prefect reads its environment when it is imported.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import sys

from openweights_prefect.cli.output import print_json
from openweights_prefect.cli.session import user_environment
from openweights_prefect.errors import OpenWeightsError
from openweights_prefect.orchestration import block_documents
from openweights_prefect.settings import Settings


def main() -> None:
    """Apply or list, as the arguments say."""
    parser = argparse.ArgumentParser()
    parser.add_argument("action", choices=("apply", "ls"))
    parser.add_argument("--document", default=block_documents.DEFAULT_NAME)
    parser.add_argument("names", nargs="*")
    arguments = parser.parse_args()
    try:
        print_json(asyncio.run(_done(arguments)))
    except OpenWeightsError as exc:
        sys.exit(str(exc))


async def _done(arguments: argparse.Namespace) -> object:
    environment = user_environment()
    settings = Settings.load(environment)
    if arguments.action == "ls":
        listed = await block_documents.listing(environment=environment, settings=settings)
        return {"blocks": [dataclasses.asdict(block) for block in listed]}
    applied = await block_documents.apply(
        arguments.names, document=arguments.document, environment=environment, settings=settings
    )
    return {
        "applied": [
            {"block": one.block, "type": one.type, "document": one.document}
            for one in applied
            if one.document
        ],
        "skipped": [
            {"block": one.block, "type": one.type, "missing": one.missing} for one in applied if one.missing
        ],
    }


if __name__ == "__main__":
    main()
