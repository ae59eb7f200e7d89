-- pgtrickle 0.28.0: outbox, consumer groups and inbox on plain PostgreSQL.
--
-- Run once, frozen by checksum, as the schema's owner. The prologue (sql/prologue.sql) has made the
-- roles and the schema.

-- ---------------------------------------------------------------------------
-- Outbox
-- ---------------------------------------------------------------------------

create table @schema@.pgt_outbox_config (
    outbox_table_name text primary key,
    stream_schema text,
    stream_table text not null,
    delta_table_name text not null,
    sleep_sequence_name text not null,
    pgt_id uuid not null unique,
    capture text not null
        check (capture in ('auto', 'statement', 'row', 'none')),
    capture_schema text,
    capture_function text,
    key_columns text[],
    notify boolean not null,
    claim_check_rows integer not null,
    claim_check_bytes bigint not null,
    retention_hours integer not null,
    swept_through bigint not null,
    snapshot_through bigint not null,
    enabled_at timestamptz not null,
    last_drained_at timestamptz,
    last_drained_count bigint not null,
    swept_created_at timestamptz,
    had_rows boolean not null default false,
    adopted jsonb
);

comment on table @schema@.pgt_outbox_config is
    'Enabled outboxes. Which table one captures now is not stored: the triggers say it, whatever the table is called since.';
comment on column @schema@.pgt_outbox_config.stream_schema is
    'Schema of the captured table when it was enabled; null for a stream that only outbox_publish writes.';
comment on column @schema@.pgt_outbox_config.stream_table is
    'The name in events: that of the table when it was enabled.';
comment on column @schema@.pgt_outbox_config.sleep_sequence_name is
    'A sequence whose value says until when, in seconds since 1970, some relay sleeps on the outbox: a publisher reads that in a tenth of the time that relay_sleepers takes.';
comment on column @schema@.pgt_outbox_config.pgt_id is
    'Identity of the outbox, the same in every row of it, another after it was enabled again.';
comment on column @schema@.pgt_outbox_config.capture_function is
    'What the capture function beside the table was called when it was made: it outlives the table. Whether it still counts, its owner''s rights on the outbox say.';
comment on column @schema@.pgt_outbox_config.key_columns is
    'Columns that identify an entity: the primary key when it was enabled, or what enable_outbox was told.';
comment on column @schema@.pgt_outbox_config.claim_check_bytes is
    'Above this size the rows go to the delta table; far below the 256 MB where jsonb ends.';
comment on column @schema@.pgt_outbox_config.swept_through is
    'Highest id that retention has deleted; never goes back.';
comment on column @schema@.pgt_outbox_config.swept_created_at is
    'The latest created_at among what retention has deleted.';
comment on column @schema@.pgt_outbox_config.snapshot_through is
    'Of a stream table of pg_trickle: its newest refresh without triggers that the outbox tells.';
comment on column @schema@.pgt_outbox_config.last_drained_count is
    'Rows that the last sweep deleted.';
comment on column @schema@.pgt_outbox_config.adopted is
    'Of an outbox that is a table of somebody else: ids_drawn_by_insert, as its owner declared, and delete_delivered. Which table, and which of its columns, is not stored: the functions beside it say it.';
comment on column @schema@.pgt_outbox_config.had_rows is
    'The table had rows when the outbox was enabled, which have no event until they are backfilled.';

create table @schema@.relay_outbox_high_water (
    outbox_table_name text primary key,
    last_id bigint not null,
    disabled_at timestamptz not null default now()
);

comment on table @schema@.relay_outbox_high_water is
    'Highest id drawn by a disabled outbox: ids of its successor continue above, so that deduplication keys stay unique.';

create unlogged table @schema@.relay_sleepers (
    outbox_table text not null,
    sleeper text not null,
    sleeps_until timestamptz not null,
    primary key (outbox_table, sleeper)
) with (fillfactor = 50);

comment on table @schema@.relay_sleepers is
    'Relays that sleep on an outbox: publishers notify only while one does. Unlogged, since a lost flag costs one fallback poll.';

-- ---------------------------------------------------------------------------
-- Consumer groups
-- ---------------------------------------------------------------------------

create table @schema@.relay_groups (
    group_id bigint generated always as identity primary key,
    group_name text not null unique
        check (length(group_name) between 1 and 200),
    outbox_table_name text not null,
    pgt_id uuid not null,
    auto_offset_reset text not null
        check (auto_offset_reset in ('earliest', 'latest')),
    relay_group_id text,
    frontier bigint not null default 0,
    watermark bigint not null default 0,
    leases_since timestamptz not null default '-infinity',
    server_instance text not null default '',
    created_at timestamptz not null default now()
) with (fillfactor = 50);

comment on table @schema@.relay_groups is
    'Consumer groups. A group has one position: everything up to the frontier is settled, except what stands in relay_group_gaps, relay_group_leases and relay_group_returned. No foreign keys: each would lock this row from every commit.';
comment on column @schema@.relay_groups.outbox_table_name is
    'The outbox that the group reads, bound when it was made: nothing looks its name up again.';
comment on column @schema@.relay_groups.pgt_id is
    'Identity of that outbox; another one means that it was made again.';
comment on column @schema@.relay_groups.relay_group_id is
    'The relay group whose pipeline reads the group; null while none does.';
comment on column @schema@.relay_groups.frontier is
    'Highest id that a poll has passed. Only seek_offset moves it back.';
comment on column @schema@.relay_groups.watermark is
    'Lower bound of what is settled without exception, as of the last poll.';
comment on column @schema@.relay_groups.leases_since is
    'No lease expires before this time: spares a poll the dead index entries of old leases.';
comment on column @schema@.relay_groups.server_instance is
    'Run of the server in which the holders were noted. In another one, after a start or a restore, their names mean nothing.';

create index relay_groups_of_outbox on @schema@.relay_groups (outbox_table_name);
comment on index @schema@.relay_groups_of_outbox is
    'Serves relay_outbox_readers.';

create table @schema@.relay_group_cohorts (
    cohort_id bigint generated always as identity primary key,
    group_id bigint not null,
    holders text[] not null
);

comment on table @schema@.relay_group_cohorts is
    'Gaps that wait for the same transactions. While all of these live nothing of the cohort is read again, however many gaps it has.';
comment on column @schema@.relay_group_cohorts.holders is
    'Virtual transaction ids that held RowExclusiveLock on the outbox, sorted; an empty one in front: the gaps were not read again since they were noted.';

create index relay_group_cohorts_of_group on @schema@.relay_group_cohorts (group_id);
comment on index @schema@.relay_group_cohorts_of_group is
    'Serves each poll: all cohorts of a group.';

create table @schema@.relay_group_gaps (
    group_id bigint not null,
    first_id bigint not null,
    last_id bigint not null,
    cohort_id bigint not null,
    primary key (group_id, first_id),
    check (first_id <= last_id)
);

comment on table @schema@.relay_group_gaps is
    'Ids below the frontier that were not visible when it passed them. Ranges, both ends included.';

create index relay_group_gaps_of_cohort on @schema@.relay_group_gaps (cohort_id, first_id);
comment on index @schema@.relay_group_gaps_of_cohort is
    'Serves relay_group_read_gaps: the next gaps of one cohort.';

create table @schema@.relay_group_leases (
    lease_token uuid primary key,
    group_id bigint not null,
    consumer_id text not null,
    outbox_ids bigint[] not null,
    leased_at timestamptz not null,
    expires_at timestamptz not null
);

comment on table @schema@.relay_group_leases is
    'Rows in the hands of a consumer. A row is gone when they are settled, given back or taken over.';

create index relay_group_leases_expiry on @schema@.relay_group_leases (group_id, expires_at);
comment on index @schema@.relay_group_leases_expiry is
    'Serves each poll: leases that have run out.';

create table @schema@.relay_group_returned (
    group_id bigint not null,
    outbox_id bigint not null,
    primary key (group_id, outbox_id)
);

comment on table @schema@.relay_group_returned is
    'Rows below the frontier that nobody holds: given back, of a lease that ran out, or late.';

create table @schema@.relay_group_consumers (
    group_id bigint not null,
    consumer_id text not null,
    newest_lease uuid,
    last_heartbeat_at timestamptz not null,
    primary key (group_id, consumer_id)
) with (fillfactor = 50);

comment on table @schema@.relay_group_consumers is
    'Consumers that have polled or sent a heartbeat.';
comment on column @schema@.relay_group_consumers.newest_lease is
    'Lease of the newest poll, null when that was empty: all that commit_offset may settle.';

-- ---------------------------------------------------------------------------
-- Inbox
-- ---------------------------------------------------------------------------

create table @schema@.relay_inboxes (
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

comment on table @schema@.relay_inboxes is
    'Tables that messages are written to, each with its columns and views.';
comment on column @schema@.relay_inboxes.adopted is
    'The table belongs to somebody else: it is never dropped, swept only where retention is set.';
comment on column @schema@.relay_inboxes.columns is
    'Our field to the table''s column; fields without a column are left out.';
comment on column @schema@.relay_inboxes.policies is
    'bypassed: the owner accepts that row-level security does not hold for what is received.';
comment on column @schema@.relay_inboxes.parts is
    'Names of the functions (receive, count, sweep) and views (pending, dlq, stats) that stand beside the table, and the arguments of receive.';
comment on column @schema@.relay_inboxes.schedule is
    'Kept for pg_trickle, where it says how often the views are refreshed; ordinary views need none.';
comment on column @schema@.relay_inboxes.retention_hours is
    'Processed messages are kept so long; null: for ever.';
