"""The command line: `tessera up`, `tessera demo`, `tessera admin-token`, `tessera certs`."""
