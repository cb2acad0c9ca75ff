-- The audit log as far as the sink has not taken it, and the head of its chain (servicekit/audit_store.py).
CREATE TABLE audit_records (
  seq INTEGER PRIMARY KEY,
  line TEXT NOT NULL
) STRICT;
CREATE TABLE audit_state (
  one INTEGER PRIMARY KEY CHECK (one = 1),
  seq INTEGER NOT NULL,
  mac TEXT NOT NULL,
  exported INTEGER NOT NULL
) STRICT;
INSERT INTO audit_state (one, seq, mac, exported)
  VALUES (1, 0, '0000000000000000000000000000000000000000000000000000000000000000', 0);
