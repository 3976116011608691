"""Names of secrets, and plain variables that hold what should be one."""

from __future__ import annotations

import re
from collections.abc import Sequence

from openweights_prefect.errors import InvalidParameterError

SECRET_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,99}")
OWN_VARIABLES = re.compile(r"OW_.*|OPENWEIGHTS_.*|N_GPUS|PATH|PYTHONPATH")
"""What the pod sets in a job's environment."""

_WORDS = {"TOKEN", "SECRET", "SECRETS", "PASSWORD", "PASSWD", "CREDENTIAL", "CREDENTIALS", "APIKEY"}
# They hold a word of the above, and a path or a number.
_HARMLESS_NAMES = {"GOOGLE_APPLICATION_CREDENTIALS"}
_HARMLESS_VALUE = re.compile(r"|true|false|yes|no|on|off|none|-?\d{1,10}(\.\d+)?", re.IGNORECASE)
_SHAPES = re.compile(
    r"""
    \bhf_[A-Za-z0-9]{16,}                      # Hugging Face
    | \bsk-(?=[\w-]*\d)[\w-]{16,}              # OpenAI, Anthropic and others
    | \bow[bip]?_[\w-]{32,}                    # ours
    | \brpa_\w{16,}                            # RunPod
    | \bgh[opsur]_[A-Za-z0-9]{16,} | \bgithub_pat_\w{16,} | \bglpat-[\w-]{16,}
    | \b(AKIA|ASIA)[0-9A-Z]{16}\b              # AWS
    | \bpn[ubd]_[A-Za-z0-9]{16,}               # Prefect Cloud
    | \bsb(p|_secret)_[\w-]{16,}               # Supabase
    | \bAIza[\w-]{30,}                         # Google
    | \bxox[abeprs]-[\w-]{10,}                 # Slack
    | \beyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]*     # JWT
    | -----BEGIN[ A-Z]*PRIVATE[ ]KEY-----
    | ://[^/\s:@]*:[^/\s@]+@                   # a password in a URL
    """,
    re.VERBOSE,
)


def unknown_secrets(names: Sequence[str]) -> InvalidParameterError:
    """The error for a job that names secrets which its organization does not have."""
    mends = ", ".join(f"`ow env set {name}`" for name in names)
    return InvalidParameterError(
        f"The organization has no secret {', '.join(map(repr, names))}. Store it with {mends}, or correct "
        "`secrets`; `ow env show` lists the names."
    )


def looks_secret(name: str, value: str) -> bool:
    """Whether a variable's name or value is like that of a secret.

    `MAX_TOKENS` and `TOKENIZERS_PARALLELISM` are not, nor is a name like `PAD_TOKEN_ID` with a number.
    """
    if _SHAPES.search(value):
        return True
    if name.upper() in _HARMLESS_NAMES or _HARMLESS_VALUE.fullmatch(value):
        return False
    words = name.upper().split("_")
    return not _WORDS.isdisjoint(words) or (len(words) > 1 and words[-1] in ("KEY", "KEYS"))
