"""Computes on every card: `PYTHON -I gpu_probe.py`, in the job environment. Prints one JSON object.

`{"torch": false}` without PyTorch, else `{"torch": true, "cards": n, "wrong": [[card, why], ...]}`.
"""

from __future__ import annotations

import json

_SIZE = 2048


def main() -> None:
    """Multiply matrices whose product is exact in every number format, and compare."""
    try:
        import torch  # the interpreter may have none, which is an answer
    except ImportError:
        print(json.dumps({"torch": False}))
        return
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    wrong: list[tuple[int, str]] = []
    for card in range(cards):
        try:
            half = torch.full((_SIZE, _SIZE), 0.5, device=f"cuda:{card}", dtype=torch.float16)
            product = (half @ half).float()
            if not bool((product == _SIZE / 4).all()):
                wrong.append((card, "a matrix product is wrong"))
        except RuntimeError as exc:
            wrong.append((card, str(exc).splitlines()[0]))
    print(json.dumps({"torch": True, "cards": cards, "wrong": wrong}))


if __name__ == "__main__":
    main()
