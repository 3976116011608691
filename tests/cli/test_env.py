"""`ow env`, `ow token` and `ow org` on a local installation: real PostgreSQL, nobody signed in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner, Result

from openweights_prefect.cli.dotenv import parse_dotenv
from openweights_prefect.cli.main import main
from openweights_prefect.errors import InvalidFileError
from openweights_prefect.settings import LOCAL_ORGANIZATION_ID

CANARY = "canary-4f1d9b"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, ledger_url: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    prefixes = ("OW_", "OPENWEIGHTS_", "SUPABASE_")
    for name in [name for name in os.environ if name.startswith(prefixes)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("OW_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("OW_DATABASE_URL", ledger_url)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def ow(*arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(main, arguments, input=stdin)


def done(*arguments: str, stdin: str | None = None) -> Result:
    result = ow(*arguments, stdin=stdin)
    assert result.exit_code == 0, result.output
    return result


def answer(*arguments: str, stdin: str | None = None) -> Any:
    return json.loads(done(*arguments, "--json", stdin=stdin).stdout)


def names() -> list[str]:
    return [held["name"] for held in answer("env", "ls")]


def test_secrets_of_a_file_are_stored(ledger_url: str) -> None:
    """`ow env import` stores all; values are shown by `ow env show` alone, and sealed in the database."""
    Path(".env").write_text(f"# tokens\nexport HF_TOKEN={CANARY}\nKEY='line 1\nline 2' # pem\n")
    assert CANARY not in done("env", "import", ".env").output
    assert names() == ["HF_TOKEN", "KEY"]
    assert CANARY not in done("env", "ls").output
    assert done("env", "show", "HF_TOKEN").stdout == f"{CANARY}\n"
    assert answer("env", "show", "KEY") == {"name": "KEY", "value": "line 1\nline 2"}
    with psycopg.connect(ledger_url.replace("authenticator@", "postgres@")) as connection:
        held = connection.execute("select to_jsonb(s)::text from ledger.organization_secrets s").fetchall()
    assert all("sealed:v1:" in row and CANARY not in row for (row,) in held)


def test_a_secret_is_set_from_stdin_or_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """One trailing newline is the shell's; a value in the arguments is refused, and not repeated."""
    done("env", "set", "A", "-", stdin=f"{CANARY}\n")
    assert done("env", "show", "A").stdout == f"{CANARY}\n"
    monkeypatch.setenv("FROM", "other")
    done("env", "set", "A", "--from-env", "FROM")
    assert done("env", "show", "A").stdout == "other\n"
    for arguments in (["A", CANARY], [f"A={CANARY}"], ["A", "--from-env", "NOT_SET"], ["A"]):
        result = ow("env", "set", *arguments)
        assert result.exit_code == 2, arguments
        assert CANARY not in result.output
    assert done("env", "show", "A").stdout == "other\n"


def test_secrets_are_removed_and_sealed_anew() -> None:
    """`ow env unset` names what is not there; `ow env rotate` keeps every value."""
    done("env", "import", "-", stdin="A=1\nB=2\n")
    assert answer("env", "rotate") == {"rotated": 2}
    assert done("env", "show", "B").stdout == "2\n"
    result = ow("env", "unset", "A", "NOPE")
    assert (result.exit_code, result.stdout) == (1, "Removed A\n")
    assert "'NOPE'" in result.stderr
    assert names() == ["B"]
    assert ow("env", "show", "A").exit_code == 1


def test_a_bad_file_is_refused_as_a_whole() -> None:
    """Every bad line is named, no value is, and nothing is stored."""
    Path("bad.env").write_text(f"GOOD=1\n{CANARY}\n1X={CANARY}\nA=${{B}}\nA=\nGOOD=2\nQ='{CANARY}\n")
    result = ow("env", "import", "bad.env")
    assert result.exit_code == 1
    for line in range(2, 8):
        assert f"line {line}: " in result.stderr
    assert CANARY not in result.output
    assert names() == []
    assert ow("env", "import", "missing.env").exit_code == 1


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("", {}),
        ("\ufeffA=1\r\n\r\n  # c\r\n B = 2 \r\n", {"A": "1", "B": "2"}),
        ("A=b#c d # e\nB=a=b==\n", {"A": "b#c d", "B": "a=b=="}),
        ('A="x\\ny\\t\\"\\$\\\\"', {"A": 'x\ny\t"$\\'}),
        ("A='x\\ny ${Z} \\' \"'", {"A": "x\\ny ${Z} ' \""}),
        ("A=\"1\n2\"\nexport\tB='3'#c", {"A": "1\n2", "B": "3"}),
        ("A=$B p@ss'word", {"A": "$B p@ss'word"}),
    ],
)
def test_dotenv_syntax(text: str, values: dict[str, str]) -> None:
    """As python-dotenv reads it, for what means the same to every reader."""
    assert parse_dotenv(text, source="x") == values


def test_many_bad_lines_are_counted() -> None:
    """Ten are named, the rest is a number."""
    with pytest.raises(InvalidFileError, match="and 5 more"):
        parse_dotenv("nope\n" * 15, source="x")


def test_tokens_of_a_local_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token is printed once, works through the environment, and is refused after it was revoked."""
    made = done("token", "create", "ci", "--expires-in", "1h", "--spend-limit", "5")
    token = made.stdout.strip()
    assert token.startswith("ow_")
    assert token not in made.stderr
    [held] = answer("token", "ls")
    assert (held["name"], held["role"], held["spend_limit_usd"]) == ("ci", "user", 5)
    assert token not in done("token", "ls").output
    done("token", "limit", held["prefix"], "7")
    with monkeypatch.context() as patch:
        patch.setenv("OPENWEIGHTS_API_KEY", token)
        me = answer("whoami")
        assert (me["token_name"], me["role"], me["local_person"]) == ("ci", "user", False)
        assert ow("env", "show", "A").exit_code == 1
        assert ow("token", "create", "more", "--role", "admin").exit_code == 1
    done("token", "revoke", held["prefix"])
    monkeypatch.setenv("OPENWEIGHTS_API_KEY", token)
    assert ow("whoami").exit_code == 1


def test_an_unknown_token_does_not_keep_the_others_from_it() -> None:
    """The exit code is 1, and the rest is revoked; of a pasted token only the beginning is shown."""
    first = answer("token", "create", "one")
    result = ow("token", "revoke", "ow_" + CANARY * 4, first["token"])
    assert result.exit_code == 1
    assert CANARY * 2 not in result.output
    assert result.stdout == f"{first['prefix']}: revoked\n"
    assert [held["state"] for held in answer("token", "ls", "--all")] == ["revoked"]


def test_organizations_of_a_local_installation(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Founded, entered by `switch`, and named by `ow whoami`; the environment counts more."""
    me = answer("whoami")
    assert (me["local_person"], me["role"], me["organization_id"]) == (True, "admin", LOCAL_ORGANIZATION_ID)
    assert me["ledger_from"] == "OW_DATABASE_URL"
    assert "local person" in done("whoami").stdout
    second = answer("org", "create", "Second")["id"]
    done("org", "switch", "Second")
    assert answer("whoami")["organization_id"] == second
    assert {each["name"]: each["current"] for each in answer("org", "ls")} == {"local": False, "Second": True}
    assert [each["role"] for each in answer("org", "members")] == ["admin"]
    assert done("org", "invite").stdout.startswith("owi_")
    monkeypatch.setenv("OW_ORGANIZATION_ID", LOCAL_ORGANIZATION_ID)
    assert answer("whoami")["organization_id"] == LOCAL_ORGANIZATION_ID
    assert "OW_ORGANIZATION_ID" in ow("org", "switch", "Second").stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["token", "create", "x", "--role", "root"],
        ["token", "create", "x", "--expires-in", "soon"],
        ["token", "limit", "x", "much"],
        ["org", "invite", "--expires-in", "never"],
        ["org", "join", "owi_in_the_arguments"],
        ["env", "set"],
        ["signup", "--url"],
    ],
)
def test_a_wrong_command_line_exits_with_2(arguments: list[str]) -> None:
    """And repeats no secret."""
    result = ow(*arguments)
    assert result.exit_code == 2
    assert "owi_in_the_arguments" not in result.output


def test_help_of_the_new_commands_needs_no_settings(home: Path) -> None:
    """`ow login --help` works where nothing is set up."""
    command = [sys.executable, "-m", "openweights_prefect.cli", "login", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "OPENWEIGHTS_PASSWORD" in result.stdout
