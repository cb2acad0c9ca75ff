-- What people are to be told of ended updates and have not been told yet: one row for each recipient and way. They stay
-- when their endpoint is deleted. Times are Unix milliseconds; due_at is when the next attempt is.
CREATE TABLE notices (
  id TEXT PRIMARY KEY,
  courier TEXT NOT NULL,
  recipient TEXT NOT NULL,
  content TEXT NOT NULL, -- JSON
  created_at INTEGER NOT NULL,
  due_at INTEGER NOT NULL,
  attempts INTEGER NOT NULL
) STRICT;
CREATE INDEX notices_by_due ON notices (due_at);
