from __future__ import annotations

import json
import stat
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from pydantic import BaseModel

from openweights_prefect.errors import (
    ConfigurationError,
    InvalidParameterError,
    InvalidRequestError,
    LedgerUnavailable,
    NotFoundError,
    PermissionDeniedError,
)
from openweights_prefect.files.store import LocalFileStore
from openweights_prefect.ledger.envelope import UnreadableSecret
from openweights_prefect.ledger.identity import Claims, LocalIdentity, hash_secret
from openweights_prefect.ledger.postgres import PostgresLedger
from openweights_prefect.ledger.protocol import Ledger, Row
from openweights_prefect.resources.custom import Jobs
from openweights_prefect.resources.secrets import MAX_VALUE_BYTES, Secrets
from openweights_prefect.resources.session import Session
from openweights_prefect.settings import LOCAL_ORGANIZATION_ID, Settings
from tests.callers import Callers, FixedIdentity

OTHER_ORGANIZATION_ID = "00000000-0000-0000-0000-000000000002"
VALUE = "hf_canary \u2713 of\nseveral lines"

Enter = Callable[..., Session]


@pytest.fixture
def enter(settings: Settings) -> Iterator[Enter]:
    """Opens the session of somebody; by default that of the local organization's admin."""
    opened: list[Ledger] = []

    def open_one(claims: Claims | None = None, **changes: Any) -> Session:
        claims = claims or LocalIdentity(LOCAL_ORGANIZATION_ID).claims()
        ledger = PostgresLedger(settings.database_url, identity=FixedIdentity(claims), patience_seconds=5)
        opened.append(ledger)
        store = LocalFileStore(settings.files_folder)
        return Session(changes.get("ledger", ledger), store, claims["organization_id"], settings)

    yield open_one
    for ledger in opened:
        ledger.close()


@pytest.fixture
def secrets(enter: Enter) -> Secrets:
    return Secrets(enter())


@pytest.fixture
def member(enter: Enter) -> Session:
    """A member who is no admin."""
    claims = {**LocalIdentity(LOCAL_ORGANIZATION_ID).claims(), "sub": str(uuid.uuid4())}
    code = hash_secret("owi_test")
    invite: dict[str, Any] = {
        "code_hash": code,
        "for_email": "a@b.example",
        "new_role": "user",
        "valid_seconds": 60,
    }
    enter().ledger.call("create_invitation", **invite)
    session = enter(claims)
    session.ledger.call("accept_invitation", code_hash=code)
    return session


def owner_sees(settings: Settings) -> list[tuple[str, str]]:
    """Names and stored values of all organizations, as the owner of the database sees them."""
    with psycopg.connect(settings.database_url.replace("authenticator@", "postgres@")) as connection:
        return connection.execute(
            "select name, sealed from ledger.organization_secrets order by name"
        ).fetchall()


def test_a_secret_is_stored_sealed_and_shown_by_name(secrets: Secrets, settings: Settings) -> None:
    secrets.set("HF_TOKEN", VALUE)
    secrets.set("A_TOKEN", "first")
    secrets.set("A_TOKEN", "second")
    assert [secret.name for secret in secrets.list()] == ["A_TOKEN", "HF_TOKEN"]
    assert secrets.get("HF_TOKEN") == VALUE
    assert secrets.get("A_TOKEN") == "second"
    stored = owner_sees(settings)
    assert all(value.startswith("sealed:v1:") and "canary" not in value for _, value in stored)
    assert stat.S_IMODE((settings.home / "secrets.key").stat().st_mode) == 0o600


def test_a_member_may_write_and_not_read(secrets: Secrets, member: Session) -> None:
    """Reading, deleting and rotating are for admins; the audit log notes who read."""
    theirs = Secrets(member)
    theirs.set("HF_TOKEN", VALUE)
    assert [secret.name for secret in theirs.list()] == ["HF_TOKEN"]
    for refused in (lambda: theirs.get("HF_TOKEN"), lambda: theirs.delete("HF_TOKEN"), theirs.rotate):
        with pytest.raises(PermissionDeniedError, match="only an admin"):
            refused()
    assert secrets.get("HF_TOKEN") == VALUE
    audit = secrets._session.ledger.call("list_audit", max_rows=10)
    assert [row["action"] for row in audit[:2]] == ["read_secret", "set_secret"]
    assert "canary" not in json.dumps(audit)


def test_another_organization_sees_nothing(secrets: Secrets, enter: Enter) -> None:
    """Neither names nor values, and its secret of the same name is another one."""
    secrets.set("HF_TOKEN", VALUE)
    claims = {**LocalIdentity(OTHER_ORGANIZATION_ID).claims(), "sub": str(uuid.uuid4())}
    theirs = Secrets(enter(claims))
    organization: dict[str, Any] = {"organization_id": OTHER_ORGANIZATION_ID, "name": "other"}
    theirs._session.ledger.call("create_organization", **organization)
    assert theirs.list() == []
    with pytest.raises(NotFoundError, match="No secret 'HF_TOKEN'"):
        theirs.get("HF_TOKEN")
    assert theirs.delete("HF_TOKEN") is False
    theirs.set("HF_TOKEN", "theirs")
    theirs.rotate()
    assert (secrets.get("HF_TOKEN"), theirs.get("HF_TOKEN")) == (VALUE, "theirs")


def test_a_value_that_the_database_moves_or_changes_is_refused(secrets: Secrets, settings: Settings) -> None:
    """Whoever can write the tables can neither swap two secrets nor change one unnoticed."""
    secrets.set("A_TOKEN", "first")
    secrets.set("B_TOKEN", "second")
    (_, first), (_, second) = owner_sees(settings)
    with psycopg.connect(settings.database_url.replace("authenticator@", "postgres@")) as connection:
        update = "update ledger.organization_secrets set sealed = %s where name = %s"
        connection.execute(update, (second, "A_TOKEN"))
        connection.execute(update, (first[:-5], "B_TOKEN"))
    for name in ("A_TOKEN", "B_TOKEN"):
        with pytest.raises(UnreadableSecret, match=f"`ow env set {name}`"):
            secrets.get(name)
        secrets.set(name, "again")
        assert secrets.get(name) == "again"


def test_deleting_says_whether_there_was_one(secrets: Secrets) -> None:
    secrets.set("HF_TOKEN", VALUE)
    assert [secrets.delete("HF_TOKEN"), secrets.delete("HF_TOKEN")] == [True, False]
    assert secrets.list() == []


@pytest.mark.parametrize(
    "name", ["", "1A", "A-B", "A B", "\u00c4", "A" * 101, "A=B", "A\n", "'; drop table x", None, 3]
)
def test_a_bad_name_is_refused_before_anything_is_asked(secrets: Secrets, ledger: Any, name: Any) -> None:
    """With what is allowed."""
    for use in (lambda: secrets.set(name, VALUE), lambda: secrets.get(name), lambda: secrets.delete(name)):
        with pytest.raises(InvalidParameterError, match="letters, digits and `_`"):
            use()
    assert secrets.list() == []


@pytest.mark.parametrize(
    ("value", "mend"),
    [
        ("", "ow env unset"),
        ("canary\0", "base64"),
        ("canary\ud800", "no valid Unicode"),
        ("canary" * 20_000, f"most is {MAX_VALUE_BYTES}"),
        (b"canary", "no string"),
        ("sealed:v1:canary", "give the plain value"),
    ],
)
def test_a_bad_value_is_refused_and_not_repeated(secrets: Secrets, value: Any, mend: str) -> None:
    with pytest.raises(InvalidParameterError, match=mend) as caught:
        secrets.set("HF_TOKEN", value)
    assert "canary" not in str(caught.value)
    assert secrets.list() == []


def test_the_largest_value_is_stored(secrets: Secrets) -> None:
    value = "\u2713" * (MAX_VALUE_BYTES // 3)
    secrets.set("LARGE", value)
    assert secrets.get("LARGE") == value


def test_rotation_leaves_values_and_drops_the_old_key(secrets: Secrets, settings: Settings) -> None:
    names = [f"TOKEN_{number}" for number in range(5)]
    for name in names:
        secrets.set(name, f"value of {name}")
    before, old_file = dict(owner_sees(settings)), (settings.home / "secrets.key").read_text()
    assert secrets.rotate() == 5
    assert [secrets.get(name) for name in names] == [f"value of {name}" for name in names]
    assert not {*before.values()} & {value for _, value in owner_sees(settings)}
    assert not {*_keys(old_file)} & {*_keys((settings.home / "secrets.key").read_text())}
    assert secrets.rotate() == 5
    assert len(_keys((settings.home / "secrets.key").read_text())) == 1


class Crashing:
    """Passes calls on until the process "dies" in one of them, before or after it had its effect."""

    def __init__(self, ledger: Ledger, function: str, at: int, *, after: bool) -> None:
        self._ledger, self._function, self._left, self._after = ledger, function, at, after

    @property
    def organization_id(self) -> str:
        return self._ledger.organization_id

    def call(self, function: str, **arguments: Any) -> list[Row]:
        if function == self._function:
            self._left -= 1
            if self._left == 0:
                if self._after:
                    self._ledger.call(function, **arguments)
                raise LedgerUnavailable("the process dies here")
        return self._ledger.call(function, **arguments)

    def close(self) -> None: ...


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(
    ("function", "at"), [("list_sealed", 2), ("replace_sealed", 1), ("replace_sealed", 3), ("list_sealed", 3)]
)
def test_a_rotation_that_crashes_loses_nothing(
    secrets: Secrets, enter: Enter, settings: Settings, function: str, at: int, after: bool
) -> None:
    """Wherever it is: every value can be read in between, and a second call finishes the work."""
    names = [f"TOKEN_{number}" for number in range(4)]
    for name in names:
        secrets.set(name, f"value of {name}")
    first_keys = _keys((settings.home / "secrets.key").read_text())
    with pytest.raises(LedgerUnavailable, match="dies here"):
        Secrets(enter(ledger=Crashing(enter().ledger, function, at, after=after))).rotate()
    assert [secrets.get(name) for name in names] == [f"value of {name}" for name in names]
    secrets.set(names[0], "new")
    assert secrets.rotate() == 4
    assert [secrets.get(name) for name in names] == ["new", *(f"value of {name}" for name in names[1:])]
    left = _keys((settings.home / "secrets.key").read_text())
    assert len(left) == 1
    assert not {*left} & {*first_keys}


def test_a_value_that_is_set_during_a_rotation_is_kept(secrets: Secrets, enter: Enter) -> None:
    """By another machine with the same key file: the replacement of the old value is refused."""
    secrets.set("HF_TOKEN", "old")

    class Late(Crashing):
        def call(self, function: str, **arguments: Any) -> list[Row]:
            if function == "replace_sealed" and self._left:
                self._left = 0
                secrets.set("HF_TOKEN", "new")
            return self._ledger.call(function, **arguments)

    rotating = Secrets(enter(ledger=Late(enter().ledger, "", 1, after=False)))
    rotating._keyring = secrets._keyring  # its lock may be taken again: as if it were no obstacle
    assert rotating.rotate() == 1
    assert secrets.get("HF_TOKEN") == "new"


def test_a_damaged_value_stops_a_rotation_and_is_named(secrets: Secrets, settings: Settings) -> None:
    """The old key is kept, so that the others can be read; without the damaged one it goes through."""
    secrets.set("A_TOKEN", "first")
    secrets.set("B_TOKEN", "second")
    with psycopg.connect(settings.database_url.replace("authenticator@", "postgres@")) as connection:
        connection.execute(
            "update ledger.organization_secrets set sealed = sealed || 'AAAA' where name = 'A_TOKEN'"
        )
    with pytest.raises(UnreadableSecret, match="'A_TOKEN'"):
        secrets.rotate()
    assert secrets.get("B_TOKEN") == "second"
    secrets.delete("A_TOKEN")
    assert secrets.rotate() == 1
    assert secrets.get("B_TOKEN") == "second"


def test_without_the_key_file_nothing_opens_and_new_values_can_be_stored(
    secrets: Secrets, settings: Settings
) -> None:
    secrets.set("HF_TOKEN", VALUE)
    (settings.home / "secrets.key").unlink()
    with pytest.raises(ConfigurationError, match=r"secrets\.key' is missing"):
        secrets.get("HF_TOKEN")
    secrets.set("HF_TOKEN", "new")
    assert secrets.get("HF_TOKEN") == "new"


def _keys(content: str) -> list[str]:
    document = json.loads(content)["organizations"][LOCAL_ORGANIZATION_ID]
    return [*document["keys"].values()]


class TestVault:
    """On Supabase the project's Vault keeps the values."""

    @pytest.fixture
    def transport(self) -> str:
        return "supabase"

    def test_values_go_to_the_vault(self, open_ledger: Callable[[], Callers], tmp_path: Path) -> None:
        """In plain text over TLS; no key file is made, and there is none to rotate."""
        settings, ledger = Settings(home=tmp_path / "home"), open_ledger()
        store = LocalFileStore(settings.files_folder)
        secrets = Secrets(Session(ledger.person, store, ledger.organization_id, settings))
        secrets.set("HF_TOKEN", VALUE)
        secrets.set("HF_TOKEN", VALUE + "!")
        assert [secret.name for secret in secrets.list()] == ["HF_TOKEN"]
        assert secrets.get("HF_TOKEN") == VALUE + "!"
        with pytest.raises(InvalidRequestError, match="not ours to rotate"):
            secrets.rotate()
        assert not (settings.home / "secrets.key").exists()
        assert secrets.delete("HF_TOKEN") is True
        assert secrets.list() == []


# Jobs that name them ------------------------------------------------------------------------------


class Params(BaseModel):
    a: int = 1


class Script(Jobs):
    name = "script_with_secrets"
    params = Params

    def get_entrypoint(self, validated_params: Params) -> str:
        return "true"


def stored(session: Session, job_id: str) -> Row:
    return session.ledger.call("get_job", job_id=job_id)[0]


def test_a_job_names_its_secrets(session: Session, ledger: Any) -> None:
    """They are a column of the job and no part of its id; the check costs no further round trip."""
    Secrets(session).set("HF_TOKEN", VALUE)
    plain = Script(session).create()
    ledger.calls.clear()
    other = Script(session).create(a=2, secrets=["HF_TOKEN", "HF_TOKEN"])
    assert ledger.calls == ["submit_job"]
    assert stored(session, other.id)["secrets"] == ["HF_TOKEN"]
    assert stored(session, plain.id)["secrets"] == []
    assert Script(session).create(secrets=["HF_TOKEN"]).id == plain.id


def test_unknown_secrets_are_an_error_at_submit(session: Session, ledger: Any) -> None:
    """With the mend for each; nothing is stored."""
    Secrets(session).set("HF_TOKEN", VALUE)
    with pytest.raises(InvalidParameterError, match="`ow env set A_KEY`, `ow env set B_KEY`") as caught:
        Script(session).create(secrets=["HF_TOKEN", "B_KEY", "A_KEY"])
    assert "'A_KEY', 'B_KEY'" in str(caught.value)
    assert "HF_TOKEN" not in str(caught.value)
    assert session.ledger.call("list_jobs") == []


def test_a_failed_job_gets_the_secrets_that_are_named_now(session: Session, pod: Any) -> None:
    """The usual mend of a job that failed without its token; named by nobody, they stay."""
    Secrets(session).set("HF_TOKEN", VALUE)
    job = Script(session).create()
    pod.open(job)
    pod.finish("failed", why="no token")
    again = Script(session).create(secrets=["HF_TOKEN"])
    assert (again.id, again.status) == (job.id, "pending")
    assert stored(session, job.id)["secrets"] == ["HF_TOKEN"]
    pod.open(again)
    pod.finish("failed", why="boom")
    Script(session).create()
    assert stored(session, job.id)["secrets"] == ["HF_TOKEN"]
    pod.open(again)
    pod.finish("failed", why="boom")
    Secrets(session).delete("HF_TOKEN")
    with pytest.raises(InvalidParameterError, match="no secret 'HF_TOKEN'"):
        Script(session).create()
    Script(session).create(secrets=[])
    assert stored(session, job.id)["secrets"] == []


@pytest.mark.parametrize(
    ("names", "mend"),
    [
        (["A-B"], "cannot be the name"),
        (["OW_X"], "set by the pod"),
        (["PATH"], "set by the pod"),
        ("HF_TOKEN", "list"),
    ],
)
def test_bad_names_in_a_job_are_refused(session: Session, ledger: Any, names: Any, mend: str) -> None:
    with pytest.raises(InvalidParameterError, match=mend):
        Script(session).create(secrets=names)
    assert ledger.calls == []


@pytest.mark.parametrize(
    "env",
    [
        {"HF_TOKEN": "canary"},
        {"db_password": "canary"},
        {"WANDB_API_KEY": "canary"},
        {"AWS_SECRET_ACCESS_KEY": "canary"},
        {"MY_CREDENTIALS": "canary"},
        {"X": "hf_canaryAbCdEfGhIjKlMnOp"},
        {"X": "sk-proj-canary0123456789"},
        {"X": "Bearer ghp_canaryAbCdEfGhIjKl"},
        {"X": "rpa_CANARY0123456789ABCDEF"},
        {"X": "AKIACANARY0123456789"},
        {"X": "ow_" + "canary12" * 5},
        {"X": "postgresql://me:canary@host/db"},
        {"X": "-----BEGIN RSA PRIVATE KEY-----\ncanary"},
    ],
)
def test_a_secret_in_env_is_refused_and_not_repeated(
    session: Session, ledger: Any, env: dict[str, str]
) -> None:
    """With where it belongs; `env` is stored in plain text."""
    [name] = env
    with pytest.raises(InvalidParameterError, match=f"`ow env set {name}`, then pass secrets=") as caught:
        Script(session).create(env=env)
    assert "canary" not in str(caught.value).lower().removeprefix(name)
    assert ledger.calls == []


def test_plain_variables_pass(session: Session) -> None:
    """Also those whose names only look a little like a secret's."""
    env = {
        "TOKENIZERS_PARALLELISM": "false",
        "MAX_TOKENS": "512",
        "PAD_TOKEN_ID": "0",
        "GOOGLE_APPLICATION_CREDENTIALS": "credentials.json",
        "HF_HOME": "/cache/hf_home_of_everybody",
        "MONKEY": "sk-learn-random-forest",
        "URL": "http://host:8080/path@v1",
        "KEY": "value",
    }
    job = Script(session).create(env=env)
    assert stored(session, job.id)["env"] == env


def test_one_variable_has_one_source(session: Session) -> None:
    Secrets(session).set("MODE", VALUE)
    with pytest.raises(InvalidParameterError, match="MODE: both in `env` and in `secrets`"):
        Script(session).create(env={"MODE": "fast"}, secrets=["MODE"])


def test_a_pod_gets_what_its_job_names_while_it_runs(session: Session, pod: Any) -> None:
    """Not the organization's others, not another job's, and nothing before or after."""
    Secrets(session).set("HF_TOKEN", VALUE)
    Secrets(session).set("OTHER", "canary of another job")
    job, other = Script(session).create(secrets=["HF_TOKEN"]), Script(session).create(a=2, secrets=["OTHER"])
    run = pod.open(job)
    boot = pod.boot
    get = {"for_run": run, "as_boot": boot}
    rows = pod.ledger.call("job_secrets", **get)
    assert [row["name"] for row in rows] == ["HF_TOKEN"]
    this_pod = pod.ledger.pod(f"w-{run[:8]}")
    assert this_pod.call("job_secrets", for_run=run, as_boot=str(uuid.uuid4())) == []
    with pytest.raises(PermissionDeniedError):
        session.ledger.call("job_secrets", **get)
    other_run = pod.open(other)
    assert pod.ledger.call("job_secrets", for_run=other_run, as_boot=boot) == []
    pod.boot, pod.run_id = boot, run
    pod.finish()
    assert pod.ledger.call("job_secrets", **get) == []
