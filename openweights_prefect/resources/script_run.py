"""`ow.run` in a script that is not a job: a job of type `script` that ends when the script does."""

from __future__ import annotations

import atexit
import logging
import os
import secrets
import shlex
import shutil
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NoReturn
from uuid import uuid4

from openweights_prefect.errors import ConflictError, LedgerUnavailable, OpenWeightsError
from openweights_prefect.resources.files import Files
from openweights_prefect.resources.session import Session
from openweights_prefect.runtime import spool
from openweights_prefect.types.paths import safe_relative_path

logger = logging.getLogger(__name__)

_LEASE_SECONDS = 60
_SHIP_SECONDS = 0.5
_RENEW_SECONDS = 15.0


class ScriptRun:
    """The run of this script: `log` returns at once, and what was logged is sent in batches.

    It ends with the process: completed, or failed after an uncaught exception or `sys.exit` with another
    code than 0. A script that is killed fails once its lease of a minute has run out.
    """

    def __init__(self, session: Session) -> None:
        self._id = uuid4()
        self.id = str(self._id)
        self.job_id = f"sjob-{secrets.token_hex(6)}"
        self._session = session
        self._boot = uuid4()
        self._folder = Path(tempfile.mkdtemp(prefix="ow-script-"))
        self._spool = self._folder / "events.jsonl"
        self._reader = spool.SpoolReader(self._spool)
        self._batch = spool.Batch([], 0)  # read, not yet stored
        self._sequence = 0
        self._shipping = threading.Lock()
        self._closed = threading.Event()
        self._process = os.getpid()  # A forked child must not end it.
        self._failure: str | None = None
        self._call("open_script", for_job=self.job_id, for_run=self._id, command=shlex.join(sys.argv))
        self._watch_exit()
        threading.Thread(target=self._keep_shipping, name="ow-script-run", daemon=True).start()

    def log(self, data: Mapping[str, Any], file: BinaryIO | None = None) -> None:
        """Log one event and return at once; with `file`, upload that first and tie it to the event."""
        file_id = Files(self._session).create(file, "event")["id"] if file is not None else None
        spool.append(self._spool, {"file": file_id, **data} if file_id else data, file=file_id)

    def upload(self, path: str | Path, name: str | None = None) -> str:
        """Upload a file now; logs `{path, file}` and returns the file id."""
        target = str(safe_relative_path(name or Path(path).name))
        file_id = Files(self._session).upload(path, "result")["id"]
        spool.append(self._spool, {"path": target, "file": file_id}, file=file_id)
        return file_id

    def flush(self) -> None:
        """Return when everything that was logged is stored.

        Raises:
            LedgerUnavailable: It cannot be stored now; what was logged is tried again.
            ConflictError: The run has ended, because its lease had run out.
        """
        spool.settle()
        with self._shipping:
            end = self._reader.end()
            while self._batch.events or self._batch.end < end:
                stored_to = self._batch.end
                if not self._batch.events:
                    self._batch = self._reader.read()
                if self._batch.events:
                    self._store(self._batch.events)
                elif self._batch.end == stored_to:  # an unfinished last line
                    return

    def close(self) -> None:
        """Send the rest and end the run; silent when already closed."""
        if self._closed.is_set() or os.getpid() != self._process:
            return
        self._closed.set()
        result = "completed" if self._failure is None else "failed"
        try:
            self.flush()
            self._call("finish_run", for_run=self._id, result=result, why=self._failure)
        except OpenWeightsError as exc:
            logger.error("Events of run %s were not sent; they are kept in %s: %s", self.id, self._spool, exc)
            return
        shutil.rmtree(self._folder, ignore_errors=True)

    def _keep_shipping(self) -> None:
        waited = 0.0
        while not self._closed.wait(_SHIP_SECONDS):
            waited += _SHIP_SECONDS
            try:
                self.flush()
                if waited >= _RENEW_SECONDS:
                    waited = 0.0
                    self._call("renew_script", for_run=self._id)
            except LedgerUnavailable:
                pass  # What cannot be sent now stays in the spool.
            except OpenWeightsError as exc:
                logger.error("Events of run %s are not sent any more: %s", self.id, exc)
                return

    def _store(self, events: list[dict[str, Any]]) -> None:
        [answer] = self._call("append_events", for_run=self._id, first_sequence=self._sequence, batch=events)
        if answer["outcome"] != "stored":
            raise ConflictError(
                f"Run {self.id} has ended in the ledger ({answer['outcome']}): this script was silent for "
                f"longer than its lease of {_LEASE_SECONDS} s. What it logs is only in {str(self._spool)!r}."
            )
        self._sequence += len(events)
        self._batch = self._batch._replace(events=[])

    def _call(self, function: str, **arguments: Any) -> list[dict[str, Any]]:
        if function in ("open_script", "renew_script"):
            arguments["lease_seconds"] = _LEASE_SECONDS
        return self._session.ledger.call(function, as_boot=self._boot, **arguments)

    def _watch_exit(self) -> None:
        """Note the status that `sys.exit` is given: Python tells exit handlers nothing of it."""
        leave = sys.exit

        def exit_(status: Any = None) -> NoReturn:
            if status not in (None, 0):
                self._failure = f"The script exited with {status!r}."
            leave(status)

        sys.exit = exit_
        atexit.register(self._end_with_script)

    def _end_with_script(self) -> None:
        uncaught = getattr(sys, "last_value", None)
        if uncaught is not None and not hasattr(sys, "ps1"):  # an interactive session goes on after an error
            self._failure = f"{type(uncaught).__name__}: {uncaught}"
        self.close()
