"""What can be set, called and imported is documented, and what is documented exists."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

import openweights_prefect
from openweights_prefect.settings import Settings

ROOT = Path(openweights_prefect.__file__).parent.parent
DOCS = ROOT / "docs"
WRITTEN = (
    *(ROOT / name for name in ("README.md", "AGENTS.md", "CHANGELOG.md", "blocks/README.md")),
    *(
        DOCS / f"{name}.md"
        for name in ("checking", "images", "money-and-waiting", "organizations", "pods", "prefect")
    ),
    *(DOCS / f"{name}.md" for name in ("simulator", "supabase", "training")),
    *ROOT.glob("cookbook/**/*.md"),
)
# Besides the settings: what the scripts of blocks and the edge function read by themselves.
SCRIPTS = (*ROOT.glob("blocks/*.py"), *ROOT.glob("infrastructure/supabase/functions/**/*.ts"))
VARIABLES = {field.metadata["variable"] for field in dataclasses.fields(Settings)} | {
    name for path in SCRIPTS for name in re.findall(r"\bOW_[A-Z_]+\b", path.read_text(encoding="utf-8"))
}


def load_generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generator = load_generator()


@pytest.mark.parametrize("name", sorted(generator.pages()))
def test_the_reference_pages_are_those_of_the_code(name: str) -> None:
    """After a change of the code: `python docs/generate.py`."""
    page = DOCS / name
    assert page.exists(), "run `python docs/generate.py`"
    assert page.read_text(encoding="utf-8") == generator.pages()[name], "run `python docs/generate.py`"


def test_every_setting_is_documented() -> None:
    """With its variable and what it means."""
    page = (DOCS / "settings.md").read_text(encoding="utf-8")
    for field in dataclasses.fields(Settings):
        assert f"| `{field.metadata['variable']}` |" in page
        assert field.metadata["description"].endswith("."), field.name
        assert field.metadata["description"] in page


def test_every_command_is_documented() -> None:
    """With every option, each of which has a help text."""
    page = (DOCS / "cli.md").read_text(encoding="utf-8")
    for path, command in generator.commands():
        section = page.partition(f"## `{path}`\n")[2].partition("\n## ")[0]
        assert section, path
        for parameter in command.params:
            if parameter.param_type_name == "option":
                assert f"`{parameter.opts[0]}`" in section, (path, parameter.name)
                assert getattr(parameter, "help", None), (path, parameter.name)


def test_every_public_name_is_documented() -> None:
    """What `openweights_prefect` exports, and every public method of what a client has."""
    page = (DOCS / "sdk.md").read_text(encoding="utf-8")
    for name in openweights_prefect.__all__:
        assert re.search(rf"^(## |\| `){name}\b", page, re.MULTILINE), name
    for attribute, kind in generator.resources().items():
        for method in [
            name for name in vars(kind) if not name.startswith("_") and callable(vars(kind)[name])
        ]:
            assert f"### ow.{attribute}.{method}\n" in page
    assert "\n\n\n" not in page


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_written_pages_name_only_what_exists(page: Path) -> None:
    """Commands in code, variables of ours, and links to files of the repository."""
    text = page.read_text(encoding="utf-8")
    known = {path.split()[1] for path, _ in generator.commands()}
    code = "\n".join(re.findall(r"```.*?```|`[^`\n]+`", text, re.DOTALL))
    used = set(re.findall(r"(?:^|[`\s/])ow ([a-z]+)\b", code))
    assert used <= known, used - known
    named = set(re.findall(r"\bOW_[A-Z_]+\b", text))
    assert named <= VARIABLES, named - VARIABLES
    for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text):
        assert (page.parent / target).exists(), target
