"""One short file a stage: what it reads, what it optimises, what it reports, what it leaves behind."""
