-- pgtrickle 0.29.0: the relay catalog.
--
-- Run once, frozen by checksum, as the schema's owner. Nothing here is readable
-- by the relay itself: it works through the functions of sql/functions only.

-- ---------------------------------------------------------------------------
-- Pipelines
-- ---------------------------------------------------------------------------

create table @schema@.relay_pipeline_names (
    name text primary key
        check (length(name) between 1 and 200)
        check (name !~ '/[0-9]+$'),
    direction text not null
        check (direction in ('forward', 'reverse'))
);

comment on table @schema@.relay_pipeline_names is
    'Names of all pipelines. One primary key over both directions keeps names unique under concurrency, which two tables can''t.';
comment on column @schema@.relay_pipeline_names.name is
    'None ends like orders/3: that is the third reader of a pipeline with partitions.';
comment on column @schema@.relay_pipeline_names.direction is
    'forward: outbox to broker (relay_outbox_config); reverse: broker to inbox (relay_inbox_config).';

create table @schema@.relay_outbox_config (
    name text primary key
        check (length(name) between 1 and 200),
    enabled boolean not null default true,
    config jsonb not null,
    outbox_table_name text,
    start_after_id bigint not null default 0,
    start_gaps int8multirange not null default '{}',
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now()
);

comment on table @schema@.relay_outbox_config is
    'Forward pipelines: an outbox to a broker. Written by set_relay_outbox.';
comment on column @schema@.relay_outbox_config.config is
    'source_type, source, sink_type, sink, config_version and the pipeline''s own keys.';
comment on column @schema@.relay_outbox_config.outbox_table_name is
    'The outbox that the pipeline reads, bound when it was set: nothing looks its name up again.';
comment on column @schema@.relay_outbox_config.start_after_id is
    'Where a new position starts: 0, or for start=latest the highest visible id when the pipeline was set.';
comment on column @schema@.relay_outbox_config.start_gaps is
    'Ids missing below start_after_id at that moment: transactions open then are still delivered.';

create table @schema@.relay_inbox_config (
    name text primary key
        check (length(name) between 1 and 200),
    enabled boolean not null default true,
    config jsonb not null,
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now()
);

comment on table @schema@.relay_inbox_config is
    'Reverse pipelines: a broker to an inbox. Written by set_relay_inbox.';
comment on column @schema@.relay_inbox_config.config is
    'source_type, source, sink_type, sink, config_version and the pipeline''s own keys.';

-- ---------------------------------------------------------------------------
-- Positions
-- ---------------------------------------------------------------------------

create table @schema@.relay_consumer_offsets (
    relay_group_id text not null,
    pipeline_id text not null,
    pipeline text not null
        generated always as (regexp_replace(pipeline_id, '/[0-9]+$', '')) stored,
    partitioning jsonb not null default '{}',
    outbox_table text,
    last_change_id bigint not null default 0,
    epoch bigint not null default 0,
    worker_id text,
    updated_at timestamptz not null default now(),
    primary key (relay_group_id, pipeline_id)
) with (fillfactor = 50);

comment on table @schema@.relay_consumer_offsets is
    'Position and owner of each pipeline in each relay group. Updated once a batch: the free half of a page keeps those updates in it.';
comment on column @schema@.relay_consumer_offsets.pipeline_id is
    'The pipeline, or one reader of a pipeline with partitions: orders/3.';
comment on column @schema@.relay_consumer_offsets.pipeline is
    'The pipeline whose reader this is.';
comment on column @schema@.relay_consumer_offsets.partitioning is
    'By what the keys were dealt to the readers when these positions were reached; {} for one reader.';
comment on column @schema@.relay_consumer_offsets.outbox_table is
    'Outbox that the position belongs to; null for reverse pipelines.';
comment on column @schema@.relay_consumer_offsets.last_change_id is
    'Every id up to here is delivered, except those in relay_pending_gaps.';
comment on column @schema@.relay_consumer_offsets.epoch is
    'Raised by each claim; a worker with an older epoch can''t write any more.';
comment on column @schema@.relay_consumer_offsets.worker_id is
    'Owner now; null when it was released.';

create table @schema@.relay_pending_gaps (
    relay_group_id text not null,
    pipeline_id text not null,
    first_id bigint not null,
    last_id bigint not null,
    primary key (relay_group_id, pipeline_id, first_id),
    check (first_id <= last_id)
);

comment on table @schema@.relay_pending_gaps is
    'Ids below the position that were not visible when it passed them: their transactions may still commit. Ranges, both ends included.';

create table @schema@.relay_cursors (
    relay_group_id text not null,
    pipeline_id text not null,
    cursor_key text not null,
    position jsonb not null,
    updated_at timestamptz not null default now(),
    primary key (relay_group_id, pipeline_id, cursor_key)
);

comment on table @schema@.relay_cursors is
    'Positions that a source without a broker''s memory keeps, such as byte offsets of a file.';

create table @schema@.relay_seeks (
    pipeline text not null
        references @schema@.relay_outbox_config on delete cascade,
    relay_group_id text not null,
    outbox_table text not null,
    sought_to text not null,
    sought_by text not null,
    sought_at timestamptz not null default now(),
    after_id bigint not null,
    through_id bigint not null,
    primary key (pipeline, relay_group_id)
);

comment on table @schema@.relay_seeks is
    'Where relay_seek put a pipeline last, and who asked for it. Seen through relay_seek_progress.';
comment on column @schema@.relay_seeks.outbox_table is
    'A pipeline that reads another one since then was moved by that.';
comment on column @schema@.relay_seeks.through_id is
    'Highest id that was visible at that moment: until the position is there, what it held is sent.';

-- ---------------------------------------------------------------------------
-- Backfills
-- ---------------------------------------------------------------------------

create table @schema@.relay_backfills (
    backfill_id bigint generated always as identity primary key,
    outbox_table_name text not null,
    pgt_id uuid not null,
    pipeline text,
    filter_digest text,
    key_columns text[] not null,
    through_key text[],
    call_token uuid not null unique,
    call_pid integer not null default pg_backend_pid(),
    sent_rows bigint not null default 0,
    estimated_rows bigint,
    started_at timestamptz not null default now(),
    updated_at timestamptz not null default now(),
    progressed_at timestamptz not null default now(),
    finished_at timestamptz
) with (fillfactor = 50);

comment on table @schema@.relay_backfills is
    'Runs of backfill and how far each has come. Seen through the view backfill_progress.';
comment on column @schema@.relay_backfills.pgt_id is
    'Identity of the outbox: what was sent to a former one does not count.';
comment on column @schema@.relay_backfills.pipeline is
    'Who gets the rows; null: all pipelines and groups.';
comment on column @schema@.relay_backfills.filter_digest is
    'Whether a call has the same filter. Not the filter: values of rows may stand in it.';
comment on column @schema@.relay_backfills.through_key is
    'Key of the last row that was looked at, in the text form of its types; null before the first.';
comment on column @schema@.relay_backfills.call_token is
    'Known to the call that is at it alone; the next call gets another.';
comment on column @schema@.relay_backfills.call_pid is
    'Server process of that call.';
comment on column @schema@.relay_backfills.updated_at is
    'When the call was last at it, in vain or not.';
comment on column @schema@.relay_backfills.progressed_at is
    'When through_key was last moved, or a call began.';

create index relay_backfills_of_outbox on @schema@.relay_backfills (pgt_id);
comment on index @schema@.relay_backfills_of_outbox is
    'Serves relay_register_backfill and backfill_progress: the runs of one outbox.';

-- ---------------------------------------------------------------------------
-- Dead letters
-- ---------------------------------------------------------------------------

create table @schema@.relay_dlq (
    id bigint generated always as identity primary key,
    relay_group_id text not null,
    pipeline text not null,
    direction text not null
        check (direction in ('forward', 'reverse')),
    dedup_key text not null,
    subject text,
    message_key text,
    op text,
    headers jsonb not null default '{}',
    payload bytea,
    metadata jsonb not null default '{}',
    key_hash bigint not null default 0,
    error_kind text not null,
    error text not null,
    attempts integer not null default 1,
    first_failed_at timestamptz not null default now(),
    last_failed_at timestamptz not null default now()
);

comment on table @schema@.relay_dlq is
    'Messages that could not be delivered, with what is needed to send them again.';
comment on column @schema@.relay_dlq.payload is
    'Raw bytes: what condemned a message may be that its payload is no valid text.';
comment on column @schema@.relay_dlq.metadata is
    'stream_table, outbox_id, refresh_id, created_at and is_full_refresh of the message.';

comment on column @schema@.relay_dlq.key_hash is
    'CRC-32 of the key, 0 without one: says which reader of a pipeline with partitions sends it again.';

-- A digest, since a deduplication key may be longer than an index entry.
create unique index relay_dlq_message on @schema@.relay_dlq
    (relay_group_id, pipeline, md5(dedup_key));
comment on index @schema@.relay_dlq_message is
    'Serves relay_dead_letter: a message that fails again updates its entry.';

create index relay_dlq_by_pipeline on @schema@.relay_dlq (pipeline, id)
    include (relay_group_id, direction, first_failed_at, last_failed_at);
comment on index @schema@.relay_dlq_by_pipeline is
    'Serves relay_dlq_list, relay_dlq_retry_all, relay_dlq_purge and, without the letters themselves, relay_dlq_stats.';

create index relay_dlq_of_row on @schema@.relay_dlq
    (relay_group_id, pipeline, (metadata ->> 'outbox_id'));
comment on index @schema@.relay_dlq_of_row is
    'Serves relay_delivered: what became dead letters of one row of an outbox.';

create table @schema@.relay_dlq_retries (
    relay_group_id text not null,
    pipeline text not null,
    id bigint not null,
    requested_at timestamptz not null default now(),
    taken_until timestamptz,
    primary key (relay_group_id, pipeline, id)
);

comment on table @schema@.relay_dlq_retries is
    'Dead letters that their pipeline sends again. Apart from the letters, which are large: asking for hundreds of thousands rewrites none of them.';
comment on column @schema@.relay_dlq_retries.taken_until is
    'Until then only who took it sends it: every relay runs a consumer group, or a receiver.';

-- ---------------------------------------------------------------------------
-- Fleet
-- ---------------------------------------------------------------------------

create table @schema@.relay_workers (
    relay_group_id text not null,
    worker_id text not null,
    host text,
    pid integer,
    version text,
    started_at timestamptz not null default now(),
    last_seen_at timestamptz not null default now(),
    report jsonb not null default '{}',
    primary key (relay_group_id, worker_id)
) with (fillfactor = 50);

comment on table @schema@.relay_workers is
    'Heartbeat of each relay process and what it says about its pipelines.';
