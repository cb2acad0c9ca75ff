-- The head of the chain is the last record; here it is as it was when records were last dropped, for when none is left
-- (servicekit/audit_store.py).
ALTER TABLE audit_state RENAME COLUMN seq TO dropped_seq;
ALTER TABLE audit_state RENAME COLUMN mac TO dropped_mac;
