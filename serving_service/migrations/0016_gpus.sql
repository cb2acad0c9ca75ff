-- The GPUs that a replica has: written before anything of it is started, and gone when no process of it is left, with
-- its record at the latest. Nobody has one that stands here.
CREATE TABLE gpus (
  uuid TEXT PRIMARY KEY,
  replica_id TEXT NOT NULL REFERENCES replicas (id) ON DELETE CASCADE
) STRICT, WITHOUT ROWID;

CREATE INDEX gpus_of_replicas ON gpus (replica_id);
