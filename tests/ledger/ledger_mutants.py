"""Ledgers that are broken in one place each, to prove that the state-machine tests see it."""

from __future__ import annotations

import re
from dataclasses import dataclass

import psycopg


@dataclass(frozen=True)
class Mutant:
    """One function whose text is changed: every match of `pattern` becomes `replacement`."""

    name: str
    function: str
    pattern: str
    replacement: str

    def apply(self, admin_url: str) -> None:
        """Break the function in this database; fails where its text has nothing to break."""
        find = "select pg_get_functiondef(p.oid) from pg_proc p where p.oid::regproc::text = %s"
        with psycopg.connect(admin_url) as connection:
            [(text,)] = connection.execute(find, [self.function])
            broken, count = re.subn(self.pattern, lambda _: self.replacement, text)
            assert count, f"{self.function} has nothing like {self.pattern!r} any more"
            connection.execute(broken.encode())


# What a pod ran is read before its row is locked: who opens a run in between is forgotten.
_HASTY = """declare
    held_run uuid := (select w.run_id from ledger.worker w where w.id = for_worker);
begin
    if held_run is not null then
        perform private.lose_run(held_run, why);
    end if;
    update ledger.worker w set status = 'lost', reason = why, boot = null, run_id = null
    where w.id = for_worker and w.status not in ('lost', 'terminated');
    return query select jsonb_build_object('outcome', case when found then 'lost' else 'refused' end);
end
"""

MUTANTS = [
    Mutant(
        "a process that lost its pod opens a run", "open_run", r"pod\.boot is distinct from as_boot or", ""
    ),
    Mutant("a busy pod opens a second run", "open_run", r"pod\.status <> 'active' or", ""),
    Mutant("a silent pod opens a run", "open_run", r"or pod\.lease_expires_at < \w+\(\)", ""),
    Mutant(
        "who lost a run ends it", "finish_run", r"held_run\.status not in \('in_progress', result\)", "false"
    ),
    Mutant(
        "an ended pod stays busy",
        "finish_run",
        r"when w\.status = 'busy' then 'active'",
        "when false then ''",
    ),
    Mutant(
        "repeated events are stored again", "append_events", r"where first_sequence \+ \S+ - 1 >= \S+", ""
    ),
    Mutant(
        "a gap in the events is let through",
        "append_events",
        r"first_sequence > held\.next_sequence",
        "false",
    ),
    Mutant("the log is stored with holes", "append_log", r"from_offset = held\.", "from_offset >= held."),
    Mutant(
        "stale writers go on", "append_events", r"r\.boot = as_boot and r\.status = 'in_progress'", "true"
    ),
    Mutant("pods are counted without a lock", "intend_pod", r"perform pg_advisory_xact_lock\(.*\);\n", ""),
    Mutant("one pod too many", "intend_pod", r">= (coalesce\()?max_pods", "- 1 >= coalesce(max_pods"),
    Mutant(
        "a completed job runs again",
        "submit_job",
        r"'completed' then 'completed'",
        "'completed' then 'reset'",
    ),
    Mutant("a canceled job leaves its run waiting", "cancel_job", r"and r\.status = 'pending'", "and false"),
    Mutant(
        "a lost run leaves its job running", "private.lose_run", r"coalesce\(ending, 'pending'\)", "j.status"
    ),
    Mutant("an older process renews the lease", "renew_lease", r"and w\.boot = as_boot", ""),
    Mutant("silent pods keep their runs", "expire_leases", r"private\.heard_until\(w\) < now\(\)", "false"),
    Mutant("a restarted agent leaves a run behind", "register_pod", r"perform private\.lose_run\(.*\);", ""),
    Mutant("a pod is lost in haste", "lose_pod", r"(?s)(declare\b.*)?begin\b.*end\n", _HASTY),
    Mutant("a file is deleted under a job", "delete_file", r"used_by is not null", "false"),
    Mutant("a file is deleted before a job", "private.missing_files", r"for key share", ""),
]
