-- A window continues until its pages end, and its time is stored.

-- How many polls of the unfinished window have used up their page budget without a new event.
ALTER TABLE poll_state RENAME COLUMN rescans_left TO idle_polls;
UPDATE poll_state SET idle_polls = 0;

ALTER TABLE poll_state ADD COLUMN window_at INTEGER; -- when the window of the poll in progress was computed
ALTER TABLE poll_state ADD COLUMN read_at INTEGER;   -- the same of the latest window that was read to its end; before: the first start
UPDATE poll_state SET read_at = polled_at;

ALTER TABLE poll_state ADD COLUMN page_at INTEGER;   -- when a page was last stored
