"""Scripts that measure on a GPU; each prints a table and writes JSON into results/."""
