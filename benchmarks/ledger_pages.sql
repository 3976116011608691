-- %(jobs)s jobs in several organizations, of which the first has six in ten. Run n is of job n. One run of the first
-- organization has a tenth of all events; the others are spread evenly over every tenth run.
create temp table orgs as select o, row_number() over () - 1 as place from unnest(%(organizations)s::uuid[]) as o;
create temp table owners as
    select n, (select o from orgs where place = case when n %% 10 < 6 then 0 else 1 + n %% 3 end) as organization_id
    from generate_series(1, %(jobs)s) n;
create unique index on owners (n);

insert into ledger.files (organization_id, id, purpose, filename, bytes, sha256, created_at)
    select organization_id, 'p' || n %% 5 || ':file-' || n, 'p' || n %% 5, n || '.jsonl', n, encode(sha256(n::text::bytea), 'hex'),
           now() - n * interval '1 minute'
    from owners;
insert into ledger.worker (organization_id, id, status, docker_image, hardware, gpu_type, gpu_count, vram_gb, cloud,
                           price_per_hour, bootstrap_hash, created_at, deadline_at)
    select organization_id, 'page-' || n, case when n <= 80 then 'active' else 'terminated' end, 'image', '1x L4', 'L4', 1, 24,
           'SECURE', 0.4, encode(sha256(('w' || n)::bytea), 'hex'), now() - n * interval '10 minutes', now() + interval '1 day'
    from owners where n <= %(jobs)s / 20;
insert into ledger.jobs (organization_id, id, type, status, model, params, docker_image, entrypoint, created_at, started_at, finished_at)
    select organization_id, 'job-' || n, case when n %% 100 = 0 then 'evaluation' when n %% 7 = 0 then 'inference' else 'fine_tuning' end,
           case when n %% 100 = 1 then 'pending' when n %% 31 = 0 then 'failed' when n %% 53 = 0 then 'canceled' else 'completed' end,
           'org/model-' || n %% 20,
           jsonb_build_object('model', 'org/model-' || n %% 20, 'training_file', 'conversations:file-' || n %% 1000,
               'learning_rate', 1e-5 * (1 + n %% 10), 'epochs', 1 + n %% 3, 'r', 32, 'loss', 'sft', 'merge_before_push', true,
               'seed', n, 'meta', jsonb_build_object('group', 'sweep-' || n %% 500, 'author', jsonb_build_object('name', 'user-' || n %% 50)),
               'validated_params', jsonb_build_object('beta', 0.1, 'warmup_steps', 5, 'optim', 'adamw_8bit', 'packing', false)),
           'image', 'true', now() - n * interval '1 minute', now() - n * interval '1 minute', now() - n * interval '1 minute'
    from owners;
insert into ledger.runs (id, organization_id, job_id, attempt, status, worker_id, mirrored, log_bytes, created_at, started_at, finished_at)
    select ('00000000-0000-4000-8000-' || lpad(to_hex(j.n), 12, '0'))::uuid, j.organization_id, 'job-' || j.n, 1,
           case when j.n %% 100 = 1 then 'pending' when j.n %% 31 = 0 then 'failed' else 'completed' end,
           (select w.id from ledger.worker w where w.organization_id = j.organization_id and w.id = 'page-' || (1 + j.n %% (%(jobs)s / 20))),
           true, 400000, now() - j.n * interval '1 minute', now() - j.n * interval '1 minute', now() - j.n * interval '1 minute'
    from owners j;
insert into ledger.events (organization_id, run_id, sequence, data)
    select j.organization_id, ('00000000-0000-4000-8000-' || lpad(to_hex(j.n), 12, '0'))::uuid, s,
           jsonb_build_object('loss', 1.0 / (1 + s), 'step', s, 'learning_rate', 1e-5, 'tag', 'step-' || s)
    from owners j, generate_series(0, 9 * %(events)s / %(jobs)s - 1) s
    where j.n %% 10 = 2 and j.n <= %(jobs)s;
insert into ledger.events (organization_id, run_id, sequence, data)
    select %(local)s, ('00000000-0000-4000-8000-' || lpad(to_hex(1000), 12, '0'))::uuid, s,
           jsonb_build_object('loss', 1.0 / (1 + s), 'step', s, 'learning_rate', 1e-5, 'tag', 'step-' || s)
    from generate_series(0, %(events)s / 10 - 1) s;
insert into ledger.log_chunks (organization_id, run_id, start_offset, end_offset, content)
    select j.organization_id, ('00000000-0000-4000-8000-' || lpad(to_hex(j.n), 12, '0'))::uuid, 4000 * c, 4000 * c + 4000, repeat('a line of the log, 32 bytes long.', 125)
    from owners j, generate_series(0, case when j.n = 1000 then 999 else 9 end) c
    where j.n %% 100 = 0;
insert into ledger.members (organization_id, user_id, role)
    select o, ('00000000-0000-4000-9000-' || lpad(to_hex(n), 12, '0'))::uuid, 'user' from orgs, generate_series(1, 500) n;
insert into ledger.api_tokens (organization_id, name, role, prefix, token_hash, created_by, created_at)
    select o, 'token ' || n, 'user', 'ow_abcdef', encode(sha256((o || ':' || n)::bytea), 'hex'),
           ('00000000-0000-4000-9000-' || lpad(to_hex(1 + n %% 500), 12, '0'))::uuid, now() - n * interval '1 minute'
    from orgs, generate_series(1, 2000) n;
insert into ledger.audit_log (organization_id, actor, action, subject)
    select o, '{}', 'set_secret', 'secret-' || n from generate_series(1, 10000) n, orgs;
