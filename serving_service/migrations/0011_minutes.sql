-- What was measured of served entities in each minute in which they were asked, for a day. Without an entity: requests
-- for which none had been chosen.
CREATE TABLE minutes (
  endpoint_id TEXT NOT NULL REFERENCES endpoints (id) ON DELETE CASCADE,
  minute INTEGER NOT NULL,       -- Unix minutes
  entity TEXT NOT NULL,
  entity_version TEXT NOT NULL,
  requests INTEGER NOT NULL,
  refused INTEGER NOT NULL,      -- answered 400 to 499
  failed INTEGER NOT NULL,       -- answered 500 or more
  busy_ms REAL NOT NULL,         -- under way, all together
  latency TEXT NOT NULL,         -- JSON: [[place, count], ...] between the bounds of servicekit.distribution
  latency_ms REAL NOT NULL,      -- all together, like the two below
  prediction_ms REAL NOT NULL,
  queue_ms REAL NOT NULL,
  replicas INTEGER NOT NULL,     -- that ran when it was stored
  PRIMARY KEY (endpoint_id, minute, entity, entity_version)
) STRICT, WITHOUT ROWID;
CREATE INDEX minutes_by_age ON minutes (minute);

-- The last report of each gateway that these minutes hold.
CREATE TABLE reports (
  gateway_id TEXT PRIMARY KEY,
  sequence INTEGER NOT NULL,
  stored_at INTEGER NOT NULL     -- Unix seconds
) STRICT;
CREATE INDEX reports_by_age ON reports (stored_at);
