-- An endpoint that is being deleted keeps its row until its last replica is gone; its name is free at once.
CREATE TABLE endpoints (
  id TEXT PRIMARY KEY,
  name TEXT NOT NULL,
  creator_id TEXT NOT NULL,
  creator TEXT NOT NULL,
  description TEXT NOT NULL,
  tags TEXT NOT NULL,               -- JSON: [[key, value], ...]
  created_at INTEGER NOT NULL,      -- Unix milliseconds, like every time here
  updated_at INTEGER NOT NULL,
  latest_version INTEGER NOT NULL,  -- 0: no configuration was ever given
  active_version INTEGER,
  pending_version INTEGER,
  config_update TEXT NOT NULL,      -- NOT_UPDATING, IN_PROGRESS, UPDATE_FAILED
  failures TEXT NOT NULL,           -- JSON: {entity: [deployment, message]} of a pending version that failed
  is_deleted INTEGER NOT NULL
) STRICT;

CREATE UNIQUE INDEX endpoint_names ON endpoints (name) WHERE NOT is_deleted;

-- The active and the pending configuration of each endpoint; a row never changes. References stay references.
CREATE TABLE configs (
  endpoint_id TEXT NOT NULL REFERENCES endpoints (id) ON DELETE CASCADE,
  version INTEGER NOT NULL,
  created_at INTEGER NOT NULL,
  content TEXT NOT NULL,            -- JSON: entities and routes
  PRIMARY KEY (endpoint_id, version)
) STRICT;

-- Written before a replica is started and removed after it is gone, so that no process is without its row.
CREATE TABLE replicas (
  id TEXT PRIMARY KEY,
  endpoint_id TEXT NOT NULL REFERENCES endpoints (id) ON DELETE CASCADE,
  version INTEGER NOT NULL,
  entity TEXT NOT NULL
) STRICT;

CREATE INDEX replicas_of_endpoints ON replicas (endpoint_id);
