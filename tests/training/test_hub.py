"""The real client of Hugging Face against a hub on this machine: nothing is lost, leaked or endless."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from hub_double import SIGNATURE, Fault, HubDouble, Repository

from openweights_prefect.jobs.training import hub as pushing
from openweights_prefect.jobs.training.hub import PushError, push

TOKEN = "hf_verysecretvalue"
CARD = "---\nlibrary_name: peft\n---\n# A model\n"
WEIGHTS = os.urandom(200_000)
COMMIT = "POST /api/models/org/tuned/commit"
STORE = "PUT /storage/"


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """The double is reached over the network of this machine, which other tests switch off."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("time.sleep", lambda _seconds: None)


@pytest.fixture
def hub() -> Iterator[HubDouble]:
    with HubDouble(token=TOKEN, part_size=64_000) as double:
        yield double


@pytest.fixture
def result(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(WEIGHTS)
    (folder / "adapter_config.json").write_text('{"r": 16}')
    (folder / "tokenizer.json").write_text("{}")
    return folder


class Waits(list[float]):
    """A clock that moves only by waiting."""

    def sleep(self, seconds: float) -> None:
        self.append(seconds)

    def clock(self) -> float:
        return sum(self)


def pushed(
    hub: HubDouble, folder: Path, *, waits: Waits | None = None, token: str | None = TOKEN, **wish: Any
) -> str:
    params: Any = SimpleNamespace(**{"finetuned_model_id": "org/tuned", "push_to_private": True, **wish})
    waits = Waits() if waits is None else waits
    return push(
        folder, params, token=token, card=CARD, endpoint=hub.endpoint, sleep=waits.sleep, clock=waits.clock
    )


def is_whole(hub: HubDouble) -> bool:
    files = hub.repositories["org/tuned"].files
    return files == {
        "README.md": CARD.encode(),
        "adapter_config.json": b'{"r": 16}',
        "adapter_model.safetensors": WEIGHTS,
        "tokenizer.json": b"{}",
    }


def test_a_result_is_pushed_in_one_commit(hub: HubDouble, result: Path) -> None:
    """Large files in parts; the token goes to the hub alone and not to its storage."""
    assert pushed(hub, result) == f"{hub.endpoint}/org/tuned"
    assert is_whole(hub)
    assert hub.repositories["org/tuned"].private
    assert len(hub.repositories["org/tuned"].commits) == 1
    assert hub.count(STORE) == 4
    assert not hub.leaks


def test_what_was_pushed_can_be_downloaded(hub: HubDouble, result: Path, tmp_path: Path) -> None:
    """By the same client, byte for byte."""
    pushed(hub, result)
    path = huggingface_hub.HfApi(endpoint=hub.endpoint, token=TOKEN).hf_hub_download(
        "org/tuned", "tokenizer.json", local_dir=tmp_path / "again"
    )
    assert Path(path).read_text() == "{}"


def test_public_when_asked(hub: HubDouble, result: Path) -> None:
    pushed(hub, result, push_to_private=False)
    assert not hub.repositories["org/tuned"].private


def test_a_private_wish_never_lands_in_a_public_repository(hub: HubDouble, result: Path) -> None:
    """One that was there before: nothing is uploaded to it."""
    hub.repositories["org/tuned"] = Repository(private=False)
    with pytest.raises(PushError, match=r"org/tuned.*public.*push_to_private=False"):
        pushed(hub, result)
    assert not hub.repositories["org/tuned"].files
    assert hub.count(STORE) == 0


def test_checkpoints_stay_here(hub: HubDouble, result: Path) -> None:
    for name in (
        "checkpoint-10/optimizer.pt",
        "checkpoint-10/deep/rng.pth",
        "model.unfinished/x.safetensors",
    ):
        (result / name).parent.mkdir(parents=True, exist_ok=True)
        (result / name).write_bytes(b"x")
    pushed(hub, result)
    assert is_whole(hub)


def test_weights_of_an_earlier_push_are_replaced(hub: HubDouble, result: Path) -> None:
    """Those of a merged model beside an adapter would load as something else; other files are the owner's."""
    earlier = {"model-00001-of-00002.safetensors": b"w", "model.safetensors.index.json": b"{}"}
    mine = {"LICENSE": b"mine", "checkpoint-5/adapter_model.safetensors": b"w"}
    hub.repositories["org/tuned"] = Repository(private=True, files={**earlier, **mine})
    pushed(hub, result)
    repository = hub.repositories["org/tuned"]
    assert not set(earlier) & set(repository.files)
    assert set(mine) < set(repository.files)
    assert len(repository.commits) == 1


def test_pushing_twice_changes_nothing(hub: HubDouble, result: Path) -> None:
    """A repeated job: no part is sent again and no empty commit is made."""
    pushed(hub, result)
    before = hub.count(STORE)
    pushed(hub, result)
    assert hub.count(STORE) == before
    assert len(hub.repositories["org/tuned"].commits) == 1


@pytest.mark.parametrize(
    "request_",
    [
        "/api/repos/create",
        "/api/models/org/tuned$",
        "/api/validate-yaml",
        "preupload",
        "batch",
        STORE,
        "complete",
        "/verify",
        COMMIT,
        "paths-info",
    ],
)
def test_short_outages_are_waited_out(hub: HubDouble, result: Path, request_: str) -> None:
    """Twice no service at each step of a push."""
    hub.script(request_, Fault(status=503), Fault(status=502))
    pushed(hub, result)
    assert is_whole(hub)
    assert len(hub.repositories["org/tuned"].commits) == 1


def test_the_wait_that_the_hub_asks_for_is_kept(hub: HubDouble, result: Path) -> None:
    waits = Waits()
    hub.script(COMMIT, Fault(status=429, headers=(("Retry-After", "77"),)))
    pushed(hub, result, waits=waits)
    assert waits == [77.0]
    assert is_whole(hub)


@pytest.mark.parametrize("request_", [COMMIT, STORE])
def test_a_wait_beyond_all_patience_ends_the_push(hub: HubDouble, result: Path, request_: str) -> None:
    """At once: the pod costs money."""
    waits = Waits()
    hub.script(request_, *[Fault(status=429, headers=(("Retry-After", "86400"),))] * 5)
    with pytest.raises(PushError, match=r"429.*86400 seconds.*does not train again"):
        pushed(hub, result, waits=waits)
    assert not waits


@pytest.mark.parametrize("cut_after", [0, 1000, 50_000])
def test_a_connection_that_breaks_in_mid_upload(hub: HubDouble, result: Path, cut_after: int) -> None:
    """The part is sent again, not the file."""
    hub.script(f"{STORE}.*/2$", Fault(cut_after=cut_after), Fault(cut_after=cut_after))
    pushed(hub, result)
    assert is_whole(hub)
    assert hub.count(f"{STORE}.*/1$") == 1


@pytest.mark.parametrize("request_", ["/api/repos/create", COMMIT])
def test_a_lost_answer_does_no_work_twice(hub: HubDouble, result: Path, request_: str) -> None:
    """The hub had done it; one commit all the same."""
    hub.script(request_, Fault(lose_answer=True))
    pushed(hub, result)
    assert is_whole(hub)
    assert len(hub.repositories["org/tuned"].commits) == 1


def test_a_silent_hub_is_not_waited_for_for_ever(
    hub: HubDouble, result: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pushing, "ANSWER_SECONDS", 0.5)
    hub.script(COMMIT, Fault(silent_seconds=30))
    pushed(hub, result)
    assert is_whole(hub)


def test_a_push_goes_on_where_another_ended(hub: HubDouble, result: Path) -> None:
    """Of a pod that was lost: what is stored is not sent again."""
    hub.script(COMMIT, *[Fault(status=500)] * 100)
    with pytest.raises(PushError, match=r"HTTP 500"):
        pushed(hub, result)
    hub._faults.clear()
    before = hub.count(STORE)
    pushed(hub, result)
    assert hub.count(STORE) == before
    assert is_whole(hub)


def test_an_outage_without_end_ends_the_push(hub: HubDouble, result: Path) -> None:
    """Within its patience and its number of tries."""
    waits = Waits()
    hub.script("POST", *[Fault(status=503)] * 1000)
    with pytest.raises(PushError, match=r"did not take it \(HTTP 503\).*does not train again"):
        pushed(hub, result, waits=waits)
    assert len(waits) <= pushing.TRIES
    assert sum(waits) <= pushing.PATIENCE_SECONDS


def test_a_hub_that_is_not_there(result: Path) -> None:
    with HubDouble(token=TOKEN) as gone:
        pass
    with pytest.raises(PushError, match=r"did not take it \(ConnectError\)"):
        pushed(gone, result)


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        ({"token": "hf_wrongsecret"}, r"'org/tuned'.*HF_TOKEN is not valid"),
        ({"token": None}, r"'org/tuned'.*HF_TOKEN is not set"),
        ({"token": ""}, r"HF_TOKEN is not set"),
        ({"finetuned_model_id": "other/tuned"}, r"HF_TOKEN may not write there.*'other'"),
        ({"finetuned_model_id": "org/a/b"}, r"'org/a/b'.*'user/model'"),
    ],
)
def test_refusals_say_what_to_do(
    hub: HubDouble, result: Path, wish: Any, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Once, without another try, and without the token."""
    waits = Waits()
    with pytest.raises(PushError, match=said) as caught:
        pushed(hub, result, waits=waits, **wish)
    assert not waits
    assert hub.count("POST /api/repos/create") <= 1
    told = str(caught.value) + "".join(capfd.readouterr())
    assert TOKEN not in told
    assert "hf_wrongsecret" not in told
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    ("token", "role", "said"),
    [(None, "write", "not set"), ("hf_wrong", "write", "not valid"), (TOKEN, "read", "may only read")],
)
def test_a_token_that_cannot_push_is_known_before_training(
    hub: HubDouble, token: str | None, role: str, said: str
) -> None:
    """Nothing is written at the hub."""
    hub.role = role
    params: Any = SimpleNamespace(finetuned_model_id="org/tuned", push_to_private=True)
    with pytest.raises(PushError, match=f"HF_TOKEN.*{said}"):
        pushing.check(params, token=token, endpoint=hub.endpoint)
    assert not hub.repositories


def test_an_outage_before_training_is_no_reason_to_stop(
    hub: HubDouble, capsys: pytest.CaptureFixture[str]
) -> None:
    params: Any = SimpleNamespace(finetuned_model_id="org/tuned", push_to_private=True)
    pushing.check(params, token=TOKEN, endpoint=hub.endpoint)
    assert not capsys.readouterr().out
    hub.script("whoami", *[Fault(status=503)] * 20)
    pushing.check(params, token=TOKEN, endpoint=hub.endpoint)
    assert "could not be checked" in capsys.readouterr().out


def test_a_token_that_is_withdrawn_on_the_way(hub: HubDouble, result: Path) -> None:
    hub.script(COMMIT, Fault(status=401))
    with pytest.raises(PushError, match="HF_TOKEN is not valid"):
        pushed(hub, result)


def test_no_other_token_of_the_machine_is_used(
    hub: HubDouble, result: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even one with which somebody logged in."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(PushError, match="HF_TOKEN is not set"):
        pushed(hub, result, token=None)
    assert not hub.requests


def test_nothing_secret_is_printed(hub: HubDouble, result: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Neither the token nor a signed address, by us or by the client, whatever goes wrong."""
    hub.script(STORE, Fault(status=503), Fault(cut_after=10), *[Fault(status=500)] * 1000)
    hub.script("batch", Fault(status=400, body={"error": f"{TOKEN} https://host/key?{SIGNATURE}"}))
    with pytest.raises(PushError) as refused:
        pushed(hub, result)
    with pytest.raises(PushError) as failed:
        pushed(hub, result)
    told = f"{refused.value} {failed.value}" + "".join(capfd.readouterr())
    assert "400" in told
    assert "503" in told
    assert TOKEN not in told
    assert "Signature" not in told


def test_a_commit_that_lost_a_file_is_noticed(
    hub: HubDouble, result: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's own listing is what counts."""
    hub.script("paths-info", Fault(status=200, body=[]))  # type: ignore[arg-type]
    with pytest.raises(PushError, match=r"not as it was sent"):
        pushed(hub, result)


def test_the_library_is_left_as_it_was(hub: HubDouble, result: Path) -> None:
    """Downloads of the same process go on as usual."""
    verbosity = huggingface_hub.logging.get_verbosity()
    xet = huggingface_hub.constants.HF_HUB_DISABLE_XET
    pushed(hub, result)
    assert huggingface_hub.logging.get_verbosity() == verbosity
    assert xet == huggingface_hub.constants.HF_HUB_DISABLE_XET
    assert huggingface_hub.get_session().timeout.read is None


def test_the_endpoint_of_the_environment_is_used(hub: HubDouble, result: Path, tmp_path: Path) -> None:
    """`HF_ENDPOINT`, as everywhere else."""
    script = (
        "import sys, types, pathlib; from openweights_prefect.jobs.training.hub import push\n"
        "params = types.SimpleNamespace(finetuned_model_id='org/tuned', push_to_private=True)\n"
        f"print(push(pathlib.Path({str(result)!r}), params, token={TOKEN!r}, card={CARD!r}))"
    )
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == f"{hub.endpoint}/org/tuned\n"
    assert is_whole(hub)
    assert hashlib.sha256(WEIGHTS).hexdigest() in hub.objects
