-- The same checks as before, as comparisons: for an IN of more than two values SQLite makes a table, each time it looks at
-- a row, and that took longer than all else about an event. Nothing that is stored changes, so the definitions may be
-- rewritten in place (https://www.sqlite.org/lang_altertable.html, "making other kinds of table schema changes").

-- Has other connections read them again.
CREATE TABLE definitions_have_changed (a INTEGER) STRICT;
DROP TABLE definitions_have_changed;

PRAGMA writable_schema = ON;
UPDATE sqlite_schema SET sql = replace(sql,
    'CHECK (details IN (''unread'', ''read'', ''gone''))',
    'CHECK (details = ''unread'' OR details = ''read'' OR details = ''gone'')')
WHERE type = 'table' AND name = 'conversations';
UPDATE sqlite_schema SET sql = replace(replace(replace(sql,
    'CHECK (name IN (''START'', ''END'', ''MESSAGE'', ''TRANSFER'', ''UNREADABLE''))',
    'CHECK (name = ''MESSAGE'' OR name = ''END'' OR name = ''TRANSFER'' OR name = ''START'' OR name = ''UNREADABLE'')'),
    'CHECK (state IN (''waiting'', ''delivered'', ''failed'', ''discarded''))',
    'CHECK (state = ''waiting'' OR state = ''delivered'' OR state = ''failed'' OR state = ''discarded'')'),
    'CHECK (sent IN (''chat created'', ''chat changed'', ''message added'', ''nothing''))',
    'CHECK (sent = ''message added'' OR sent = ''chat created'' OR sent = ''chat changed'' OR sent = ''nothing'')')
WHERE type = 'table' AND name = 'events';
PRAGMA writable_schema = RESET;
