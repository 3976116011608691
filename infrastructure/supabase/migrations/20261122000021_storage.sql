-- The bucket of the file store, and who reaches what in it: `{organization_id}/{purpose}/{file-...}` and
-- `{organization_id}/flow-results/{key}`. Only where Supabase Storage is: a plain PostgreSQL has none.
do $migration$
begin
    if to_regclass('storage.objects') is null then
        return;
    end if;

    insert into storage.buckets (id, name, public) values ('files', 'files', false)
    on conflict (id) do update set public = false;

    -- How Supabase lets a role of one's own reach the schema `storage`; `anon` has no other right of use.
    if not (pg_has_role('ow_worker', 'anon', 'member') and pg_has_role('ow_pod', 'anon', 'member')) then
        grant anon to ow_worker, ow_pod;
    end if;

    -- The folder of the caller's organization. Nobody's is none: what is raised in a policy, the storage service
    -- answers like an outage.
    create function private.my_folder() returns setof text
    language plpgsql stable
    set search_path = ''
    as $$
    begin
        return query select org::text from private.my_orgs() as org;
    exception
        when invalid_authorization_specification then return;
    end
    $$;
    revoke execute on function private.my_folder() from public, anon;
    grant execute on function private.my_folder() to authenticated, ow_worker, ow_pod;

    create policy files_read on storage.objects for select to authenticated, ow_worker
    using (bucket_id = 'files' and (storage.foldername(name))[1] = any (array(select private.my_folder())));

    create policy files_insert on storage.objects for insert to authenticated, ow_worker
    with check (bucket_id = 'files' and (storage.foldername(name))[1] = any (array(select private.my_folder())));

    -- A file is what its id says: only results are ever replaced.
    create policy files_update on storage.objects for update to authenticated, ow_worker
    using (
        bucket_id = 'files' and (storage.foldername(name))[1] = any (array(select private.my_folder()))
        and (storage.foldername(name))[2] = 'flow-results'
    )
    with check (
        bucket_id = 'files' and (storage.foldername(name))[1] = any (array(select private.my_folder()))
        and (storage.foldername(name))[2] = 'flow-results'
    );

    create policy files_delete on storage.objects for delete to authenticated, ow_worker
    using (bucket_id = 'files' and (storage.foldername(name))[1] = any (array(select private.my_folder())));

    -- A pod adds files while it has a job, and for a minute longer; it reads what its job reads and stored.
    create policy files_insert_by_pod on storage.objects for insert to ow_pod
    with check (
        bucket_id = 'files' and (storage.foldername(name))[1] = any (array(select private.my_folder()))
        and exists (select from private.pod_jobs())
    );

    create policy files_read_by_pod on storage.objects for select to ow_pod
    using (
        bucket_id = 'files' and (storage.foldername(name))[1] = any (array(select private.my_folder()))
        and ((storage.foldername(name))[2] || ':' || storage.filename(name)
                = any (array(select private.pod_files()))
             -- The result of its job, which an earlier attempt may have left.
             or ((storage.foldername(name))[2] = 'flow-results'
                 and storage.filename(name) = any (array(select private.pod_jobs()))))
    );

    create policy files_update_by_pod on storage.objects for update to ow_pod
    using (
        bucket_id = 'files' and (storage.foldername(name))[1] = any (array(select private.my_folder()))
        and (storage.foldername(name))[2] = 'flow-results'
        and storage.filename(name) = any (array(select private.pod_jobs()))
    )
    with check (
        bucket_id = 'files' and (storage.foldername(name))[1] = any (array(select private.my_folder()))
        and (storage.foldername(name))[2] = 'flow-results'
        and storage.filename(name) = any (array(select private.pod_jobs()))
    );
end
$migration$;
