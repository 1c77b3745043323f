"""One state machine for everything that has state: `model` knows what must come, `rigs` and `adapters` what comes."""
