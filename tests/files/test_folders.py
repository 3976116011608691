from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from openweights_prefect.errors import InvalidParameterError
from openweights_prefect.files.folders import walk_folder


def make(folder: Path, files: dict[str, str] | list[str]) -> Path:
    contents = files if isinstance(files, dict) else dict.fromkeys(files, "x")
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


def targets(folder: Path) -> list[str]:
    return [file.target for file in walk_folder(folder).files]


def skipped(folder: Path) -> dict[str, str]:
    return {entry.target: entry.reason for entry in walk_folder(folder).skipped}


def test_targets_and_paths(tmp_path: Path) -> None:
    """Every file is listed by its target with `/`, in the order of the targets, however they were made."""
    names = ["b/c.py", "a.py", "b-c.py", "b/a/z.py", "B.py", ".hidden"]
    random.shuffle(names)
    listing = walk_folder(make(tmp_path, names))
    assert [file.target for file in listing.files] == sorted(names)
    assert all(file.path == tmp_path.resolve() / file.target for file in listing.files)
    assert listing.skipped == []


def test_secrets_and_caches_are_never_listed(tmp_path: Path) -> None:
    """Not even an ignore file can bring them back."""
    names = [
        ".env",
        ".env.production",
        "sub/.ENV",
        ".git/config",
        "__pycache__/a.pyc",
        "a.pyc",
        ".venv/x",
        ".DS_Store",
    ]
    make(tmp_path, [*names, "environment.py", "my_env/pyvenv.cfg"])
    make(tmp_path, {".owignore": "!.env\n!.git\n"})
    assert targets(tmp_path) == ["environment.py"]
    reasons = skipped(tmp_path)
    assert reasons[".env"] == reasons["sub/.ENV"] == "may hold secrets"
    assert reasons["my_env/"] == reasons[".venv/"] == "virtual environment"
    assert reasons[".owignore"] == "ignore file"


NEVER_MOUNTED = [
    ".env", ".env.local", ".git/config", ".hg/store", ".svn/entries", ".venv/pyvenv.cfg", "__pycache__/a.pyc",
    "a.pyc", ".cache/a", ".mypy_cache/a", ".pytest_cache/a", ".ruff_cache/a", ".hypothesis/a",
    ".ipynb_checkpoints/a", ".nox/a", ".tox/a", "node_modules/a", ".DS_Store", "Thumbs.db",
    ".gitignore", ".owignore",
]  # fmt: skip


@pytest.mark.parametrize("name", [*NEVER_MOUNTED, *(f"deep/er/{name}" for name in NEVER_MOUNTED)])
def test_each_name_that_is_never_mounted(tmp_path: Path, name: str) -> None:
    """At any depth, in other letters too, by itself and through a link; the listing says what it left out."""
    make(tmp_path, {"kept": "x", name: "\n"})
    assert targets(tmp_path) == ["kept"]
    assert [entry.rstrip("/") for entry in skipped(tmp_path)] in ([name], [str(Path(name).parent)])
    make(tmp_path / "upper", {"kept": "x", name.upper(): "\n"})
    assert targets(tmp_path / "upper") == ["kept"]
    (tmp_path / "link").symlink_to(name)
    assert targets(tmp_path) == ["kept", "upper/kept"]


def test_what_is_left_out_is_told(tmp_path: Path) -> None:
    """Secrets and what ignore files name are told, a few by name; nobody misses a cache."""
    make(tmp_path, [".env", "data/a", "__pycache__/a", ".git/a", *(f"{number}.log" for number in range(5))])
    assert walk_folder(tmp_path).left_out() == "'.env' (may hold secrets)"
    make(tmp_path, {".gitignore": "data/\n", ".owignore": "*.log\n"})
    assert walk_folder(tmp_path).left_out() == (
        "'.env' (may hold secrets), '0.log' (ignored by .owignore), '1.log' (ignored by .owignore), "
        "'2.log' (ignored by .owignore), '3.log' (ignored by .owignore), and 2 more"
    )
    assert walk_folder(tmp_path / "data").left_out() == ""


def test_ignore_files(tmp_path: Path) -> None:
    """Git's rules hold: anchors, negation, deeper files win; `.owignore` wins over `.gitignore`."""
    make(
        tmp_path,
        ["a.log", "keep.log", "model.bin", "out/x", "sub/out/x", "sub/b.log", "sub/c.tmp", "deep/er/y"],
    )
    make(tmp_path, {".gitignore": "*.log\n!keep.log\n/out/\n*.bin\ndeep/*\n", ".owignore": "!*.bin\n*.tmp\n"})
    make(tmp_path, {"sub/.gitignore": "!b.log\n"})
    assert targets(tmp_path) == ["keep.log", "model.bin", "sub/b.log", "sub/out/x"]
    reasons = skipped(tmp_path)
    assert reasons["a.log"] == reasons["out/"] == "ignored by .gitignore"
    assert reasons["sub/c.tmp"] == "ignored by .owignore"


def test_allowed_folder_does_not_allow_its_content(tmp_path: Path) -> None:
    """`!logs/` is about the folder; what other patterns ignore in it stays ignored, as in Git."""
    make(tmp_path, {"logs/a.log": "x", "logs/b": "x", "logs/build/c": "x", "a/a": "x"})
    make(tmp_path, {".gitignore": "*.log\nbuild/\na\n!logs/\n!/a/\n"})
    assert targets(tmp_path) == ["logs/b"]


def test_double_star_is_about_the_content(tmp_path: Path) -> None:
    """`data/**` leaves the folder itself open, so that a later pattern can keep one file of it."""
    make(tmp_path, {"data/a": "x", "data/keep": "x", "data/sub/b": "x", "src/c": "x"})
    make(tmp_path, {".gitignore": "data/**\n!data/keep\n/src\n!src/**\n"})
    assert targets(tmp_path) == ["data/keep"]


def test_star_ignores_all_but_what_is_named(tmp_path: Path) -> None:
    """The idiom of a list of what to keep works, for names of one letter too."""
    make(tmp_path, {"a": "x", "b/c": "x", "d/e": "x", "f.py": "x"})
    make(tmp_path, {".owignore": "*\n!*.py\n!b/\n!b/**\n"})
    assert targets(tmp_path) == ["b/c", "f.py"]


def test_ignore_files_above_do_not_count(tmp_path: Path) -> None:
    """A folder that its repository ignores can be mounted by name."""
    make(tmp_path, {".gitignore": "outputs/\n", "outputs/a": "x"})
    assert targets(tmp_path / "outputs") == ["a"]


def test_links_inside_are_followed(tmp_path: Path) -> None:
    """A link to a file or folder inside is listed under its own name; a secret is not reached by a link."""
    make(tmp_path, ["real/a", ".env"])
    (tmp_path / "file").symlink_to("real/a")
    (tmp_path / "folder").symlink_to("real")
    (tmp_path / "config").symlink_to(".env")
    assert targets(tmp_path) == ["file", "folder/a", "real/a"]
    assert skipped(tmp_path)["config"] == "may hold secrets"


@pytest.mark.parametrize(
    ("link", "message"),
    [("../outside/a", "outside of"), ("../outside", "outside of"), ("/etc/hostname", "outside of"),
    ("missing", "not exist"),
     ("link", "not exist|loop"), (".", "folder that it is in")],
)  # fmt: skip
def test_bad_links_are_errors_unless_ignored(tmp_path: Path, link: str, message: str) -> None:
    """A link out of the folder, to nothing or in a circle is named; naming it in `.owignore` helps."""
    make(tmp_path, ["outside/a", "folder/a"])
    (tmp_path / "folder" / "link").symlink_to(link)
    with pytest.raises(InvalidParameterError, match=message):
        walk_folder(tmp_path / "folder")
    make(tmp_path, {"folder/.owignore": "link\n"})
    assert targets(tmp_path / "folder") == ["a"]


def test_linked_folder_may_be_mounted(tmp_path: Path) -> None:
    """The mounted folder itself may be a link."""
    make(tmp_path, ["real/a"])
    (tmp_path / "link").symlink_to("real")
    assert targets(tmp_path / "link") == ["a"]


def test_special_files_are_skipped(tmp_path: Path) -> None:
    """A FIFO is not opened."""
    os.mkfifo(tmp_path / "fifo")
    assert skipped(tmp_path) == {"fifo": "not a regular file"}


@pytest.mark.parametrize("name", ["a\nb", "aux.py", "a\\b"])
def test_names_that_are_not_legal_everywhere(tmp_path: Path, name: str) -> None:
    """A name that a mount target cannot have is an error that names it."""
    make(tmp_path, [name])
    with pytest.raises(InvalidParameterError, match="is not allowed"):
        walk_folder(tmp_path)


def test_bad_sources(tmp_path: Path) -> None:
    """A missing folder, a file and a bad ignore pattern are errors that name the path."""
    make(tmp_path, {"file": "x", "sub/.gitignore": "!\n"})
    for name, message in {
        "missing": "does not exist",
        "file": "is a file",
        "sub": "Cannot use the ignore file",
    }.items():
        with pytest.raises(InvalidParameterError, match=message):
            walk_folder(tmp_path / name)


def test_empty_folder(tmp_path: Path) -> None:
    """An empty folder has an empty listing."""
    assert walk_folder(tmp_path) == ([], [])
