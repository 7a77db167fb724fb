-- A window continues until its pages end, and its time is stored.

-- Of the polls of the unfinished window that used up their page budget: those without a new event, minus those with one.
ALTER TABLE poll_state RENAME COLUMN rescans_left TO idle_polls;
UPDATE poll_state SET idle_polls = 0;

ALTER TABLE poll_state ADD COLUMN window_at INTEGER; -- when the unfinished window was computed
ALTER TABLE poll_state ADD COLUMN read_at INTEGER;   -- the same for the latest window that was read to its end; before that: the first start
UPDATE poll_state SET read_at = polled_at;

ALTER TABLE poll_state ADD COLUMN page_at INTEGER;   -- when a page was last stored
