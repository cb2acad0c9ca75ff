-- How many times this service has started: shims obey only the latest.
CREATE TABLE epochs (epoch INTEGER NOT NULL) STRICT;
INSERT INTO epochs VALUES (0);
