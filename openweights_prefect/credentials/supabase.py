"""A Supabase project, and its bucket as a filesystem of Prefect."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import ClassVar

from prefect._internal.compatibility.async_dispatch import async_dispatch  # As in Prefect's own integrations.
from prefect.blocks.core import Block
from prefect.filesystems import WritableDeploymentStorage, WritableFileSystem
from prefect.utilities.filesystem import filter_files
from pydantic import ConfigDict, Field, HttpUrl, PrivateAttr, SecretStr

from openweights_prefect.credentials import forms
from openweights_prefect.errors import ConfigurationError, InvalidParameterError
from openweights_prefect.files.objects import SupabaseObjects
from openweights_prefect.files.supabase_service import StorageService
from openweights_prefect.ledger.access import AccessTokens
from openweights_prefect.ledger.connect import access_tokens, project_url
from openweights_prefect.settings import Settings
from openweights_prefect.types.paths import safe_relative_path


class _Access:
    """The access token in use. A copy of it, as Prefect makes of blocks, starts without one."""

    def __init__(self) -> None:
        self._tokens: AccessTokens | None = None
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def __deepcopy__(self, memo: dict[int, object]) -> _Access:
        return _Access()

    def __reduce__(self) -> tuple[type[_Access], tuple[()]]:
        return _Access, ()

    def bearer(self, settings: Settings) -> str:
        """A JWT to use now, for the one account that it is asked for."""
        with self._lock:
            if self._tokens is None:
                self._tokens = access_tokens(settings)
            tokens = self._tokens
        assert tokens is not None, "a Supabase project has access tokens"
        return tokens.bearer()


class SupabaseCredentials(Block):
    """A Supabase project that holds a ledger and its files, and who acts there.

    Example:
        A header for a request of one's own:
        ```python
        from openweights_prefect.credentials import SupabaseCredentials

        credentials = SupabaseCredentials.load("BLOCK_NAME")
        headers = {"Authorization": f"Bearer {credentials.get_access_token()}"}
        ```
    """

    _block_type_name = "Supabase Credentials"
    _block_type_slug = "supabase-credentials"
    _description = "A Supabase project that holds a ledger and its files, and the API token that acts there."
    _documentation_url = HttpUrl("https://supabase.com/docs/guides/api/api-keys")
    _logo_url = forms.SECRET_LOGO
    model_config: ClassVar[ConfigDict] = forms.HIDDEN
    _access: _Access = PrivateAttr(default_factory=_Access)

    url: str = Field(
        title="URL",
        description="Address of the Supabase project.",
        examples=["https://abcdefghijklmnopqrst.supabase.co"],
    )
    key: str = Field(
        title="Publishable Key",
        description="The project's publishable key, or its legacy `anon` key; never a secret key.",
        examples=["sb_publishable_1a2b3c4d5e6f7g8h9i0j"],
    )
    token: SecretStr = Field(
        title="API Token",
        description="An API token of an organization; it is exchanged for JWTs that soon expire.",
        examples=["ow_1a2B3c4D5e6F7g8H9i0J"],
    )

    def block_initialization(self) -> None:
        """Check the form of the fields, without asking Supabase; raises `ConfigurationError`."""
        self.url = forms.checked_url(self, "url", "SUPABASE_URL")
        forms.check_publishable(self, "key", "SUPABASE_ANON_KEY")
        forms.check_token(self, "token", "OPENWEIGHTS_API_KEY", forms.API_TOKEN)
        project_url(self.settings())

    def get_access_token(self) -> str:
        """A JWT that is still good for a while; raises `AuthenticationError` when the API token is not."""
        return self._access.bearer(self.settings())

    def settings(self) -> Settings:
        """Settings that name this project and this token, and nothing of the process."""
        return Settings(supabase_url=self.url, supabase_key=self.key, api_key=self.token.get_secret_value())


class SupabaseStorage(WritableFileSystem, WritableDeploymentStorage):
    """A folder of a bucket of Supabase Storage.

    Example:
        Keep the results of a flow there:
        ```python
        from openweights_prefect.credentials import SupabaseStorage
        from prefect import flow

        storage = SupabaseStorage.load("BLOCK_NAME")

        @flow(result_storage=storage, persist_result=True)
        def evaluate() -> float: ...
        ```
    """

    _block_type_name = "Supabase Storage"
    _block_type_slug = "supabase-storage"
    _description = "A folder of a bucket of Supabase Storage, for results and for code."
    _documentation_url = HttpUrl("https://supabase.com/docs/guides/storage")
    _logo_url = forms.STORE_LOGO
    model_config: ClassVar[ConfigDict] = forms.HIDDEN
    _access: _Access = PrivateAttr(default_factory=_Access)

    bucket: str = Field(default="files", description="Name of the bucket.", examples=["files"])
    basepath: str = Field(
        default="",
        title="Base Path",
        description="Folder that every path is below; its first part is the id of the organization.",
        examples=["6f1c2f5e-7a34-4a53-9a2c-0d7e3b1c9f10/flow-results"],
    )
    credentials: SupabaseCredentials | None = Field(
        default=None, description="Who acts; empty means the settings of the process that loads the block."
    )

    def block_initialization(self) -> None:
        """Check the names, without asking Supabase; raises `ConfigurationError`, `InvalidParameterError`."""
        forms.check_bucket(self, "bucket", "nothing")
        self.basepath = str(safe_relative_path(self.basepath)) if self.basepath else ""

    async def aread_path(self, path: str) -> bytes:
        """The content of an object; raises `NotFoundError`."""
        return await asyncio.to_thread(self._read, path)

    # Like Prefect's own stores: each of these four is sync or async as its caller is, which the types of the
    # base class do not tell.
    @async_dispatch(aread_path)
    def read_path(self, path: str) -> bytes:  # type: ignore[override]
        """The content of an object; raises `NotFoundError`."""
        return self._read(path)

    async def awrite_path(self, path: str, content: bytes) -> str:
        """Store an object, over what is there; returns its path in the bucket."""
        return await asyncio.to_thread(self._write, path, content)

    @async_dispatch(awrite_path)
    def write_path(self, path: str, content: bytes) -> str:  # type: ignore[override]
        """Store an object, over what is there; returns its path in the bucket."""
        return self._write(path, content)

    async def aget_directory(self, from_path: str | None = None, local_path: str | None = None) -> None:
        """Download a folder; see `get_directory`."""
        await asyncio.to_thread(self._download, from_path, local_path)

    @async_dispatch(aget_directory)
    def get_directory(  # type: ignore[override]
        self, from_path: str | None = None, local_path: str | None = None
    ) -> None:
        """Download a folder, by default all of the block's to the current one.

        Each file arrives whole or not at all. Raises `InvalidParameterError` for an object whose name leads
        out of the local folder.
        """
        self._download(from_path, local_path)

    async def aput_directory(
        self, local_path: str | None = None, to_path: str | None = None, ignore_file: str | None = None
    ) -> int:
        """Upload a folder; see `put_directory`."""
        return await asyncio.to_thread(self._upload, local_path, to_path, ignore_file)

    @async_dispatch(aput_directory)
    def put_directory(  # type: ignore[override]
        self, local_path: str | None = None, to_path: str | None = None, ignore_file: str | None = None
    ) -> int:
        """Upload a folder, by default the current one to the block's, and return how many files.

        `ignore_file` has patterns like `.gitignore`. Links out of the folder are an `InvalidParameterError`.
        """
        return self._upload(local_path, to_path, ignore_file)

    def _resolve_path(self, path: str) -> str:
        """The path in the bucket. One that was resolved before stays as it is, which Prefect relies on."""
        if not path:
            return self.basepath
        checked = safe_relative_path(path)
        if not self.basepath or checked.is_relative_to(self.basepath):
            return str(checked)
        return str(safe_relative_path(f"{self.basepath}/{checked}"))

    @contextmanager
    def _objects(self) -> Iterator[SupabaseObjects]:
        settings = self.credentials.settings() if self.credentials else _ambient_settings()
        service = StorageService(
            project_url(settings), settings.supabase_key, bearer=partial(self._access.bearer, settings)
        )
        try:
            yield SupabaseObjects(service, self.bucket)
        finally:
            service.close()

    def _read(self, path: str) -> bytes:
        with self._objects() as objects:
            return objects.read(self._resolve_path(path))

    def _write(self, path: str, content: bytes) -> str:
        resolved = self._resolve_path(path)
        with self._objects() as objects:
            objects.write(resolved, content)
        return resolved

    def _download(self, from_path: str | None, local_path: str | None) -> None:
        folder, target = self._resolve_path(from_path or ""), Path(local_path or ".").expanduser()
        with self._objects() as objects:
            for name in objects.list(folder):
                path = safe_relative_path(name)
                objects.download(f"{folder}/{path}" if folder else str(path), target / path)

    def _upload(self, local_path: str | None, to_path: str | None, ignore_file: str | None) -> int:
        source, folder = Path(local_path or ".").expanduser().resolve(), self._resolve_path(to_path or "")
        if not source.is_dir():
            raise InvalidParameterError(f"{str(source)!r} is not a folder; check `local_path`.")
        patterns = Path(ignore_file).read_text(encoding="utf-8").splitlines() if ignore_file else []
        names = sorted(filter_files(str(source), patterns, include_dirs=False, as_posix=True))
        paths = [(name, _inside(source, name)) for name in names]
        with self._objects() as objects:
            for name, path in paths:
                objects.write(f"{folder}/{name}" if folder else name, path.read_bytes())
        return len(paths)


def _inside(source: Path, name: str) -> Path:
    path = (source / safe_relative_path(name)).resolve()
    if not path.is_relative_to(source):
        raise InvalidParameterError(
            f"{name!r} links to {str(path)!r}, outside of {str(source)!r}; name it in the `ignore_file`."
        )
    return path


def _ambient_settings() -> Settings:
    settings = Settings.load()
    if not settings.supabase_url:
        raise ConfigurationError(
            "The block names no `credentials`, and this process uses no Supabase project. Give the block "
            "some, run `ow login`, or set SUPABASE_URL, SUPABASE_ANON_KEY and OPENWEIGHTS_API_KEY."
        )
    return settings
