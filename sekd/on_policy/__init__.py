"""On-policy steps: which they are, when their rollouts are generated, and with which weights."""
