-- First answers to changes whose callers chose the request id, for retries (servicekit/once.py). The records are sealed.
-- No foreign key: whoever deletes itself is gone when the answer is recorded.
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
CREATE TRIGGER answers_of_nobody AFTER DELETE ON principals
  BEGIN DELETE FROM answers WHERE principal_id = OLD.id; END;
