-- The cached folders that a replica uses, the one of its model and that of its environment: written before they are
-- used, and gone with the replica's record. What is named here is not dropped.
CREATE TABLE uses (
  replica_id TEXT NOT NULL REFERENCES replicas (id) ON DELETE CASCADE,
  folder TEXT NOT NULL,
  PRIMARY KEY (replica_id, folder)
) STRICT, WITHOUT ROWID;

-- How the environment of a served entity came about at its latest launch.
CREATE TABLE build_logs (
  endpoint_id TEXT NOT NULL REFERENCES endpoints (id) ON DELETE CASCADE,
  version INTEGER NOT NULL,
  entity TEXT NOT NULL,
  log TEXT NOT NULL,
  PRIMARY KEY (endpoint_id, version, entity)
) STRICT, WITHOUT ROWID;
