"""From sign-up to sign-out at the command line, over HTTP."""

from __future__ import annotations

import json
import os
import pty
import select
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from openweights_prefect.cli.main import main
from openweights_prefect.client import OpenWeights
from openweights_prefect.errors import (
    AuthenticationError,
    ConfigurationError,
    OpenWeightsError,
    PermissionDeniedError,
)
from openweights_prefect.settings import LOCAL_ORGANIZATION_ID, Settings
from openweights_prefect.stack.addresses import running_settings
from tests.supabase_double import SupabaseDouble

PASSWORD = "correct horse battery staple"
ADA, BOB = "ada@example.org", "bob@example.org"


@pytest.fixture
def transport() -> str:
    return "supabase"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    prefixes = ("OW_", "OPENWEIGHTS_", "PREFECT_", "RUNPOD_", "SUPABASE_")
    for name in [name for name in os.environ if name.startswith(prefixes)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("OW_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def project(home: Path, supabase: SupabaseDouble) -> list[str]:
    """How to say where to sign in."""
    return ["--url", supabase.url, "--key", supabase.key]


def ow(*arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(main, arguments, input=stdin)


def done(*arguments: str, stdin: str | None = None) -> Result:
    result = ow(*arguments, stdin=stdin)
    assert result.exit_code == 0, result.output
    return result


def answer(*arguments: str, stdin: str | None = None) -> Any:
    return json.loads(done(*arguments, "--json", stdin=stdin).stdout)


def credentials(home: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((home / "credentials.json").read_text())
    return document


def sign_up(project: list[str], email: str = ADA) -> Any:
    return answer("signup", email, *project, "--password-stdin", stdin=f"{PASSWORD}\n")


def test_from_sign_up_to_sign_out(home: Path, project: list[str], supabase: SupabaseDouble) -> None:
    """Signed up, a machine works with a token of its own, makes others, and leaves nothing behind."""
    first = sign_up(project)
    assert (first["email"], first["role"], first["secret_storage"]) == (ADA, "admin", "vault")
    token = credentials(home)["api_key"]
    for name in ("credentials.json", "session.json"):
        assert stat.S_IMODE((home / name).stat().st_mode) == 0o600

    me = answer("whoami")
    assert (me["organization_id"], me["token_id"]) == (first["organization_id"], first["token_id"])
    assert (me["ledger"], me["ledger_from"], me["identity_from"]) == (
        supabase.url, "`ow login`", "`ow login`",
    )  # fmt: skip
    assert token not in done("whoami").output

    made = answer("token", "create", "ci")
    with OpenWeights(auth_token=made["token"]) as client:
        assert client.organization_id == first["organization_id"]
        assert client.jobs.list() == []
        assert client.organization.info()["role"] == "user"
        done("token", "revoke", made["prefix"])
        with pytest.raises(AuthenticationError):
            client.organization.info()
        with pytest.raises(AuthenticationError):
            client.jobs.cancel("ftjob-000000000000")

    assert "token revoked" in done("logout").stdout
    assert sorted(path.name for path in home.iterdir() if path.suffix == ".json") == []
    with pytest.raises(AuthenticationError):
        OpenWeights(auth_token=token, supabase_url=supabase.url, supabase_key=supabase.key)
    assert done("logout").stdout == "Nobody is signed in here.\n"


def test_a_job_is_submitted_over_http(home: Path, project: list[str], tmp_path: Path) -> None:
    """A fine-tune with its file goes to the project, and is the same job the second time."""
    sign_up(project)
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}
    data = tmp_path / "train.jsonl"
    data.write_text(json.dumps(row) + "\n")
    with OpenWeights() as client:
        file = client.files.upload(data, "conversations")["id"]
        job = client.fine_tuning.create(model="org/model", training_file=file, loss="sft")
        assert client.fine_tuning.create(model="org/model", training_file=file, loss="sft").id == job.id
    assert [row["id"] for row in answer("ls")] == [job.id]


def test_signing_in_again_replaces_the_token(home: Path, project: list[str]) -> None:
    """One machine has one token of `ow login`; the one before is revoked."""
    before = sign_up(project)["token_id"]
    after = answer("login", *project, "--email", ADA, "--password-stdin", stdin=PASSWORD)["token_id"]
    states = {held["id"]: held["state"] for held in answer("token", "ls", "--all")}
    assert states == {before: "revoked", after: "active"}
    assert [held["id"] for held in answer("token", "ls")] == [after]


def test_a_wrong_password_changes_nothing(home: Path, project: list[str]) -> None:
    """The error is one line without the password, and the login before stays."""
    sign_up(project)
    before = credentials(home)
    result = ow("login", *project, "--email", ADA, "--password-stdin", stdin="wrong password\n")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: Cannot sign in")
    assert "wrong password" not in result.output
    assert credentials(home) == before


def test_a_given_token_is_used_and_not_revoked(home: Path, project: list[str]) -> None:
    """`ow login --token` reads it from stdin; `ow logout` forgets it and leaves it valid.

    What a person makes with `ow token create` is not ended by the person's logout.
    """
    sign_up(project)
    token = done("token", "create", "shared").stdout.strip()
    done("logout")
    me = answer("login", *project, "--token", stdin=f"{token}\n")
    assert (me["token_name"], me["role"]) == ("shared", "user")
    assert token not in done("whoami").output
    assert "its token stays valid" in done("logout").stdout
    assert answer("login", *project, "--token", stdin=token)["token_name"] == "shared"


def test_a_logout_that_cannot_revoke_keeps_the_login(
    home: Path, project: list[str], supabase: SupabaseDouble
) -> None:
    """Nobody believes a token to be dead that lives; `--force` forgets it, and says so."""
    sign_up(project)
    document = {**credentials(home), "supabase_url": "http://127.0.0.1:9"}
    (home / "credentials.json").write_text(json.dumps(document))
    forced = ow("logout", "--force")
    assert forced.exit_code == 0
    assert "Warning: the token was not revoked" in forced.stderr
    assert not (home / "credentials.json").exists()


def test_organizations_of_a_person(home: Path, project: list[str]) -> None:
    """Found one, invite somebody into it, switch; the token of a machine is of one organization."""
    first = sign_up(project)["organization_id"]
    second = answer("org", "create", "Second")["id"]
    assert {each["name"]: each["current"] for each in answer("org", "ls")} == {ADA: True, "Second": False}
    assert answer("org", "switch", "Second")["id"] == second
    assert answer("whoami")["organization_id"] == second
    assert ow("org", "switch", "Third").exit_code == 1
    code = done("org", "invite", BOB).stdout.strip()

    sign_up(project, BOB)
    assert answer("whoami")["email"] == BOB
    assert ow("org", "join", code).exit_code == 2
    assert answer("org", "join", "-", stdin=code)["name"] == "Second"
    assert ow("org", "join", "-", stdin="owi_" + "x" * 43).exit_code == 1
    done("org", "switch", second)
    assert {each["email"]: each["role"] for each in answer("org", "members")} == {ADA: "admin", BOB: "user"}
    assert ow("org", "role", BOB, "admin").exit_code == 1
    assert ow("org", "remove", ADA).exit_code == 1
    assert first not in [each["id"] for each in answer("org", "ls")]


def test_doctor_looks_at_what_is_the_users(home: Path, project: list[str]) -> None:
    """The hosted ledger and its files; the machines behind it are others' to look after."""
    sign_up(project)
    checks = answer("doctor")["checks"]
    assert [check["name"] for check in checks] == ["settings", "python", "disk", "ledger", "file store"]
    assert "from `ow login`" in checks[0]["detail"]
    done("token", "revoke", credentials(home)["api_key"])
    result = ow("doctor")
    assert result.exit_code == 1
    assert "refused" in result.stdout


def test_a_token_of_the_environment_goes_before_the_login(
    home: Path, project: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The project is the login's, the identity the environment's, and `ow whoami` says so."""
    sign_up(project)
    token = done("token", "create", "ci").stdout.strip()
    monkeypatch.setenv("OPENWEIGHTS_API_KEY", token)
    me = answer("whoami")
    assert (me["token_name"], me["identity_from"]) == ("ci", "OPENWEIGHTS_API_KEY")
    assert me["ledger_from"] == "`ow login`"
    assert "OPENWEIGHTS_API_KEY is set" in ow("org", "switch", "x").stderr
    with OpenWeights() as client, pytest.raises(PermissionDeniedError):
        client.organization.create("a token founds nothing")


def test_a_token_is_shown_to_its_own_project_only(
    home: Path, project: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the environment or the caller names another ledger, the login counts for nothing."""
    sign_up(project)
    stack = {
        "database_url": "postgresql://x@/y",
        "organization_id": LOCAL_ORGANIZATION_ID,
        "job_python": "py",
    }
    (home / "stack.json").write_text(json.dumps(stack))
    signed_in = Settings.load()
    assert (signed_in.database_url, signed_in.job_python) == ("", "py")
    with pytest.raises(ConfigurationError, match="needs a token"):
        OpenWeights(supabase_url="https://other.example", supabase_key="k")
    monkeypatch.setenv("OW_DATABASE_URL", "postgresql://a@/b")
    assert (Settings.load().api_key, Settings.load().supabase_url) == ("", "")
    monkeypatch.delenv("OW_DATABASE_URL")
    # The services of a local stack serve that stack.
    local = running_settings(os.environ)
    assert (local.api_key, local.supabase_url, local.database_url) == ("", "", "postgresql://x@/y")


@pytest.mark.parametrize("url", ["http://ledger.example", "ftp://x", "ledger.example", "https://u:p@x"])
def test_secrets_go_nowhere_unencrypted(home: Path, url: str) -> None:
    """A password is not even asked for where it would be sent in plain text."""
    result = ow("login", "--url", url, "--key", "k", "--email", ADA, "--password-stdin", stdin=PASSWORD)
    assert result.exit_code == 1
    assert "SUPABASE_URL" in result.stderr
    assert not (home / "credentials.json").exists()


def test_a_damaged_login_says_what_to_do(home: Path) -> None:
    """Without quoting the file."""
    home.mkdir()
    (home / "credentials.json").write_text('{"api_key": "ow_secret')
    result = ow("whoami")
    assert result.exit_code == 1
    assert "ow login" in result.stderr
    assert "ow_secret" not in result.output


def test_an_outage_is_no_refusal(home: Path, project: list[str]) -> None:
    """A project that does not answer is said to be unavailable, within a bounded time."""
    started = time.monotonic()
    with pytest.raises(OpenWeightsError, match="did not answer"):
        OpenWeights(auth_token="ow_" + "x" * 43, supabase_url="http://127.0.0.1:9", supabase_key="k")
    assert time.monotonic() - started < 40


def test_a_password_is_typed_without_echo(home: Path, project: list[str]) -> None:
    """On a terminal the password is asked for, and does not appear on it."""
    sign_up(project)
    done("logout")
    command = [sys.executable, "-m", "openweights_prefect.cli", "login", *project, "--email", ADA]
    terminal, inner = pty.openpty()
    process = subprocess.Popen(command, stdin=inner, stdout=inner, stderr=inner, start_new_session=True)
    os.close(inner)
    screen = b""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and (process.poll() is None or select.select([terminal], [], [], 0)[0]):
        if select.select([terminal], [], [], 0.1)[0]:
            try:
                screen += os.read(terminal, 4096)
            except OSError:
                break
        if screen.endswith(b"Password: "):
            os.write(terminal, PASSWORD.encode() + b"\n")
            screen += b"\n"
    assert process.wait(10) == 0, screen
    os.close(terminal)
    assert PASSWORD.encode() not in screen
    assert b"Signed in to" in screen
