"""Where one is signed in: `$OW_HOME/credentials.json`, which `Settings.load()` reads too."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

from openweights_prefect.errors import ConfigurationError
from openweights_prefect.settings import Settings
from openweights_prefect.stack.addresses import make_home, write_private


@dataclass(frozen=True)
class Login:
    """A token of this machine, and the project and organization that it is of."""

    supabase_url: str
    supabase_key: str
    organization_id: str
    api_key: str = field(repr=False)
    token_id: str
    minted: bool
    """Whether `ow login` made the token, and so `ow logout` ends it."""

    def settings(self, home: Path) -> Settings:
        """The settings of this login alone, whatever the environment says."""
        return Settings(
            home=home,
            supabase_url=self.supabase_url,
            supabase_key=self.supabase_key,
            organization_id=self.organization_id,
            api_key=self.api_key,
        )


def login_path(home: Path) -> Path:
    """The file of the login."""
    return home / "credentials.json"


def session_path(home: Path) -> Path:
    """The file of the person's session, for what no token may do."""
    return home / "session.json"


def load_login(home: Path) -> Login | None:
    """The login of this home, None without one."""
    path = login_path(home)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return Login(**{spec.name: document[spec.name] for spec in dataclasses.fields(Login)})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError):
        problem = f"{str(path)!r} cannot be read or is damaged. Delete it and run `ow login`."
    raise ConfigurationError(problem)  # Outside the handler: a cause may quote the file.


def save_login(home: Path, login: Login) -> None:
    """Replace the login as a whole, readable by its owner only."""
    try:
        write_private(login_path(home), json.dumps(dataclasses.asdict(login), indent=2) + "\n")
    except OSError as exc:
        raise _unwritable(home, exc) from exc


def prepare_home(home: Path) -> None:
    """Make the folder of the login, before there is a token to lose."""
    try:
        make_home(home)
        write_private(probe := home / ".credentials-probe", "")
        probe.unlink()
    except OSError as exc:
        raise _unwritable(home, exc) from exc


def _unwritable(home: Path, exc: OSError) -> ConfigurationError:
    return ConfigurationError(
        f"The login cannot be written to {str(home)!r} ({exc.strerror}). Set `OW_HOME` to a folder that you "
        "can write to."
    )
