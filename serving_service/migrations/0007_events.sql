-- The phases of launches that ended, the newest of each endpoint. Times are Unix milliseconds, durations milliseconds.
CREATE TABLE events (
  id INTEGER PRIMARY KEY,
  endpoint_id TEXT NOT NULL REFERENCES endpoints (id) ON DELETE CASCADE,
  replica_id TEXT NOT NULL,
  version INTEGER NOT NULL,
  entity TEXT NOT NULL,
  phase TEXT NOT NULL,
  outcome TEXT NOT NULL,
  started_at INTEGER NOT NULL,
  duration INTEGER NOT NULL,
  message TEXT NOT NULL
) STRICT;
CREATE INDEX events_of_endpoints ON events (endpoint_id, id);
