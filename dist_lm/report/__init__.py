"""`python -m dist_lm report RUN...`: one HTML file of what runs left behind. Files are read, no more."""
