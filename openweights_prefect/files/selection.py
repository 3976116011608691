"""The file store of an installation: what `OW_FILE_STORE` names, else the Supabase project's or a folder."""

from __future__ import annotations

from collections.abc import Callable

from openweights_prefect.files.connect import connect
from openweights_prefect.files.store import FileStore
from openweights_prefect.settings import Settings


def open_store(settings: Settings, *, bearer: Callable[[], str] | None) -> FileStore:
    """The store that the settings name; it makes no request before it is used.

    `bearer` gives the JWTs of a Supabase project, None without one.
    """
    folder = settings.home / "files"
    if bearer is None:
        return connect(settings.file_store, folder)
    token = bearer

    def hosted() -> FileStore:
        from openweights_prefect.files.supabase import SupabaseFileStore  # Only those who use it pay for it.

        return SupabaseFileStore(
            settings.supabase_url.rstrip("/"),
            settings.supabase_key,
            bearer=token,
            uploads_folder=settings.home / "uploads",
        )

    return connect(settings.file_store, folder, hosted=hosted)
