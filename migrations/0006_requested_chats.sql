-- A `verify` command asks for a set of chats, and its request ends when each of them is verified and, if that was
-- requested, repaired or given up. Open requests of earlier versions are dropped. `conversations.verified_in` now refers
-- only to the passes in idle time.

DROP TABLE findings;
DELETE FROM verifications WHERE NOT idle;
ALTER TABLE verifications DROP COLUMN conversation;

CREATE TABLE requested_chats (
    verification INTEGER NOT NULL REFERENCES verifications (id) ON DELETE CASCADE,
    conversation INTEGER NOT NULL REFERENCES conversations (id),
    next_at      INTEGER NOT NULL DEFAULT 0,     -- not before this time: the chat could not be read
    state        TEXT,                           -- NULL: the chat is still to be verified
    messages     INTEGER NOT NULL DEFAULT 0,     -- how many were missing
    fields       TEXT NOT NULL DEFAULT '[]',     -- those that differ, as a JSON array
    repairing    INTEGER NOT NULL DEFAULT 0 CHECK (repairing = 0 OR repairing = 1), -- not repaired yet
    not_repaired TEXT,                           -- why it is not completely repaired
    PRIMARY KEY (conversation, verification)
) STRICT, WITHOUT ROWID;
CREATE INDEX requested_chats_open ON requested_chats (next_at, verification, conversation) WHERE state IS NULL;
CREATE INDEX requested_chats_repairing ON requested_chats (verification) WHERE repairing;
CREATE INDEX requested_chats_not_repaired ON requested_chats (verification) WHERE not_repaired IS NOT NULL;
