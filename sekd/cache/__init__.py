"""The offline teacher cache: RS-KD targets of a teacher that is paid for once (arXiv 2602.01395, section 7.1)."""
