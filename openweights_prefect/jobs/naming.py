"""The name of a repository of Hugging Face, made from the template that a job was given."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass

from openweights_prefect.errors import InvalidParameterError

DEFAULT_TEMPLATE = "{org_id}/{model_name}-{job_id}"
"""Where a job pushes to that says only to whom."""

_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")
# The rules of the hub: word characters, `-` and `.`, neither of the two at an end of a part.
_PART = re.compile(r"(?=.{1,96}\Z)[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?")
_NOT_YOURS = frozenset({"datasets", "models", "unsloth", "None"})


@dataclass(frozen=True)
class RepositoryName:
    """A template like `{org_id}/{model_name}-{job_id}`, and the values of its other placeholders."""

    template: str
    values: Mapping[str, str]

    def of(self, job_id: str) -> str:
        """The name for a job; raises `InvalidParameterError` when it cannot be one."""
        name = _PLACEHOLDER.sub(
            lambda match: self._value(match[1], {"job_id": job_id, **self.values}), self.template
        )
        if problem := _problem(name):
            made = "" if name == self.template else f" (made of {self.template!r})"
            raise InvalidParameterError(f"finetuned_model_id={name!r}{made}: {problem}")
        return name

    def _value(self, placeholder: str, values: Mapping[str, str]) -> str:
        if placeholder in values:
            return values[placeholder]
        if placeholder == "org_id":
            raise InvalidParameterError(
                f"finetuned_model_id={self.template!r}: `{{org_id}}` needs `hf_org`, the user or "
                "organization of Hugging Face to push to."
            )
        near = difflib.get_close_matches(placeholder, values, n=1)
        mend = f"did you mean `{{{near[0]}}}`?" if near else f"known are {', '.join(sorted(values))}."
        raise InvalidParameterError(
            f"finetuned_model_id={self.template!r}: `{{{placeholder}}}` is unknown; {mend}"
        )


def _problem(name: str) -> str | None:
    owner, slash, rest = name.partition("/")
    if not slash or "/" in rest:
        return "is not a Hugging Face id. Write it as 'user/model'."
    for part in (owner, rest):
        if not _PART.fullmatch(part):
            return (
                f"{part!r} is not a Hugging Face name: 1 to 96 letters, digits, '_', '-' and '.', and none "
                "of the last two at its ends."
            )
    if "--" in name or ".." in name or name.endswith(".git"):
        return "is not a Hugging Face id: '--', '..' and '.git' at the end are not allowed."
    if owner in _NOT_YOURS:
        return f"{owner!r} is not an organization that you can push to. Use your own."
    return None
