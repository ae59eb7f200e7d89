-- pgtrickle 0.28.0: outbox, consumer groups and inbox on plain PostgreSQL.
--
-- Run once, frozen by checksum. The prologue (sql/prologue.sql) has made the
-- roles, the schema and the record of migrations, and this file runs as the
-- schema's owner. Beside the pg_trickle extension each object that the
-- extension brings is left as it is: everything here is created only if missing,
-- and what is ours alone is kept in tables named relay_….

-- ---------------------------------------------------------------------------
-- Outbox
-- ---------------------------------------------------------------------------

do $only_if_missing$
begin
    if to_regclass('pgtrickle.pgt_outbox_config') is null then
        create table pgtrickle.pgt_outbox_config (
            outbox_table_name text primary key,
            stream_table_oid regclass unique,
            stream_table_name text not null,
            retention_hours integer not null default 24
                check (retention_hours >= 0),
            enabled_at timestamptz not null default now(),
            last_drained_at timestamptz,
            last_drained_count bigint not null default 0
        );

        comment on table pgtrickle.pgt_outbox_config is
            'Enabled outboxes. The final table name is stored here and never derived again.';
        comment on column pgtrickle.pgt_outbox_config.stream_table_oid is
            'The captured table, by identity, so that a rename does not lose it and a restore finds it by name; null for a logical stream that only outbox_publish writes.';
        comment on column pgtrickle.pgt_outbox_config.last_drained_count is
            'Rows that the last sweep deleted.';
    end if;
end
$only_if_missing$;

create table if not exists pgtrickle.relay_outbox_settings (
    outbox_table_name text primary key,
    stream_schema name,
    delta_table_name text,
    latest_view_name text,
    sleep_sequence_name text,
    capture_function_name text,
    pgt_id uuid not null default gen_random_uuid(),
    key_columns text[],
    capture boolean not null default false,
    notify boolean not null default true,
    claim_check_rows integer not null default 1000
        check (claim_check_rows >= 0),
    claim_check_bytes bigint not null default 1048576
        check (claim_check_bytes between 0 and 134217728),
    swept_through bigint not null default 0,
    enabled_by name not null
);

comment on table pgtrickle.relay_outbox_settings is
    'What the relay keeps about an outbox besides pgt_outbox_config, which may be the extension''s.';
comment on column pgtrickle.relay_outbox_settings.stream_schema is
    'Schema of the captured table when it was enabled; null for a logical stream.';
comment on column pgtrickle.relay_outbox_settings.sleep_sequence_name is
    'A sequence whose value says until when, in seconds since 1970, some relay sleeps on the outbox: a publisher reads that in a tenth of the time that relay_sleepers takes.';
comment on column pgtrickle.relay_outbox_settings.pgt_id is
    'Identity of the outbox, the same in every row of it.';
comment on column pgtrickle.relay_outbox_settings.key_columns is
    'Columns that identify an entity: the primary key, or what enable_outbox was told.';
comment on column pgtrickle.relay_outbox_settings.claim_check_bytes is
    'Above this size the rows go to the delta table; far below the 256 MB where jsonb ends.';
comment on column pgtrickle.relay_outbox_settings.swept_through is
    'Highest id that retention has deleted; never goes back.';
comment on column pgtrickle.relay_outbox_settings.enabled_by is
    'Role that enabled the outbox: it may disable it when the table is gone.';

create table if not exists pgtrickle.relay_outbox_high_water (
    outbox_table_name text primary key,
    last_id bigint not null,
    disabled_at timestamptz not null default now()
);

comment on table pgtrickle.relay_outbox_high_water is
    'Highest id drawn by a disabled outbox: ids of its successor continue above, so that deduplication keys stay unique.';

create unlogged table if not exists pgtrickle.relay_sleepers (
    outbox_table text not null,
    sleeper text not null,
    sleeps_until timestamptz not null,
    primary key (outbox_table, sleeper)
) with (fillfactor = 50);

comment on table pgtrickle.relay_sleepers is
    'Relays that sleep on an outbox: publishers notify only while one does. Unlogged, since a lost flag costs one fallback poll.';

-- ---------------------------------------------------------------------------
-- Consumer groups
-- ---------------------------------------------------------------------------

create table pgtrickle.relay_groups (
    group_id bigint generated always as identity primary key,
    group_name text not null unique
        check (length(group_name) between 1 and 200),
    outbox_table text not null,
    outbox_oid oid not null,
    auto_offset_reset text not null
        check (auto_offset_reset in ('earliest', 'latest')),
    frontier bigint not null default 0,
    watermark bigint not null default 0,
    leases_since timestamptz not null default '-infinity',
    server_instance text not null,
    created_at timestamptz not null default now()
) with (fillfactor = 50);

comment on table pgtrickle.relay_groups is
    'Consumer groups. A group has one position: everything up to the frontier is settled, except what stands in relay_group_gaps, relay_group_leases and relay_group_returned. No foreign keys: each would lock this row from every commit.';
comment on column pgtrickle.relay_groups.outbox_oid is
    'Table whose lock holders were noted; another one means that the outbox was made anew.';
comment on column pgtrickle.relay_groups.frontier is
    'Highest id that a poll has passed. Only seek_offset moves it back.';
comment on column pgtrickle.relay_groups.watermark is
    'Lower bound of what is settled without exception, as of the last poll.';
comment on column pgtrickle.relay_groups.leases_since is
    'No lease expires before this time: spares a poll the dead index entries of old leases.';
comment on column pgtrickle.relay_groups.server_instance is
    'Run of the server in which the holders were noted. After another start their names mean nothing.';

create table pgtrickle.relay_group_cohorts (
    cohort_id bigint generated always as identity primary key,
    group_id bigint not null,
    holders text[] not null,
    checked_through bigint
);

comment on table pgtrickle.relay_group_cohorts is
    'Gaps that wait for the same transactions. While all of these live nothing of the cohort is read again, however many gaps it has.';
comment on column pgtrickle.relay_group_cohorts.holders is
    'Virtual transaction ids that held RowExclusiveLock on the outbox, sorted; empty: the gaps can be decided.';
comment on column pgtrickle.relay_group_cohorts.checked_through is
    'First id of the last gap that was read again since a holder ended; null: nothing to read.';

create index relay_group_cohorts_of_group on pgtrickle.relay_group_cohorts (group_id);
comment on index pgtrickle.relay_group_cohorts_of_group is
    'Serves each poll: all cohorts of a group.';

create table pgtrickle.relay_group_gaps (
    group_id bigint not null,
    first_id bigint not null,
    last_id bigint not null,
    cohort_id bigint not null,
    primary key (group_id, first_id),
    check (first_id <= last_id)
);

comment on table pgtrickle.relay_group_gaps is
    'Ids below the frontier that were not visible when it passed them. Ranges, both ends included.';

create index relay_group_gaps_of_cohort on pgtrickle.relay_group_gaps (cohort_id, first_id);
comment on index pgtrickle.relay_group_gaps_of_cohort is
    'Serves relay_group_read_gaps: a slice of one cohort.';

create table pgtrickle.relay_group_leases (
    lease_token uuid primary key,
    group_id bigint not null,
    consumer_id text not null,
    outbox_ids bigint[] not null,
    leased_at timestamptz not null,
    expires_at timestamptz not null
);

comment on table pgtrickle.relay_group_leases is
    'Rows in the hands of a consumer. A row is gone when they are settled, given back or taken over.';

create index relay_group_leases_expiry on pgtrickle.relay_group_leases (group_id, expires_at);
comment on index pgtrickle.relay_group_leases_expiry is
    'Serves each poll: leases that have run out.';

create table pgtrickle.relay_group_returned (
    group_id bigint not null,
    outbox_id bigint not null,
    primary key (group_id, outbox_id)
);

comment on table pgtrickle.relay_group_returned is
    'Rows below the frontier that nobody holds: given back, of a lease that ran out, or late.';

create table pgtrickle.relay_group_consumers (
    group_id bigint not null,
    consumer_id text not null,
    newest_lease uuid,
    last_heartbeat_at timestamptz not null,
    primary key (group_id, consumer_id)
) with (fillfactor = 50);

comment on table pgtrickle.relay_group_consumers is
    'Consumers that have polled or sent a heartbeat.';
comment on column pgtrickle.relay_group_consumers.newest_lease is
    'Lease of the newest poll, null when that was empty: all that commit_offset may settle.';

-- The names of pg_trickle 0.28 are views over the tables above; where the
-- extension brings tables of these names, they stay as they are.
do $create$
begin
    if to_regclass('pgtrickle.pgt_consumer_groups') is null then
        create view pgtrickle.pgt_consumer_groups as
        select
            g.group_name,
            g.outbox_table as outbox_name,
            g.auto_offset_reset,
            g.watermark,
            g.frontier,
            g.created_at
        from pgtrickle.relay_groups as g;
        comment on view pgtrickle.pgt_consumer_groups is
            'Consumer groups; watermark as of the last poll.';
    end if;

    if to_regclass('pgtrickle.pgt_consumer_offsets') is null then
        create view pgtrickle.pgt_consumer_offsets as
        select
            g.group_name,
            c.consumer_id,
            g.watermark as committed_offset,
            c.last_heartbeat_at
        from pgtrickle.relay_group_consumers as c
        join pgtrickle.relay_groups as g using (group_id);
        comment on view pgtrickle.pgt_consumer_offsets is
            'Consumers; the offset is the group''s, since a group has one position.';
    end if;

    if to_regclass('pgtrickle.pgt_consumer_leases') is null then
        create view pgtrickle.pgt_consumer_leases as
        select
            g.group_name,
            l.consumer_id,
            l.lease_token,
            l.outbox_ids[1] as batch_start,
            l.outbox_ids[cardinality(l.outbox_ids)] as batch_end,
            cardinality(l.outbox_ids) as row_count,
            l.leased_at,
            l.expires_at
        from pgtrickle.relay_group_leases as l
        join pgtrickle.relay_groups as g using (group_id);
        comment on view pgtrickle.pgt_consumer_leases is
            'Rows in the hands of consumers, by lease.';
    end if;
end
$create$;

-- ---------------------------------------------------------------------------
-- Inbox
-- ---------------------------------------------------------------------------

create table pgtrickle.relay_inboxes (
    inbox_name text primary key
        check (length(inbox_name) between 1 and 200),
    inbox_schema name not null,
    inbox_table name not null,
    adopted boolean not null default false,
    max_retries integer not null default 5
        check (max_retries >= 0),
    schedule text not null default '1s',
    with_dead_letter boolean not null default true,
    with_stats boolean not null default true,
    retention_hours integer
        check (retention_hours > 0),
    columns jsonb not null,
    policies text not null default 'enforced'
        check (policies in ('enforced', 'bypassed')),
    parts jsonb not null,
    created_at timestamptz not null default now(),
    unique (inbox_schema, inbox_table)
);

comment on table pgtrickle.relay_inboxes is
    'Tables that messages are written to, each with its columns and views.';
comment on column pgtrickle.relay_inboxes.adopted is
    'The table belongs to somebody else: it is never dropped, swept only where retention is set.';
comment on column pgtrickle.relay_inboxes.columns is
    'Our field to the table''s column; fields without a column are left out.';
comment on column pgtrickle.relay_inboxes.policies is
    'bypassed: the owner accepts that row-level security does not hold for what is received.';
comment on column pgtrickle.relay_inboxes.parts is
    'Names of the functions (receive, count, sweep) and views (pending, dlq, stats) that stand beside the table.';
comment on column pgtrickle.relay_inboxes.schedule is
    'Kept for pg_trickle, where it says how often the views are refreshed; ordinary views need none.';
comment on column pgtrickle.relay_inboxes.retention_hours is
    'Processed messages are kept so long; null: for ever.';

do $create$
begin
    if to_regclass('pgtrickle.pgt_inbox_config') is null then
        create view pgtrickle.pgt_inbox_config as
        select
            i.inbox_name,
            i.inbox_schema,
            i.inbox_table,
            i.adopted,
            i.max_retries,
            i.schedule,
            i.with_dead_letter,
            i.with_stats,
            i.retention_hours,
            i.columns,
            i.created_at
        from pgtrickle.relay_inboxes as i;
        comment on view pgtrickle.pgt_inbox_config is
            'Inboxes under the name that pg_trickle 0.28 uses.';
    end if;
end
$create$;
