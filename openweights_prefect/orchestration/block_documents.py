"""Block documents from environment variables: what the scripts of `blocks/` and `ow blocks` share."""

from __future__ import annotations

import argparse
import asyncio
import difflib
import importlib.util
import re
import sys
import typing
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from prefect.blocks.core import Block
from prefect.client.orchestration import PrefectClient, get_client
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL, temporary_settings

from openweights_prefect import bundle
from openweights_prefect.errors import ConfigurationError, InvalidParameterError, OpenWeightsError
from openweights_prefect.settings import Settings

DEFAULT_NAME = "openweights"
"""Name of a block document when none is given."""

_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


class MissingVariables(ConfigurationError):
    """Environment variables that a block needs are not set."""

    def __init__(self, names: Sequence[str]) -> None:
        listed = ", ".join(names)
        super().__init__(f"{listed} {'is' if len(names) == 1 else 'are'} not set; the block needs it.")
        self.names = tuple(names)


class Variables:
    """Environment variables, without the blanks around them; an empty one is not set."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment

    def required(self, *names: str) -> list[str]:
        """The values; raises `MissingVariables` naming every one that is not set."""
        values = [self.optional(name) for name in names]
        missing = [name for name, value in zip(names, values, strict=True) if value is None]
        if missing:
            raise MissingVariables(missing)
        return [value for value in values if value is not None]

    def optional(self, name: str) -> str | None:
        """The value, or None."""
        return self._environment.get(name, "").strip() or None


Script = Callable[[Variables], Block]
"""What a file of `blocks/` holds: a function of the file's name that makes the block."""


@dataclass(frozen=True)
class Applied:
    """What became of one script."""

    block: str
    """Name of the script."""
    type: str
    """Slug of the block type."""
    document: str | None
    """Name of the block document that was saved, or None."""
    missing: tuple[str, ...] = ()
    """The variables for whose lack it was skipped."""


@dataclass(frozen=True)
class Listed:
    """A script, and what Prefect has of its block type."""

    block: str
    type: str
    missing: tuple[str, ...]
    """The variables that it would need."""
    documents: tuple[str, ...]
    """Names of the block documents of that type, whoever saved them."""


def run(script: Script, environment: Mapping[str, str], arguments: Sequence[str] | None = None) -> None:
    """Run one script from the command line: save its block document, or say why not and exit with 1."""
    parser = argparse.ArgumentParser(description=script.__doc__)
    parser.add_argument("name", nargs="?", default=DEFAULT_NAME, help="of the block document [%(default)s]")
    name = parser.parse_args(arguments).name
    try:
        block = script(Variables(environment))
        asyncio.run(_save_one(block, _checked_name(name), Settings.load(environment)))
    except OpenWeightsError as exc:
        sys.exit(f"Error: {exc}")
    print(f"Saved {block.get_block_type_slug()}/{name}: {block!r}")


async def apply(
    names: Sequence[str], *, document: str, environment: Mapping[str, str], settings: Settings
) -> list[Applied]:
    """Save the block documents of the named scripts, or of all whose variables are set.

    Every block is made before the first is saved, so that a bad value changes nothing. Saving again
    overwrites. Raises `MissingVariables` for a script that was named.
    """
    scripts = _chosen(names)
    _checked_name(document)
    blocks: dict[str, Block | MissingVariables] = {}
    for name, script in scripts.items():
        try:
            blocks[name] = script(Variables(environment))
        except MissingVariables as exc:
            if names:
                raise
            blocks[name] = exc
    applied = []
    async with _connected(settings) as client:
        for name, block in blocks.items():
            slug = _type_of(scripts[name]).get_block_type_slug()
            if isinstance(block, MissingVariables):
                applied.append(Applied(name, slug, None, block.names))
                continue
            await save(block, document, client=client)
            applied.append(Applied(name, slug, document))
    return applied


async def listing(*, environment: Mapping[str, str], settings: Settings) -> list[Listed]:
    """Every script, what it lacks, and the documents that Prefect has of its type."""
    listed = []
    async with _connected(settings) as client:
        for name, script in _scripts().items():
            slug = _type_of(script).get_block_type_slug()
            documents = await _documents(client, slug)
            listed.append(Listed(name, slug, _missing(script, environment), documents))
    return listed


async def save(block: Block, name: str, *, client: PrefectClient) -> None:
    """Save a block under a name, and the unsaved blocks in it before under the same one; overwrites.

    A document then refers to those in it, so that a secret is in one place.
    """
    for inner in _inner_blocks(block):
        await save(inner, name, client=client)
    await block.asave(name, overwrite=True, client=client)


async def register_types(types: Iterable[type[Block]], *, settings: Settings) -> list[str]:
    """Make the block types known to Prefect, so that its UI offers them; returns their slugs. Idempotent."""
    slugs = []
    async with _connected(settings) as client:
        for block_type in types:
            await block_type.aregister_type_and_schema(client=client)
            slugs.append(block_type.get_block_type_slug())
    return slugs


# Scripts ------------------------------------------------------------------------------------------


def _scripts() -> dict[str, Script]:
    return {path.stem: _load(path) for path in sorted((bundle.deploy_root() / "blocks").glob("*.py"))}


def _load(path: Path) -> Script:
    """The function of the file's name; the module stays out of `sys.modules`, where the user's may be."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None, path
    assert spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    script: Script = vars(module)[path.stem]
    return script


def _chosen(names: Sequence[str]) -> dict[str, Script]:
    scripts = _scripts()
    wanted = [name.replace("-", "_") for name in names] or list(scripts)
    for name in wanted:
        if name not in scripts:
            near = difflib.get_close_matches(name, scripts, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"There are {', '.join(map(repr, scripts))}."
            raise InvalidParameterError(f"There is no block {name!r}. {hint}")
    return {name: scripts[name] for name in wanted}


def _type_of(script: Script) -> type[Block]:
    block_type: type[Block] = typing.get_type_hints(script)["return"]
    return block_type


def _missing(script: Script, environment: Mapping[str, str]) -> tuple[str, ...]:
    try:
        script(Variables(environment))
    except MissingVariables as exc:
        return exc.names
    except OpenWeightsError:
        pass  # A value that is set but wrong: `apply` says how.
    return ()


def _checked_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise InvalidParameterError(
            f"{name!r} cannot name a block document. Use lowercase letters, digits and single dashes."
        )
    return name


# Prefect ------------------------------------------------------------------------------------------


def _inner_blocks(block: Block) -> Iterator[Block]:
    for field in type(block).model_fields:
        value = getattr(block, field)
        if isinstance(value, Block) and value._block_document_id is None:
            yield value


async def _save_one(block: Block, name: str, settings: Settings) -> None:
    async with _connected(settings) as client:
        await save(block, name, client=client)


async def _documents(client: PrefectClient, slug: str) -> tuple[str, ...]:
    try:
        documents = await client.read_block_documents_by_type(slug, include_secrets=False)
    except ObjectNotFound:  # Nobody has registered the type yet.
        return ()
    return tuple(sorted(document.name for document in documents if document.name))


@asynccontextmanager
async def _connected(settings: Settings) -> AsyncIterator[PrefectClient]:
    """A client of the API that the settings name, or else Prefect's own profile."""
    url = settings.prefect_api_url or PREFECT_API_URL.value()
    if not url:  # Prefect would start a server for this process alone.
        raise ConfigurationError("No Prefect API is configured. Run `ow up`, or set `PREFECT_API_URL`.")
    with temporary_settings(updates={PREFECT_API_URL: url}):
        try:
            async with get_client() as client:
                yield client
        except httpx.TransportError as exc:
            raise ConfigurationError(
                f"Prefect's API at {url!r} does not answer ({exc!r}). Run `ow up`, or mend `PREFECT_API_URL`."
            ) from exc
