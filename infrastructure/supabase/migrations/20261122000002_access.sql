-- Who the caller is, and what it may see: claims, policies and table grants.
-- Functions that write live in the later migrations; only those of the allow-list in the tests are `security definer`.

create function private.claims() returns jsonb
language sql stable
set search_path = ''
as $$ select coalesce(nullif(current_setting('request.jwt.claims', true), '')::jsonb, '{}') $$;

-- The person behind the caller: itself, or who made its token; null for a pod.
create function private.my_user() returns uuid
language sql stable
set search_path = ''
as $$ select nullif(private.claims() ->> 'sub', '')::uuid $$;

create function private.my_token() returns uuid
language sql stable
set search_path = ''
as $$ select nullif(private.claims() ->> 'token_id', '')::uuid $$;

-- The organization that the caller speaks for, believed only as far as its claims hold at this moment: a token that
-- was revoked or a member that was removed is refused from the next call on. A pod that has ended sees nothing, and
-- learns so from the answer. One row at most; `setof`, so that policies can write `= any (array(select ...))`, which is
-- evaluated once a statement.
create function private.my_orgs() returns setof uuid
language plpgsql stable security definer
set search_path = ''
as $$
declare
    claims jsonb := private.claims();
    db_role text := claims ->> 'role';
    org uuid := (claims ->> 'organization_id')::uuid;
begin
    if claims ->> 'aud' is distinct from 'authenticated' or to_timestamp((claims ->> 'exp')::double precision) <= now() then
        org := null;
    elsif db_role = 'ow_pod' then
        return query
            select w.organization_id from ledger.worker w
            where w.organization_id = org and w.id = claims ->> 'worker_id'
              and w.session_hash = claims ->> 'session' and w.status <> 'terminated';
        return;
    elsif claims ? 'token_id' then
        return query
            select t.organization_id from ledger.api_tokens t
            join ledger.members m on m.organization_id = t.organization_id and m.user_id = t.created_by
            where t.id = (claims ->> 'token_id')::uuid and t.organization_id = org
              and t.revoked_at is null and (t.expires_at is null or t.expires_at > now())
              and db_role = case t.role when 'worker' then 'ow_worker' else 'authenticated' end;
    else
        -- A session of Supabase Auth names no organization; the client does, in a header.
        org := coalesce(org, (nullif(current_setting('request.headers', true), '')::jsonb ->> 'x-organization-id')::uuid);
        return query
            select m.organization_id from ledger.members m
            where m.user_id = (claims ->> 'sub')::uuid and m.organization_id = org
              and (db_role = 'authenticated' or (db_role = 'ow_worker' and m.role = 'admin'));
    end if;
    if not found or org is null then
        raise exception 'the caller speaks for no organization: its token is unknown, revoked or expired, or it is not a member'
            using errcode = '28000';
    end if;
end
$$;

-- The one organization that a write is for; raises when the caller speaks for none.
create function private.my_org() returns uuid
language plpgsql stable
set search_path = ''
as $$
declare
    org uuid := (select o from private.my_orgs() as o);
begin
    if org is null then
        raise exception 'the pod has ended' using errcode = '28000';
    end if;
    return org;
end
$$;

-- For functions whose filter may leave no row to check: a caller that speaks for nobody is told so, not shown emptiness.
create function private.known_caller() returns boolean
language plpgsql stable
set search_path = ''
as $$
begin
    perform private.my_orgs();
    return true;
end
$$;

-- 'admin', 'user', 'worker' or 'pod'; a token is never more than who made it.
create function private.my_role() returns text
language plpgsql stable security definer
set search_path = ''
as $$
declare
    claims jsonb := private.claims();
    org uuid := private.my_org();
begin
    if claims ->> 'role' = 'ow_pod' then
        return 'pod';
    elsif claims ->> 'role' = 'ow_worker' then
        return 'worker';
    end if;
    return (
        select case when m.role = 'admin' and coalesce(t.role, 'admin') = 'admin' then 'admin' else 'user' end
        from ledger.members m
        left join ledger.api_tokens t on t.id = (claims ->> 'token_id')::uuid
        where m.organization_id = org and m.user_id = coalesce(t.created_by, (claims ->> 'sub')::uuid));
end
$$;

create function private.require_admin() returns void
language plpgsql stable
set search_path = ''
as $$
begin
    if private.my_role() <> 'admin' then
        raise exception 'only an admin of the organization may do this' using errcode = '42501';
    end if;
end
$$;

create function private.audit(for_action text, for_subject text, with_detail jsonb default '{}', for_org uuid default null)
returns void
language plpgsql security definer
set search_path = ''
as $$
declare
    claims jsonb := private.claims();
begin
    insert into ledger.audit_log (organization_id, actor, action, subject, detail)
    values (coalesce(for_org, private.my_org()),
            jsonb_strip_nulls(jsonb_build_object('user_id', claims -> 'sub', 'token_id', claims -> 'token_id',
                                                 'worker_id', claims -> 'worker_id')),
            for_action, for_subject, with_detail);
end
$$;

-- What a pod may see --------------------------------------------------------------------------

create function private.my_pod() returns text
language sql stable
set search_path = ''
as $$ select private.claims() ->> 'worker_id' $$;

-- The run that the calling pod holds, with its job: what its rights over files, events and secrets come from.
create function private.pod_run() returns table (run_id uuid, job_id text)
language sql stable security definer
set search_path = ''
as $$
    select r.id, r.job_id
    from ledger.worker w join ledger.runs r on r.id = w.run_id and r.boot = w.boot and r.status = 'in_progress'
    where w.organization_id = any (array(select private.my_orgs())) and w.id = private.my_pod()
$$;

-- Jobs that the calling pod may write: the one it runs or is pointed at, and for a minute the one it ended, because the
-- answer may be lost.
create function private.pod_jobs() returns setof text
language sql stable security definer
set search_path = ''
as $$
    select r.job_id from ledger.runs r
    where r.organization_id = any (array(select private.my_orgs()))
      and ((r.worker_id = private.my_pod() and (r.status = 'in_progress' or r.finished_at > now() - interval '1 minute'))
           or (r.hinted_worker_id = private.my_pod() and r.status = 'pending'))
$$;

-- Runs of the job that the calling pod runs: an earlier attempt's events are its own history.
create function private.pod_runs() returns setof uuid
language sql stable security definer
set search_path = ''
as $$
    select r.id from private.pod_run() held
    join ledger.runs r on r.job_id = held.job_id and r.organization_id = any (array(select private.my_orgs()))
$$;

-- Files that the calling pod may read: those its job names, and those that the job's runs stored.
create function private.pod_files() returns setof text
language sql stable security definer
set search_path = ''
as $$
    select unnest(j.files) from private.pod_run() held
    join ledger.jobs j on j.id = held.job_id and j.organization_id = any (array(select private.my_orgs()))
    union
    select f.file_id from private.pod_runs() as r (id) join ledger.run_files f on f.run_id = r.id
$$;

-- Grants and policies -------------------------------------------------------------------------

revoke all on all tables in schema ledger, private from public, anon, authenticated;
grant all on all tables in schema ledger to service_role;
grant select, insert, update, delete on private.refused_exchanges to service_role;

do $$
declare
    tab text;
begin
    for tab in select c.relname from pg_class c where c.relnamespace = 'ledger'::regnamespace and c.relkind = 'r' loop
        execute format('alter table ledger.%I enable row level security', tab);
        execute format('alter table ledger.%I force row level security', tab);
    end loop;
end
$$;

-- One policy a table, verb and kind of caller. Tables that are not named (tokens, secrets, invitations, the audit log)
-- are open to definer functions alone.
do $$
declare
    own constant text := 'organization_id = any (array(select private.my_orgs()))';
    rule record;
begin
    for rule in
        select t.tab, t.callers, v.verb, coalesce(t.which, 'true') as which, coalesce(t.after, t.which, 'true') as after
        from (values
            ('organizations', 'authenticated, ow_worker', 'select', null, null),
            ('members', 'authenticated', 'select', null, null),
            ('files', 'authenticated', 'select insert delete', null, null),
            ('files', 'ow_worker', 'select', null, null),
            ('files', 'ow_pod', 'select', 'id = any (array(select private.pod_files()))', null),
            ('files', 'ow_pod', 'insert', 'exists (select from private.pod_run())', null),
            ('run_files', 'authenticated', 'select', null, null),
            ('run_files', 'ow_pod', 'select insert', 'run_id = any (array(select p.run_id from private.pod_run() p))', null),
            ('worker', 'authenticated', 'select update', null, null),
            ('worker', 'ow_worker', 'select insert update', null, null),
            ('worker', 'ow_pod', 'select update', 'id = private.my_pod()', null),
            ('jobs', 'authenticated, ow_worker', 'select insert update', null, null),
            ('jobs', 'ow_pod', 'select update', 'id = any (array(select private.pod_jobs()))', null),
            ('runs', 'authenticated, ow_worker', 'select insert update', null, null),
            ('runs', 'ow_pod', 'select', 'private.my_pod() in (worker_id, hinted_worker_id) or id = any (array(select private.pod_runs()))', null),
            ('runs', 'ow_pod', 'update', 'private.my_pod() in (worker_id, hinted_worker_id)', 'worker_id = private.my_pod()'),
            ('events', 'authenticated', 'select insert', null, null),
            ('events', 'ow_worker', 'select delete', null, null),
            ('events', 'ow_pod', 'select', 'run_id = any (array(select private.pod_runs()))', null),
            ('events', 'ow_pod', 'insert', 'run_id = any (array(select p.run_id from private.pod_run() p))', null),
            ('log_chunks', 'authenticated', 'select insert', null, null),
            ('log_chunks', 'ow_worker', 'select delete', null, null),
            ('log_chunks', 'ow_pod', 'select insert', 'run_id = any (array(select p.run_id from private.pod_run() p))', null),
            ('budgets', 'authenticated, ow_worker', 'select', null, null),
            ('reservations', 'authenticated', 'select', null, null),
            ('reservations', 'ow_worker', 'select insert update delete', null, null),
            ('pod_intervals', 'authenticated', 'select', null, null),
            ('pod_intervals', 'ow_worker', 'select insert update', null, null),
            ('catalogues', 'authenticated', 'select', null, null),
            ('catalogues', 'ow_worker', 'select insert update', null, null),
            ('refusals', 'authenticated', 'select', null, null),
            ('refusals', 'ow_worker', 'select insert update delete', null, null)
        ) as t (tab, callers, verbs, which, after),
        regexp_split_to_table(t.verbs, ' ') as v (verb)
    loop
        execute format('grant %s on ledger.%I to %s', rule.verb, rule.tab, rule.callers);
        execute format(
            'create policy %I on ledger.%I for %s to %s %s %s',
            rule.verb || '_' || replace(rule.callers, ', ', '_'), rule.tab, rule.verb, rule.callers,
            case when rule.verb <> 'insert' then
                format('using (%s and (%s))', replace(own, 'organization_id', case rule.tab when 'organizations' then 'id' else 'organization_id' end), rule.which) end,
            case when rule.verb in ('insert', 'update') then format('with check (%s and (%s))', own, rule.after) end);
    end loop;
end
$$;
