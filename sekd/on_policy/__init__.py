"""On-policy training: which steps learn from rollouts, when these are generated, and with which weights."""
