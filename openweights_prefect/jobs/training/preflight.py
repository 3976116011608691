"""Looks at the data of a training before there is a GPU: a question on stdin, the answer on stdout, as JSON.

`python -m openweights_prefect.jobs.training.preflight` runs in a folder that is laid out as the job's, the
weights of the model left out. It reads the files with the code that training reads them with.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from typing import Any, TextIO


def main() -> None:
    """Answer and exit, whatever the libraries' threads still do."""
    question = json.load(sys.stdin)
    answers, sys.stdout = sys.stdout, sys.stderr  # Libraries print what they like.
    # Torch takes longer to import than all the rest takes, and tokenizers do without.
    sys.modules["torch"] = None  # type: ignore[assignment]
    from openweights_prefect.jobs.training.data_report import inspect

    patience = float(question["patience"])
    why = f"the tokenizer could not be loaded within {patience:g} s"
    reached = threading.Timer(patience, _answer, [answers, {"unreachable": why}])
    reached.daemon = True
    reached.start()
    _answer(answers, inspect(question, on_tokenizer=reached.cancel))


def _answer(stream: TextIO, answer: dict[str, Any]) -> None:
    json.dump(answer, stream)
    stream.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
