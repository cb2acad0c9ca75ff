-- Up to which audit record they were taken over by whoever gets them besides (servicekit/audit_store.py).
ALTER TABLE audit_state ADD COLUMN forwarded INTEGER NOT NULL DEFAULT 0;
