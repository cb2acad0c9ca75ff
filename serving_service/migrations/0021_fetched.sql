-- What the files of a model version were when they were first fetched: the digest of their manifest. They are launched
-- only as they were then.
CREATE TABLE fetched (
  name TEXT NOT NULL,
  version TEXT NOT NULL,
  source TEXT NOT NULL,
  created_at INTEGER NOT NULL,
  digest TEXT NOT NULL,
  PRIMARY KEY (name, version, source, created_at)
) STRICT, WITHOUT ROWID;
