-- Names of what must never be and is, in the organizations `orgs`. Knows nothing of the model.
with o as (select id from ledger.organizations where id = any (%(orgs)s))
select 'a job has two live runs' as broken from o where exists (
    select from ledger.runs r where r.organization_id = o.id and r.status in ('pending', 'in_progress')
    group by r.job_id having count(*) > 1)
union all
select 'a completed job has a live run, or not one completed run' as broken from o where exists (
    select from ledger.jobs j where j.organization_id = o.id and j.status = 'completed' and (
        1 <> (select count(*) from ledger.runs r
              where (r.organization_id, r.job_id) = (o.id, j.id) and r.status = 'completed')
        or exists (select from ledger.runs r where (r.organization_id, r.job_id) = (o.id, j.id)
                   and r.status in ('pending', 'in_progress'))))
union all
select 'a run is executed by nobody who holds its lease' as broken from o where exists (
    select from ledger.runs r where r.organization_id = o.id and r.status = 'in_progress'
    and r.lease_expires_at is null and not exists (
        select from ledger.worker w where (w.organization_id, w.id) = (o.id, r.worker_id)
        and w.run_id = r.id and w.boot = r.boot and w.status = 'busy'))
union all
select 'a pod holds what does not run' as broken from o where exists (
    select from ledger.worker w where w.organization_id = o.id and (
        (w.status = 'busy') <> (w.run_id is not null)
        or (w.run_id is not null and not exists (
            select from ledger.runs r where r.id = w.run_id and r.status = 'in_progress' and r.boot = w.boot))))
union all
select 'a job is in progress without a run' as broken from o where exists (
    select from ledger.jobs j where j.organization_id = o.id and (j.status = 'in_progress') <> exists (
        select from ledger.runs r where (r.organization_id, r.job_id) = (o.id, j.id) and r.status = 'in_progress'))
union all
select 'a waiting job is moved by nobody' as broken from o where exists (
    select from ledger.jobs j where j.organization_id = o.id and j.status = 'pending' and exists (
        select from ledger.runs r where (r.organization_id, r.job_id, r.attempt) = (o.id, j.id, j.attempt)
        and r.status <> 'pending'))
union all
select 'a waiting or running job reads a file that is not there' as broken from o where exists (
    select from ledger.jobs j, unnest(j.files) f where j.organization_id = o.id
    and j.status in ('pending', 'in_progress')
    and not exists (select from ledger.files k where (k.organization_id, k.id) = (o.id, f)))
union all
select 'a job has ended or not, and its time says otherwise' as broken from o where exists (
    select from ledger.jobs j where j.organization_id = o.id
    and (j.finished_at is not null) <> (j.status in ('completed', 'failed', 'canceled')))
union all
select 'more pods live than may' as broken from o where exists (
    select from ledger.worker w where w.organization_id = o.id and w.status <> 'terminated'
        and w.reason is distinct from 'found after it was given up'  -- nobody decided on those
    having count(*) > %(most)s)
union all
select 'events are missing, double or out of order' as broken from o where exists (
    select from ledger.runs r left join ledger.events e on e.run_id = r.id where r.organization_id = o.id
    group by r.id having count(e.id) <> r.next_sequence or count(distinct e.sequence) <> count(e.id)
    or coalesce(min(e.sequence), 0) <> 0 or coalesce(max(e.sequence) + 1, 0) <> count(e.id)
    or array_agg(e.sequence order by e.id) <> array_agg(e.sequence order by e.sequence))
union all
select 'the log has holes' as broken from o where exists (
    select from ledger.runs r left join ledger.log_chunks c on c.run_id = r.id where r.organization_id = o.id
    group by r.id having coalesce(sum(c.end_offset - c.start_offset), 0) <> r.log_bytes
    or coalesce(max(c.end_offset), 0) <> r.log_bytes)
union all
select 'the seconds of a pod are not counted once' as broken from o where exists (
    select from ledger.worker w where w.organization_id = o.id and (w.status <> 'terminated')::int <> (
        select count(*) from ledger.pod_intervals i
        where (i.organization_id, i.worker_id) = (o.id, w.id) and i.ended_at is null))
union all
select 'rows of two organizations are tied together' as broken from o where exists (
    select from ledger.runs r where r.organization_id = o.id and (
        exists (select from ledger.events e where e.run_id = r.id and e.organization_id <> o.id)
        or exists (select from ledger.log_chunks c where c.run_id = r.id and c.organization_id <> o.id)))
