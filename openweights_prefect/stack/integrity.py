"""What must hold in a ledger at every moment, as queries for what breaks it."""

from __future__ import annotations

from typing import NamedTuple

_RESTORE = "Restore a backup (`ow db restore`) into a new ledger, or report how it came to this."


class Integrity(NamedTuple):
    """Finds what is wrong: each row is a sentence about one thing."""

    name: str
    whole: str
    text: str
    mend: str = _RESTORE


QUERIES = (
    Integrity(
        "row security",
        "forced on every table",
        """
        select c.relname || ' has no forced row-level security' from pg_class c
        where c.relnamespace = 'ledger'::regnamespace and c.relkind in ('r', 'p')
          and not (c.relrowsecurity and c.relforcerowsecurity)
        """,
        "Run `alter table ledger.<name> enable row level security, force row level security` as the owner.",
    ),
    Integrity(
        "policies",
        "every table is closed to the public and to other organizations",
        """
        select c.relname || ' is open to ' || acl.grantee::regrole from pg_class c, aclexplode(c.relacl) acl
        where c.relnamespace = 'ledger'::regnamespace and acl.grantee = 'anon'::regrole
        union all
        select c.relname || ' is open to everybody' from pg_class c, aclexplode(c.relacl) acl
        where c.relnamespace = 'ledger'::regnamespace and acl.grantee = 0
        union all
        select 'the policy ' || p.polname || ' of ' || c.relname || ' does not ask for the organization'
        from pg_policy p join pg_class c on c.oid = p.polrelid
        where c.relnamespace = 'ledger'::regnamespace
          and (pg_get_expr(p.polqual, c.oid) not like '%my_orgs%'
               or pg_get_expr(p.polwithcheck, c.oid) not like '%my_orgs%')
        """,
        "Undo what was made by hand: `revoke all on ledger.<table> from anon, public`, `drop policy`.",
    ),
    Integrity(
        "tenancy",
        "every row is of its run's organization, and every organization has an admin",
        """
        select 'event ' || e.id || ' is of another organization than its run' from ledger.events e
        join ledger.runs r on r.id = e.run_id where e.organization_id <> r.organization_id
        union all
        select 'a piece of the log of run ' || r.id || ' is of another organization' from ledger.log_chunks c
        join ledger.runs r on r.id = c.run_id where c.organization_id <> r.organization_id
        union all
        select 'a file of run ' || r.id || ' is of another organization' from ledger.run_files f
        join ledger.runs r on r.id = f.run_id where f.organization_id <> r.organization_id
        union all
        select 'organization ' || o.id || ' has no admin' from ledger.organizations o
        where not exists (select from ledger.members m where m.organization_id = o.id and m.role = 'admin')
        """,
    ),
    Integrity(
        "events",
        "numbered without a gap in every run",
        # Retention takes the oldest events of runs that ended more than a day ago.
        """
        select 'run ' || r.id || ' has ' || count(e.id) || ' of ' || r.next_sequence || ' events'
        from ledger.runs r left join ledger.events e on e.run_id = r.id
        group by r.id
        having max(e.sequence) <> r.next_sequence - 1
            or count(e.id) <> coalesce(max(e.sequence) - min(e.sequence) + 1, 0)
            or (coalesce(min(e.sequence), r.next_sequence) > 0
                and r.finished_at < now() - interval '1 day' is not true)
        """,
    ),
    Integrity(
        "logs",
        "contiguous in every run",
        """
        select 'the log of run ' || p.run_id || ' has a gap or an overlap at byte ' || p.start_offset
        from (select c.run_id, c.start_offset,
                     lag(c.end_offset, 1, 0::bigint) over (partition by c.run_id order by c.start_offset)
                         as before
              from ledger.log_chunks c) p
        where p.start_offset <> p.before
        union all
        select 'the log of run ' || r.id || ' ends at byte ' || coalesce(max(c.end_offset), 0)
               || ' of ' || r.log_bytes
        from ledger.runs r left join ledger.log_chunks c on c.run_id = r.id
        group by r.id having coalesce(max(c.end_offset), 0) <> r.log_bytes
        """,
    ),
    Integrity(
        "jobs",
        "jobs and their runs agree",
        """
        select 'job ' || j.id || ' is ' || j.status || ' and has ' || count(r.id) || ' runs in progress'
        from ledger.jobs j
        left join ledger.runs r on r.organization_id = j.organization_id and r.job_id = j.id
                               and r.status = 'in_progress'
        group by j.organization_id, j.id having count(r.id) <> (j.status = 'in_progress')::int
        union all
        select 'run ' || r.id || ' is ' || r.status || ' as attempt ' || r.attempt || ' of job ' || j.id
               || ', which is ' || j.status || ' at attempt ' || j.attempt
        from ledger.runs r join ledger.jobs j on j.organization_id = r.organization_id and j.id = r.job_id
        where r.status in ('pending', 'in_progress') and (r.attempt <> j.attempt or r.status <> j.status)
          and not (r.status = 'in_progress' and j.status <> 'in_progress')
        union all
        select 'job ' || j.id || ' is ' || j.status || ' and '
               || case when j.finished_at is null then 'has no end' else 'has ended' end
        from ledger.jobs j
        where (j.finished_at is not null) <> (j.status in ('completed', 'failed', 'canceled'))
        union all
        select 'run ' || r.id || ' is ' || r.status || ' and '
               || case when r.finished_at is null then 'has no end' else 'has ended' end
        from ledger.runs r where (r.finished_at is null) <> (r.status in ('pending', 'in_progress'))
        """,
    ),
    Integrity(
        "pods",
        "pods, their runs and what they reserve agree",
        """
        select 'run ' || r.id || ' is in progress on pod ' || r.worker_id || ', which is ' || w.status
               || ' and holds ' || coalesce(w.run_id::text, 'none')
        from ledger.runs r
        join ledger.worker w on w.organization_id = r.organization_id and w.id = r.worker_id
        where r.status = 'in_progress'
          and (w.run_id is distinct from r.id or w.status in ('lost', 'terminated'))
        union all
        select 'pod ' || w.id || ' holds run ' || w.run_id || ', which is ' || coalesce(r.status, 'unknown')
        from ledger.worker w left join ledger.runs r on r.id = w.run_id
        where w.run_id is not null and r.status is distinct from 'in_progress'
        union all
        select 'pod ' || w.id || ' has ended and still reserves money'
        from ledger.worker w
        join ledger.reservations s on s.organization_id = w.organization_id and s.worker_id = w.id
        where w.status = 'terminated'
        union all
        select 'pod ' || w.id || ' is ' || w.status || ' and has ' || count(i.id) || ' open intervals of cost'
        from ledger.worker w
        left join ledger.pod_intervals i on i.organization_id = w.organization_id and i.worker_id = w.id
                                        and i.ended_at is null
        group by w.organization_id, w.id having count(i.id) <> (w.status <> 'terminated')::int
        """,
    ),
)
