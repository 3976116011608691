-- Everything that the model of the ledger predicts about the organization `org`, in its shape.
select jsonb_build_object(
    'jobs', (
        select coalesce(jsonb_object_agg(j.id, jsonb_build_object(
            'type', j.type, 'entrypoint', j.entrypoint, 'files', j.files, 'retries', j.retries,
            'priority', j.priority, 'status', j.status, 'attempt', j.attempt,
            'failed_attempts', j.failed_attempts, 'lost_attempts', j.lost_attempts,
            'cancel_requested', j.cancel_requested, 'error', j.error, 'outputs', j.outputs)), '{}')
        from ledger.jobs j where j.organization_id = o.id),
    'order', (
        select coalesce(jsonb_agg(j.id order by j.created_at), '[]')
        from ledger.jobs j where j.organization_id = o.id),
    'runs', (
        select coalesce(jsonb_object_agg(r.id, jsonb_build_object(
            'job', r.job_id, 'attempt', r.attempt, 'status', r.status, 'worker', r.worker_id, 'boot', r.boot,
            'error', r.error, 'mirrored', r.mirrored, 'hinted', r.hinted_worker_id,
            'hint_is_fresh', coalesce(r.hinted_at > now() - interval '10 seconds', false),
            'is_script', r.lease_expires_at is not null,
            'events', (
                select coalesce(jsonb_agg(e.data order by e.id), '[]')
                from ledger.events e where e.run_id = r.id),
            'log', (
                select coalesce(jsonb_agg(jsonb_build_array(c.start_offset, c.end_offset, c.content)
                                          order by c.start_offset), '[]')
                from ledger.log_chunks c where c.run_id = r.id))), '{}')
        from ledger.runs r where r.organization_id = o.id),
    'pods', (
        select coalesce(jsonb_object_agg(w.id, jsonb_build_object(
            'status', w.status, 'provider_id', w.pod_id, 'session', w.session_hash, 'boot', w.boot,
            'run', w.run_id, 'shutdown_requested', w.shutdown_requested)), '{}')
        from ledger.worker w where w.organization_id = o.id),
    'files', (
        select coalesce(jsonb_agg(f.id order by f.id), '[]')
        from ledger.files f where f.organization_id = o.id),
    'reserved', (
        select coalesce(jsonb_agg(r.worker_id order by r.worker_id), '[]')
        from ledger.reservations r where r.organization_id = o.id))
from ledger.organizations o
where o.id = %(org)s
