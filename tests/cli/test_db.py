"""`ow db`: backups that can be restored, and checks that find damage, on a real PostgreSQL."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner, Result
from psycopg import sql

from openweights_prefect.cli.main import main
from openweights_prefect.client import OpenWeights
from openweights_prefect.ledger import backup, migrator
from openweights_prefect.ledger.embedded import EmbeddedPostgres
from openweights_prefect.resources.job import Job
from tests.callers import Callers
from tests.sdk.conftest import Pod


@pytest.fixture
def home(tmp_path: Path, ledger_url: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The ledger as its owner sees it, with a finished job, a running one, and files."""
    for name in [name for name in os.environ if name.startswith(("OW_", "OPENWEIGHTS_", "SUPABASE_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("OW_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("OW_DATABASE_URL", ledger_url)
    with OpenWeights() as client:
        callers = Callers(ledger_url)
        first = work(client, callers, "first")
        first.finish()
        work(client, callers, "second")
        source = tmp_path / "data.bin"
        source.write_bytes(b"\x00content")
        client.files.upload(source, "custom_job_file")
        callers.close()
    monkeypatch.setenv("OW_DATABASE_URL", owner(ledger_url))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def work(client: OpenWeights, callers: Callers, name: str) -> Pod:
    """A job whose run has logged a few lines and events."""
    row = {"id": f"addition-{name}", "type": "addition", "docker_image": "i", "entrypoint": "true"}
    client._session.ledger.call("submit_job", job=row)
    pod = Pod(callers)
    job: Job = client.jobs.retrieve(row["id"])
    pod.open(job)
    pod.log({"step": 1}, {"step": 2}, {"step": 3})
    pod.print("one\n")
    pod.print("two\n")
    return pod


def owner(url: str) -> str:
    return url.replace("authenticator@", "postgres@")


@pytest.fixture
def empty_url(postgres: EmbeddedPostgres) -> Iterator[str]:
    """A database without anything."""
    name, server = f"empty_{os.getpid()}", postgres.url(database="postgres")
    migrator.ensure_database(server, name)
    yield postgres.url(database=name)
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))


def ow(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def checks(*arguments: str) -> dict[str, Any]:
    result = ow("db", "verify", *arguments, "--json")
    document = json.loads(result.stdout)
    assert result.exit_code == (0 if document["ok"] else 1)
    return {check["name"]: check for check in document["checks"]}


def rows(url: str) -> dict[str, list[Any]]:
    with psycopg.connect(url) as connection:
        tables = connection.execute("select tablename from pg_tables where schemaname = 'ledger'").fetchall()
        return {
            table: connection.execute(
                sql.SQL("select to_jsonb(t) from ledger.{} t order by 1").format(sql.Identifier(table))
            ).fetchall()
            for (table,) in tables
        }


def test_a_backup_is_restored(
    home: Path, ledger_url: str, empty_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every row comes back as it was, nothing else, and new ones go on from there."""
    made = json.loads(ow("db", "backup", "ledger.dump", "--json").stdout)
    path = Path("ledger.dump")
    assert (made["path"], made["bytes"]) == ("ledger.dump", path.stat().st_size)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [each.name for each in Path().iterdir() if "unfinished" in each.name] == []

    monkeypatch.setenv("OW_DATABASE_URL", empty_url)
    result = ow("db", "restore", "ledger.dump")
    assert result.exit_code == 0, result.output
    assert rows(empty_url) == rows(owner(ledger_url))
    assert all(check["ok"] for check in checks("--deep").values())
    again = ow("db", "restore", "ledger.dump")
    assert again.exit_code == 1
    assert "not empty" in again.stderr
    with psycopg.connect(empty_url) as connection:  # Numbers that the database gives go on.
        connection.execute("update ledger.organizations set name = 'restored'")
        connection.execute(
            "insert into ledger.audit_log (organization_id, actor, action, subject) "
            "select id, '{}', 'test', '' from ledger.organizations"
        )


def test_a_backup_replaces_nothing(home: Path) -> None:
    """A file that is there stays as it is."""
    Path("ledger.dump").write_text("mine")
    result = ow("db", "backup", "ledger.dump")
    assert result.exit_code == 1
    assert "exists already" in result.stderr
    assert Path("ledger.dump").read_text() == "mine"


def test_what_is_no_backup_is_refused(home: Path, empty_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text, half a backup, and nothing: each is named, and the ledger stays as it was."""
    ow("db", "backup", "ledger.dump")
    Path("half.dump").write_bytes(Path("ledger.dump").read_bytes()[:2000])
    Path("text.dump").write_text("select 1;")
    monkeypatch.setenv("OW_DATABASE_URL", empty_url)
    for name in ("half.dump", "text.dump", "missing.dump"):
        result = ow("db", "restore", name)
        assert result.exit_code == 1, name
        assert repr(name) in result.stderr or "pg_restore" in result.stderr
    with psycopg.connect(empty_url) as connection:
        held = connection.execute("select to_regclass('ledger.jobs')").fetchone()
        if held and held[0]:
            assert connection.execute("select count(*) from ledger.jobs").fetchone() == (0,)


def test_a_backup_of_another_version_is_refused(
    home: Path, ledger_url: str, empty_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of other tables than ours are not brought in."""
    with psycopg.connect(owner(ledger_url)) as connection:
        connection.execute(
            "insert into supabase_migrations.schema_migrations (version, name) values ('20990101000000', 'x')"
        )
    ow("db", "backup", "ledger.dump")
    monkeypatch.setenv("OW_DATABASE_URL", empty_url)
    result = ow("db", "restore", "ledger.dump")
    assert result.exit_code == 1
    assert "20990101000000" in result.stderr


def test_without_pg_dump_the_error_says_how_to_get_it(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Missing, and older than the server: both name the versions."""
    monkeypatch.setattr(backup, "candidate_folders", lambda: iter([tmp_path]))
    assert "none was found" in ow("db", "backup", "x.dump").stderr
    old = tmp_path / "old"
    old.mkdir()
    for name in ("pg_dump", "pg_restore"):
        (old / name).write_text("#!/bin/sh\necho 'pg_dump (PostgreSQL) 12.1'\n")
        (old / name).chmod(0o755)
    monkeypatch.setattr(backup, "candidate_folders", lambda: iter([old]))
    result = ow("db", "backup", "x.dump")
    assert result.exit_code == 1
    assert "only that of PostgreSQL 12 was found" in result.stderr
    assert not Path("x.dump").exists()


def test_the_password_is_in_no_argument(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other users of the machine see the command line of `pg_dump`."""
    seen: list[list[str]] = []
    real = subprocess.run

    def run(command: list[Any], **options: Any) -> Any:
        seen.append([str(part) for part in command])
        return real(command, **options)

    monkeypatch.setattr("openweights_prefect.ledger.backup.subprocess.run", run)
    url = os.environ["OW_DATABASE_URL"].replace("postgres@", "postgres:hidden%20word@")
    monkeypatch.setenv("OW_DATABASE_URL", url)
    assert ow("db", "backup", "x.dump").exit_code == 0
    assert any("pg_dump" in command[0] for command in seen)
    assert "hidden" not in json.dumps(seen)


def test_a_whole_ledger_passes(home: Path) -> None:
    """Every check is ok, and says what it looked at."""
    found = checks("--deep")
    assert list(found) == [
        "migrations", "row security", "policies", "tenancy", "events", "logs", "jobs", "pods", "files",
    ]  # fmt: skip
    assert all(check["ok"] for check in found.values()), found
    assert found["files"]["detail"] == "1 are in the store with the right content"


DAMAGE = {
    "row security": "alter table ledger.jobs no force row level security",
    "policies": "grant select on ledger.jobs to anon",
    "tenancy": "delete from ledger.members",
    "events": "delete from ledger.events where sequence = 1",
    "logs": "delete from ledger.log_chunks where start_offset = 0",
    "jobs": "update ledger.jobs set status = 'completed', finished_at = now() where id = 'addition-second'",
    "pods": "update ledger.worker set run_id = null where run_id is not null",
    "files": "insert into ledger.files (organization_id, id, purpose, filename, bytes, sha256) "
    "select id, 'result:file-0123456789ab', 'result', 'f', 1, repeat('0', 64) from ledger.organizations",
}
MORE_DAMAGE = [
    ("policies", "grant insert on ledger.files to public"),
    ("policies", "create policy open on ledger.files for select to authenticated using (true)"),
    ("events", "delete from ledger.events where sequence = 2"),
    ("events", "delete from ledger.events where sequence = 0"),
    ("events", "update ledger.runs set next_sequence = 9"),
    ("logs", "update ledger.runs set log_bytes = log_bytes + 1"),
    ("logs", "update ledger.log_chunks set end_offset = end_offset - 1 where start_offset = 0"),
    ("jobs", "update ledger.runs set status = 'lost', finished_at = now() where status = 'in_progress'"),
    ("jobs", "update ledger.jobs set finished_at = null where status = 'completed'"),
    ("jobs", "update ledger.jobs set attempt = attempt + 1 where status = 'in_progress'"),
    ("pods", "update ledger.pod_intervals set ended_at = now()"),
    ("migrations", "delete from supabase_migrations.schema_migrations where version like '%21'"),
]


@pytest.mark.parametrize(("name", "damage"), [*DAMAGE.items(), *MORE_DAMAGE])
def test_damage_is_found(home: Path, ledger_url: str, name: str, damage: str) -> None:
    """The check that looks for it fails, and says how to mend it; `ow db verify` exits with 1."""
    with psycopg.connect(owner(ledger_url)) as connection:
        connection.execute("set session_replication_role = replica")
        assert connection.execute(damage.encode()).rowcount != 0
    found = checks()
    assert not found[name]["ok"]
    assert found[name]["mend"]
    assert found[name]["detail"] in ow("db", "verify").stdout


def test_damaged_content_is_found_by_hashing(home: Path) -> None:
    """A blob of the right length and the wrong bytes; one that is gone is found without `--deep`."""
    [blob] = [path for path in (home / "files").rglob("file-*") if path.is_file()]
    blob.chmod(0o600)
    blob.write_bytes(b"\x00CONTENT")
    assert checks()["files"]["ok"]
    assert "other content" in checks("--deep")["files"]["detail"]
    blob.unlink()
    assert "not in the store" in checks()["files"]["detail"]


def test_a_login_that_sees_not_every_row_is_refused(
    home: Path, ledger_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A check that saw a part only would say that all is well."""
    monkeypatch.setenv("OW_DATABASE_URL", ledger_url)
    done = subprocess.run(
        [sys.executable, "-m", "openweights_prefect.cli", "db", "verify"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "Error: " in done.stderr
