"""`runpodctl` of a simulated pod: `remove pod ID`, `stop pod ID`, `get pod ID`; standard library alone."""

from __future__ import annotations

import json
import os
import sys
import urllib.error
import urllib.request
from typing import Any

_QUERIES = {
    "remove": "mutation { podTerminate(input: { podId: %s }) }",
    "stop": "mutation { podStop(input: { podId: %s }) { id desiredStatus } }",
    "get": "query { pod(input: { podId: %s }) { id name desiredStatus } }",
}


def main(arguments: list[str]) -> int:
    """Call the GraphQL API with the pod's own key, as the real program does."""
    base_url = os.environ.get("RUNPOD_API_BASE_URL") or arguments[0]
    verb, kind, pod_id = (*arguments[1:], "", "", "")[:3]
    if verb not in _QUERIES or kind != "pod" or not pod_id:
        print("usage: runpodctl remove|stop|get pod ID", file=sys.stderr)
        return 1
    answer = _ask(base_url, _QUERIES[verb] % json.dumps(pod_id))
    if answer.get("errors"):
        print(f"Error: {answer['errors'][0]['message']}", file=sys.stderr)
        return 1
    done = {"remove": "removed", "stop": "stopped"}
    print(f'pod "{pod_id}" {done[verb]}' if verb in done else json.dumps(answer["data"]["pod"]))
    return 0


def _ask(base_url: str, query: str) -> dict[str, Any]:
    headers = {
        "Content-Type": "application/json",
        "Authorization": f"Bearer {os.environ.get('RUNPOD_API_KEY', '')}",
        "User-Agent": "runpodctl/1.14.4",
    }
    request = urllib.request.Request(
        f"{base_url}/graphql", data=json.dumps({"query": query}).encode(), headers=headers
    )
    # A proxy of the environment is for the outside world.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=30) as response:
            answer: dict[str, Any] = json.load(response)
    except urllib.error.URLError as exc:
        return {"errors": [{"message": str(exc)}]}
    return answer


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
