"""`python -m dist_lm report RUN...`: one HTML file about runs, made from their files. Runs are only read."""
