"""Which models are served, and how one comes and goes."""
