"""A page to look at: one self-contained HTML file of what an experiment's work directory holds."""
