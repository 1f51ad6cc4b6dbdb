"""Who talks to whom: flow table, TCP states as a table, timeouts, sweep. Knows tuples, never bytes."""
