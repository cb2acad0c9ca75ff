-- How many predictions and waits there were of which length, like `latency`: not every request that was answered has
-- either. What is there already is told as it was, by the number of answers, for the day that it is kept.
ALTER TABLE minutes ADD COLUMN prediction TEXT NOT NULL DEFAULT '[]';
ALTER TABLE minutes ADD COLUMN queue TEXT NOT NULL DEFAULT '[]';
UPDATE minutes SET prediction = latency, queue = latency;
