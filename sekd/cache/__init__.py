"""The offline cache: a teacher reads the data once, and its RS-KD targets are kept (arXiv 2602.01395, section 7.1)."""
