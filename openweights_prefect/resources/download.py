"""Bring the results of a run to a local folder."""

from __future__ import annotations

import logging
from pathlib import Path, PurePosixPath

from openweights_prefect.errors import InvalidParameterError
from openweights_prefect.resources.events import Event, read_events, run_scope
from openweights_prefect.resources.logs import LogReader, is_over
from openweights_prefect.resources.session import Session
from openweights_prefect.types.identity import FileId, parse_file_id
from openweights_prefect.types.paths import safe_relative_path
from openweights_prefect.types.run import RunColumns

_log = logging.getLogger(__name__)


def download_run(session: Session, run: RunColumns, folder: Path) -> list[Path]:
    """Write the files of a run's events, and its log as `<run id>.log`; returns their paths.

    Nothing is written outside of `folder`, whatever the job named. Contents are checked against their ids.
    """
    wanted: dict[PurePosixPath, str] = {}
    for event in read_events(session, run_scope(run.id)):
        file = _file_of(event)
        if file is not None:
            wanted[_path_of(event, file)] = str(file)
    written = [_fetch(session, folder, path, file_id) for path, file_id in wanted.items()]
    return [*written, *_write_log(session, run, folder / f"{run.id}.log")]


def _file_of(event: Event) -> FileId | None:
    """Jobs log what they like: a `file` that is no file id is just a value."""
    value = event["file"] or event["data"].get("file")
    try:
        return parse_file_id(value) if isinstance(value, str) else None
    except InvalidParameterError:
        return None


def _path_of(event: Event, file: FileId) -> PurePosixPath:
    """The path that the job named; one made of the file id if it named none, or one that leads elsewhere."""
    fallback = PurePosixPath(f"{file.purpose}-{file.name}")
    named = event["data"].get("path")
    if named is None:
        return fallback
    try:
        return safe_relative_path(named)
    except InvalidParameterError as exc:
        _log.warning("Event %s: %s Written as %s instead.", event["id"], exc, fallback)
        return fallback


def _fetch(session: Session, folder: Path, path: PurePosixPath, file_id: str) -> Path:
    target = folder / path
    # A link that lies in the folder could lead out of it.
    if not target.parent.resolve().is_relative_to(folder.resolve()):
        raise InvalidParameterError(
            f"{str(target)!r} leads out of {str(folder)!r} through a link. "
            "Remove the link, or download to an empty folder."
        )
    session.store.fetch(file_id, session.organization_id, target)
    return target


def _write_log(session: Session, run: RunColumns, target: Path) -> list[Path]:
    if run.log_file is not None:
        session.store.fetch(run.log_file, session.organization_id, target)
        return [target]
    reader = LogReader(session, run.id)
    lines = list(reader.rest(run))
    if not lines and not is_over(run):
        return []
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return [target]
