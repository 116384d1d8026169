"""Model schemas, artifacts on disk, and building them."""
