-- What the last replica of a served entity that has ended had printed, masked as it was in memory. Gone with its
-- configuration.
CREATE TABLE last_logs (
  endpoint_id TEXT NOT NULL,
  version INTEGER NOT NULL,
  entity TEXT NOT NULL,
  log TEXT NOT NULL,
  PRIMARY KEY (endpoint_id, version, entity),
  FOREIGN KEY (endpoint_id, version) REFERENCES configs (endpoint_id, version) ON DELETE CASCADE
) STRICT;
