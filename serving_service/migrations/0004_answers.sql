-- First answers to changes whose callers chose the request id, for retries (servicekit/once.py).
CREATE TABLE answers (
  id INTEGER PRIMARY KEY,
  principal_id INTEGER NOT NULL,
  request_id TEXT NOT NULL,
  answered_ms INTEGER NOT NULL,
  position INTEGER NOT NULL, -- bytes of the principal's records, this one included
  record BLOB NOT NULL,
  UNIQUE (principal_id, request_id)
) STRICT;
CREATE UNIQUE INDEX answers_by_position ON answers (principal_id, position);
CREATE INDEX answers_by_age ON answers (answered_ms);
