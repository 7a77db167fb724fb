-- Whether a retry of a dead letter is pointless is stored, not read from the text of its reason.

-- 1: the event could not be parsed, or OurAPI permanently rejected it.
ALTER TABLE dead_letters ADD COLUMN permanent INTEGER NOT NULL DEFAULT 0 CHECK (permanent = 0 OR permanent = 1);

UPDATE dead_letters SET permanent = 1
    WHERE event IN (SELECT id FROM events WHERE kind = 'UNREADABLE')
       OR event IN (SELECT event FROM attempts WHERE reason LIKE 'OurAPI permanently rejects it%');
