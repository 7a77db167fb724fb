-- The journal: an append-only log of BigChat's events, how far each conversation was delivered, and what is known of
-- both APIs.
--
-- Times reported by BigChat are whole Unix seconds by its clock. All other times are Unix milliseconds by this machine's.

-- How far BigChat was read, and the poll in progress: one row.
CREATE TABLE poll_state (
    id           INTEGER PRIMARY KEY CHECK (id = 1),
    cursor       INTEGER,                        -- BigChat was read up to this time
    window_start INTEGER,                        -- of the poll in progress; NULL: there is none
    window_end   INTEGER,
    next_query   TEXT,                           -- its next page; NULL: its last page is stored
    rescans_left INTEGER NOT NULL DEFAULT 0,     -- how many more polls of a window read again may be empty
    cursor_moved_at INTEGER,                     -- when the cursor last changed
    polled_at    INTEGER,                        -- when a poll last completed
    clock_ahead  INTEGER,                        -- seconds BigChat's clock was ahead of this machine's then
    newest_event INTEGER,                        -- the latest event_at ever received
    CHECK ((window_start IS NULL) = (window_end IS NULL)),
    CHECK (next_query IS NULL OR window_start IS NOT NULL)
) STRICT;
INSERT INTO poll_state (id) VALUES (1);

-- Periods that BigChat no longer reports and that were not read.
CREATE TABLE gaps (
    id        INTEGER PRIMARY KEY,
    starts_at INTEGER NOT NULL,
    ends_at   INTEGER NOT NULL,
    found_at  INTEGER NOT NULL
) STRICT;

-- The state of delivery as a whole: one row.
CREATE TABLE control (
    id                  INTEGER PRIMARY KEY CHECK (id = 1),
    session             INTEGER NOT NULL DEFAULT 0, -- how often the daemon has started
    writes_succeeded    INTEGER NOT NULL DEFAULT 0,
    losses              INTEGER NOT NULL DEFAULT 0, -- how often OurAPI was found to have lost something
    timed_out_until     INTEGER NOT NULL DEFAULT 0, -- requests that timed out may be carried out until then
    paused_at           INTEGER,                    -- when deliveries were last paused
    paused_until        INTEGER,                    -- when that pause ends; NULL: only by resuming
    resumed_at          INTEGER,                    -- when it ended; NULL: it has not, as far as is recorded
    clean_end           INTEGER NOT NULL DEFAULT 1 CHECK (clean_end = 0 OR clean_end = 1),
    -- the settings of the last session that decide what is a problem, in seconds
    poll_interval       REAL NOT NULL DEFAULT 0,
    verify_every        REAL                        -- NULL: chats are not verified in idle time
) STRICT;
INSERT INTO control (id) VALUES (1);

-- How often OurAPI was found to have lost something, per minute of this machine's clock, in the last hour.
CREATE TABLE losses (
    minute INTEGER PRIMARY KEY,
    count  INTEGER NOT NULL
) STRICT;

-- From one restart of BigChat to the next: in another epoch an id means another conversation or advisor.
CREATE TABLE epochs (
    id       INTEGER PRIMARY KEY,
    began_at INTEGER NOT NULL
) STRICT;
INSERT INTO epochs (id, began_at) VALUES (1, 0);

-- The pages of the poll in progress, as they came. Their events are ingested once their epoch is known; the pages stay
-- until the poll ends, since equal messages are counted over all of them.
CREATE TABLE inbox (
    id           INTEGER PRIMARY KEY,
    query        TEXT NOT NULL,
    served_at    INTEGER NOT NULL,               -- by BigChat's clock
    window_start INTEGER NOT NULL,
    body         TEXT NOT NULL,
    requested_in INTEGER NOT NULL,               -- the latest known epoch when it was requested: it belongs to that or a later one
    ingested     INTEGER NOT NULL DEFAULT 0 CHECK (ingested = 0 OR ingested = 1)
) STRICT;

CREATE TABLE conversations (
    id               INTEGER PRIMARY KEY,
    epoch            INTEGER NOT NULL REFERENCES epochs (id),
    bigchat_id       INTEGER NOT NULL,
    details          TEXT NOT NULL DEFAULT 'unread' CHECK (details = 'unread' OR details = 'read' OR details = 'gone'),
    -- desired: the fold of its details and of its accepted events
    started_at       INTEGER,                    -- by its START or its details; NULL: neither is known
    first_advisor    INTEGER,                    -- of the details when they were first read
    ended_at         INTEGER,
    transfer_at      INTEGER,
    transfer_event   INTEGER,
    transfer_advisor INTEGER,
    -- observed: what OurAPI has, as last written or read
    external_id      TEXT,                       -- once chosen
    chat_id          TEXT,                       -- NULL: no chat yet
    chat_started_at  INTEGER,                    -- also while its creation is in progress
    chat_ended_at    INTEGER,
    chat_agent       TEXT,
    chat_advisor     INTEGER,                    -- whose agent that is; NULL: not known
    -- whether what was observed can be relied on
    stale_seq        INTEGER NOT NULL DEFAULT 0, -- raised whenever the chat becomes stale
    fresh_seq        INTEGER NOT NULL DEFAULT 0, -- stale_seq as of the claim that last read the chat
    verified_losses  INTEGER NOT NULL DEFAULT 0, -- control.losses as of that claim
    read_in_session  INTEGER NOT NULL DEFAULT 0, -- the session that last read the chat's messages or created it
    -- verification
    verified_in      INTEGER,                    -- the latest verification when it was last verified or created; NULL: there is
                                                 -- nothing to verify, no chat or no event
    drift            TEXT,                       -- the fields that another client has changed, when last read; NULL: none
    missing          TEXT,                       -- what OurAPI has lost of it and was not restored, when last verified
    -- progress
    offset           INTEGER NOT NULL DEFAULT 0, -- events up to this one are delivered, except dead letters and redeliveries
    restored_through INTEGER NOT NULL DEFAULT 0, -- events up to this one were delivered before, to a chat that is gone
    waiting          INTEGER NOT NULL DEFAULT 0, -- events above the offset that are no dead letters, and redeliveries
    waiting_since    INTEGER,                    -- when the oldest of those was received
    due_at           INTEGER,                    -- when it is to be worked on; NULL: there is nothing to do
    -- erasure: no data of a forgotten conversation's events is stored, and none of it is sent or verified any more
    forgotten_at     INTEGER,
    forgotten_by     TEXT,
    UNIQUE (epoch, bigchat_id)
) STRICT;
CREATE INDEX conversations_due ON conversations (due_at) WHERE due_at IS NOT NULL;
-- The index is not on `waiting`, which changes with each event. A conversation with waiting events has a `due_at`.
CREATE INDEX conversations_waiting ON conversations (waiting_since) WHERE waiting_since IS NOT NULL;
CREATE INDEX conversations_by_bigchat_id ON conversations (bigchat_id);
CREATE INDEX conversations_by_verified_losses ON conversations (verified_losses)
    WHERE external_id IS NOT NULL AND forgotten_at IS NULL;
CREATE INDEX conversations_by_verification ON conversations (verified_in) WHERE verified_in IS NOT NULL;
CREATE INDEX conversations_with_drift ON conversations (drift) WHERE drift IS NOT NULL;
CREATE INDEX conversations_with_missing ON conversations (missing) WHERE missing IS NOT NULL;
CREATE INDEX conversations_by_chat ON conversations (chat_id) WHERE chat_id IS NOT NULL;
CREATE INDEX conversations_by_agent ON conversations (chat_agent) WHERE chat_agent IS NOT NULL;

-- The log. A row is appended, never updated unless it is erased, and dropped after the retention period.
CREATE TABLE events (
    id           INTEGER PRIMARY KEY AUTOINCREMENT, -- in order of arrival, never reused
    conversation INTEGER REFERENCES conversations (id), -- NULL: the event could not be parsed
    kind         TEXT NOT NULL,
    event_at     INTEGER NOT NULL,
    data         TEXT,                           -- canonical JSON; the whole raw event if it could not be parsed; NULL: erased
    fingerprint  INTEGER NOT NULL,               -- of kind, time and data
    received_at  INTEGER NOT NULL
) STRICT;
CREATE INDEX events_of_conversation ON events (conversation, id);
CREATE INDEX events_by_fingerprint ON events (conversation, fingerprint);

-- Events up to the offset that are to be sent again: retried, or missing in OurAPI.
CREATE TABLE redeliveries (
    conversation INTEGER NOT NULL REFERENCES conversations (id),
    event        INTEGER NOT NULL REFERENCES events (id) ON DELETE CASCADE,
    restored     INTEGER NOT NULL CHECK (restored = 0 OR restored = 1), -- it was delivered before
    PRIMARY KEY (conversation, event)
) STRICT, WITHOUT ROWID;
CREATE INDEX redeliveries_by_event ON redeliveries (event);

-- Messages in OurAPI that are not accounted for by a delivered event or a dead letter, as of the last read of the chat.
CREATE TABLE credits (
    conversation INTEGER NOT NULL REFERENCES conversations (id),
    sent_at      INTEGER NOT NULL,
    text         TEXT NOT NULL,
    count        INTEGER NOT NULL,
    as_of        INTEGER NOT NULL,               -- the conversation's latest event before the read
    PRIMARY KEY (conversation, sent_at, text)
) STRICT, WITHOUT ROWID;

-- The history of delivery: one row for consecutive events of a conversation with the same effect.
CREATE TABLE deliveries (
    id           INTEGER PRIMARY KEY,
    conversation INTEGER NOT NULL REFERENCES conversations (id),
    from_event   INTEGER NOT NULL,
    through      INTEGER NOT NULL,
    delivered_at INTEGER NOT NULL,
    effect       TEXT NOT NULL,                  -- 'forgotten': they were not delivered before they were erased
    waited       INTEGER                         -- ms since the oldest of them was received; NULL: it was delivered before
) STRICT;
CREATE INDEX deliveries_of_conversation ON deliveries (conversation, through);
CREATE INDEX deliveries_by_time ON deliveries (delivered_at);

-- Events that have failed at least once and are not delivered.
CREATE TABLE attempts (
    event           INTEGER PRIMARY KEY REFERENCES events (id) ON DELETE CASCADE,
    conversation    INTEGER,
    attempts        INTEGER NOT NULL,            -- all failures but denials, for the back-off
    counted         INTEGER NOT NULL,            -- failures while other conversations were delivered
    next_at         INTEGER,                     -- NULL: no attempt is scheduled
    writes_then     INTEGER,                     -- control.writes_succeeded at the last failure
    outcome_unknown INTEGER NOT NULL DEFAULT 0 CHECK (outcome_unknown = 0 OR outcome_unknown = 1),
    reason          TEXT NOT NULL,
    request         TEXT NOT NULL,
    response        TEXT NOT NULL
) STRICT;
CREATE INDEX attempts_of_conversation ON attempts (conversation) WHERE conversation IS NOT NULL;

-- The latest failures of an event. `attempt` is the number of its failures up to and including this one.
CREATE TABLE failures (
    event     INTEGER NOT NULL REFERENCES attempts (event) ON DELETE CASCADE,
    attempt   INTEGER NOT NULL,
    failed_at INTEGER NOT NULL,
    reason    TEXT NOT NULL,
    request   TEXT NOT NULL,
    response  TEXT NOT NULL,
    PRIMARY KEY (event, attempt)
) STRICT, WITHOUT ROWID;

-- Events that are not delivered until an operator resolves them.
CREATE TABLE dead_letters (
    event        INTEGER PRIMARY KEY REFERENCES events (id) ON DELETE CASCADE,
    conversation INTEGER,
    failed_at    INTEGER NOT NULL,
    discarded_at INTEGER,                        -- NULL: open
    -- of an event that could not be parsed, for a later version that can parse it:
    epoch        INTEGER REFERENCES epochs (id),
    received     INTEGER                         -- how many equal ones one poll reported
) STRICT;
CREATE INDEX dead_letters_open ON dead_letters (event) WHERE discarded_at IS NULL;
CREATE INDEX dead_letters_discarded ON dead_letters (discarded_at) WHERE discarded_at IS NOT NULL;
CREATE INDEX dead_letters_of_conversation ON dead_letters (conversation, event);

-- Who retried, discarded or reopened a dead letter, and when. Never dropped.
CREATE TABLE resolutions (
    id           INTEGER PRIMARY KEY AUTOINCREMENT,
    resolved_at  INTEGER NOT NULL,
    resolved_by  TEXT NOT NULL,                  -- 'command' or 'console'
    user         TEXT,                           -- NULL: unknown
    resolution   TEXT NOT NULL CHECK (resolution IN ('retry', 'discard', 'undo')),
    event        INTEGER NOT NULL,               -- which may have been dropped since, after the retention period
    conversation INTEGER,                        -- BigChat's id; NULL: not even that could be parsed
    kind         TEXT NOT NULL,
    reason       TEXT NOT NULL                   -- why it had failed
) STRICT;
CREATE INDEX resolutions_by_event ON resolutions (event);

-- Requests to verify chats, for the process that delivers. A chat waits for a verification as long as its `verified_in` is
-- smaller, so that the cost of a request does not grow with the chats.
CREATE TABLE verifications (
    id           INTEGER PRIMARY KEY AUTOINCREMENT, -- never reused
    idle         INTEGER NOT NULL CHECK (idle = 0 OR idle = 1), -- 1: the pass in idle time, one row; 0: by the `verify` command
    requested_at INTEGER NOT NULL,
    ended_at     INTEGER,                        -- of the pass in idle time; NULL: it is in progress
    conversation INTEGER,                        -- BigChat's id; NULL: all chats
    repair       INTEGER NOT NULL CHECK (repair = 0 OR repair = 1),
    last_event   INTEGER NOT NULL,               -- later events are not its concern
    -- how many chats were verified so far, and what was found
    verified     INTEGER NOT NULL DEFAULT 0,
    missing      INTEGER NOT NULL DEFAULT 0,
    differing    INTEGER NOT NULL DEFAULT 0,
    messages     INTEGER NOT NULL DEFAULT 0
) STRICT;

-- The chats that a `verify` command has found to differ from their events.
CREATE TABLE findings (
    verification INTEGER NOT NULL REFERENCES verifications (id) ON DELETE CASCADE,
    conversation INTEGER NOT NULL REFERENCES conversations (id),
    state        TEXT NOT NULL,
    messages     INTEGER NOT NULL,               -- how many were missing
    fields       TEXT NOT NULL,                  -- those that differ, as a JSON array
    PRIMARY KEY (verification, conversation)
) STRICT, WITHOUT ROWID;

CREATE TABLE advisors (
    epoch      INTEGER NOT NULL REFERENCES epochs (id),
    bigchat_id INTEGER NOT NULL,
    name       TEXT,                             -- NULL: BigChat no longer knows the advisor
    email      TEXT,
    PRIMARY KEY (epoch, bigchat_id),
    CHECK ((name IS NULL) = (email IS NULL))
) STRICT, WITHOUT ROWID;

-- The agent of an e-mail address.
CREATE TABLE agents (
    email    TEXT PRIMARY KEY,
    spelled  TEXT,                               -- by OurAPI
    agent_id TEXT                                -- NULL: OurAPI permanently rejects it
) STRICT, WITHOUT ROWID;

-- The state of each API as of the daemon's latest request.
CREATE TABLE api_status (
    name          TEXT PRIMARY KEY CHECK (name = 'bigchat' OR name = 'our_api'),
    state         TEXT NOT NULL CHECK (state IN ('unknown', 'up', 'failing', 'down')),
    since         INTEGER,                       -- when that began; NULL while it is unknown
    problem       TEXT,                          -- why its latest requests failed
    lasts         INTEGER NOT NULL CHECK (lasts = 0 OR lasts = 1), -- 1: the problem lasts until an operator acts
    limited_at    INTEGER,                       -- the latest rate limit: its start, its end,
    limited_until INTEGER,
    limited_by    INTEGER,                       -- and the status of the response that asked for it
    asked_at      INTEGER NOT NULL,              -- the latest exchange
    request       TEXT NOT NULL,
    response      TEXT NOT NULL,
    CHECK ((since IS NULL) = (state = 'unknown')),
    CHECK (problem IS NULL OR state <> 'up'),
    CHECK ((limited_at IS NULL) = (limited_until IS NULL))
) STRICT, WITHOUT ROWID;

-- Events per minute of this machine's clock (Unix seconds / 60), for charts and rates.
CREATE TABLE activity (
    minute    INTEGER NOT NULL,
    kind      TEXT NOT NULL,
    received  INTEGER NOT NULL DEFAULT 0,
    delivered INTEGER NOT NULL DEFAULT 0,
    failed    INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (minute, kind)
) STRICT, WITHOUT ROWID;

-- Zeros that overwrite deleted data in free pages, or serve as a trial write. Otherwise the table is empty.
CREATE TABLE scratch (
    id    INTEGER PRIMARY KEY,
    zeros BLOB NOT NULL
) STRICT;

-- Each event with its state, which follows from the offset of its conversation.
CREATE VIEW event_states AS
SELECT e.id, e.conversation, e.kind, e.event_at, e.data, e.fingerprint, e.received_at,
    CASE
        WHEN c.forgotten_at IS NOT NULL OR e.conversation IS NULL AND e.data IS NULL THEN 'forgotten'
        WHEN d.event IS NOT NULL AND d.discarded_at IS NULL THEN 'failed'
        WHEN d.event IS NOT NULL THEN 'discarded'
        WHEN e.id > c.offset OR r.event IS NOT NULL THEN 'waiting'
        ELSE 'delivered'
    END AS state,
    d.failed_at, d.discarded_at
FROM events e
LEFT JOIN conversations c ON c.id = e.conversation
LEFT JOIN dead_letters d ON d.event = e.id
LEFT JOIN redeliveries r ON r.conversation = e.conversation AND r.event = e.id;
