"""Has the work pool and the deployments registered with Prefect, by a child process."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping

from openweights_prefect.errors import StackError
from openweights_prefect.settings import Settings
from openweights_prefect.stack.processes import tail
from openweights_prefect.stack.service import Folders
from openweights_prefect.stack.services import module_command

SECONDS = 300.0
"""How long it may take, with the wait for a booting server."""


class Registration:
    """A registration that has been started; `finish()` it, or `kill()` it."""

    def __init__(self, folders: Folders, settings: Settings, common: Mapping[str, str]) -> None:
        self._log = folders.logs / "deployments.log"
        self._log.unlink(missing_ok=True)
        self._log.touch(mode=0o600)
        with self._log.open("wb") as output:
            self._child = subprocess.Popen(
                module_command("openweights_prefect.stack.registration_child"),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=folders.run,
                env={**common, "PREFECT_API_URL": settings.prefect_api_url},
                start_new_session=True,
            )

    def finish(self) -> None:
        """Return when everything is registered; raises `StackError`."""
        try:
            code = self._child.wait(SECONDS)
        except subprocess.TimeoutExpired as exc:
            raise StackError(
                f"Registering the deployments took longer than {SECONDS:.0f} s. Run `ow up` again."
            ) from exc
        if code != 0:
            raise StackError(
                "The deployments could not be registered with Prefect. Mend the cause and run `ow up` again. "
                f"The end of {str(self._log)!r}:\n{tail(self._log)}"
            )

    def kill(self) -> None:
        """End it, if it has not ended."""
        self._child.kill()
        self._child.wait()
