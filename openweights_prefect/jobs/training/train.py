"""Trains one model: `python -m openweights_prefect.jobs.training.train [KIND]` in a job folder.

`KIND` is `fine_tuning`, as without it, or `weighted_sft`. Reads `params.json` (the validated parameters,
plus `files`: file id -> path in the folder), trains, and leaves the result in `uploads/`. Only the packages
of the job environment are needed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from openweights_prefect.errors import OpenWeightsError
from openweights_prefect.jobs.training import launch

_MODULE = "openweights_prefect.jobs.training.train"
_KINDS = ("fine_tuning", "weighted_sft")


def main(arguments: Sequence[str]) -> int:
    """Train in the current folder; 1 and a last line that begins with `error:` when the user can mend it."""
    kind = arguments[0] if arguments else _KINDS[0]
    if kind not in _KINDS:
        launch.report_error(f"error: {kind!r} is no kind of training; there are {', '.join(_KINDS)}.")
        return 1
    processes = launch.process_count()
    if processes > 1:
        return launch.launch(_MODULE, [kind], processes=processes)
    if launch.rank() > 0:  # The first process speaks for all.
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - for as long as it lives

    # Read when they are imported: no bars in the log, no advice about ORPO.
    os.environ.update(TQDM_DISABLE="1", TRL_EXPERIMENTAL_SILENCE="1")
    # Unsloth has to come before Transformers, TRL and PEFT; and a launcher needs none of them.
    from openweights_prefect.jobs.training import unsloth_loading

    unsloth_loading.prepare()
    from openweights_prefect.jobs.training.job import train

    try:
        train(Path.cwd(), kind)
    except OpenWeightsError as exc:
        launch.report_error(f"error: {exc}")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
